"""Readers under inputs that nobody thought of: no crash, no hang, bounded memory; an answer or one clear line."""
from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from aac_metrics.eval import load_csv_file
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_captioning import tiny_language_model

from dl.__main__ import literal
from dl.bridge import DiffusionLink
from dl.caption_metrics import write_candidates
from dl.captioner import LLMCaptioner
from dl.config import REPO, BridgeConfig, CaptionerConfig
from dl.data import CAPTION_COLUMNS, read_captions, read_table
from dl.store import RowFile, csv_text, key, load_checkpoint, save_checkpoint

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
CELLS = TEXT | st.sampled_from(["", '"', ",", "\n", "\r", "=1+1", "<script>", "../../x", "\0", "🐕", "[]", "['a']",
                                "NaN", "-inf", "1e999"])
ROWS = st.lists(st.lists(CELLS, max_size=6), max_size=6)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
NAMES = ["__metadata__", "about", "checkpoint", "sha256", "dtype", "shape", "data_offsets"]
HEADERS = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    TEXT | st.sampled_from(NAMES), inner, max_size=4), max_leaves=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def refused(error: Exception, path: Path) -> None:
    """The message is one line that names the file."""
    assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 2000, error


# ---------------------------------------------------------------------------------------------------------------- CSV
def test_any_bytes_as_a_table(folder, ledger):
    path = folder / "train.csv"

    @given(st.binary(max_size=300)
           | ROWS.map(lambda rows: "\n".join(map(",".join, [CAPTION_COLUMNS, *rows])).encode()))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with ledger.attempt("mutation", "table"):
            try:
                frame = read_captions(path)
                assert list(frame.columns) and frame.caption.str.strip().ne("").all() and frame.audiocap_id.is_unique
            except ValueError as error:
                refused(error, path)

    check()


def test_any_cells_come_back_as_they_were_written(folder, ledger):
    path = folder / "written.csv"

    @given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8))
    def check(rows: list[tuple[str, str]]) -> None:
        buffer = io.StringIO()
        csv.writer(buffer).writerows([("a", "b"), *rows])
        path.write_text(buffer.getvalue(), encoding="utf-8", newline="")
        with ledger.attempt("mutation", "table"):
            assert list(read_table(path, ["a", "b"]).itertuples(index=False, name=None)) == rows

    check()


@pytest.mark.parametrize("fresh", [True, False])
def test_any_bytes_as_a_result_file(folder, ledger, fresh):
    file = RowFile(folder / "rows.csv", ("a", "b", "c"), ("a",))
    good = csv_text([{"a": 1, "b": "x", "c": None}, {"a": 2, "b": "y", "c": 0.5}], file.columns).encode()

    @given(st.binary(max_size=200), st.integers(0, len(good)), st.integers(0, len(good)))
    def check(junk: bytes, first: int, last: int) -> None:
        content = junk if fresh else good[:first] + junk[:5] + good[last:]
        file.path.write_bytes(content)
        with ledger.attempt("mutation", "result file"):
            try:
                rows = file.read()
            except ValueError as error:
                refused(error, file.path)
                assert file.path.read_bytes() == content
            else:
                file.add([{"a": "new"}])
                assert {row["a"] for row in rows} | {"new"} == {row["a"] for row in file.read()}, "a row was lost"

    check()


def test_any_captions_in_a_candidates_file(folder, ledger):
    @given(st.lists(CELLS.filter(str.strip), min_size=1, max_size=5))
    def check(texts: list[str]) -> None:
        path = write_candidates(folder / "c.csv", list(map(str, range(len(texts)))),
                                {("raw", "text"): [(0, 0, texts)]}, [[text] for text in texts])
        with ledger.attempt("mutation", "candidates file"):
            captions, references = load_csv_file(path, "raw_seed_0", "caption_1")
            lines = [" ".join(text.split()) for text in texts]
            assert [text.removeprefix("'") for text in captions] == lines and references == [[line] for line in lines]

    check()


# -------------------------------------------------------------------------------------------------------- safetensors
def mutated(good: bytes) -> st.SearchStrategy[bytes]:
    """A good file with some bytes changed, cut or put in; a header of any JSON or length; any bytes."""
    places = st.integers(0, len(good)) | st.integers(0, 120)

    def with_header(header: object, rest: bytes) -> bytes:
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + rest

    return st.one_of(
        st.builds(lambda first, junk, skip: good[:first] + junk + good[first + skip:], places, st.binary(max_size=12),
                  st.integers(0, 40)),
        places.map(lambda first: good[:first]),
        st.builds(with_header, HEADERS, st.binary(max_size=64)),
        st.builds(lambda length, rest: length.to_bytes(8, "little") + rest, st.integers(0, 2**64 - 1),
                  st.binary(max_size=40)),
        st.binary(max_size=200))


