"""The paper profile, end to end on stand-ins in the formats of the real things.

They are AudioCaps' CSVs and clips, a ClapModel and a Llama of random weights saved as hub folders, and a random
LAION-CLAP ``.pt``. The figures mean nothing; every joint between the parts is real.
"""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from test_captioner import tiny_language_model
from test_clap_backends import (  # noqa: F401, two of them are fixtures
    TINY_AUDIO,
    TINY_TEXT,
    laion_pt,
    make_hub_folder,
    make_tokenizer,
    roberta,
)

from dl.config import PROFILES, REPO, get_profile

QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}      # the same numbers wherever the test runs
CLIPS = {"train": 24, "val": 22, "test": 30}
GONE, BROKEN = ("test04_40", "test17_170"), "test09_90"
SOUNDS, ENDS = ("A dog barks", "Rain falls", "An engine idles", "A bell rings", "Birds sing"), (
    "", " twice", " far away", " in a hall", " and stops")
SETTINGS = """
[paper]
data_dir = "audiocaps"
encoder = "{encoder}"
seeds = [0, 1]
processes = 1
noise_seeds = [0]
bootstrap_samples = 50
[paper.bridge]
train_steps = 8
batch_size = 16
[paper.captioner]
language_model = "llama"
lora_dropout = 0.0
train_steps = 12
batch_size = 4
learning_rate = 3e-3
warmup_steps = 1
validate_every = 6
num_beams = 2
dtype = "float32"
max_new_tokens = 12
"""


def make_audiocaps(folder: Path) -> Path:
    """76 clips in AudioCaps' columns; in test two missing, a corrupt, a 9.9 s, a 12 s, an 8 kHz stereo one."""
    (folder / "audio").mkdir(parents=True)
    rng, number = np.random.default_rng(0), 0
    lengths, formats = {"test01_10": 9.9, "test02_20": 12.0}, (
        ("wav", None), ("flac", None), ("mp3", None), ("opus", "OPUS"))
    for split, count in CLIPS.items():
        rows = []
        for place in range(count):
            clip_id, start = f"{split}{place:02d}", f"{10 * place}"
            for text in range(1 if split == "train" else 5):
                number += 1
                rows.append((str(number), clip_id, start, SOUNDS[(place + text) % 5] + ENDS[place % 5]))
            name = f"{clip_id}_{start}"
            rate, (suffix, subtype) = 16_000, formats[place % 4]
            if name in GONE:
                continue
            if name == BROKEN:
                (folder / "audio" / f"{name}.wav").write_bytes(b"RIFF, but no sound")
                continue
            sound = np.arange(round(lengths.get(name, 1 + place % 3) * rate)) / rate
            wave = 0.3 * np.sin(2 * np.pi * 150 * 1.3 ** (place % 12) * sound) + 0.05 * rng.standard_normal(len(sound))
            if name == "test03_30":
                wave, rate, suffix = np.stack([wave[::2], 0.5 * wave[::2]], 1), 8_000, "wav"
            options = {"format": "OGG", "subtype": subtype} if subtype else {}
            soundfile.write(folder / "audio" / f"{name}.{suffix}", wave, rate, **options)
        pd.DataFrame(rows, columns=["audiocap_id", "youtube_id", "start_time", "caption"]).to_csv(
            folder / f"{split}.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """A folder with audiocaps/, clap/, llama/ and my.toml."""
    root = tmp_path_factory.mktemp("paper")
    make_audiocaps(root / "audiocaps")
    make_hub_folder(root / "clap", make_tokenizer(root / "tokenizer", 300), TINY_TEXT, TINY_AUDIO, projection_dim=24)
    tiny_language_model(root / "llama")
    (root / "my.toml").write_text(SETTINGS.format(encoder="clap"))
    return root


def run_all(root: Path, *arguments: str, settings: str | None = "my.toml", timeout: int = 600,
            **environment: str) -> subprocess.CompletedProcess:
    """``./run_all.sh --profile paper`` as a user calls it, with the stand-in's paths and results of its own."""
    own = {"DL_SETTINGS": str(root / settings)} if settings else {}
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                   "DL_RESULTS": str(root / "results"),
                   **QUIET, **own, **environment}
    return subprocess.run([REPO / "run_all.sh", "--profile", "paper", *arguments], check=False, capture_output=True,
                          text=True, timeout=timeout, env=environment)


