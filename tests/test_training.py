"""Losses against worked examples, the loop's bookkeeping, resuming bit for bit, and learning on a toy gap."""
from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dl.bridge import TOPOLOGY_FORMS, bridge_losses, combined_losses, prediction_loss, topology_loss
from dl.config import REPO, BridgeConfig
from dl.scheduler import DDIMScheduler
from dl.train import EMA, PairSampler, fit, learning_rate, train_bridge

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = BridgeConfig(train_steps=30, batch_size=8)


def toy_pairs(dim: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """20 clips with 1, 2 or 3 captions each."""
    generator = torch.Generator().manual_seed(0)
    text_clip = torch.arange(20).repeat_interleave(torch.arange(20) % 3 + 1)
    return torch.randn(20, dim, generator=generator), torch.randn(len(text_clip), dim, generator=generator), text_clip


def train(config: BridgeConfig = CONFIG, seed: int = 0, **kwargs):
    return train_bridge(config, *toy_pairs(), seed=seed, progress=False, **kwargs)


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# -------------------------------------------------------------------------------------------------------------- losses
def test_prediction_loss_worked_example():
    prediction, target = torch.tensor([[1.0, 2.0], [0.0, -4.0]]), torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    assert float(prediction_loss(prediction, target, "l1")) == pytest.approx((1 + 0 + 3 + 4) / 4)
    assert float(prediction_loss(prediction, target, "l2")) == pytest.approx((1 + 0 + 9 + 16) / 4)


def test_topology_losses_worked_example():
    """Two rows: f at 60 degrees from each other, t at 90."""
    f = 3 * torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]])
    t = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert float(topology_loss(f, t, "gram")) == pytest.approx(0.5**2)
    assert float(topology_loss(f, t, "distance")) == pytest.approx((1 - math.sqrt(2)) ** 2, rel=1e-5)
    # cos(f_1, t_2) = 0, cos(f_2, t_1) = .5, both against cos(t_1, t_2) = 0
    assert float(topology_loss(f, t, "cross_gram")) == pytest.approx((0 + 0.25) / 2)


def test_softmax_kl_worked_example():
    """Three rows; row by row KL of the softmax over the other two, at tau = 0.5."""
    f = F.normalize(torch.tensor([[1.0, 0.2], [0.9, 0.5], [-1.0, 0.5]]), dim=-1)
    t = F.normalize(torch.tensor([[0.1, 1.0], [1.0, -0.4], [0.2, 1.0]]), dim=-1)
    total = 0.0
    for i in range(3):
        others = [j for j in range(3) if j != i]
        p, q = (torch.softmax(torch.stack([x[i] @ x[j] for j in others]) / 0.5, 0) for x in (t, f))
        total += float((p * (p / q).log()).sum())
    assert total > 0.01
    assert float(topology_loss(f, t, "softmax_kl", temperature=0.5)) == pytest.approx(total / 3, rel=1e-5)


@pytest.mark.parametrize("form", TOPOLOGY_FORMS)
def test_topology_is_blind_to_rotation_except_across(form):
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(10, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    assert float(topology_loss(t, t, form)) == pytest.approx(0, abs=1e-6)
    rotated = float(topology_loss(5 * t @ rotation, t, form))
    assert rotated > 0.01 if form == "cross_gram" else rotated == pytest.approx(0, abs=1e-6)
    assert float(topology_loss(torch.randn(10, 6, generator=generator), t, form)) > 0.01


@pytest.mark.parametrize("form", TOPOLOGY_FORMS)
def test_topology_has_a_finite_slope_at_the_networks_zero_start(form):
    prediction = torch.zeros(4, 6, requires_grad=True)
    loss = topology_loss(prediction, torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), form)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(prediction.grad).all()
    with pytest.raises(ValueError, match="at least 2"):
        topology_loss(prediction[:1], prediction[:1], form)


def test_combined_losses_weigh_the_parts():
    generator = torch.Generator().manual_seed(0)
    from_audio, from_text, target = torch.randn(3, 5, 4, generator=generator)
    config = BridgeConfig(loss="l2", self_weight=0.5, topology_weight=3.0, topology_form="distance")
    losses = combined_losses(from_audio, from_text, target, config)
    cross, self_ = (from_audio - target).square().mean(), (from_text - target).square().mean()
    topology = (topology_loss(from_audio, target, "distance") + topology_loss(from_text, target, "distance")) / 2
    torch.testing.assert_close(losses["loss"], cross + 0.5 * self_ + 3 * topology)
    torch.testing.assert_close(losses["loss_topology"], topology)
    alone = combined_losses(from_audio, None, target, replace(config, topology_weight=0.0))
    torch.testing.assert_close(alone["loss"], cross)
    assert float(alone["loss_self"]) == float(alone["loss_topology"]) == 0.0