def test_any_checkpoint(folder, ledger, capsys):
    path, run = folder / "fit.safetensors", key("fit", 1, seed=0)
    save_checkpoint(path, {"w": torch.arange(6.0), "g": torch.arange(5, dtype=torch.uint8)},
                    {"step": 3, "history": []}, run)

    @given(mutated(path.read_bytes()))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        capsys.readouterr()
        with ledger.attempt("mutation", "checkpoint"):
            if (found := load_checkpoint(path, run)) is None:
                assert capsys.readouterr().err.count("\n") == 1
            else:
                assert torch.equal(found[0]["w"], torch.arange(6.0)) and found[1]["step"] == 3, "altered, not noticed"

    check()


@pytest.mark.parametrize("which, kind, share", [("bridge", DiffusionLink, 1), ("captioner", LLMCaptioner, 4)])
def test_any_weights_and_any_config(folder, ledger, which, kind, share):
    root = folder / which
    if kind is DiffusionLink:
        model = DiffusionLink.from_config(BridgeConfig(num_blocks=1), 4)
    else:
        model = LLMCaptioner(4, CaptionerConfig(language_model=str(tiny_language_model(folder / "llama")),
                                                projector_width=4, dtype="float32", lora_r=1))
    model.save_pretrained(root)
    good = {name: (root / name).read_bytes() for name in ("model.safetensors", "config.json")}
    values = json.loads(good["config.json"])
    odd = st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | TEXT | st.lists(st.integers(), max_size=2)
    changed = st.builds(lambda name, value: json.dumps({**values, name: value}).encode(),
                        st.sampled_from([*values, "more"]), odd)

    @settings(max_examples=settings().max_examples // share)
    @given(st.tuples(st.just("model.safetensors"), mutated(good["model.safetensors"]))
           | st.tuples(st.just("config.json"), changed | st.binary(max_size=50)))
    def check(change: tuple[str, bytes]) -> None:
        for name, content in (good | dict([change])).items():
            (root / name).write_bytes(content)
        with ledger.attempt("mutation", f"{which}'s folder"):
            try:
                assert all(value.numel() < 10**7 for value in kind.from_pretrained(root).parameters())
            except (ValueError, FileNotFoundError) as error:
                assert "\n" not in str(error), error

    check()


# ----------------------------------------------------------------------------------------------- settings and sounds
def test_any_value_on_the_command_line(ledger):
    """``-p NAME VALUE``: a literal or the text itself; nothing is ever run."""
    counts = st.integers(0, 3000)

    @given(TEXT | st.text("()[]{}-+*'\"1a_.: ,\\", max_size=200) | counts.map(lambda n: "(" * n)
           | counts.map(lambda n: "-" * n + "1"))
    @example("{[]: 1}")
    @example("-" * 3000 + "1")
    @example("-" * 90_000 + "1")
    @example("1e400")
    def check(text: str) -> None:
        with ledger.attempt("mutation", "setting"):
            value = literal(text)
            assert value is text or type(value).__module__ == "builtins"

    check()


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_sounds(tmp_path, ledger, count):
    """Real recordings in five formats, damaged: heard or refused; a crash of the decoder is counted, not hidden."""
    at, lines, peak = 0, [], 0
    while at < count:
        mutate = [sys.executable, REPO / "tests/reliability/mutate.py", tmp_path, str(at), str(count), "1"]
        done = subprocess.run(mutate, capture_output=True, text=True, check=False, cwd=REPO, timeout=1800,
                              env=os.environ | {"PYTHONPATH": str(REPO)})
        said = done.stdout.splitlines()
        found = [line for line in said if line[:1].isdigit()]
        lines += found
        peak = max([peak, *(int(line.split()[1]) for line in said if line.startswith("PEAK"))])
        at += max(len(found), 1)
        if done.returncode:
            lines[-1:] = [f"{lines[-1] if lines else at} BAD ended with code {done.returncode} {done.stderr[-300:]}"]
    bad = [line for line in lines if line.split()[2:3] not in (["HEARD"], ["REFUSED"])]
    ledger.add("mutation", "sound", good=len(lines) - len(bad), bad=len(bad))
    assert not bad and len(lines) == count, bad[:10]
    refusals = sum("REFUSED" in line for line in lines)
    assert 0.1 * count < refusals < 0.95 * count, "the mutations are too weak or too strong to say anything"
    ledger.measure("peak memory of the sound reader", peak, 600, "MB")
