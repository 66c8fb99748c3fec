"""Golden values: what the arithmetic gives on toy data, beside the number of the recipe that gave it.

A recipe's number stands in the code (``BRIDGE_RECIPE`` and so on; 1 where it is absent) and goes up when its figures
move on purpose. ``goldens.json`` holds for each recipe its number, its values and, where a number went up though no
toy value can show why, the reason: ``"reason": {"2": "..."}``. ``python tests/test_recipes.py`` writes it anew and
refuses what the tests refuse; the captions under ``given`` stay. Values are of one thread, to 1e-5; vectors of real
sounds to 1e-4, as convolutions differ a little between CPUs.
"""
from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_captioner import CAPTIONS, shake, tiny_config, tiny_language_model
from torch import Tensor

from dl.bootstrap import (
    ClipCounts,
    make_draws,
    make_reference,
    paired_difference,
    score_clips,
    score_system,
    text_floor,
)
from dl.bridge import (
    TOPOLOGY_FORMS,
    BridgeNetwork,
    DiffusionLink,
    bridge_losses,
    timestep_embedding,
    topology_loss,
    unit_rows,
)
from dl.caption_metrics import METRICS, score_captions
from dl.captioner import LLMCaptioner
from dl.captioner_train import BucketSampler, caption_loss, train_captioner
from dl.captioner_train import learning_rate as captioner_learning_rate
from dl.clap import MINI_FOLDER, ClapEncoder, Embeddings
from dl.config import BridgeConfig, get_profile
from dl.data import check_waveform, load_split
from dl.gap import gap_length, gap_metrics, separability_functions
from dl.mini_clap import MiniClap, MiniClapBackend
from dl.peers import REGISTRY, build, centre, uncentre
from dl.scheduler import BETA_SCHEDULES, DDIMScheduler, ddim_sample
from dl.train import EMA, PairSampler, learning_rate, train_bridge

GOLDENS = Path(__file__).with_name("goldens.json")
ANEW = "python tests/test_recipes.py"
RECIPES = {     # recipe: the module and the name of its number
    "BRIDGE": ("dl.train", "BRIDGE_RECIPE"), "PEERS": ("dl.peers", "PEERS_RECIPE"),
    "DECODER": ("dl.captioner_train", "DECODER_RECIPE"),
    "VECTORS": ("dl.clap", "VECTORS_RECIPE"), "GAP": ("dl.gap", "GAP_RECIPE"),
    "BOOTSTRAP": ("dl.bootstrap", "BOOTSTRAP_RECIPE"),
    "CAPTION_METRICS": ("dl.caption_metrics", "CAPTION_METRICS_RECIPE"),
}
TOLERANCE = {"VECTORS": 1e-4}
D, N = 16, 48
Values = dict[str, list]      # name -> numbers, strings and None (not computed)


# ---------------------------------------------------------------------------------------------------------- comparison
def recipe(name: str) -> int:
    """The recipe's number in the code."""
    module, attribute = RECIPES[name]
    return getattr(import_module(module), attribute, 1)


def moved(stored: Values, found: Values, tolerance: float = 1e-5) -> list[str]:
    """The names whose values differ, or that one side lacks."""
    def same(old: object, new: object) -> bool:
        both = isinstance(old, int | float) and isinstance(new, int | float)
        return math.isclose(old, new, rel_tol=tolerance, abs_tol=tolerance) if both else old == new

    return [name for name in stored | found if len(stored.get(name, [])) != len(found.get(name, []))
            or not all(map(same, stored[name], found[name]))]


def problem(name: str, entry: dict, found: Values, number: int) -> str:
    """What is wrong between the stored ``entry`` and today's values and number; blank if nothing."""
    changed, constant = moved(entry["values"], found, TOLERANCE.get(name, 1e-5)), RECIPES[name][1]
    which = f"{len(changed)} of {len(found)} values moved: {', '.join(changed[:5])}"
    if number == entry["recipe"]:
        wanted = f"restore the arithmetic or raise {constant} (and write the goldens anew: {ANEW})"
        return f"{which}; {wanted}" if changed else ""
    if changed:
        return f"{constant} is {number} and the goldens are of {entry['recipe']} ({which}): write them anew: {ANEW}"
    if str(number) in entry.get("reason", {}):
        return ""
    return (f"{constant} was raised but nothing moved: toy values cannot see it; "
            "state the reason in goldens.json under 'reason'")


