"""Build the scenes and captions of data/mini from its recordings (notebook A1 explains the rules).

    python data/mini/build_corpus.py                     # writes this folder's own files again
    python data/mini/build_corpus.py FOLDER --seed 1     # a corpus of your own; FOLDER/recordings must be there

Reads recordings/recordings.csv and recordings/labels.csv. Writes scenes.csv, train.csv, val.csv and test.csv. One seed
gives the same bytes everywhere. ``dl.data.mix_scene`` makes the sound of a scene. All rules are [ours].
"""
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from dl.data import source_stem
from dl.store import atomic_write

LONGEST_S = 10.0                                    # s, CLAP's window [paper~]
SCENE_COUNTS = {"train": 6000, "val": 500, "test": 600}
EVENT_SHARES = (0.25, 0.55, 0.20)                   # scenes with one, two and three recordings
LAYOUTS = {1: ("alone",), 2: ("sequence", "together", "background"), 3: ("sequence", "background")}
TRAIN_FORMS = ("clause", "progressive", "paraphrase_1")     # columns of labels.csv; "nominal" has slots of its own
HELDOUT_FORM = "paraphrase_2"                       # never in a train caption

# {a}, {b}, {c}: a clause-like form of the event; {A}, {B}, {C}: its nominal form.
# The last event of a `background` scene is behind the others.
TEMPLATES = {
    ("alone", 1): ["{a}", "{a}", "{a}", "{A} can be heard", "{A}"],
    ("sequence", 2): [
        "{a} and then {b}", "{a}, then {b}", "{A} followed by {B}", "{a} before {b}", "after {A}, {b}",
        "first {a}, then {b}"],
    ("together", 2): [
        "{a} while {b}", "{a} as {b}", "{a} and {b}", "{A} along with {B}", "{A} and {B} at the same time"],
    ("background", 2): [
        "{a} with {B} in the background", "{a} over {B}", "{b} in the background while {a}", "{A} with {B} behind it"],
    ("sequence", 3): [
        "{a}, {b} and then {c}", "{a}, then {b}, then {c}", "{A} followed by {B} and {C}",
        "{a} before {b}, and finally {c}"],
    ("background", 3): [
        "{a} and then {b} with {C} in the background", "{a}, then {b}, over {C}",
        "{c} in the background while {a} and {b}", "{A} followed by {B}, with {C} behind it"],
}
HELDOUT_TEMPLATES = {                               # connectives never in a train caption
    ("alone", 1): ["we hear {A}"],
    ("sequence", 2): ["{a} and afterwards {b}", "{A} comes before {B}"],
    ("together", 2): ["{a} and meanwhile {b}", "{A} is mixed with {B}"],
    ("background", 2): ["{a} and in the distance {b}", "{A} against {B}"],
    ("sequence", 3): ["{a}, next {b}, and afterwards {c}"],
    ("background", 3): ["{a}, afterwards {b}, and in the distance {c}"],
}


def draw_recordings(pool: pd.DataFrame, uses: np.ndarray, size: int, rng: np.random.Generator) -> list[int]:
    """Places of ``size`` recordings with different labels, the least used first, with jitter."""
    chosen: list[int] = []
    for place in np.argsort(uses + rng.uniform(0, 1.5, len(pool))):
        if pool.label[place] not in {pool.label[other] for other in chosen}:
            chosen.append(int(place))
        if len(chosen) == size:
            break
    return chosen


def arrange(layout: str, seconds: list[float], rng: np.random.Generator) -> dict[str, str]:
    """Draw offsets (s), gains (dB), noise level (dBFS) and length (s, at most 10) of a scene.

    Args:
        seconds: length of each recording; in layout "background" the last one lies behind the others.
    """
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


