"""Trained peers: one protocol, and of each recipe the part that makes it that method and no other."""
from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch.nn.functional import normalize

from dl.bridge import DiffusionLink
from dl.train import train_bridge
from dl.config import BridgeConfig
from dl.peers import Peer, centre, uncentre
from dl.peers import REGISTRY

D = 8
SMALL = {"train_steps": 12, "batch_size": 16}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small are slower on two threads, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def split() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """150 clips, two captions each: text is the audio rotated, moved away and a little noisy; unit norm."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    audio = torch.randn(150, D, generator=generator) + 1.0
    text_clip = torch.arange(150).repeat_interleave(2)
    text = audio[text_clip] @ rotation - 1.5 + 0.2 * torch.randn(300, D, generator=generator)
    return normalize(audio, dim=-1), normalize(text, dim=-1), text_clip


@pytest.fixture(scope="module")
def fitted(split) -> dict[str, Peer]:
    return {name: REGISTRY[name](**SMALL).fit(*split, seed=0) for name in REGISTRY}


@pytest.mark.parametrize("name", REGISTRY)
def test_protocol(name, split, fitted):
    peer, audio = fitted[name], split[0][:7]
    answer = peer(audio, noise_seed=0)
    assert isinstance(peer, Peer) and peer.trained and not peer.uses_memory and peer.source
    assert answer.shape == (7, D) and answer.dtype == torch.float32 and not answer.requires_grad
    torch.testing.assert_close(answer.norm(dim=1), torch.ones(7))
    assert torch.equal(answer, peer(audio, noise_seed=0))
    assert torch.allclose(answer, peer(audio, noise_seed=1), atol=1e-4) is not peer.stochastic
    assert peer.num_parameters >= sum(p.numel() for p in peer.network.parameters()) > 0
    assert len(peer.history) == 12 and peer.history.step.iloc[-1] == 12


def test_flags_that_table_1_prints():
    assert {name for name in REGISTRY if not REGISTRY[name].uses_pairs} == {"diffusion_bridge"}
    assert {name for name in REGISTRY if REGISTRY[name].centred} == {"diffusion_bridge"}
    assert {name for name in REGISTRY if not REGISTRY[name].stochastic} == {"diffusion_bridge", "regression_mlp", "regression_mlp_topology"}


@pytest.mark.parametrize("name", REGISTRY)
def test_hyper_parameters_read_back_and_a_misspelt_one_raises(name):
    values = {field.name: getattr(BridgeConfig(), field.name) for field in fields(BridgeConfig)} | {"dropout": 0.4, "start_timestep": 77}
    assert REGISTRY[name](**values).config == BridgeConfig(**values)
    with pytest.raises(TypeError, match="learning_rat"):
        REGISTRY[name](learning_rat=1e-3)
    with pytest.raises(ValueError, match="cannot change after the fit"):
        REGISTRY[name]().set_inference(learning_rate=1e-3)


@pytest.mark.parametrize("name", REGISTRY)
def test_seed_decides_the_fit_and_a_kept_fit_is_reused(name, split, fitted, tmp_path, capsys):
    again = REGISTRY[name](**SMALL).fit(*split, seed=0, checkpoint_path=tmp_path / "fit")
    kept = REGISTRY[name](**SMALL).fit(*split, seed=0, checkpoint_path=tmp_path / "fit")
    for peer in (again, kept):
        assert torch.equal(peer(split[0]), fitted[name](split[0]))
    assert capsys.readouterr().err == ""
    other = REGISTRY[name](**SMALL).fit(*split, seed=1)
    assert not torch.equal(next(other.network.parameters()), next(again.network.parameters()))


def test_two_recipes_never_share_a_checkpoint(split, tmp_path, capsys):
    values = {field.name: getattr(BridgeConfig(**SMALL), field.name) for field in fields(BridgeConfig)}
    REGISTRY["diffusion_link"](**values).fit(*split, checkpoint_path=tmp_path / "fit")
    for name in ("regression_mlp", "diffusion_bridge"):
        REGISTRY[name](**values).fit(*split, checkpoint_path=tmp_path / "fit")
        assert "recipe" in capsys.readouterr().err


def test_start_step_is_tuned_without_a_new_fit(split, tmp_path):
    peer = REGISTRY["diffusion_bridge"](**SMALL, learning_rate=1e-2).fit(*split, checkpoint_path=tmp_path / "fit")
    written = (tmp_path / "fit").stat().st_mtime_ns
    answers = {k: peer.set_inference(start_timestep=k)(split[0]) for k in (100, 600)}
    assert not torch.allclose(answers[100], answers[600], atol=1e-4)
    again = REGISTRY["diffusion_bridge"](**SMALL, learning_rate=1e-2, start_timestep=100).fit(*split, checkpoint_path=tmp_path / "fit")
    assert torch.equal(again(split[0]), answers[100]) and (tmp_path / "fit").stat().st_mtime_ns == written


def test_bad_calls_raise(fitted, split):
    for name, peer in fitted.items():
        with pytest.raises(ValueError, match="wide"):
            peer(split[0][:, :5])
        if not peer.centred:
            with pytest.raises(ValueError, match="does not answer in space 'centred'"):
                peer(split[0], space="centred")
        assert name in REGISTRY


# -------------------------------------------------------------------------------------------------------------- recipes
def test_diffusion_link_is_train_bridge(fitted, split):
    link, history = train_bridge(BridgeConfig(**SMALL), *split, seed=0, progress=False)
    peer = fitted["diffusion_link"]
    assert history.equals(peer.history) and isinstance(peer.link, DiffusionLink)
    assert torch.equal(peer(split[0], noise_seed=4), link(split[0], 50, 1, True, torch.Generator().manual_seed(4)))
    ddim = fitted["diffusion_link_ddim"]
    assert torch.equal(ddim(split[0], noise_seed=4), link(split[0], 50, 5, True, torch.Generator().manual_seed(4)))


def test_seed_setting_has_no_topology_term(fitted):
    assert (fitted["seed"].history.loss_topology == 0).all() and (fitted["seed"].history.loss_self > 0).all()
    assert (fitted["diffusion_link"].history.loss_topology > 0).all()


def test_regression_controls(fitted, split):
    plain, topology = fitted["regression_mlp"], fitted["regression_mlp_topology"]
    assert (plain.history.loss_self == 0).all() and (plain.history.loss_topology == 0).all() and (topology.history.loss_topology > 0).all()
    expected = normalize(plain.network(D**0.5 * split[0], torch.tensor(0)), dim=-1)
    torch.testing.assert_close(plain(split[0]), expected)
    assert plain.num_parameters == fitted["diffusion_link"].num_parameters


def test_text_to_audio_swaps_the_roles(split):
    audio, text, text_clip = split
    peer = REGISTRY["text_to_audio"](train_steps=200, batch_size=64, learning_rate=2e-3, width_factor=16).fit(audio, text, text_clip)
    raw = (text * audio[text_clip]).sum(1).mean()
    assert (peer(text) * audio[text_clip]).sum(1).mean() > raw + 0.3


def test_conditional_diffusion_starts_from_pure_noise_and_reads_the_condition(split):
    audio, text, text_clip = split
    peer = REGISTRY["conditional_diffusion"](train_steps=300, batch_size=64, learning_rate=2e-3, width_factor=16).fit(audio, text, text_clip)
    assert peer.network.input.in_features == 2 * D
    answer = peer(audio)[text_clip]
    matched = (answer * text).sum(1).mean()
    assert matched > (answer * text.roll(50, 0)).sum(1).mean() + 0.1, "without its condition it could not tell clips apart"
    seen = []
    peer.network.register_forward_pre_hook(lambda module, arguments: seen.append((int(arguments[1]), arguments[0].clone(), arguments[2].clone())))
    peer(audio, noise_seed=3)
    assert [timestep for timestep, _, _ in seen] == [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]
    assert torch.equal(seen[0][1], torch.randn(150, D, generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(seen[0][2], D**0.5 * audio)


class TestDiffusionBridge:
    """Recipe: text only, u of norm 5, SNR weights, renormalised before every call, enters at 600 without noise, 5 steps."""

    @staticmethod
    def watch(peer) -> list:
        seen = []
        peer.network.register_forward_pre_hook(lambda module, arguments: seen.append((arguments[1], arguments[0].detach().clone())))
        return seen

    def test_published_settings(self):
        config = REGISTRY["diffusion_bridge"]().config
        assert (config.learning_rate, config.batch_size, config.ema_decay, config.weight_decay) == (8e-5, 64, 0.995, 0.0)
        assert (config.beta_schedule, config.start_timestep, config.num_inference_steps, config.lr_schedule) == ("squaredcos_cap_v2", 600, 5, "constant")
        assert REGISTRY["diffusion_bridge"].norm == 5.0 and REGISTRY["diffusion_bridge"].betas == (0.9, 0.99)

    def test_sampling(self, split):
        peer = REGISTRY["diffusion_bridge"](**SMALL).fit(*split)
        seen = self.watch(peer)
        peer(split[0])
        assert [int(timestep) for timestep, _ in seen] == [600, 480, 360, 240, 120]
        for _, sample in seen:
            torch.testing.assert_close(sample.norm(dim=1), torch.full((150,), 5.0))
        torch.testing.assert_close(seen[0][1], 5 * centre(split[0], split[0].double().mean(0)))  # no noise was added

    def test_training_renormalises_and_weighs_by_snr(self, split):
        peer = REGISTRY["diffusion_bridge"](train_steps=1, batch_size=32).fit(*split)
        seen = self.watch(peer)
        losses = peer.loss_fn(*split)(peer.network, torch.Generator().manual_seed(0))
        timesteps, sample = seen[0]
        torch.testing.assert_close(sample.norm(dim=1), torch.full((32,), 5.0))
        captions = torch.randint(300, (32,), generator=torch.Generator().manual_seed(0))
        clean = 5 * centre(split[1], split[1].double().mean(0))[captions]
        errors = (peer.network(sample, timesteps) - clean).square().mean(1)
        alpha_bar = peer.scheduler.alphas_cumprod[timesteps]
        torch.testing.assert_close(losses["loss"], (alpha_bar / (1 - alpha_bar) * errors).mean())

    def test_pairs_are_not_looked_at(self, split):
        audio, text, text_clip = split
        shuffled = text_clip[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
        one, other = (REGISTRY["diffusion_bridge"](**SMALL).fit(audio, text, clip) for clip in (text_clip, shuffled))
        assert torch.equal(one(audio), other(audio))

    def test_both_spaces(self, split, fitted):
        peer = fitted["diffusion_bridge"]
        centred = peer(split[0], space="centred")
        torch.testing.assert_close(peer(split[0], space="text"), uncentre(centred, peer.text_mean, peer.text_radius))
        assert not torch.allclose(centred, peer(split[0]), atol=1e-2)

    def test_texts_pass_through_the_same_chain(self, split, fitted):
        peer = fitted["diffusion_bridge"]
        seen = self.watch(peer)
        answer = peer.map_text(split[1])
        assert answer.shape == (300, D) and torch.allclose(answer.norm(dim=1), torch.ones(300))
        assert [int(timestep) for timestep, _ in seen] == [400, 320, 240, 160, 80]
        torch.testing.assert_close(seen[0][1], 5 * centre(split[1], split[1].double().mean(0)))

    def test_it_moves_audio_towards_text(self, split):
        audio, text, text_clip = split
        peer = REGISTRY["diffusion_bridge"](train_steps=400, learning_rate=2e-3, width_factor=8).fit(audio, text, text_clip)
        before = (audio.mean(0) - text.mean(0)).norm()
        assert (peer(audio).mean(0) - text.mean(0)).norm() < 0.3 * before


def test_regression_learns_the_pairs(split):
    audio, text, text_clip = split
    peer = REGISTRY["regression_mlp"](train_steps=200, batch_size=64, learning_rate=2e-3, width_factor=16).fit(audio, text, text_clip)
    assert (peer(audio)[text_clip] * text).sum(1).mean() > (audio[text_clip] * text).sum(1).mean() + 0.5
