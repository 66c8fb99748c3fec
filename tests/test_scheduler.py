"""The noise schedule and the DDIM sampler against diffusers, a float64 reference, and exact identities."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler as DiffusersDDIM
from diffusers import DDPMScheduler as DiffusersDDPM

from dl.scheduler import BETA_SCHEDULES, DDIMScheduler, ddim_sample

ORACLE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "sample", "clip_sample": False}


def rows(seed: int, n: int = 8, dim: int = 16) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("oracle", [DiffusersDDPM, DiffusersDDIM])
def test_schedule_equals_diffusers_bit_for_bit(oracle, beta_schedule):
    theirs, ours = oracle(**ORACLE, beta_schedule=beta_schedule), DDIMScheduler(beta_schedule=beta_schedule)
    assert ours.alphas_cumprod.dtype == torch.float32
    assert torch.equal(ours.betas, theirs.betas)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize(
    ("timestep", "alpha_bar"),
    [(25, 0.9965), (50, 0.9908), (100, 0.9712), (200, 0.8873), (300, 0.7366), (400, 0.5366), (500, 0.3313), (600, 0.1673),
     (800, 0.0203), (999, 0.0007)],
)
def test_alpha_bar_at_the_levels_of_the_sweep(timestep, alpha_bar):
    assert float(DDIMScheduler().alphas_cumprod[timestep]) == pytest.approx(alpha_bar, abs=5e-5)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_add_noise_equals_diffusers(beta_schedule):
    theirs, ours = DiffusersDDPM(**ORACLE, beta_schedule=beta_schedule), DDIMScheduler(beta_schedule=beta_schedule)
    timesteps = torch.arange(1000)
    x, noise = rows(0, 1000), rows(1, 1000)
    torch.testing.assert_close(ours.add_noise(x, noise, timesteps), theirs.add_noise(x, noise, timesteps), rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_every_step_equals_diffusers_where_the_spacing_agrees(beta_schedule):
    theirs = DiffusersDDIM(**ORACLE, beta_schedule=beta_schedule, set_alpha_to_one=True)
    ours = DDIMScheduler(beta_schedule=beta_schedule)
    theirs.set_timesteps(10)  # 900, 800 .. 0: each step goes 100 down
    ours.set_timesteps(900, 9)  # 900, 800 .. 100, then abar = 1
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()[:-1]
    sample = rows(2)
    for timestep in ours.timesteps[:-1]:
        model_output = rows(int(timestep))
        mine, reference = ours.step(model_output, timestep, sample), theirs.step(model_output, int(timestep), sample)
        torch.testing.assert_close(mine.prev_sample, reference.prev_sample, rtol=0, atol=1e-6)
        assert torch.equal(mine.pred_original_sample, reference.pred_original_sample)
        sample = mine.prev_sample
    theirs.set_timesteps(1)  # one step from anywhere: the one that goes to abar = 1
    model_output = rows(3)
    mine, reference = ours.step(model_output, 100, sample), theirs.step(model_output, 100, sample)
    torch.testing.assert_close(mine.prev_sample, reference.prev_sample, rtol=0, atol=1e-6)


def test_sampler_stays_within_a_thousandth_of_a_float64_reference():
    scheduler = DDIMScheduler()
    matrix = rows(4, 16) / 8
    sample = ddim_sample(lambda sample, timestep: sample @ matrix, scheduler, rows(5), scheduler.inference_timesteps(600, 50))

    alpha_bar = np.cumprod(1 - np.linspace(1e-4**0.5, 0.02**0.5, 1000, dtype=np.float64) ** 2)
    levels = np.round(np.linspace(600, 0, 51)).astype(int)
    reference = rows(5).double().numpy()
    for k, previous in zip(levels[:-1], [*levels[1:-1], None], strict=True):
        predicted = reference @ matrix.double().numpy()
        noise = (reference - np.sqrt(alpha_bar[k]) * predicted) / np.sqrt(1 - alpha_bar[k])
        a = 1.0 if previous is None else alpha_bar[previous]
        reference = np.sqrt(a) * predicted + np.sqrt(1 - a) * noise
    np.testing.assert_allclose(sample.numpy(), reference, rtol=0, atol=1e-3)
    assert np.abs(reference).max() > 0.01, "a chain that collapses to zero would prove nothing"


@pytest.mark.parametrize(("start_timestep", "num_inference_steps"), [(0, 1), (50, 1), (50, 5), (300, 50), (999, 999)])
def test_perfect_predictor_gives_the_clean_sample_back(start_timestep, num_inference_steps):
    scheduler, x = DDIMScheduler(), rows(6)
    timesteps = scheduler.inference_timesteps(start_timestep, num_inference_steps)
    sample = scheduler.add_noise(x, rows(7), timesteps[:1])
    assert (sample - x).abs().max() > 1e-3
    torch.testing.assert_close(ddim_sample(lambda sample, timestep: x, scheduler, sample, timesteps), x, rtol=0, atol=1e-6)


def test_perfect_predictor_walks_along_the_forward_process():
    """With the true x^0 the implied noise never changes: at every level the sample is the forward formula with one eps."""
    scheduler, x, noise, seen = DDIMScheduler(), rows(6), rows(7), []
    timesteps = scheduler.inference_timesteps(500, 10)
    start = scheduler.add_noise(x, noise, timesteps[:1])
    ddim_sample(lambda sample, timestep: x, scheduler, start, timesteps, callback=lambda i, sample: seen.append(sample))
    assert len(seen) == 11
    for level, sample in zip(timesteps, seen, strict=False):
        torch.testing.assert_close(sample, scheduler.add_noise(x, noise, level[None]), rtol=0, atol=1e-5)


def test_inference_timesteps():
    scheduler = DDIMScheduler()
    assert scheduler.inference_timesteps(50, 5).tolist() == [50, 40, 30, 20, 10]
    assert scheduler.inference_timesteps(600, 5).tolist() == [600, 480, 360, 240, 120]
    assert scheduler.inference_timesteps(50, 3).tolist() == [50, 33, 17]  # 16.67 is rounded, not cut
    assert scheduler.inference_timesteps(0, 1).tolist() == [0]
    for start_timestep in (1, 2, 3, 7, 25, 50, 99, 600):
        for n in range(1, start_timestep + 1):
            timesteps = scheduler.inference_timesteps(start_timestep, n)
            assert len(timesteps) == n and timesteps[0] == start_timestep and timesteps[-1] >= 1
            assert (timesteps.diff() < 0).all()


@pytest.mark.parametrize(("start_timestep", "n"), [(-1, 1), (1000, 1), (50, 0), (50, 51), (0, 2), (1, 2)])
def test_timesteps_out_of_range_raise(start_timestep, n):
    with pytest.raises(ValueError, match="choose"):
        DDIMScheduler().inference_timesteps(start_timestep, n)


def test_other_errors_are_one_line():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(50, 5)
    for call in (
        lambda: scheduler.step(rows(0), 45, rows(0)),
        lambda: DDIMScheduler(beta_schedule="sigmoid"),
        lambda: DDIMScheduler(beta_end=1.5),
        lambda: DDIMScheduler(num_train_timesteps=0),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert "\n" not in str(error.value)


def test_sampler_is_pure_and_projects_before_each_call():
    scheduler, start = DDIMScheduler(), rows(8)
    before, seen = start.clone(), []

    def model(sample, timestep):
        seen.append(sample.norm(dim=-1))
        return 0.5 * sample

    timesteps = scheduler.inference_timesteps(100, 4)
    first = ddim_sample(model, scheduler, start, timesteps, project=lambda sample: 5 * torch.nn.functional.normalize(sample, dim=-1))
    assert torch.equal(start, before) and len(scheduler.timesteps) == 0
    assert len(seen) == 4 and all(torch.allclose(norms, torch.full((8,), 5.0)) for norms in seen)
    assert not torch.equal(first, ddim_sample(model, scheduler, start, timesteps))


def test_snr_is_signal_over_noise():
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    timesteps = torch.tensor([10, 500, 990])
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    torch.testing.assert_close(scheduler.snr(timesteps), alpha_bar / (1 - alpha_bar))
    assert float(DDIMScheduler(2, 0.5, 0.5, "linear").snr(torch.tensor([0]))) == 1.0