def build_scenes(recordings: pd.DataFrame, split: str, n_scenes: int, seed: int = 0) -> pd.DataFrame:
    """Draw ``n_scenes`` scenes from the recordings of one split.

    Outside train every scene has a set of labels of its own. ``seen`` is 1 where all labels occur in train,
    ``shares_source`` where a recording has the source stem of a train recording (another stroke of the same bell).

    Returns:
        the columns of scenes.csv without ``heldout_captions``, all cells strings.

    Raises:
        ValueError: there are fewer sets of labels than scenes.
    """
    rng = np.random.default_rng([seed, ("train", "val", "test").index(split)])
    stems = pd.Series(map(source_stem, recordings.source_package, recordings.source_path), recordings.index)
    is_train = recordings.split == "train"
    train_labels, train_stems = set(recordings.label[is_train]), set(stems[is_train])
    pool = recordings.assign(stem=stems)[recordings.split == split].reset_index(drop=True)
    uses, label_sets, rows = np.zeros(len(pool)), set(), []
    for _ in range(100 * n_scenes + 1):
        if len(rows) == n_scenes:
            break
        size = int(rng.choice(3, p=EVENT_SHARES)) + 1
        chosen = draw_recordings(pool, uses, size, rng)
        layout = str(rng.choice(LAYOUTS[size]))
        if layout == "background":                            # the longest recording lies behind the others
            chosen.sort(key=lambda place: float(pool.seconds[place]))
        picked = pool.loc[chosen]
        labels = frozenset(picked.label)
        if split != "train" and labels in label_sets:
            uses[chosen] += 0.1                               # so that another set comes up
            continue
        label_sets.add(labels)
        uses[chosen] += 1
        rows.append({
            "youtube_id": f"mini-{split}-{len(rows):05d}", "split": split, "layout": layout,
            "recordings": ";".join(picked.clip_id), "labels": ";".join(picked.label),
            **arrange(layout, [float(cell) for cell in picked.seconds], rng),
            "noise_seed": str(rng.integers(2**31)),
            "seen": str(int(labels <= train_labels)),
            "shares_source": "" if split == "train" else str(int(not train_stems.isdisjoint(picked.stem))),
        })
    if len(rows) < n_scenes:
        raise ValueError(f"only {len(rows)} of {n_scenes} scenes of split '{split}' "
                         "have a set of labels of their own; ask for fewer")
    return pd.DataFrame(rows).astype(str)


def compose_captions(scene: pd.Series, labels: pd.DataFrame, n_captions: int, rng: np.random.Generator,
                     heldout: bool = False) -> tuple[list[str], list[int]]:
    """Write ``n_captions`` different captions of a scene, each as another annotator might.

    An annotator chooses a connective for the layout and a form for every event, and leaves one of three events out in
    one of four captions.

    Args:
        scene: ``layout`` and ``labels`` of one row.
        labels: labels.csv indexed by label, with a column for each form.
        heldout: one of the captions uses the held-out paraphrase or connective.

    Returns:
        the captions, capitalised and without a full stop as in AudioCaps; the 1-based places of the held-out ones.
    """
    events, captions, marked = scene.labels.split(";"), [], []
    heldout_at = int(rng.integers(n_captions)) if heldout else -1
    for _ in range(50 * n_captions):
        if len(captions) == n_captions:
            break
        kept, strange = list(events), len(captions) == heldout_at
        if len(events) == 3 and not strange and rng.random() < 0.25:
            del kept[int(rng.integers(2))]
        new_connective = strange and rng.random() < 0.5
        templates = (HELDOUT_TEMPLATES if new_connective else TEMPLATES)[scene.layout, len(kept)]
        forms = TRAIN_FORMS
        if strange and not new_connective:                    # every event in the held-out form
            forms, templates = (HELDOUT_FORM,), [text for text in templates if text == text.lower()]
        slots = {}
        for letter, event in zip("abc", kept, strict=False):
            slots[letter] = labels.at[event, str(rng.choice(forms))]
            slots[letter.upper()] = labels.at[event, "nominal"]
        caption = str(rng.choice(templates)).format(**slots)
        caption = caption[0].upper() + caption[1:]
        if caption not in captions:
            captions.append(caption)
            marked += [len(captions)] * strange
    return captions, marked


def write_corpus(folder: Path, seed: int = 0) -> None:
    """Write scenes.csv and {train,val,test}.csv from the tables in ``folder/recordings``.

    Train scenes get one to five captions, val and test five, one of them held out (column ``heldout_captions``).
    """
    recordings = pd.read_csv(folder / "recordings/recordings.csv", dtype=str, keep_default_na=False)
    labels = pd.read_csv(folder / "recordings/labels.csv", dtype=str, keep_default_na=False).set_index("label")
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
        atomic_write(folder / f"{split}.csv", frame.to_csv(index=False, lineterminator="\n"))
    atomic_write(folder / "scenes.csv", pd.concat(tables).to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_corpus(arguments.folder, arguments.seed)
