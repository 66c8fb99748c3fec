"""Trained peers: one protocol, and of each recipe the part that makes it that method and no other."""
from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch.nn.functional import normalize

from dl.config import BridgeConfig
from dl.peers import TRAINED, Peer, TrainedPeer, centre, uncentre
from dl.train import train_bridge

pytestmark = pytest.mark.usefixtures("one_thread")
D = 8
SMALL = {"train_steps": 12, "batch_size": 16}
LEARNS = {"train_steps": 200, "batch_size": 64, "learning_rate": 2e-3, "width_factor": 16}


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
    return {name: TRAINED[name](**SMALL).fit(*split, seed=0) for name in TRAINED}


def watch(peer: TrainedPeer) -> list:
    """What the network is given from here on: (timestep, sample, ...)."""
    seen: list = []
    peer.network.register_forward_pre_hook(
        lambda module, given: seen.append((given[1], given[0].detach().clone(), *given[2:])))
    return seen


@pytest.mark.parametrize("name", TRAINED)
def test_protocol(name, split, fitted, tmp_path, capsys):
    peer, audio = fitted[name], split[0][:7]
    answer = peer(audio, noise_seed=0)
    assert answer.shape == (7, D) and answer.dtype == torch.float32 and not answer.requires_grad
    torch.testing.assert_close(answer.norm(dim=1), torch.ones(7))
    assert torch.allclose(answer, peer(audio, noise_seed=1), atol=1e-4) is not peer.stochastic
    assert len(peer.history) == 12 and peer.history.step.iloc[-1] == 12
    for _ in range(2):                                         # a kept fit is the fit
        again = TRAINED[name](**SMALL).fit(*split, seed=0, checkpoint_path=tmp_path / "fit")
        assert torch.equal(again(audio), answer) and capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="5 wide but"):
        peer(audio[:, :5])
    with pytest.raises(ValueError, match="cannot change after the fit"):
        peer.set_inference(learning_rate=1e-3)
    with pytest.raises(TypeError, match="learning_rat"):
        TRAINED[name](learning_rat=1e-3)


def test_two_recipes_never_share_a_checkpoint(split, tmp_path, capsys):
    values = asdict(BridgeConfig(**SMALL))
    TRAINED["diffusion_link"](**values).fit(*split, checkpoint_path=tmp_path / "fit")
    for name in ("regression_mlp", "regression_mlp_topology", "diffusion_bridge"):
        TRAINED[name](**values).fit(*split, checkpoint_path=tmp_path / "fit")
        assert capsys.readouterr().err, "a fit that is not this one is said to be made anew"


def test_start_step_is_tuned_without_a_new_fit(split, tmp_path):
    changed = {**SMALL, "learning_rate": 1e-2}
    peer = TRAINED["diffusion_bridge"](**changed).fit(*split, checkpoint_path=tmp_path / "fit")
    written = (tmp_path / "fit").stat().st_mtime_ns
    high = peer(split[0])
    peer.set_inference(start_timestep=100)
    low = peer(split[0])
    assert not torch.allclose(low, high, atol=1e-4)
    again = TRAINED["diffusion_bridge"](**changed, start_timestep=100).fit(*split, checkpoint_path=tmp_path / "fit")
    assert torch.equal(again(split[0]), low) and (tmp_path / "fit").stat().st_mtime_ns == written


# ------------------------------------------------------------------------------------------------------------ recipes
def test_diffusion_link_is_train_bridge(fitted, split):
    link, history = train_bridge(BridgeConfig(**SMALL), *split, seed=0, progress=False)
    assert history.equals(fitted["diffusion_link"].history)
    for name, steps in (("diffusion_link", 1), ("diffusion_link_ddim", 5)):
        expected = link(split[0], 50, steps, True, torch.Generator().manual_seed(4))
        assert torch.equal(fitted[name](split[0], noise_seed=4), expected)
    assert (fitted["seed"].history.loss_topology == 0).all() and (fitted["seed"].history.loss_self > 0).all()


