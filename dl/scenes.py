"""Scenes of ``data/mini``: one to three real recordings mixed into at most 10 s, with captions composed from their labels.

A scene is a row of ``scenes.csv``: which recordings, when each starts (s), how loud (dB), and a noise floor (dBFS).
:func:`mix_scene` turns the row into sound, the same samples every time. :func:`build_scenes` draws the rows and
:func:`compose_captions` writes what five annotators might have said. Everything here is [ours].
"""
from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd

from dl.data import SAMPLING_RATE
from dl.results import atomic_write

LONGEST_S = 10.0                                    # s, CLAP's window [paper~]
FADE_S = 0.02                                       # s, where a recording is cut at the end of its scene
SCENE_COUNTS = {"train": 6000, "val": 500, "test": 600}
EVENT_SHARES = (0.25, 0.55, 0.20)                   # scenes with one, two and three recordings
LAYOUTS = {1: ("alone",), 2: ("sequence", "together", "background"), 3: ("sequence", "background")}
TRAIN_FORMS = ("clause", "progressive", "paraphrase_1")   # columns of labels.csv; "nominal" has slots of its own
HELDOUT_FORM = "paraphrase_2"                       # never in a train caption

# {a}, {b}, {c}: a clause-like form of the event; {A}, {B}, {C}: its nominal form. The last `background` event is behind the others.
TEMPLATES = {
    ("alone", 1): ["{a}", "{a}", "{a}", "{A} can be heard", "{A}"],
    ("sequence", 2): ["{a} and then {b}", "{a}, then {b}", "{A} followed by {B}", "{a} before {b}", "after {A}, {b}", "first {a}, then {b}"],
    ("together", 2): ["{a} while {b}", "{a} as {b}", "{a} and {b}", "{A} along with {B}", "{A} and {B} at the same time"],
    ("background", 2): ["{a} with {B} in the background", "{a} over {B}", "{b} in the background while {a}", "{A} with {B} behind it"],
    ("sequence", 3): ["{a}, {b} and then {c}", "{a}, then {b}, then {c}", "{A} followed by {B} and {C}", "{a} before {b}, and finally {c}"],
    ("background", 3): ["{a} and then {b} with {C} in the background", "{a}, then {b}, over {C}", "{c} in the background while {a} and {b}",
                        "{A} followed by {B}, with {C} behind it"],
}
HELDOUT_TEMPLATES = {                                # connectives never in a train caption
    ("alone", 1): ["we hear {A}"],
    ("sequence", 2): ["{a} and afterwards {b}", "{A} comes before {B}"],
    ("together", 2): ["{a} and meanwhile {b}", "{A} is mixed with {B}"],
    ("background", 2): ["{a} and in the distance {b}", "{A} against {B}"],
    ("sequence", 3): ["{a}, next {b}, and afterwards {c}"],
    ("background", 3): ["{a}, afterwards {b}, and in the distance {c}"],
}