class Recorder(nn.Module):
    """Stands in for the network: keeps what it was given, answers with the sample."""

    def forward(self, sample, timestep):
        self.sample, self.timestep = sample, timestep
        return sample


def test_audio_and_text_rows_get_their_own_noise_and_level():
    recorder, zeros = Recorder(), torch.zeros(500, 4)
    config = BridgeConfig(self_weight=0.0)
    bridge_losses(recorder, DDIMScheduler(), zeros, zeros, config, torch.Generator().manual_seed(0))
    assert len(recorder.sample) == 500, "text rows are left out where they have no weight"
    bridge_losses(recorder, DDIMScheduler(), zeros, zeros, BridgeConfig(), torch.Generator().manual_seed(0))
    audio_level, text_level = recorder.timestep.split(500)
    assert abs(float(torch.corrcoef(torch.stack([audio_level, text_level]).float())[0, 1])) < 0.15
    assert int(recorder.timestep.min()) < 20 and int(recorder.timestep.max()) > 980
    noise = recorder.sample / (1 - DDIMScheduler().alphas_cumprod[recorder.timestep]).sqrt()[:, None]
    audio_noise, text_noise = noise.split(500)
    assert abs(float((audio_noise * text_noise).mean())) < 0.1 and float(noise.std()) == pytest.approx(1, abs=0.05)


# --------------------------------------------------------------------------------------------------------------- parts
def test_ema_worked_example():
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0.0)
    ema = EMA(network, decay=0.9)
    network.weight.data.fill_(1.0)
    ema.update(network, step=0)  # (1 + 0) / (10 + 0) = .1 is below .9
    assert float(ema.network.weight) == pytest.approx(0.9)
    ema.update(network, step=10_000)  # now .9
    assert float(ema.network.weight) == pytest.approx(0.9 * 0.9 + 0.1)
    assert not ema.network.weight.requires_grad and network.weight.item() == 1.0


def test_pair_sampler_draws_clips_uniformly_and_one_of_their_captions():
    text_clip = torch.tensor([2, 0, 2, 1, 2, 2])  # in any order
    clips, captions = PairSampler(text_clip, 3).draw(6000, torch.Generator().manual_seed(0))
    assert torch.equal(text_clip[captions], clips)
    assert torch.bincount(clips).float().div(6000).sub(1 / 3).abs().max() < 0.03, "not by the number of captions"
    of_clip_2 = torch.bincount(captions[clips == 2], minlength=6)[torch.tensor([0, 2, 4, 5])]
    assert (of_clip_2 / of_clip_2.sum() - 0.25).abs().max() < 0.05


@pytest.mark.parametrize(("text_clip", "message"), [
    ([0, 2], "clip 1 has no caption"), ([0, 1, 3], "rows of audio"), ([-1, 0], "rows of audio"), ([], "rows"),
])
def test_pair_sampler_errors(text_clip, message):
    with pytest.raises(ValueError, match=message):
        PairSampler(torch.tensor(text_clip, dtype=torch.int64), 3)


def test_learning_rates():
    config = BridgeConfig(learning_rate=0.1, train_steps=100)
    assert learning_rate(replace(config, lr_schedule="constant"), 99) == 0.1
    assert [learning_rate(config, step) for step in (0, 50, 100)] == pytest.approx([0.1, 0.05, 0.0])


# ---------------------------------------------------------------------------------------------------------------- loop
def test_history_is_the_mean_over_the_steps_since_the_row_before():
    seen = []
    config = replace(CONFIG, train_steps=120)  # a row every 2 steps
    _, history = train(config, callback=lambda step, losses: seen.append((step, losses)))
    assert list(history.columns) == ["step", "loss", "loss_cross", "loss_self", "loss_topology", "val_pair_cosine"]
    assert history.step.tolist() == list(range(2, 121, 2)) and [step for step, _ in seen] == list(range(1, 121))
    assert history.loss_cross[3] == pytest.approx((seen[6][1]["loss_cross"] + seen[7][1]["loss_cross"]) / 2)
    assert history.val_pair_cosine.isna().all()
    total = history.loss_cross + history.loss_self + history.loss_topology
    assert (history.loss - total).abs().max() < 1e-5


