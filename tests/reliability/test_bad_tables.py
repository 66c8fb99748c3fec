"""CSVs, ids, vectors and settings as people have them: read as they are meant, or refused with a remedy."""
from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from aac_metrics.eval import load_csv_file
from test_bad_sounds import Vectors, noise
from test_captioning import data, embeddings
from torch.nn.functional import normalize

from dl import check
from dl.__main__ import main
from dl.caption_metrics import write_candidates
from dl.clap import Embeddings, embed_split, load_embeddings
from dl.config import SPLITS, BridgeConfig, get_profile
from dl.data import CAPTION_COLUMNS, load_split, read_captions, recording_files
from dl.experiments import fit_system, score_table
from dl.peers import REGISTRY
from dl.store import MetricsFile, RowFile, key, save_checkpoint
from dl.train import train_bridge

HEADER = ",".join(CAPTION_COLUMNS)
LONG = "a dog barks and " * 625


def rows(*lines: str) -> bytes:
    return "\n".join([HEADER, *lines, ""]).encode()


# what it is: the bytes of val.csv, and the captions that must come out, or the words of the refusal
TABLES: dict[str, tuple[bytes, list[str] | str]] = {
    "no bytes": (b"", "column audiocap_id, youtube_id, start_time, caption is missing"),
    "header only": (rows(), "holds no captions"),
    "a column missing": (b"audiocap_id,youtube_id,caption\n1,a,A dog\n", "column start_time is missing; the columns"),
    "semicolons": (HEADER.replace(",", ";").encode() + b"\n1;a;0;A dog barks\n", "is missing; the columns are"),
    "a duplicate id": (rows("1,a,0,A dog barks", "1,b,0,A cat"), "audiocap_id 1 stands 2 times; ids are unique"),
    "an empty caption": (rows("1,a,0,A dog", "2,b,0,  "), "row 3 has an empty caption; fill it in or remove the row"),
    "no youtube_id": (rows("1,,0,A dog barks"), "row 2 has no youtube_id"),
    "no start_time": (rows("1,a,,A dog barks"), "row 2 has no youtube_id or no start_time; fill it in"),
    "Latin-1": (rows("1,a,0,Voegel").replace(b"oe", b"\xf6"), "is not in UTF-8 (byte 49); save it as 'CSV UTF-8'"),
    "UTF-16": ((HEADER + "\n1,a,0,A dog barks\n").encode("utf-16"), "is not in UTF-8"),
    "an unquoted comma in the first row": (rows("1,a,0,A dog, a cat", "2,b,0,Rain"), "row 2 has 5 cells, the"),
    "an unquoted comma in a later row": (rows("1,a,0,Rain", "2,b,0,A dog, a cat"), "row 3 has 5 cells, the header 4"),
    "a row cut off": (rows("1,a,0,Rain", "2,b"), "row 3 has 2 cells, the header 4"),
    "a quote that never ends": (rows('1,a,0,"A dog', "2,b,0,Rain"), "is not a CSV (unexpected end of data)"),
    "a quote in the middle": (rows('1,a,0,"A dog" barks'), "is not a CSV"),
    "a caption of 200,000 letters": (rows("1,a,0," + "x" * 200_000), "is not a CSV (field larger than field limit"),
    "a binary file": (bytes(range(256)), "is not in UTF-8"),
    "a byte order mark": (b"\xef\xbb\xbf" + rows("1,a,0,Rain"), ["Rain"]),
    "line ends of Windows": (rows("1,a,0,Rain", "2,a,0,Wind").replace(b"\n", b"\r\n"), ["Rain", "Wind"]),
    "line ends of old Macs": (rows("1,a,0,Rain").replace(b"\n", b"\r"), ["Rain"]),
    "blank lines": (rows("1,a,0,Rain", "", "2,a,0,It rains", "", ""), ["Rain", "It rains"]),
    "quotes and commas": (rows('1,a,0,"A ""dog"", then a cat"'), ['A "dog", then a cat']),
    "a line end in a caption": (rows('1,a,0,"A dog\nbarks"'), ["A dog\nbarks"]),
    "emoji": (rows("1,a,0,A dog 🐕 barks"), ["A dog 🐕 barks"]),
    "10,000 letters": (rows(f"1,a,0,{LONG}"), [LONG]),
    "a formula": (rows('1,a,0,"=HYPERLINK(""http://x"",""click"")"'), ['=HYPERLINK("http://x","click")']),
    "a tag": (rows("1,a,0,<script>alert(1)</script>"), ["<script>alert(1)</script>"]),
    "NA and null": (rows("1,a,0,NA", "2,a,0,null", "3,a,0,nan"), ["NA", "null", "nan"]),
    "identical captions": (rows("1,a,0,Rain", "2,a,0,Rain", "3,a,0,Rain"), ["Rain", "Rain", "Rain"]),
    "more columns": (b"x," + HEADER.encode() + b"\n9,1,a,0,Rain\n", ["Rain"]),
}