def numbers(*parts: object) -> list:
    """Tensors, arrays, numbers and strings as one flat list: nine digits, None for what is not finite."""
    flat = []
    for part in parts:
        values = part.tolist() if isinstance(part, Tensor | np.ndarray) else part
        if isinstance(values, list | tuple):
            flat += numbers(*values)
        elif values is None or isinstance(values, str):
            flat.append(values)
        else:
            flat.append(float(f"{values:.9g}") if math.isfinite(values) else None)
    return flat


def brief(*matrices: Tensor) -> list:
    """Of each matrix its sum by the root of its size, its absolute sum, and the beginnings of two rows."""
    return numbers(*((x.double().sum() / x.numel() ** 0.5, x.double().abs().sum(), x[:2, :4]) for x in matrices))


# ---------------------------------------------------------------------------------------------------------------- data
def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def toy(seed: int = 0, clips: int = N, captions: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Audio (n, D), text (m, D), text_clip (m,): pairs, a gap; one to three captions a clip, or ``captions``."""
    rng = np.random.default_rng(seed)
    text_clip = torch.from_numpy(np.repeat(np.arange(clips), captions or rng.integers(1, 4, clips)))
    shared = normal(seed + 1, clips, D)
    audio = shared + 0.7 * normal(seed + 2, clips, D) + 0.8 * normal(99, 1, D)
    text = shared[text_clip] @ (torch.eye(D) + 0.3 * normal(98, D, D)) + 0.5 * normal(seed + 3, len(text_clip), D)
    return F.normalize(audio, dim=1), F.normalize(text, dim=1), text_clip


def weighted(network: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """The network with weights that are nowhere zero, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return network.eval()


def untrained(**values: object) -> torch.nn.Module:
    """A bridge, or with ``condition_dim`` a network, of fixed weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return weighted(BridgeNetwork(D, **values) if "condition_dim" in values else DiffusionLink(D, **values))


# ------------------------------------------------------------------------------------------------------------- recipes
def bridge_values() -> Values:
    out: Values = {}
    x, noise, audio = 4 * F.normalize(normal(1, 6, D), dim=1), normal(2, 6, D), toy(20, 8)[0]
    levels = torch.tensor([0, 1, 50, 500, 998, 999])
    for schedule in BETA_SCHEDULES:
        scheduler = DDIMScheduler(beta_schedule=schedule)
        out[f"schedule {schedule}"] = numbers(scheduler.betas[levels], scheduler.alphas_cumprod[levels],
            scheduler.snr(levels[1:]))
        out[f"add_noise {schedule}"] = brief(scheduler.add_noise(x, noise, levels),
            scheduler.add_noise(x, noise, levels[2:3]))
        for k, n in ((0, 1), (50, 1), (50, 5), (600, 5), (999, 10), (7, 7)):
            steps = scheduler.inference_timesteps(k, n)
            taken = scheduler.step(noise, k, x, int(steps[1]) if n > 1 else -1)
            walked = [ddim_sample(lambda sample, k: 0.5 * sample + (k + 1) / 1000, scheduler, x, steps, project)
                      for project in (None, lambda sample: 5 * F.normalize(sample, dim=-1))]
            out[f"ddim {schedule} {k} {n}"] = numbers(steps) + brief(taken, *walked)
    out["betas of 10 levels"] = numbers(DDIMScheduler(10, 0.01, 0.3, "linear").betas)
    out["timestep_embedding"] = brief(timestep_embedding(levels, 8))
    out["unit_rows"] = brief(unit_rows(x, D, "x"))
    for k in (torch.tensor(50), levels):
        out[f"network {k.ndim}"] = brief(untrained().network(x, k))
        conditional = untrained(condition_dim=D, num_blocks=1, width_factor=3)
        out[f"network with a condition {k.ndim}"] = brief(conditional(x, k, noise))
    out["network at its start"] = brief(BridgeNetwork(D)(x, levels))
    link, generator = untrained(scale=2.0, start_timestep=100), torch.Generator().manual_seed(7)
    answer, path = link(audio, num_inference_steps=3, generator=generator, return_trajectory=True)
    out["trajectory"] = brief(answer, path.flatten(1))

    network, scheduler = untrained().network, DDIMScheduler()
    for loss in ("l1", "l2"):
        for form in TOPOLOGY_FORMS:
            for weight in (0.0, 1.0, 10.0):
                for self_weight in (0.0, 1.0, 0.3):
                    config = BridgeConfig(
                        loss=loss, topology_form=form, topology_weight=weight, self_weight=self_weight)
                    losses = bridge_losses(network, scheduler, x, noise, config, torch.Generator().manual_seed(4))
                    out[f"losses {loss} {form} {weight:g} {self_weight:g}"] = numbers(list(losses.values()))
    out["topology temperature"] = numbers(topology_loss(x, noise, "softmax_kl", 0.5),
        topology_loss(torch.zeros(3, D), noise[:3], "distance"))

    audio, text, text_clip = toy()
    out["pairs"] = numbers(*PairSampler(text_clip, N).draw(12, torch.Generator().manual_seed(6)))
    short = BridgeConfig(train_steps=6, batch_size=16, learning_rate=3e-3)
    for schedule in ("cosine", "constant"):
        config = replace(short, lr_schedule=schedule)
        out[f"learning_rate {schedule}"] = numbers([learning_rate(config, step) for step in (0, 1, 5)])
    ema, target = EMA(untrained().network, 0.995), weighted(untrained().network, 6)
    for step in (0, 10, 5000):
        ema.update(target, step)
        out[f"ema {step}"] = brief(ema.network.input.weight)
    variants: dict[str, dict] = {
        "default": {}, "no ema": {"ema_decay": 0.0}, "no clipping": {"grad_clip": 0.0}, "decay": {"weight_decay": 0.5},
        "tight clipping": {"grad_clip": 0.01}, "constant": {"lr_schedule": "constant"}, "l2": {"loss": "l2"},
        "no dropout": {"dropout": 0.0}, "no self": {"self_weight": 0.0}, "no topology": {"topology_weight": 0.0},
        "cosine betas": {"beta_schedule": "squaredcos_cap_v2"},
        **{form: {"topology_form": form} for form in TOPOLOGY_FORMS[1:]},
        "many steps": {"train_steps": 100, "learning_rate": 1e-4, "num_blocks": 1},
    }
    test, test_text, test_clip = toy(10, 12, 1)
    for name, values in variants.items():
        val = (test, test_text[test_clip]) if name == "default" else None
        link, history = train_bridge(replace(short, **values), audio, text, text_clip, seed=0, val=val, progress=False)
        mapped = link(test, generator=torch.Generator().manual_seed(1))
        out[f"fit {name}"] = numbers(len(history), history.iloc[0].tolist(), history.iloc[-1].tolist()) + brief(mapped)
        for k, n in ((0, 1), (50, 1), (50, 5), (800, 5)) if name == "default" else ():
            for add_noise in (True, False):
                out[f"map {k} {n} {add_noise}"] = brief(link(test, k, n, add_noise, torch.Generator().manual_seed(2)))
    return out


def peer_values() -> Values:
    out: Values = {}
    audio, text, text_clip = toy()
    test, test_text, _ = toy(10, 12, 1)
    changed = (
        ("projection", {"scale": 5.0}), ("ridge", {"alpha": 2.0}), ("pls_head", {"num_directions": 4}),
        ("whitening_colouring", {"shrinkage": 0.4}), ("c3", {"noise_variance": 0.1}),
        ("regression_mlp", {"loss": "l2"}))
    for name, values in (*((name, {}) for name in REGISTRY), *changed):
        system = REGISTRY[name]
        budget = {"train_steps": 4, "batch_size": 16} if system.trained else {}
        peer = build(name, **budget, **values).fit(audio, text, text_clip, seed=1)
        given = test_text if name == "text_to_audio" else test
        label = " ".join([name, *(f"{key}={value}" for key, value in values.items())])
        out[label] = numbers(peer.decoder_noise_variance, peer.num_parameters, peer.text_radius, peer.audio_mean[:3],
            peer.text_mean[:3])
        for space in ("text", "centred") if system.centred else ("text",):
            out[f"{label}, {space} space"] = brief(peer(given, space=space), peer(given, noise_seed=1, space=space))
        if system.trained and not values:
            plain = asdict(BridgeConfig())
            recipe_of_its_own = {key: value for key, value in asdict(system.defaults).items() if value != plain[key]}
            out[f"{label}, fit"] = numbers(str(recipe_of_its_own), system.betas,
                peer.history.drop(columns="val_pair_cosine").iloc[-1].tolist())
            weighted(peer.network)      # a few steps leave a network that hardly sees its noise level
            out[f"{label}, other weights"] = brief(peer(given))
            if name == "diffusion_bridge":
                centred = [peer.map_text(test_text, *level) for level in ((), (100,))]
                out["map_text, centred space"] = brief(*centred)
                out["map_text, text space"] = brief(*(uncentre(x, peer.text_mean, peer.text_radius) for x in centred))
            peer.set_inference(start_timestep=30, num_inference_steps=2, add_noise=False)
            out[f"{label}, called otherwise"] = brief(peer(given))
    inside = centre(test_text, text.mean(0))
    out["centre and back"] = brief(inside, uncentre(inside, text.mean(0), 0.7))
    return out


def decoder_values() -> Values:
    out: Values = {}
    captions = [f"{caption} {word}" for caption in CAPTIONS[:4] for word in ("now", "again", "far away")]
    embeddings = toy(30, len(captions), 1)[0]
    variants: dict[str, dict] = {
        "cosine": {}, "constant": {"lr_schedule": "constant"}, "accumulated": {"gradient_accumulation_steps": 2},
        "prefix 2": {"prefix_length": 2}, "no clipping": {"grad_clip": 0.0, "lora_dropout": 0.0},
        "decay": {"weight_decay": 0.5, "lora_r": 2},
    }
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        tiny_language_model(Path(folder))
        for name, values in variants.items():
            budget = {"train_steps": 5, "learning_rate": 3e-3, "warmup_steps": 2, "validate_every": 2}
            config = tiny_config(Path(folder), **budget, **values)
            captioner = LLMCaptioner(D, config, seed=1)
            if name == "cosine":
                out["captioner"] = numbers(captioner(embeddings, captions), captioner.caption_ids(captions[:1]))
                out["context"] = brief(captioner.context(embeddings[:2])[0])
                total = shake(captioner)(embeddings, captions, reduction="sum")
                out["captioner, random lora"] = numbers(total, captioner.generate(embeddings[:2]))
                captioner = LLMCaptioner(D, config, seed=1)
            history = train_captioner(captioner, embeddings, captions, seed=1, val=(embeddings[:5], captions[:5]))
            loss, state = caption_loss(captioner, embeddings, captions, batch_size=5), captioner.trainable_state()
            out[f"{name}, fit"] = numbers(history.drop(columns="val_score").to_numpy(), loss,
                [value.double().abs().sum() for value in state.values()])
            for beams in (1, 2):
                out[f"{name}, {beams} beams"] = captioner.generate(embeddings[:4], num_beams=beams)
        out["learning_rate"] = numbers([captioner_learning_rate(config, step) for step in range(5)])
    sampler = BucketSampler([5 + i * 7 % 13 for i in range(70)], 4, 0)
    out["batches"] = numbers(sampler.batches_per_epoch, *(sampler[i] for i in (0, 1, 2, 20)))
    return out


def vector_values() -> Values:
    # from_pretrained("mini") takes bfloat16 where the CPU has it
    encoder = ClapEncoder(MiniClapBackend(MiniClap.from_pretrained(MINI_FOLDER), "", "cpu", "float32"))
    profile, out = get_profile("mini"), {}
    for name, places in {"test": (0, 3, 11, 300), "train": (27, 38, 55, 700)}.items():   # some cut; train 55 is scaled
        split = load_split(profile, name)
        sounds = [split.waveform(place) for place in places]
        rows = encoder.embed_audio(sounds), encoder.embed_text([split.captions[place][0] for place in places])
        for place, sound, audio, text in zip(places, sounds, *rows, strict=True):
            sizes = [np.abs(part.astype(float)).sum() for part in (sound, sound[-200:])]
            out[f"{split.clip_ids[place]}, sound"] = numbers(sizes, 1000 * sound[:4].astype(float))
            out[f"{split.clip_ids[place]}, audio"] = numbers(audio.sum(), audio[:8])
            out[f"{split.clip_ids[place]}, text"] = numbers(text.sum(), text[:8])
    tone = (0.3 * np.sin(np.arange(530_000) * 0.05) * np.linspace(1, 0.1, 530_000)).astype(np.float32)      # 12 s
    out["a tone of 44.1 kHz"] = numbers(np.abs(check_waveform(tone, 44_100).astype(float)).sum(),
        encoder.embed_audio([tone], 44_100)[0, :8])
    return out


def toy_split(clips: int = 60) -> tuple[Embeddings, list[frozenset[str]], list[tuple[str, ...]]]:
    """Vectors with two captions a clip, labels and recordings of the clips."""
    audio, text, text_clip = toy(40, clips, 2)
    rng = np.random.default_rng(1)
    labels = [frozenset(f"label {i}" for i in rng.choice(12, 2, replace=False)) for _ in range(clips)]
    clusters = [tuple(f"recording {i}" for i in rng.integers(0, 40, 2)) for _ in range(clips)]
    ids, captions = [f"clip {i}" for i in range(clips)], [f"caption {i}" for i in range(len(text))]
    return Embeddings("test", ids, audio, text, text_clip, captions, []), labels, clusters


def intervals(rows: list[dict]) -> Values:
    ends = ("value", "sd", "ci_low", "ci_high", "clip_ci_low", "clip_ci_high")
    return {f"{row['system']}, {row['metric']}": numbers([row.get(end) for end in ends], row["n_items"], row["reason"])
            for row in rows}


def gap_values() -> Values:
    split, labels, clusters = toy_split()
    means = split.audio.mean(0), split.text.mean(0)
    reference, centred = make_reference(split, labels), make_reference(split, None, means)
    shifted = F.normalize(split.audio + means[1] - means[0], dim=1)
    raw, few = split.audio.numpy(), toy_split(10)[0]
    sets = {"raw": (raw, reference), "shifted": (shifted.numpy(), reference), "floor": text_floor(split, reference),
            "centred": (centre(split.audio, means[0]).numpy(), centred),
            "few": (few.audio.numpy(), make_reference(few))}
    weights = np.random.default_rng(2).integers(0, 3, (2, 60))
    out = {f"{name}, {metric}": numbers(value)
           for name, (vectors, texts) in sets.items() for metric, value in gap_metrics(vectors, texts).items()}
    out |= {f"weighted, {metric}": numbers(value) for metric, value in gap_metrics(raw, reference, weights).items()}
    out["bandwidths"] = numbers(reference.bandwidth, centred.bandwidth)
    out["other settings"] = numbers(gap_length(raw, reference.text, group_size=1),
        *(metric() for metric in separability_functions(raw, reference.text, seed=1).values()))
    draws = make_draws(clusters, 60)
    runs = [(seed, k, F.normalize(shifted + 0.1 * normal(50 + 10 * seed + k, 60, D), dim=1).numpy())
        for seed in (0, 1) for k in (0, 1)]
    noisy = F.normalize(split.audio + 0.1 * normal(9, 60, D), dim=1).numpy()
    ours, base = (score_system(name, mapped, reference, draws, heavy_samples=50)
                  for name, mapped in (("ours", runs), ("base", [(0, 0, noisy)])))
    out |= intervals(ours.rows(each_run=False)) | intervals(paired_difference(ours, base))
    stable = ("pair_cosine_", "rmg_", "recall_at_10_")      # others divide by what comes near 0
    out |= intervals([row for row in paired_difference(ours, base, relative=True) if row["metric"].startswith(stable)])
    masked = score_system("masked", runs, reference, draws, mask=np.arange(60) % 3 > 0, heavy_samples=0)
    return out | intervals(masked.rows(each_run=False))


def bootstrap_values() -> Values:
    clusters, out = toy_split()[2], {}
    for seed in (0, 1):
        draws = make_draws(clusters, 100, seed)
        for part, values in asdict(draws).items():
            out[f"{part}, seed {seed}"] = numbers(values[:4], values.sum())
    rng = np.random.default_rng(3)
    counts = ClipCounts(rng.integers(1, 9, (60, 2)).astype(float), lambda sums: sums[:, 0] / sums[:, 1])
    holed = np.where(rng.random(60) < 0.2, np.nan, rng.random(60))
    runs = [(seed, 0, {"mean": rng.random(60) + seed, "ratio": counts, "holed": holed, "absent": np.full(60, np.nan)})
        for seed in (0, 1, 2)]
    ours, base = score_clips("ours", runs, draws), score_clips("base", runs[:1], draws)
    out |= intervals(ours.rows(each_run=False)) | intervals(paired_difference(ours, base))
    return out | intervals(paired_difference(ours, base, relative=True))


def caption_values() -> Values:
    given = json.loads(GOLDENS.read_text(encoding="utf-8"))["CAPTION_METRICS"]["given"]
    scores = score_captions(given["candidates"], given["references"], strict=False)
    known = [metric for metric in METRICS if not metric.startswith("spi")]     # not every machine has SPICE's models
    out = {metric: numbers(scores.corpus[metric], scores.clips[metric][:5], scores.reasons.get(metric, ""))
        for metric in known}
    by_metric = {metric: value for metric, value in scores.for_bootstrap().items() if metric in known}
    draws = make_draws([(f"clip {i // 2}",) for i in range(len(given["candidates"]))], 60)
    return out | intervals(score_clips("bootstrap", [(0, 0, by_metric)], draws).rows(each_run=False))


GROUPS: dict[str, Callable[[], Values]] = dict(zip(RECIPES, (
    bridge_values, peer_values, decoder_values, vector_values, gap_values, bootstrap_values, caption_values),
    strict=True))


# --------------------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize("name", GROUPS)
def test_values_move_only_with_the_recipe(name, one_thread):
    entry = json.loads(GOLDENS.read_text(encoding="utf-8"))[name]
    assert not (wrong := problem(name, entry, GROUPS[name](), recipe(name))), wrong


@pytest.mark.parametrize(("change", "number", "reason", "message"), [
    ({}, 1, {}, ""), ({"a": [1.0, 2.00001, "x", None]}, 1, {}, ""),
    ({"a": [1.0, 2.0001, "x", None]}, 1, {}, "raise BRIDGE_RECIPE"),
    ({"a": [1.0, 2.0, "y", None]}, 1, {}, "1 of 2 values moved: a; restore"),
    ({"a": [1.0, 2.0, "x", 0.0]}, 1, {}, "restore the arithmetic"),
    ({"a": [1.0, 2.0]}, 1, {}, "restore"), ({"c": [1.0]}, 1, {}, "restore"), ({"b": [4.0]}, 2, {}, "goldens are of 1"),
    ({}, 2, {}, "raised but nothing moved"), ({}, 2, {"2": "a fix for GPUs"}, ""),
    ({}, 3, {"2": "a fix for GPUs"}, "nothing moved"),
])
def test_a_moved_value_and_a_raised_number_are_seen(change, number, reason, message):
    values = {"a": [1.0, 2.0, "x", None], "b": [3.0]}
    wrong = problem("BRIDGE", {"recipe": 1, "values": values, "reason": reason}, values | change, number)
    assert message in wrong and bool(wrong) == bool(message)


def write() -> None:
    """Write goldens.json anew; what the rules forbid is refused, names that are new or gone are not."""
    torch.set_num_threads(1)
    stored = json.loads(GOLDENS.read_text(encoding="utf-8"))
    for name, values in GROUPS.items():
        entry, found = stored.get(name, {}), values()
        old = entry.get("values", {})
        shared = found.keys() & old.keys()
        before = {"recipe": entry.get("recipe", 0), "values": {key: old[key] for key in shared},
            "reason": entry.get("reason", {})}
        wrong = problem(name, before, {key: found[key] for key in shared}, recipe(name)) if shared else ""
        if wrong and "write them anew" not in wrong:
            raise SystemExit(wrong)
        stored[name] = {**entry, "recipe": recipe(name), "values": found}
    lines = [f'"{name}": {{"recipe": {entry["recipe"]},'
        + "".join(f'\n "{part}": {json.dumps(entry[part])},' for part in ("reason", "given") if part in entry)
             + ' "values": {\n' + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key,
                 value in entry["values"].items()) + "}}"
             for name, entry in stored.items()]
    GOLDENS.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
