"""The noise schedule and the DDIM sampler against diffusers, a float64 reference, and exact identities."""
from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler as DiffusersDDIM
from diffusers import DDPMScheduler as DiffusersDDPM

from dl.scheduler import BETA_SCHEDULES, DDIMScheduler, ddim_sample

ORACLE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "sample",
          "clip_sample": False}


def rows(seed: int, n: int = 8, dim: int = 16) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_schedule_and_noise_equal_diffusers(beta_schedule):
    theirs, ours = DiffusersDDPM(**ORACLE, beta_schedule=beta_schedule), DDIMScheduler(beta_schedule=beta_schedule)
    assert torch.equal(ours.betas, theirs.betas) and torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    given = rows(0, 1000), rows(1, 1000), torch.arange(1000)
    torch.testing.assert_close(ours.add_noise(*given), theirs.add_noise(*given), rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_every_step_equals_diffusers_where_the_spacing_agrees(beta_schedule):
    theirs = DiffusersDDIM(**ORACLE, beta_schedule=beta_schedule, set_alpha_to_one=True)
    ours = DDIMScheduler(beta_schedule=beta_schedule)
    theirs.set_timesteps(10)  # 900, 800 .. 0: each step goes 100 down
    timesteps = ours.inference_timesteps(900, 9).tolist()  # 900, 800 .. 100, then abar = 1
    assert timesteps == theirs.timesteps.tolist()[:-1]
    sample = rows(2)
    for timestep, prev_timestep in pairwise([*timesteps, -1]):
        if prev_timestep == -1:
            theirs.set_timesteps(1)  # one step from anywhere: the one that goes to abar = 1
        reference = theirs.step(rows(timestep), timestep, sample).prev_sample
        sample = ours.step(rows(timestep), timestep, sample, prev_timestep)
        torch.testing.assert_close(sample, reference, rtol=0, atol=1e-6)


def test_sampler_stays_within_a_thousandth_of_a_float64_reference():
    scheduler, matrix = DDIMScheduler(), rows(4, 16) / 8
    sample = ddim_sample(lambda x, k: x @ matrix, scheduler, rows(5), scheduler.inference_timesteps(600, 50))

    alpha_bar = np.cumprod(1 - np.linspace(1e-4**0.5, 0.02**0.5, 1000, dtype=np.float64) ** 2)
    levels = np.round(np.linspace(600, 0, 51)).astype(int)
    reference = rows(5).double().numpy()
    for k, a in zip(levels[:-1], [*alpha_bar[levels[1:-1]], 1.0], strict=True):
        predicted = reference @ matrix.double().numpy()
        noise = (reference - np.sqrt(alpha_bar[k]) * predicted) / np.sqrt(1 - alpha_bar[k])
        reference = np.sqrt(a) * predicted + np.sqrt(1 - a) * noise
    np.testing.assert_allclose(sample.numpy(), reference, rtol=0, atol=1e-3)
    assert np.abs(reference).max() > 0.01, "a chain that collapses to zero would prove nothing"


@pytest.mark.parametrize(("start_timestep", "n"), [(0, 1), (50, 1), (50, 5), (300, 50), (999, 999)])
def test_perfect_predictor_walks_back_along_the_forward_process(start_timestep, n):
    """With the true x^0 the implied noise never changes: every sample is the forward formula with one eps."""
    scheduler, x, noise, seen = DDIMScheduler(), rows(6), rows(7), []
    timesteps = scheduler.inference_timesteps(start_timestep, n)
    start = scheduler.add_noise(x, noise, timesteps[:1])
    before = start.clone()
    clean = ddim_sample(lambda sample, k: x, scheduler, start, timesteps, callback=lambda i, at: seen.append(at))
    assert torch.equal(start, before), "the sampler changes none of its arguments"
    assert len(seen) == n + 1 and (start - x).abs().max() > 1e-3
    for level, sample in zip(timesteps, seen, strict=False):
        torch.testing.assert_close(sample, scheduler.add_noise(x, noise, level[None]), rtol=0, atol=1e-4)
    torch.testing.assert_close(clean, x, rtol=0, atol=1e-6)


def test_inference_timesteps():
    scheduler = DDIMScheduler()
    assert scheduler.inference_timesteps(600, 5).tolist() == [600, 480, 360, 240, 120]
    assert scheduler.inference_timesteps(50, 3).tolist() == [50, 33, 17]  # 16.67 is rounded, not cut
    assert scheduler.inference_timesteps(0, 1).tolist() == [0]
    for start_timestep in (1, 7, 50, 600):
        for n in range(1, start_timestep + 1):
            timesteps = scheduler.inference_timesteps(start_timestep, n)
            assert len(timesteps) == n and timesteps[0] == start_timestep and timesteps[-1] >= 1
            assert (timesteps.diff() < 0).all()


@pytest.mark.parametrize(("settings", "message"), [
    ({"beta_schedule": "sigmoid"}, "choose one of scaled_linear"), ({"beta_end": 1.5}, "need 0 < beta_start"),
    ({"num_train_timesteps": 0}, "at least 1"),
])
def test_bad_schedules_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        DDIMScheduler(**settings)


def test_sampler_projects_before_each_call():
    scheduler, seen = DDIMScheduler(), []

    def model(sample, timestep):
        seen.append(sample.norm(dim=-1))
        return 0.5 * sample

    ddim_sample(model, scheduler, rows(8), scheduler.inference_timesteps(100, 4),
                project=lambda sample: 5 * torch.nn.functional.normalize(sample, dim=-1))
    assert len(seen) == 4 and all(torch.allclose(norms, torch.full((8,), 5.0)) for norms in seen)
    assert float(DDIMScheduler(2, 0.5, 0.5, "linear").snr(torch.tensor([0]))) == 1.0