def audiocaps(folder: Path, content: bytes) -> Path:
    """An AudioCaps folder with the sound a_0 whose val.csv has that content; train and test are good."""
    (folder / "audio").mkdir(parents=True)
    soundfile.write(folder / "audio/a_0.wav", noise(1), 48_000)
    for split in SPLITS:
        (folder / f"{split}.csv").write_bytes(content if split == "val" else rows("1,a,0,A tone"))
    return folder


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_is_read_as_it_is_meant_or_refused(results_root, tmp_path, ledger, kind):
    content, expected = TABLES[kind]
    profile = get_profile("paper", data_dir=audiocaps(tmp_path, content))
    with ledger.attempt("bad input", "table"):
        other = embed_split(profile, load_split(profile, "test"), Vectors(), progress=False)
        assert other.captions == ["A tone"], "the other splits are done"
        if isinstance(expected, list):
            split = load_split(profile, "val")
            assert split.captions == [expected]
            assert embed_split(profile, split, Vectors(), progress=False).captions == expected
            return
        with pytest.raises(ValueError) as refused:
            load_split(profile, "val")
        message = str(refused.value)
        assert str(tmp_path / "val.csv") in message and expected in message and "\n" not in message
        assert load_embeddings(profile, "test").captions == ["A tone"], "what was computed stays"


@pytest.mark.parametrize("kind", ["no bytes", "a column missing", "semicolons", "Latin-1", "a binary file"])
def test_check_names_a_bad_table(results_root, tmp_path, monkeypatch, capsys, ledger, kind):
    """``python -m dl check`` reads them first: a line that begins with MISSING, and the checks after it are done."""
    monkeypatch.setattr(check, "CHECKS", [row for row in check.CHECKS if row[0] in ("data", "results")])
    profile = get_profile("paper", data_dir=audiocaps(tmp_path, TABLES[kind][0]))
    with ledger.attempt("bad input", "table"):
        assert check.check(profile) == 1
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("OK", "MISSING"))]
        assert lines[0].startswith("MISSING data: ") and lines[1].startswith("OK      results: ") and len(lines) == 2


# ---------------------------------------------------------------------------------------------------- ids and scenes
@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", "a/../../secret", "C:\\secret", "a\0b"])
def test_an_id_never_becomes_a_path(results_root, tmp_path, ledger, name):
    """An id is compared with the names of the files that are there; no path is made of it."""
    folder = audiocaps(tmp_path / "data/audiocaps", rows("1,a,0,A tone", f"2,{name},0,A secret"))
    soundfile.write(tmp_path / "secret_0.wav", noise(1), 48_000)
    profile = get_profile("paper", data_dir=folder)
    with ledger.attempt("bad input", "id"):
        split = load_split(profile, "val")
        assert split.clip_ids == ["a_0"] and split.missing == (f"{name}_0",)
        embed_split(profile, split, Vectors(), progress=False)
        assert {path.name for path in tmp_path.iterdir()} == {"data", "results", "secret_0.wav"}


def corpus(folder: Path, scene: str = "", file: str = "tone.wav") -> Path:
    """A folder in the layout of data/mini with the recording ``tone``, the good scene s1 and that of s2."""
    (folder / "recordings").mkdir(parents=True)
    soundfile.write(folder / "recordings/tone.wav", noise(1), 48_000)
    (folder / "recordings/recordings.csv").write_text(f"clip_id,file\ntone,{file}\n")
    (folder / "scenes.csv").write_text("youtube_id,recordings,offsets_s,gains_db,noise_dbfs,seconds,noise_seed\n"
                                       f"s1,tone,0.1,0,-60,2,1\n{scene}")
    (folder / "val.csv").write_bytes(rows("1,s1,0,A tone", "2,s2,0,Another tone"))
    return folder


@pytest.mark.parametrize("scene, words", [
    ("nothing,0.1,0,-60,2,1", "'nothing'"), ("tone,early,0,-60,2,1", "'early'"), ("tone,0.1,0,-60,2,one", "'one'"),
    ("tone;tone,0.1,0,-60,2,1", "zip()"), ("tone,99,0,-60,2,1", ""), ("tone,-5,0,-60,2,1", ""),
])
def test_a_scene_that_cannot_be_mixed_is_skipped_by_name(results_root, tmp_path, ledger, scene, words):
    profile = get_profile("smoke", data_dir=corpus(tmp_path, f"s2,{scene}\n"))
    with ledger.attempt("bad input", "scene"):
        e = embed_split(profile, load_split(profile, "val"), Vectors(), progress=False)
        skipped, = e.skipped
        assert e.clip_ids == ["s1_0"] and skipped.startswith("s2_0: its row of scenes.csv cannot be mixed")
        assert words in skipped and "git checkout" in skipped


