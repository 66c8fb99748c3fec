"""Closed-form peers: each recovers exactly what it claims to undo, on synthetic shifts, stretches and rotations."""
from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge
from torch.nn.functional import normalize

from dl.peers import REGISTRY, TRAINED, build, centre, uncentre
from dl.store import SYSTEMS

D = 12
CLOSED_FORMS = [name for name in REGISTRY if name not in TRAINED]


def cloud(n: int, seed: int) -> torch.Tensor:
    """Unit vectors about one direction, (n, D) float32."""
    noise = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    return normalize(torch.eye(D)[0] + 0.5 * torch.linspace(0.3, 1.5, D) * noise, dim=-1)


def rotation(seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed)))[0]


@pytest.fixture
def split():
    """400 clips, the first 200 with one caption, the others with three; texts are noisy rotated audio."""
    audio = cloud(400, 0)
    text_clip = torch.cat([torch.arange(200), torch.arange(200, 400).repeat_interleave(3)])
    noise = 0.1 * torch.randn(len(text_clip), D, generator=torch.Generator().manual_seed(1))
    return audio, normalize(audio[text_clip] @ rotation(2) + noise, dim=-1), text_clip


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_protocol(name, split):
    audio, text, text_clip = split
    peer = build(name).fit(*split)
    answer = peer(audio[:7])
    assert answer.shape == (7, D) and answer.dtype == torch.float32
    torch.testing.assert_close(answer.norm(dim=1), torch.ones(7))
    assert torch.equal(answer, peer(audio[:7], noise_seed=3)), "a closed form does not depend on the noise seed"
    assert torch.allclose(peer(audio)[:7], answer, atol=1e-6), "batch size changes nothing"
    if not peer.uses_pairs:
        shuffled = text_clip[torch.randperm(len(text_clip), generator=torch.Generator().manual_seed(5))]
        assert torch.equal(answer, build(name).fit(audio, text, shuffled)(audio[:7]))


def test_flags_that_table_1_prints():
    flags = {flag: {name for name, kind in REGISTRY.items() if getattr(kind, flag)}
             for flag in ("uses_pairs", "uses_memory", "centred", "trained", "stochastic")}
    controls = {"regression_mlp", "regression_mlp_topology"}
    assert flags["uses_pairs"] == {"procrustes", "ridge", "pls_head", *TRAINED} - {"diffusion_bridge"}
    assert flags["uses_memory"] == {"projection", "nearest_text"} and flags["centred"] == {"c3", "diffusion_bridge"}
    assert flags["trained"] == set(TRAINED) and flags["stochastic"] == set(TRAINED) - {"diffusion_bridge", *controls}
    assert set(REGISTRY) == set(SYSTEMS) - {"text_floor", "text_ceiling"}


def test_bad_calls_raise(split):
    with pytest.raises(ValueError, match="unknown system 'mean_shfit': choose one of raw, mean_shift"):
        build("mean_shfit")
    with pytest.raises(ValueError, match="Raw does not answer in space 'centred'"):
        build("raw").fit(*split)(split[0], space="centred")


def test_mean_shift_by_hand():
    audio = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])            # means (.5, .5) and (-.5, .5): the shift is (-1, 0)
    answer = build("mean_shift").fit(audio, text, torch.arange(2))(torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(answer, normalize(torch.tensor([[-0.4, 0.8]]), dim=-1))


def test_c3_centres_and_comes_back(split):
    audio, text, _ = split
    peer = build("c3").fit(*split)
    torch.testing.assert_close(peer(audio, space="centred"), normalize(audio - audio.mean(0), dim=-1))
    back = uncentre(centre(text, peer.text_mean), peer.text_mean, peer.text_radius)
    assert (back * text).sum(1).mean() > 0.98, "texts that are centred and taken back stay near themselves"


def test_realign_brings_the_centroid_and_the_spread(split):
    audio, text, text_clip = split
    text = normalize(text + 1.5 * rotation(9)[0], dim=-1)
    peer = build("realign").fit(audio, text, text_clip)
    torch.testing.assert_close(peer._map(audio.double()).mean(0), peer.text_mean)      # before the last normalisation
    spread = [(x - x.mean(0)).square().sum(1).mean().sqrt() for x in (peer(audio), text)]
    assert abs(spread[0] - spread[1]) < 0.1 * spread[1]


def test_whitening_colouring_recovers_an_unpaired_stretch():
    """Moments alone identify a positive map only where both covariances commute: a stretch along the axes."""
    base = torch.randn(4000, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    base = (base - base.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(base.T, correction=0))).T   # white
    audio, stretch = base * torch.linspace(0.2, 1, D), torch.linspace(2, 0.5, D).double()
    text = audio * stretch + 1.0
    peer = build("whitening_colouring", shrinkage=0.0)
    peer.fit(audio, text[torch.randperm(4000, generator=torch.Generator().manual_seed(4))], torch.arange(4000))
    torch.testing.assert_close(peer.matrix, torch.diag(stretch))
    torch.testing.assert_close(peer(audio.float()), normalize(text, dim=-1).float())


def test_projection_and_nearest_text_stay_among_the_captions(split):
    audio, text, _ = split
    nearest = build("nearest_text").fit(*split)(audio)
    torch.testing.assert_close(nearest, text[(audio @ text.T).argmax(1)])
    sharp, flat = (build("projection", scale=scale).fit(*split)(audio) for scale in (1e5, 0.0))
    assert ((sharp * nearest).sum(1) > 0.999).float().mean() > 0.95, "at a high scale projection is the nearest text"
    torch.testing.assert_close(flat, normalize(text.mean(0), dim=0).expand(400, D), atol=1e-5, rtol=1e-5)


def test_procrustes_recovers_a_rotation_exactly():
    audio = cloud(200, 0)
    peer = build("procrustes").fit(audio, audio @ rotation(7), torch.arange(200))
    torch.testing.assert_close(peer.matrix.float(), rotation(7), atol=1e-5, rtol=1e-5)


def test_ridge_equals_scikit_learn_on_all_pairs(split):
    audio, text, text_clip = split
    peer = build("ridge", alpha=0.3).fit(*split)
    reference = SklearnRidge(alpha=peer.penalty).fit(audio[text_clip].double().numpy(), text.double().numpy())
    expected = normalize(torch.from_numpy(reference.predict(audio.double().numpy())), dim=-1).float()
    torch.testing.assert_close(peer(audio), expected, atol=1e-6, rtol=1e-5)
    twice = build("ridge", alpha=0.3).fit(audio, torch.cat([text, text]), torch.cat([text_clip, text_clip]))
    torch.testing.assert_close(twice(audio), peer(audio))      # the penalty does not depend on the number of pairs


def test_pls_head_keeps_k_directions(split):
    peer, full = (build("pls_head", num_directions=k).fit(*split) for k in (3, 100))
    assert peer.audio_directions.shape == peer.text_directions.shape == (D, 3)
    assert peer.num_parameters == 2 * D + 2 * 3 * D
    torch.testing.assert_close(full(split[0]), build("procrustes").fit(*split)(split[0]))