def mix_scene(scene: pd.Series, read_recording: Callable[[str], np.ndarray]) -> np.ndarray:
    """Mix one row of ``scenes.csv``.

    Args:
        scene: ``recordings``, ``offsets_s``, ``gains_db`` (each joined by ";"), ``noise_dbfs``, ``seconds``, ``noise_seed``.
        read_recording: gives a recording by id as float32 (samples,), mono, 48 kHz.

    Returns:
        float32 (seconds * 48,000,), peak at most 1: sum_i 10^(gain_i / 20) r_i(t - offset_i) + noise, scaled down if it would clip.

    Raises:
        ValueError: a cell that is no number, lists of different lengths, a recording that would start outside the scene.
    """
    samples = round(float(scene.seconds) * SAMPLING_RATE)
    noise = np.random.default_rng(int(scene.noise_seed)).standard_normal(samples, dtype=np.float32)
    mix = noise * np.float32(10 ** (float(scene.noise_dbfs) / 20))
    for clip_id, offset, gain in zip(scene.recordings.split(";"), scene.offsets_s.split(";"), scene.gains_db.split(";"), strict=True):
        start = round(float(offset) * SAMPLING_RATE)
        if not 0 <= start <= samples:
            raise ValueError(f"{clip_id} would start at {offset} s, outside the scene")
        sound = read_recording(clip_id)
        if len(sound) > samples - start:
            sound = sound[: samples - start].copy()
            fade = min(len(sound), round(FADE_S * SAMPLING_RATE))
            sound[len(sound) - fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
        mix[start: start + len(sound)] += sound * np.float32(10 ** (float(gain) / 20))
    return mix / max(1.0, float(np.abs(mix).max()))


def source_stem(source_package: str, source_path: str) -> str:
    """What takes of one source share: the package and path with every number struck out (for a SoundFont only the note)."""
    is_soundfont = ".sf2!" in source_path
    return f"{source_package}:" + re.sub(r"(?<=note=)\d+" if is_soundfont else r"\d+", "#", source_path)


def arrange(layout: str, seconds: list[float], rng: np.random.Generator) -> dict[str, object]:
    """Draw offsets (s), gains (dB) and the scene's length (s, at most 10) for recordings that last ``seconds`` each."""
    gains = rng.uniform(-6, 0, len(seconds))
    lead = rng.uniform(0.05, 0.4)
    if layout == "together":
        starts = [lead, lead + rng.uniform(0, 0.3)]
    else:
        foreground = seconds[:-1] if layout == "background" else seconds
        starts, at = [], lead + (rng.uniform(0.2, 0.8) if layout == "background" else 0.0)
        for length in foreground:
            starts.append(at)
            at += min(length, 8.5 / len(seconds)) + rng.uniform(0.1, 0.5)
        if layout == "background":
            starts.append(lead)
            gains[-1] = rng.uniform(-14, -8)
    end = max(start + length for start, length in zip(starts, seconds, strict=True))
    return {
        "offsets_s": ";".join(f"{start:.3f}" for start in starts),
        "gains_db": ";".join(f"{gain:.1f}" for gain in gains),
        "noise_dbfs": f"{rng.uniform(-70, -45):.1f}",
        "seconds": f"{min(LONGEST_S, end + rng.uniform(0.1, 0.4)):.3f}",
    }


def build_scenes(recordings: pd.DataFrame, split: str, n_scenes: int, seed: int = 0, unique_labels: bool | None = None) -> pd.DataFrame:
    """Draw ``n_scenes`` scenes from the recordings of one split.

    Recordings are used evenly; a scene never holds one label twice. Outside train the set of labels of every scene is
    unique. ``seen`` is 1 where all labels occur in train, ``shares_source`` is 1 where a recording has the source stem
    of a train recording (another stroke of the same bell).

    Returns:
        DataFrame in the columns of ``scenes.csv``, all cells strings.
    """
    rng = np.random.default_rng([seed, ("train", "val", "test").index(split)])
    train = recordings[recordings.split == "train"]
    train_labels = set(train.label)
    train_stems = set(map(source_stem, train.source_package, train.source_path))
    pool = recordings[recordings.split == split].reset_index(drop=True)
    uses = np.zeros(len(pool))
    unique = split != "train" if unique_labels is None else unique_labels
    label_sets: set[frozenset[str]] = set()
    rows: list[dict[str, object]] = []
    for attempt in count():
        if len(rows) == n_scenes:
            break
        if attempt > 100 * n_scenes:
            raise ValueError(f"only {len(rows)} of {n_scenes} scenes of split '{split}' have a set of labels of their own; ask for fewer")
        size = int(rng.choice(3, p=EVENT_SHARES)) + 1
        order = np.argsort(uses + rng.uniform(0, 1.5, len(pool)))                 # least used first, with jitter
        chosen: list[int] = []
        for index in order:
            if pool.label[index] not in {pool.label[other] for other in chosen}:
                chosen.append(int(index))
            if len(chosen) == size:
                break
        layout = str(rng.choice(LAYOUTS[size]))
        if layout == "background":                                                # the longest recording lies behind the others
            chosen.sort(key=lambda index: float(pool.seconds[index]))
        picked = pool.loc[chosen]
        labels = frozenset(picked.label)
        if unique and labels in label_sets:
            uses[chosen] += 0.1                                                   # so that another set comes up
            continue
        label_sets.add(labels)
        uses[chosen] += 1
        rows.append({
            "youtube_id": f"mini-{split}-{len(rows):05d}", "split": split, "layout": layout,
            "recordings": ";".join(picked.clip_id), "labels": ";".join(picked.label),
            **arrange(layout, [float(cell) for cell in picked.seconds], rng),
            "noise_seed": str(rng.integers(2**31)),
            "seen": str(int(labels <= train_labels)),
            "shares_source": "" if split == "train" else str(int(not train_stems.isdisjoint(map(source_stem, picked.source_package, picked.source_path)))),
        })
    return pd.DataFrame(rows).astype(str)


def compose_captions(scene: pd.Series, labels: pd.DataFrame, n_captions: int, rng: np.random.Generator,
                     heldout: bool = False) -> tuple[list[str], list[int]]:
    """Write ``n_captions`` different captions of a scene, each as another annotator might.

    An annotator chooses a connective for the layout and a form for every event, and in one of four scenes with three
    events leaves one of them out. With ``heldout`` one of the captions uses the held-out paraphrase or connective.

    Args:
        scene: ``layout`` and ``labels`` of one row.
        labels: ``labels.csv`` indexed by label, with a column for each form.

    Returns:
        The captions, capitalised without a full stop as in AudioCaps, and the 1-based places of the held-out ones.
    """
    events = scene.labels.split(";")
    heldout_at = int(rng.integers(n_captions)) if heldout else -1
    captions: list[str] = []
    marked: list[int] = []
    for _ in range(50 * n_captions):
        if len(captions) == n_captions:
            break
        kept, layout, strange = list(events), scene.layout, len(captions) == heldout_at
        if len(events) == 3 and not strange and rng.random() < 0.25:
            del kept[int(rng.integers(2))]
        new_connective = strange and rng.random() < 0.5
        templates = (HELDOUT_TEMPLATES if new_connective else TEMPLATES)[layout, len(kept)]
        forms = (HELDOUT_FORM,) if strange and not new_connective else TRAIN_FORMS
        if strange and not new_connective:
            templates = [text for text in templates if text == text.lower()]            # every event in the held-out form
        slots = {}
        for letter, event in zip("abc", kept, strict=False):
            slots[letter] = labels.at[event, str(rng.choice(forms))]
            slots[letter.upper()] = labels.at[event, "nominal"]
        caption = str(rng.choice(templates)).format(**slots)
        caption = caption[0].upper() + caption[1:]
        if caption in captions:
            continue
        captions.append(caption)
        if strange:
            marked.append(len(captions))
    return captions, marked


def write_corpus(data_dir: Path, seed: int = 0) -> None:
    """Write ``scenes.csv`` and ``{train,val,test}.csv`` from ``recordings/recordings.csv`` and ``recordings/labels.csv``.

    Train scenes get one to five captions, val and test five, one of them held out (column ``heldout_captions``: its
    1-based place). The same seed gives the same bytes.
    """
    recordings = pd.read_csv(data_dir / "recordings/recordings.csv", dtype=str, keep_default_na=False)
    labels = pd.read_csv(data_dir / "recordings/labels.csv", dtype=str, keep_default_na=False).set_index("label")
    tables = []
    for number, (split, n_scenes) in enumerate(SCENE_COUNTS.items()):
        rng = np.random.default_rng([seed, 1, number])
        scenes = build_scenes(recordings, split, n_scenes, seed)
        captions, heldout = [], []
        for _, scene in scenes.iterrows():
            n_captions = int(rng.integers(1, 6)) if split == "train" else 5
            texts, marked = compose_captions(scene, labels, n_captions, rng, heldout=split != "train")
            captions += [(scene.youtube_id, "0", text) for text in texts]
            heldout.append(";".join(map(str, marked)))
        tables.append(scenes.assign(heldout_captions=heldout))
        frame = pd.DataFrame(captions, columns=["youtube_id", "start_time", "caption"])
        frame.insert(0, "audiocap_id", [str((number + 1) * 100_000 + row) for row in range(len(frame))])
        atomic_write(data_dir / f"{split}.csv", frame.to_csv(index=False, lineterminator="\n"))
    atomic_write(data_dir / "scenes.csv", pd.concat(tables).to_csv(index=False, lineterminator="\n"))
