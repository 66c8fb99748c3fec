"""The network's shape and start, and what a call of DiffusionLink promises."""
from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding

from dl.bridge import BridgeNetwork, DiffusionLink, timestep_embedding, unit_rows
from dl.config import BridgeConfig
from dl.peers import build
from dl.scheduler import DDIMScheduler
from dl.train import train_bridge

DIM = 12


def embeddings(n: int = 6, seed: int = 0, dim: int = DIM) -> torch.Tensor:
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stir(network: torch.nn.Module) -> None:
    """Random weights everywhere: at initialisation the output is 0 and would hide every difference."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def bridge() -> DiffusionLink:
    link = DiffusionLink(DIM, dropout=0.5)
    stir(link.network)
    return link


# -------------------------------------------------------------------------------------------------------------- network
def test_network_has_the_published_size():
    assert sum(parameter.numel() for parameter in BridgeNetwork(512).parameters()) == 9_725_440


def test_network_gives_exactly_zero_at_initialisation_and_blocks_are_the_identity():
    network = BridgeNetwork(DIM)
    output = network(embeddings(), torch.arange(6))
    assert output.shape == (6, DIM) and torch.count_nonzero(output) == 0
    x = torch.randn(6, 2 * DIM)
    assert torch.equal(network.blocks[0](x, torch.randn(6, DIM)), x)


def test_network_reads_sample_timestep_and_condition():
    network = BridgeNetwork(DIM, condition_dim=3, dropout=0.0)
    stir(network)
    condition = torch.ones(6, 3)
    base = network(embeddings(), torch.tensor(50), condition)
    for given in ((embeddings(), 60, condition), (embeddings(seed=9), 50, condition), (embeddings(), 50, 0 * condition)):
        assert not torch.allclose(base, network(*given), atol=1e-4)
    torch.testing.assert_close(base, network(embeddings(), torch.full((6,), 50), condition))


def test_timestep_embedding_equals_diffusers():
    timesteps = torch.tensor([0, 1, 50, 999])
    reference = get_timestep_embedding(timesteps, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(timesteps, 64), reference, rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------- call
def test_call_gives_unit_float32_rows(bridge):
    for n in (0, 1, 6):
        bridged_emb = bridge(embeddings(n), generator=seeded(0))
        assert bridged_emb.shape == (n, DIM) and bridged_emb.dtype == torch.float32 and not bridged_emb.requires_grad
        torch.testing.assert_close(bridged_emb.norm(dim=1), torch.ones(n))
    assert bridge(embeddings().double()).dtype == torch.float32


def test_unit_rows():
    once = unit_rows(3 * torch.randn(500, 64, generator=seeded(0)).requires_grad_(), 64, "audio_emb")
    assert torch.equal(unit_rows(once, 64, "audio_emb"), once) and not once.requires_grad
    torch.testing.assert_close(once.norm(dim=1), torch.ones(500))


def test_embeddings_with_a_graph_are_trained_on():
    """Vectors of an encoder that is not frozen; the second step would go through a graph that is gone."""
    audio = embeddings(20).requires_grad_()
    config = BridgeConfig(train_steps=3, batch_size=8)
    link, _ = train_bridge(config, 2 * audio, embeddings(20, 1), torch.arange(20), seed=0, progress=False)
    for peer in (build("ridge"), build("regression_mlp", train_steps=3, batch_size=8)):
        assert not peer.fit(2 * audio, embeddings(20, 1), torch.arange(20))(2 * audio).requires_grad
    assert audio.grad is None and not link(2 * audio).requires_grad


def test_generator_decides_the_noise(bridge):
    first = bridge(embeddings(), start_timestep=300, generator=seeded(0))
    assert torch.equal(first, bridge(embeddings(), start_timestep=300, generator=seeded(0)))
    assert not torch.allclose(first, bridge(embeddings(), start_timestep=300, generator=seeded(1)), atol=1e-3)
    torch.manual_seed(5)
    without = bridge(embeddings(), start_timestep=300)
    torch.manual_seed(5)
    assert torch.equal(without, bridge(embeddings(), start_timestep=300))


def test_one_step_is_the_prediction_at_the_noised_sample(bridge):
    """Formula by hand: s a, noise to k*, network, normalise."""
    noise = torch.randn(6, DIM, generator=seeded(3))
    alpha_bar = bridge.scheduler.alphas_cumprod[200]
    sample = alpha_bar.sqrt() * DIM**0.5 * embeddings() + (1 - alpha_bar).sqrt() * noise
    expected = F.normalize(bridge.network.eval()(sample, torch.tensor(200)), dim=-1)
    torch.testing.assert_close(bridge(embeddings(), start_timestep=200, generator=seeded(3)), expected)


def test_without_noise_the_call_is_deterministic(bridge):
    sample = bridge.scheduler.alphas_cumprod[200].sqrt() * DIM**0.5 * embeddings()
    expected = F.normalize(bridge.network.eval()(sample, torch.tensor(200)), dim=-1)
    torch.testing.assert_close(bridge(embeddings(), start_timestep=200, add_noise=False), expected)


def test_trajectory(bridge):
    bridged_emb, trajectory = bridge(embeddings(), 50, 5, generator=seeded(0), return_trajectory=True)
    assert trajectory.shape == (6, 6, DIM)
    noise = torch.randn(6, DIM, generator=seeded(0))
    expected = bridge.scheduler.add_noise(DIM**0.5 * embeddings(), noise, torch.tensor([50]))
    torch.testing.assert_close(trajectory[0], expected)
    assert torch.equal(F.normalize(trajectory[-1], dim=-1), bridged_emb)
    assert torch.equal(bridged_emb, bridge(embeddings(), 50, 5, generator=seeded(0)))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_restored(bridge, training):
    bridge.train(training)
    answers = [bridge(embeddings(), generator=seeded(0)) for _ in range(2)]
    assert torch.equal(*answers)
    assert all(module.training is training for module in bridge.modules())


# --------------------------------------------------------------------------------------------------------------- errors
def with_value(value: float) -> torch.Tensor:
    rows = embeddings().clone()
    rows[2] = value
    return rows


@pytest.mark.parametrize(
    ("audio_emb", "kwargs", "message"),
    [
        (embeddings(dim=DIM + 1), {}, "13 wide but the bridge expects 12"),
        (embeddings()[0], {}, "shape"),
        (embeddings()[None], {}, "shape"),
        (embeddings().tolist(), {}, "torch tensor"),
        (with_value(float("nan")), {}, "NaN"),
        (with_value(float("inf")), {}, "NaN or infinity"),
        (with_value(0.0), {}, "zeros"),
        (embeddings(), {"start_timestep": 1000}, "choose 0 to 999"),
        (embeddings(), {"start_timestep": -1}, "choose 0 to 999"),
        (embeddings(), {"start_timestep": 5, "num_inference_steps": 6}, "choose 1 to 5"),
        (embeddings(), {"start_timestep": 0, "num_inference_steps": 2}, "choose 1 to 1"),
        (embeddings(), {"num_inference_steps": 0}, "choose 1 to 50"),
    ],
)
def test_bad_input_raises_one_clear_line(bridge, audio_emb, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        bridge(audio_emb, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"start_timestep": 1000}, {"num_inference_steps": 51}, {"scale": 0.0},
                                      {"scale": float("nan")}, {"beta_schedule": "x"}])
def test_bad_settings_raise(settings):
    with pytest.raises(ValueError, match="choose|scale"):
        DiffusionLink(DIM, **settings)


def test_a_misspelt_flag_raises(bridge):
    for call, given in ((DiffusionLink, (DIM,)), (BridgeConfig, ()), (bridge, (embeddings(),))):
        with pytest.raises(TypeError, match="num_blcks"):
            call(*given, num_blcks=1)


# -------------------------------------------------------------------------------------------------------------- on disk
SETTINGS = {
    "num_blocks": 2, "width_factor": 3, "dropout": 0.25, "num_train_timesteps": 500, "beta_start": 2e-4,
    "beta_end": 0.03, "beta_schedule": "linear", "scale": 7.5, "start_timestep": 120, "num_inference_steps": 4, "add_noise": False,
}


def test_flags_read_back_as_set(tmp_path):
    link = DiffusionLink(DIM, **SETTINGS)
    stir(link.network)
    link.save_pretrained(tmp_path / "bridge")
    assert json.loads((tmp_path / "bridge/config.json").read_text()) == {"embed_dim": DIM, **SETTINGS}
    loaded = DiffusionLink.from_pretrained(tmp_path / "bridge")
    assert loaded.start_timestep == 120 and loaded.num_inference_steps == 4 and loaded.add_noise is False
    assert float(loaded.scale) == 7.5 and len(loaded.network.blocks) == 2 and loaded.network.blocks[0].dropout.p == 0.25
    assert torch.equal(loaded.scheduler.betas, link.scheduler.betas) and not loaded.training
    assert torch.equal(loaded(embeddings()), link(embeddings()))


def test_config_fields_reach_the_bridge():
    config = BridgeConfig(num_blocks=1, width_factor=4, dropout=0.3, beta_schedule="linear", start_timestep=7,
                          num_inference_steps=3, add_noise=False)
    link = DiffusionLink.from_config(config, DIM)
    block = link.network.blocks[0]
    assert len(link.network.blocks) == 1 and block.linear_in.out_features == 4 * DIM and block.dropout.p == 0.3
    assert (link.start_timestep, link.num_inference_steps, link.add_noise) == (7, 3, False)
    assert torch.equal(link.scheduler.betas, DDIMScheduler(beta_schedule="linear").betas)


def test_what_was_changed_after_construction_is_saved(tmp_path):
    link = DiffusionLink(DIM)
    assert float(link.scale) == pytest.approx(DIM**0.5)
    link.scale.fill_(9.0)
    link.start_timestep, link.num_inference_steps = 200, 5
    link.save_pretrained(tmp_path / "bridge")
    loaded = DiffusionLink.from_pretrained(tmp_path / "bridge")
    assert (float(loaded.scale), loaded.start_timestep, loaded.num_inference_steps) == (9.0, 200, 5)
    names = sorted(file.name for file in (tmp_path / "bridge").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]


def test_half_precision_on_disk(bridge, tmp_path, capsys):
    sizes = {}
    for dtype in (torch.float32, torch.float16):
        bridge.save_pretrained(tmp_path / str(dtype), dtype=dtype)
        sizes[dtype] = (tmp_path / str(dtype) / "model.safetensors").stat().st_size
    loaded = DiffusionLink.from_pretrained(tmp_path / str(torch.float16))
    assert sizes[torch.float16] < 0.7 * sizes[torch.float32]
    assert loaded.network.input.weight.dtype == bridge.network.input.weight.dtype == torch.float32
    answers = [link(embeddings(), generator=seeded(0)) for link in (loaded, bridge)]
    torch.testing.assert_close(*answers, rtol=0, atol=5e-3)
    assert capsys.readouterr().out == "", "loading prints nothing: a caller may be writing JSON to stdout"


def test_loading_is_strict(bridge, tmp_path):
    bridge.save_pretrained(tmp_path / "bridge")
    config = json.loads((tmp_path / "bridge/config.json").read_text())
    (tmp_path / "bridge/config.json").write_text(json.dumps({**config, "start_timestp": 3}))
    with pytest.raises(ValueError, match="start_timestp"):
        DiffusionLink.from_pretrained(tmp_path / "bridge")
    (tmp_path / "bridge/config.json").write_text(json.dumps({**config, "num_blocks": 4}))
    with pytest.raises(ValueError, match="bridge is damaged .*blocks.3.*: copy or train it again"):
        DiffusionLink.from_pretrained(tmp_path / "bridge")
    with pytest.raises(FileNotFoundError, match="run notebook 05"):
        DiffusionLink.from_pretrained(tmp_path / "nothing" / "here")