def test_validation_uses_the_average_weights():
    audio, text, text_clip = toy_pairs()
    val = (audio, text[[int((text_clip == i).nonzero()[0]) for i in range(20)]])
    link, history = train(val=val)
    bridged_emb = link(audio, generator=torch.Generator().manual_seed(0))
    expected = float((bridged_emb * F.normalize(val[1], dim=-1)).sum(1).mean())
    assert history.val_pair_cosine.iloc[-1] == pytest.approx(expected, abs=1e-5)


def test_seed_decides_everything_and_the_global_generator_is_untouched():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one, history = train()
    torch.randn(5)
    other, again = train()
    torch.manual_seed(11)
    train()
    assert torch.equal(torch.get_rng_state(), before)
    assert equal_weights(one, other) and history.equals(again)
    assert not equal_weights(one, train(seed=1)[0])


class Interrupted(Exception):
    pass


def steps_of(seen: list[int], stop: int | None = None):
    """A callback that notes the steps, and ends the run at ``stop``."""
    def callback(done: int, losses: dict[str, float]) -> None:
        seen.append(done)
        if done == stop:
            raise Interrupted

    return callback


@pytest.mark.parametrize("stop", [4, 17, 29])
def test_resumed_run_equals_an_undisturbed_one_bit_for_bit(tmp_path, stop):
    audio, text, _ = toy_pairs()
    val, path, seen = (audio, text[:20]), tmp_path / "bridge.safetensors", []
    whole, whole_history = train(val=val)
    with pytest.raises(Interrupted):
        train(val=val, checkpoint_path=path, checkpoint_every=4, callback=steps_of([], stop))
    torch.randn(3)
    resumed, history = train(val=val, checkpoint_path=path, checkpoint_every=4, callback=steps_of(seen))
    assert seen == list(range(stop // 4 * 4 + 1, 31)), "it goes on after its last checkpoint"
    assert equal_weights(whole, resumed) and history.equals(whole_history)


def test_killed_process_leaves_a_checkpoint_that_resumes(tmp_path):
    path, seen = tmp_path / "bridge.safetensors", []
    script = (
        "import os, signal; from test_training import train\n"
        f"train(checkpoint_path={str(path)!r}, checkpoint_every=5,"
        " callback=lambda step, losses: step == 13 and os.kill(os.getpid(), signal.SIGKILL))")
    folders = os.pathsep.join([str(REPO), str(REPO / "tests")])
    environment = {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [file.name for file in tmp_path.iterdir()] == ["bridge.safetensors"]
    resumed, history = train(checkpoint_path=path, callback=steps_of(seen))
    whole, whole_history = train()
    assert seen[0] == 11 and equal_weights(whole, resumed) and history.equals(whole_history)


def test_finished_fit_returns_at_once_whatever_its_start_step(tmp_path):
    path, seen = tmp_path / "bridge.safetensors", []
    first, history = train(checkpoint_path=path)
    config = replace(CONFIG, start_timestep=300)
    second, again = train(config, checkpoint_path=path, callback=steps_of(seen))
    assert seen == [] and equal_weights(first, second) and again.equals(history)
    assert not second.training and second.start_timestep == 300


@pytest.mark.parametrize("change", ["settings", "seed", "data"])
def test_checkpoint_of_another_run_is_ignored_with_the_reason(tmp_path, capsys, change):
    path, seen = tmp_path / "bridge.safetensors", []
    train(checkpoint_path=path)
    config = replace(CONFIG, learning_rate=1e-3) if change == "settings" else CONFIG
    audio, text, text_clip = toy_pairs()
    text[3, 2] += 1e-3 if change == "data" else 0
    run = {"seed": int(change == "seed"), "progress": False}
    capsys.readouterr()
    link, _ = train_bridge(config, audio, text, text_clip, checkpoint_path=path, callback=steps_of(seen), **run)
    printed = capsys.readouterr().err
    assert seen == list(range(1, 31))
    assert f"from another run (its {change} differ)" in printed and printed.count("\n") == 1
    assert equal_weights(link, train_bridge(config, audio, text, text_clip, **run)[0])


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "an altered state"])
def test_damaged_checkpoint_is_refused_and_training_starts_over(tmp_path, capsys, damage):
    """Other damage to such a file: tests/reliability."""
    path, seen = tmp_path / "bridge.safetensors", []
    whole, _ = train(checkpoint_path=path)
    content = path.read_bytes()
    path.write_bytes({
        "a flipped bit": content[:-100] + bytes([content[-100] ^ 1]) + content[-99:], "cut": content[:-100],
        "an altered state": content.replace(rb"\"step\": 30", rb"\"step\": 20"),
    }[damage])
    assert path.read_bytes() != content
    link, _ = train(checkpoint_path=path, callback=steps_of(seen))
    printed = capsys.readouterr().err
    assert seen[0] == 1 and "damaged" in printed and "made anew" in printed and printed.count("\n") == 1
    assert equal_weights(link, whole)


def test_every_training_field_of_the_config_is_used():
    """A field that training ignored would be a flag that sets nothing: each change must change the weights."""
    short = BridgeConfig(train_steps=4, batch_size=8)
    base, _ = train(short)
    changed = {
        "num_blocks": 2, "width_factor": 3, "dropout": 0.3, "num_train_timesteps": 900, "beta_start": 1e-3,
        "beta_end": 0.03, "beta_schedule": "linear", "loss": "l2", "self_weight": 0.5, "topology_weight": 5.0,
        "topology_form": "distance", "learning_rate": 1e-3, "weight_decay": 0.5, "lr_schedule": "constant",
        "batch_size": 7, "train_steps": 5, "grad_clip": 0.01, "ema_decay": 0.0,
    }
    inference = {"start_timestep": 3, "num_inference_steps": 2, "add_noise": False}
    assert changed.keys() | inference.keys() == {field.name for field in fields(BridgeConfig)}
    shapes = [parameter.shape for parameter in base.parameters()]
    for name, value in changed.items():
        other, _ = train(replace(short, **{name: value}))
        same = [parameter.shape for parameter in other.parameters()] == shapes
        assert not (same and equal_weights(base.network, other.network)), name
    other, _ = train(replace(short, **inference))
    assert equal_weights(base, other)


def test_divergence_and_bad_data_raise_one_line():
    config = replace(CONFIG, train_steps=2)

    def infinite(network, generator):
        return {"loss": network.weight.sum() * math.nan}

    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        fit(nn.Linear(1, 1), infinite, config, seed=0, progress=False)
    audio, text, text_clip = toy_pairs()
    for arguments, message in [((audio, text[:, :5], text_clip), "5 wide"),
                               ((audio, text, text_clip[:-1]), "one for each"),
                               ((audio, text, text_clip.clamp_max(18)), "clip 19 has no caption")]:
        with pytest.raises(ValueError, match=message):
            train_bridge(config, *arguments, seed=0, progress=False)


# ------------------------------------------------------------------------------------------------------------ learning
def shifted_gaussians(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs in the plane: audio about (2, 0), text the same points about (0, 2) with a little noise; unit norm."""
    generator = torch.Generator().manual_seed(seed)
    points = 0.5 * torch.randn(400, 2, generator=generator)
    audio = points + torch.tensor([2.0, 0.0])
    text = points + torch.tensor([0.0, 2.0]) + 0.1 * torch.randn(400, 2, generator=generator)
    return F.normalize(audio, dim=-1), F.normalize(text, dim=-1)


@pytest.mark.parametrize(("seed", "direction"), [(0, "audio to text"), (1, "audio to text"), (0, "text to audio")])
def test_bridge_closes_the_gap_of_a_shifted_gaussian(seed, direction):
    """The opposite direction is the same call with the roles swapped."""
    given, wanted = shifted_gaussians(seed)
    if direction == "text to audio":
        given, wanted = wanted, given
    config = BridgeConfig(width_factor=32, train_steps=400, batch_size=128, learning_rate=2e-3)
    link, history = train_bridge(config, given[:300], wanted[:300], torch.arange(300), seed=seed, progress=False)
    mapped = link(given[300:], generator=torch.Generator().manual_seed(seed))
    before, after = (float((x.mean(0) - wanted[300:].mean(0)).norm()) for x in (given[300:], mapped))
    assert before > 1.0 and after < 0.2 * before, f"centroid gap {before:.3f} -> {after:.3f}"
    assert history.loss_cross.iloc[-1] < 0.7 * history.loss_cross.iloc[0]