def test_a_scene_that_is_not_there(tmp_path, ledger):
    missing = r"scenes\.csv: scene s2 of val\.csv is not in it; .*git checkout"
    with ledger.attempt("bad input", "scene"), pytest.raises(ValueError, match=missing):
        load_split(get_profile("smoke", data_dir=corpus(tmp_path)), "val")


@pytest.mark.parametrize("file", ["../../secret.wav", "/etc/passwd", "a/../../x.wav"])
def test_a_recording_stays_in_its_folder(tmp_path, ledger, file):
    leads = r"recordings\.csv: file .* leads out of .*recordings; recordings lie in it"
    with ledger.attempt("bad input", "id"), pytest.raises(ValueError, match=leads):
        recording_files(corpus(tmp_path, file=file))


# ------------------------------------------------------------------------------------------------------------ vectors
@pytest.mark.parametrize("where", ["audio", "text"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_vectors_that_are_no_vectors(ledger, where, value):
    e = embeddings("train")
    bad = {"audio": e.audio.clone(), "text": e.text.clone()}
    bad[where][3] = value
    remedy = "check the audio files" if value else "no direction: check the audio files"
    with ledger.attempt("bad input", "vectors"), pytest.raises(ValueError, match=f"{where} holds .*{remedy}"):
        trained(bad["audio"], bad["text"])


def trained(audio: torch.Tensor | None = None, text: torch.Tensor | None = None, **settings) -> None:
    e, config = embeddings("train"), BridgeConfig(**{"train_steps": 2, "batch_size": 4, **settings})
    train_bridge(config, e.audio if audio is None else audio, e.text if text is None else text, e.text_clip, seed=0,
                 progress=False)


SYSTEMS = ["raw", "mean_shift", "c3", "realign", "whitening_colouring", "projection", "nearest_text", "procrustes",
           "ridge", "pls_head", "diffusion_link"]


def alike(e: Embeddings, what: str) -> Embeddings:
    """The same clips with one caption everywhere, or one sound everywhere, or the first clip alone."""
    if what == "captions":
        return replace(e, text=e.text[:1].expand_as(e.text).clone(), captions=["Rain"] * len(e.captions))
    if what == "sounds":
        return replace(e, audio=e.audio[:1].expand_as(e.audio).clone())
    first = {name: getattr(e, name)[:1] for name in ("clip_ids", "audio", "text", "text_clip", "captions")}
    return replace(e, **first)


@pytest.mark.parametrize("what", ["captions", "sounds", "one clip"])
def test_splits_without_variety_give_figures_or_reasons(results_root, ledger, what):
    """Every metric of every system has a finite value or a reason; nothing is NaN in silence."""
    profile = get_profile("smoke", bridge=BridgeConfig(train_steps=2, batch_size=4), bootstrap_samples=5,
                          noise_seeds=(0,), seeds=(0,))
    with ledger.attempt("bad input", "split without variety"):
        test, file = alike(embeddings("test"), what), MetricsFile(profile)
        file.add(score_table(profile, SYSTEMS, embeddings("train"), test, data(test))[1])
        frame = file.frame()
        assert set(frame.system[frame.experiment == "gap"]) >= set(SYSTEMS) and len(frame) > 100
        silent = frame[frame.value.isna() & frame.reason.eq("")]
        assert silent.empty, silent[["system", "metric"]].to_string()


@pytest.mark.parametrize("what", ["captions", "sounds"])
def test_every_system_fits_a_training_split_without_variety_or_says_why(results_root, ledger, what):
    profile = get_profile("smoke", bridge=BridgeConfig(train_steps=2, batch_size=4))
    train = alike(embeddings("train"), what)
    some = normalize(torch.randn(3, train.audio.shape[1]), dim=1)
    for system in REGISTRY:
        with ledger.attempt("bad input", "split without variety"):
            try:
                assert torch.isfinite(fit_system(profile, system, train)(some, noise_seed=0)).all(), system
            except ValueError as error:
                assert "\n" not in str(error) and ": " in str(error), error


def test_odd_ids_come_back_from_the_cache(ledger, results_root):
    odd = ["a\nb", 'quote"', "\\", "\u2028", "🐕"]
    profile, e = get_profile("smoke"), embeddings("val", 5)
    with ledger.attempt("bad input", "vectors"):
        save_checkpoint(profile.cache_dir / "embeddings/val.safetensors",
                        {"audio": e.audio, "text": e.text, "text_clip": e.text_clip},
                        {"clip_ids": odd, "captions": e.captions, "skipped": e.skipped}, key("vectors", 1))
        again = load_embeddings(profile, "val")
        assert again.clip_ids == odd and np.array_equal(again.audio, e.audio)


# ------------------------------------------------------------------------------------------------------- result files
KEPT = {"experiment": "gap", "system": "raw", "split": "test", "seed": 0, "noise_seed": 0, "metric": "rmg",
        "value": 0.5, "n_items": 3}
EDITS: dict[str, Callable[[bytes], bytes]] = {
    "no bytes": lambda text: b"",
    "cut in a row": lambda text: text[:-40],
    "a column less": lambda text: text.replace(b"metric,value", b"value", 1),
    "a column more": lambda text: text.replace(b"metric,value", b"metric,mine,value", 1),
    "semicolons": lambda text: text.replace(b",", b";"),
    "Latin-1": lambda text: text.replace(b"raw", b"r\xe4w"),
    "a cell more": lambda text: text.rstrip(b"\n") + b",0.7\n",
    "a binary file": lambda text: bytes(range(256)),
}


@pytest.mark.parametrize("kind", EDITS)
def test_metrics_that_were_edited_are_never_overwritten(results_root, ledger, kind):
    """Adding a row reads what is there and writes it back: what cannot be read must not be lost by it."""
    file = MetricsFile(get_profile("smoke"))
    file.add([KEPT])
    edited = EDITS[kind](file.path.read_bytes())
    file.path.write_bytes(edited)
    with ledger.attempt("bad input", "result file"):
        for call in (lambda: file.add([KEPT | {"seed": 1}]), lambda: file.remove(system="raw"), file.frame):
            with pytest.raises(ValueError, match=r"metrics\.csv is not as it was written .*: get it back with git"):
                call()
        assert file.path.read_bytes() == edited


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, ""])
def test_a_figure_that_is_none_needs_a_reason(results_root, ledger, value):
    with ledger.attempt("bad input", "result file"), pytest.raises(ValueError, match="raw/rmg has no value and no"):
        MetricsFile(get_profile("smoke")).add([{**KEPT, "value": value}])


