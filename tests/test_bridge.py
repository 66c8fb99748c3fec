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
    return F.normalize(torch.randn(n, dim, generator=seeded(seed)), dim=-1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stir(network: torch.nn.Module) -> None:
    """Random weights everywhere: at initialisation the output is 0 and would hide every difference."""
    generator = seeded(1)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def bridge() -> DiffusionLink:
    link = DiffusionLink(DIM, dropout=0.5)
    stir(link.network)
    return link


# ------------------------------------------------------------------------------------------------------------- network
def test_network_starts_at_zero_and_its_blocks_as_the_identity():
    network = BridgeNetwork(DIM)
    output = network(embeddings(), torch.arange(6))
    assert output.shape == (6, DIM) and torch.count_nonzero(output) == 0
    x = torch.randn(6, 2 * DIM)
    assert torch.equal(network.blocks[0](x, torch.randn(6, DIM)), x)
    assert sum(parameter.numel() for parameter in BridgeNetwork(512).parameters()) == 9_725_440


def test_network_reads_sample_timestep_and_condition():
    network = BridgeNetwork(DIM, condition_dim=3, dropout=0.0)
    stir(network)
    x, condition = embeddings(), torch.ones(6, 3)
    base = network(x, torch.tensor(50), condition)
    for given in ((x, 60, condition), (embeddings(seed=9), 50, condition), (x, 50, 0 * condition)):
        assert not torch.allclose(base, network(*given), atol=1e-4)
    torch.testing.assert_close(base, network(x, torch.full((6,), 50), condition))


def test_timestep_embedding_equals_diffusers():
    timesteps = torch.tensor([0, 1, 50, 999])
    reference = get_timestep_embedding(timesteps, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(timesteps, 64), reference, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- call
def test_call_gives_unit_float32_rows(bridge):
    for given in (embeddings(0), embeddings(1), embeddings(), 3 * embeddings().double()):
        bridged_emb = bridge(given, generator=seeded(0))
        assert bridged_emb.shape == given.shape and bridged_emb.dtype == torch.float32
        torch.testing.assert_close(bridged_emb.norm(dim=1), torch.ones(len(given)))
    once = unit_rows(3 * torch.randn(500, 64, generator=seeded(0)), 64, "audio_emb")
    assert torch.equal(unit_rows(once, 64, "audio_emb"), once)
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


@pytest.mark.parametrize("add_noise", [True, False])
def test_one_step_is_the_prediction_at_the_noised_sample(bridge, add_noise):
    """Formula by hand: s a, noise to k*, network, normalise."""
    noise = torch.randn(6, DIM, generator=seeded(3)) if add_noise else torch.zeros(6, DIM)
    alpha_bar = bridge.scheduler.alphas_cumprod[200]
    sample = alpha_bar.sqrt() * DIM**0.5 * embeddings() + (1 - alpha_bar).sqrt() * noise
    expected = F.normalize(bridge.network.eval()(sample, torch.tensor(200)), dim=-1)
    answer = bridge(embeddings(), start_timestep=200, add_noise=add_noise, generator=seeded(3))
    torch.testing.assert_close(answer, expected)


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
    assert torch.equal(*(bridge(embeddings(), generator=seeded(0)) for _ in range(2)))
    assert all(module.training is training for module in bridge.modules())


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(("audio_emb", "kwargs", "message"), [
    (embeddings(dim=DIM + 1), {}, "13 wide but the bridge expects 12"), (embeddings()[0], {}, "shape"),
    (embeddings().tolist(), {}, "torch tensor"), (embeddings() / 0, {}, "NaN or infinity"),
    (0 * embeddings(), {}, "zeros"), (embeddings(), {"start_timestep": 1000}, "choose 0 to 999"),
    (embeddings(), {"start_timestep": -1}, "choose 0 to 999"), (embeddings(), {"num_inference_steps": 0}, "1 to 50"),
    (embeddings(), {"start_timestep": 5, "num_inference_steps": 6}, "choose 1 to 5"),
    (embeddings(), {"start_timestep": 0, "num_inference_steps": 2}, "choose 1 to 1"),
])
def test_bad_input_raises_one_clear_line(bridge, audio_emb, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        bridge(audio_emb, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"start_timestep": 1000}, {"num_inference_steps": 51}, {"scale": 0.0},
                                      {"scale": float("nan")}, {"beta_schedule": "x"}])
def test_bad_settings_raise(settings):
    with pytest.raises(ValueError, match="choose|scale"):
        DiffusionLink(DIM, **settings)


# ------------------------------------------------------------------------------------------------------------- on disk
SETTINGS = {
    "num_blocks": 2, "width_factor": 3, "dropout": 0.25, "num_train_timesteps": 500, "beta_start": 2e-4,
    "beta_end": 0.03, "beta_schedule": "linear", "start_timestep": 120, "num_inference_steps": 4, "add_noise": False,
}


def test_settings_reach_the_bridge_and_are_read_back(tmp_path):
    link = DiffusionLink.from_config(BridgeConfig(**SETTINGS), DIM)
    stir(link.network)
    assert float(link.scale) == pytest.approx(DIM**0.5)
    link.scale.fill_(7.5)                                      # what is changed after construction is saved too
    link.start_timestep = 100
    link.save_pretrained(tmp_path / "bridge")
    assert sorted(file.name for file in (tmp_path / "bridge").iterdir()) == [
        "README.md", "config.json", "model.safetensors"]
    written = json.loads((tmp_path / "bridge/config.json").read_text())
    assert {"embed_dim": DIM, **SETTINGS, "start_timestep": 100}.items() <= written.items()
    loaded = DiffusionLink.from_pretrained(tmp_path / "bridge")
    block = loaded.network.blocks[0]
    assert (loaded.start_timestep, loaded.num_inference_steps, loaded.add_noise) == (100, 4, False)
    assert float(loaded.scale) == 7.5 and len(loaded.network.blocks) == 2 and not loaded.training
    assert block.linear_in.out_features == 3 * DIM and block.dropout.p == 0.25
    assert torch.equal(loaded.scheduler.betas, DDIMScheduler(500, 2e-4, 0.03, "linear").betas)
    assert torch.equal(loaded(embeddings()), link(embeddings()))


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
    """Damaged files: tests/reliability/test_bad_weights.py."""
    bridge.save_pretrained(tmp_path / "bridge")
    config = json.loads((tmp_path / "bridge/config.json").read_text())
    (tmp_path / "bridge/config.json").write_text(json.dumps({**config, "num_blocks": 4}))
    with pytest.raises(ValueError, match=r"bridge is damaged .*blocks.3.*: copy or train it again"):
        DiffusionLink.from_pretrained(tmp_path / "bridge")
    with pytest.raises(FileNotFoundError, match="run notebook 05"):
        DiffusionLink.from_pretrained(tmp_path / "nothing" / "here")