def dl(root: Path, *arguments: str, processes: int = 1, results: str = "results",
       settings: str = "my.toml") -> subprocess.CompletedProcess:
    """``python -m dl ...`` in one process, or in several that meet through gloo."""
    start = [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, **QUIET, "DL_SETTINGS": str(root / settings), "DL_RESULTS": str(root / results)}
    done = subprocess.run([sys.executable, *start, "-m", "dl", *arguments, "--profile", "paper"], check=False,
                          cwd=REPO, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def finished(stand_in) -> Path:
    """results/paper after notebooks 02, 05, 07 and 10."""
    done = run_all(stand_in, "--only", "02", "05", "07", "10")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return stand_in / "results" / "paper"


def cells(notebook: Path) -> str:
    """All that the cells of an executed notebook printed."""
    outputs = [output for cell in json.loads(notebook.read_text())["cells"] for output in cell.get("outputs", [])]
    return "\n".join("".join(output.get("text", "")) for output in outputs
                     if output["output_type"] == "stream" and output["name"] == "stdout")


def embeddings(results: Path) -> dict:
    """The cached vectors of the three splits."""
    return {split: load_file(results / "cache/embeddings" / f"{split}.safetensors") for split in CLIPS}


# ---------------------------------------------------------------------------------------------------------- end to end
def test_the_unchanged_notebooks_run_on_audiocaps(finished):
    """Every joint from CSV to report: counts, both networks that were named, captions, the report."""
    usable = {**CLIPS, "test": CLIPS["test"] - len(GONE) - 1}
    for split, tensors in embeddings(finished).items():
        assert tensors["audio"].shape == (usable[split], 24), split
        assert tensors["text"].shape == (usable[split] * (1 if split == "train" else 5), 24), split
        assert tensors["audio"].unique(dim=0).shape[0] > 0.9 * usable[split], "sounds differ, so their vectors do"
    unusable = pd.read_csv(finished / "unusable_clips.csv")
    assert unusable[unusable.reason == "not on disk"].clip_id.tolist() == list(GONE)
    assert unusable[unusable.reason.str.contains("not readable")].clip_id.tolist() == [BROKEN] and len(unusable) == 3

    metrics = pd.read_csv(finished / "metrics.csv", dtype=str)
    assert set(metrics.dataset) == {"audiocaps"} and metrics.ids_sha256.notna().all()
    assert set(metrics[metrics.split == "test"].n_items) == {str(usable["test"])}

    captions = pd.read_csv(finished / "captions/zero_shot_beam2.csv", keep_default_na=False)
    said = captions[[column for column in captions if "_seed_" in column]]
    assert len(captions) == usable["test"] and said.shape[1] == 5
    assert (said.map(str.strip) != "").to_numpy().all()

    assert json.loads((finished / "checkpoints/captioner/config.json").read_text())["language_model"].endswith("llama")
    assert json.loads((finished / "checkpoints/bridge/config.json").read_text())["embed_dim"] == 24
    printed = cells(finished / "notebooks/02_encode_audio_and_text.ipynb")
    assert "| encoder " + str(finished.parents[1] / "clap") in printed, "the named encoder, no other"
    assert "AudioCaps' training clips and AudioSet" in (
        finished / "report.html").read_text(encoding="utf-8").replace("&#x27;", "'").replace("&#39;", "'")


def test_a_second_run_skips_all(stand_in, finished):
    done = run_all(stand_in, "--only", "02", "05", "07", "10", "--dry-run")
    assert done.stdout.count("SKIP") == 4 and "RUN " not in done.stdout, done.stdout


@pytest.fixture(scope="module")
def laion_settings(stand_in, laion_pt, roberta) -> str:  # noqa: F811
    """A random ``.pt`` of LAION-CLAP in place of the hub folder, with its tokenizer; few clips."""
    (stand_in / "pt.toml").write_text(
        SETTINGS.format(encoder=laion_pt) + "[paper.max_clips]\ntrain = 8\nval = 4\ntest = 24\n")
    shutil.copytree(roberta, laion_pt.with_suffix("") / "tokenizer")
    return "pt.toml"


@pytest.mark.slow
def test_laion_clap_itself_embeds_audiocaps(stand_in, laion_settings, laion_pt):  # noqa: F811
    """The official package: the ``.pt`` is converted without its code being run, and laion-clap opened."""
    done = dl(stand_in, "embed", results="pt", settings=laion_settings)
    assert f"{laion_pt.name}  sha256" in done.stdout and "1 unusable, 2 not on disk" in done.stdout, done.stdout
    found = embeddings(stand_in / "pt/paper")
    assert [tensors["audio"].shape for tensors in found.values()] == [(8, 512), (4, 512), (21, 512)]
    assert all(tensors["audio"].unique(dim=0).shape[0] > 3 for tensors in found.values())


@pytest.mark.slow
def test_every_notebook_runs_on_audiocaps(stand_in, finished, laion_settings):
    """The other default stages after those of ``finished``; and notebook 02 through laion-clap."""
    done = run_all(stand_in, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert {"table1.csv", "table2.csv", "ablations.csv", "comparison.csv", "claims.csv", "report.html"} <= {
        path.name for path in finished.iterdir()}
    done = run_all(stand_in, "--only", "02", settings=laion_settings, DL_RESULTS=str(stand_in / "pt"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


# --------------------------------------------------------------------------------------------------- several processes
def test_two_processes_embed_like_one(stand_in, finished):
    done = dl(stand_in, "embed", processes=2, results="two")
    assert done.stdout.count("in 2 process(es) on cpu") == 3 and "clips/s" in done.stdout, done.stdout
    one, two = embeddings(finished), embeddings(stand_in / "two/paper")
    for split in CLIPS:
        assert torch.allclose(one[split]["audio"], two[split]["audio"], atol=1e-5)
        assert torch.equal(one[split]["text"], two[split]["text"]) and torch.equal(
            one[split]["text_clip"], two[split]["text_clip"])
    assert (stand_in / "two/paper/unusable_clips.csv").read_bytes() == (finished / "unusable_clips.csv").read_bytes()
    assert not [path for path in (stand_in / "two/paper/cache/embeddings").iterdir() if path.is_dir()]


@pytest.mark.slow
def test_two_processes_fit_a_decoder_that_one_then_reads(stand_in, finished):
    """``dl fit`` in two processes: the weights of notebook 07 in one, under the name by which it looks for them."""
    shutil.copytree(finished / "cache/embeddings", stand_in / "fit/paper/cache/embeddings")
    done = dl(stand_in, "fit", "--decoder", "text", processes=2, results="fit")
    assert "12 steps" in done.stdout and "in 2 process(es)" in done.stdout, done.stdout
    (one,), (two,) = (list((results / "cache/captioners").glob("text-0-*.safetensors"))
                      for results in (finished, stand_in / "fit/paper"))
    assert one.name == two.name
    expected, found = load_file(one), load_file(two)
    assert all(torch.allclose(found[name], value, rtol=1e-2, atol=1e-4)
               for name, value in expected.items()) and found.keys() == expected.keys()
    before = two.stat().st_mtime_ns
    assert "in 1 process(es)" in dl(
        stand_in, "fit", "--decoder", "text", results="fit").stdout and two.stat().st_mtime_ns == before, "it is read"


# ------------------------------------------------------------------------------------------------ before anything runs
def test_without_data_and_weights_nothing_is_written(tmp_path):
    """Exit code 2 at once, with all that is missing, where it comes from, its size and its licence."""
    began = time.monotonic()
    done = run_all(tmp_path, settings=None, HF_HOME=str(tmp_path / "hub"), DL_RESULTS=str(tmp_path / "results"))
    assert done.returncode == 2 and time.monotonic() - began < 30
    for text in ("MISSING data: AudioCaps: train.csv, val.csv, test.csv", "MISSING encoder: laion/clap-htsat-unfused",
                 "MISSING language model: lmsys/vicuna-7b-v1.5", "aac-datasets-download", "hf download",
                 "43 GB", "13.5 GB", "academic use only", "Llama 2 Community License",
                 "DL_SETTINGS=my.toml", "nothing was run"):
        assert text in done.stderr, text
    assert list(tmp_path.rglob("*")) == [] and not (REPO / "results/paper").exists()


def test_stages_without_captions_need_no_language_model(stand_in):
    from dl.check import missing_assets

    profile = replace(PROFILES["paper"], data_dir=stand_in / "audiocaps", encoder=str(stand_in / "clap"))
    assert missing_assets(profile, captions=False) == []
    profile = replace(profile, captioner=replace(profile.captioner, language_model=str(stand_in / "audiocaps")))
    assert [line.split(":")[0] for line in missing_assets(profile)] == ["MISSING language model"], \
        "a folder without a model in it"


def test_check_names_version_differences_and_overlap(stand_in):
    environment = {**os.environ, "DL_SETTINGS": str(stand_in / "my.toml"), "DL_RESULTS": str(stand_in / "results")}
    done = subprocess.run([sys.executable, "-m", "dl", "check", "--profile", "paper"], check=False, cwd=REPO,
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    for text in ("AudioCaps v1", "train 24 of 24, val 22 of 22, test 28 of 30 clips",
                 "train.csv has 24 captions, v1 has 49,838",
                 "test.csv has 30 clips, v1 has 975", "known overlap: LAION-CLAP"):
        assert text in done.stdout, text
    assert len(done.stdout.splitlines()) < 40, "one screen"


@pytest.mark.parametrize(("text", "message"), [
    ("[paper]\nseed = 1", r"\[paper\] has no 'seed': it takes data_dir, encoder"),
    ("[paper.captioner]\nbatch_size = '8'", r"\[paper.captioner\] batch_size = '8' is of the wrong type"),
    ("[huge]\n", "unknown profile 'huge'"), ("[paper\n", "is not TOML"),
    ("[paper]\nseeds = 3\n", r"seeds = 3 is of the wrong type"),
])
def test_settings_that_are_wrong_are_named(tmp_path, monkeypatch, text, message):
    (tmp_path / "my.toml").write_text(text)
    monkeypatch.setenv("DL_SETTINGS", str(tmp_path / "my.toml"))
    with pytest.raises(ValueError, match=message):
        get_profile("paper")
    monkeypatch.setenv("DL_SETTINGS", str(tmp_path / "absent.toml"))
    with pytest.raises(FileNotFoundError, match="which is no file"):
        get_profile("paper")


def test_settings_reach_one_profile_and_its_parts(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "my.toml").write_text(
        '[paper]\ndata_dir = "ac"\nencoder = "here"\nseeds = [7]\n'
        '[paper.captioner]\nlearning_rate = 1\nlanguage_model = "a/b"\n')
    monkeypatch.setenv("DL_SETTINGS", str(tmp_path / "my.toml"))
    profile = get_profile("paper")
    assert (profile.data_dir, profile.encoder, profile.seeds) == (tmp_path / "ac", str(tmp_path / "here"), (7,))
    assert (profile.captioner.learning_rate, profile.captioner.language_model, profile.captioner.num_beams) == (
        1.0, "a/b", 4)
    assert get_profile("mini") == PROFILES["mini"]