@pytest.mark.parametrize("caption", [
    "=1+1", "+cmd", "-x", "@SUM(A1)", "'quoted", "a [b] c", "[]", "['x']", "a,b \"c\"", "<b>", "tab\there", "🐕", LONG,
], ids=lambda text: text[:9])
def test_captions_come_back_from_a_candidates_file_and_no_cell_is_a_formula(tmp_path, ledger, caption):
    with ledger.attempt("bad input", "caption in a file"):
        runs = {("raw", "text"): [(0, 0, [caption, "Rain"])]}
        path = write_candidates(tmp_path / "c.csv", ["a", "b"], runs, [[caption, "Rain"], ["Rain"]])
        again, references = load_csv_file(path, "raw_seed_0", ("caption_1", "caption_2"))
        expected = [" ".join(caption.split()), "Rain"]
        assert [text.removeprefix("'") for text in again] == expected and references[0] == expected
        with open(path, newline="", encoding="utf-8") as file:
            assert not [cell for row in csv.reader(file) for cell in row if cell[:1] in ("=", "+", "-", "@")]


# ----------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize("arguments, words", [
    ("run --profile huge", "invalid choice: 'huge'"), ("run --only 99", "choose one of"), ("caption", "FILE"),
    ("run --seeds 0", "at least 1"), ("run --only 00 -p dpeth 3", "leave -p dpeth out"), ("delete", "'delete'"),
    ("run --form 02", "unrecognized arguments"), ("run -p profile mini --only 00", "by --profile"),
])
def test_a_wrong_call_ends_with_what_to_write_instead(results_root, capsys, ledger, arguments, words):
    with ledger.attempt("bad input", "setting"):
        try:
            code = main(arguments.split())
        except SystemExit as exit_:
            code = exit_.code
        err = capsys.readouterr().err
        assert code == 2 and words in err and "Traceback" not in err and not results_root.exists()


@pytest.mark.parametrize("call, words", [
    (lambda: get_profile("mini", bootstrap=3), "unknown profile field .*known are"),
    (lambda: get_profile("maxi"), "choose one of"),
    (lambda: load_split(get_profile("smoke"), "dev"), "choose one of train, val, test"),
    (lambda: trained(loss="l3"), "choose"),
    (lambda: trained(lr_schedule="linear"), "choose constant or cosine"),
    (lambda: trained(topology_form="ring"), "choose"),
    (lambda: trained(start_timestep=5000), "start_timestep"),
    (lambda: RowFile("x.csv", ("a",), ("a",)).add([{"b": 1}]), "unknown columns .*known are a"),
    (lambda: read_captions(Path("nowhere.csv")), "is missing: it must hold the columns"),
])
def test_a_wrong_setting_names_the_right_ones(ledger, call, words):
    with ledger.attempt("bad input", "setting"), pytest.raises((ValueError, OSError), match=words) as refused:
        call()
    assert "\n" not in str(refused.value)