def test_regression_controls(fitted, split):
    plain, topology = fitted["regression_mlp"], fitted["regression_mlp_topology"]
    assert (plain.history[["loss_self", "loss_topology"]] == 0).all(axis=None)
    assert (topology.history.loss_topology > 0).all()
    expected = normalize(plain.network(D**0.5 * split[0], torch.tensor(0)), dim=-1)
    torch.testing.assert_close(plain(split[0]), expected)
    assert plain.num_parameters == fitted["diffusion_link"].num_parameters


@pytest.mark.parametrize(("name", "margin"), [("regression_mlp", 0.5), ("text_to_audio", 0.3)])
def test_pairs_are_learned(split, name, margin):
    audio, text, text_clip = split
    given, wanted = (text, audio[text_clip]) if name == "text_to_audio" else (audio[text_clip], text)
    peer = TRAINED[name](**LEARNS).fit(*split, val=(audio[text_clip], text))
    reached = float((peer(given) * wanted).sum(1).mean())
    assert reached > (given * wanted).sum(1).mean() + margin
    if name == "text_to_audio":                                # the roles are swapped in val too
        assert peer.history.val_pair_cosine.iloc[-1] == pytest.approx(reached, abs=0.03)


def test_conditional_diffusion_starts_from_pure_noise_and_reads_the_condition(split):
    audio, text, text_clip = split
    peer = TRAINED["conditional_diffusion"](**{**LEARNS, "train_steps": 300}).fit(*split)
    answer = peer(audio)[text_clip]
    strangers = (answer * text.roll(50, 0)).sum(1).mean()
    assert (answer * text).sum(1).mean() > strangers + 0.1, "without its condition it could not tell clips apart"
    seen = watch(peer)
    peer(audio, noise_seed=3)
    assert [int(timestep) for timestep, *_ in seen] == [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]
    assert torch.equal(seen[0][1], torch.randn(150, D, generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(seen[0][2], D**0.5 * audio)


class TestDiffusionBridge:
    """Text only, u of norm 5, SNR weights, renormalised before every call, enters at 600 without noise, 5 steps."""

    def test_sampling(self, split):
        peer = TRAINED["diffusion_bridge"](**SMALL).fit(*split)
        for call, given, levels in ((peer, split[0], [600, 480, 360, 240, 120]),
                                    (peer.map_text, split[1], [400, 320, 240, 160, 80])):
            seen = watch(peer)
            call(given)
            assert [int(timestep) for timestep, _ in seen] == levels
            for _, sample in seen:
                torch.testing.assert_close(sample.norm(dim=1), torch.full((len(given),), 5.0))
            torch.testing.assert_close(seen[0][1], 5 * centre(given, given.double().mean(0)))      # no noise was added

    def test_training_renormalises_and_weighs_by_snr(self, split):
        peer = TRAINED["diffusion_bridge"](train_steps=1, batch_size=32).fit(*split)
        seen = watch(peer)
        losses = peer.loss_fn(*split)(peer.network, torch.Generator().manual_seed(0))
        timesteps, sample = seen[0]
        torch.testing.assert_close(sample.norm(dim=1), torch.full((32,), 5.0))
        captions = torch.randint(300, (32,), generator=torch.Generator().manual_seed(0))
        clean = 5 * centre(split[1], split[1].double().mean(0))[captions]
        errors = (peer.network(sample, timesteps) - clean).square().mean(1)
        alpha_bar = peer.scheduler.alphas_cumprod[timesteps]
        torch.testing.assert_close(losses["loss"], (alpha_bar / (1 - alpha_bar) * errors).mean())

    def test_both_spaces(self, split, fitted):
        peer = fitted["diffusion_bridge"]
        centred = peer(split[0], space="centred")
        torch.testing.assert_close(peer(split[0]), uncentre(centred, peer.text_mean, peer.text_radius))

    def test_it_moves_audio_towards_text_without_pairs(self, split):
        audio, text, text_clip = split
        settings = {"train_steps": 400, "learning_rate": 2e-3, "width_factor": 8}
        peer = TRAINED["diffusion_bridge"](**settings).fit(audio, text, text_clip.flip(0))
        gap = (audio.mean(0) - text.mean(0)).norm()
        assert (peer(audio).mean(0) - text.mean(0)).norm() < 0.3 * gap
