"""Readers under inputs that nobody thought of: no crash, no hang, no memory without bound; an answer or one clear line."""
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

from dl import store as checkpoint
from dl.__main__ import literal
from dl.bridge import DiffusionLink
from dl.caption_metrics import write_candidates
from dl.captioner import LLMCaptioner
from dl.config import REPO, BridgeConfig, CaptionerConfig
from dl.data import CAPTION_COLUMNS, read_captions, read_table
from dl.store import RowFile, csv_text

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
CELLS = TEXT | st.sampled_from(["", '"', ",", "\n", "\r", "=1+1", "<script>", "../../x", "\0", "🐕", "[]", "['a']", "NaN", "-inf", "1e999"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def refused(error: Exception, path: Path) -> None:
    """The message is one line that names the file."""
    assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 2000, error


# ----------------------------------------------------------------------------------------------------------------------- CSV
def test_any_bytes_as_a_table(folder, ledger):
    path = folder / "train.csv"

    @given(st.binary(max_size=300) | st.builds(lambda rows: (",".join(CAPTION_COLUMNS) + "\n" + "\n".join(map(",".join, rows))).encode(),
                                               st.lists(st.lists(CELLS, max_size=6), max_size=6)))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with ledger.attempt("mutation", "table"):
            try:
                frame = read_captions(path)
            except ValueError as error:
                refused(error, path)
            else:
                assert list(frame.columns) and frame.caption.str.strip().ne("").all() and frame.audiocap_id.is_unique

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
        path = write_candidates(folder / "c.csv", [str(i) for i in range(len(texts))], {("raw", "text"): [(0, 0, texts)]}, [[text] for text in texts])
        with ledger.attempt("mutation", "candidates file"):
            captions, references = load_csv_file(path, "raw_seed_0", "caption_1")
            one_line = [" ".join(text.split()) for text in texts]
            assert [text.removeprefix("'") for text in captions] == one_line and references == [[text] for text in one_line]

    check()


# --------------------------------------------------------------------------------------------------------------- safetensors
HEADERS = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
                       lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.sampled_from(
                           ["__metadata__", "about", "checkpoint", "sha256", "dtype", "shape", "data_offsets"]), inner, max_size=4), max_leaves=8)


def mutated(good: bytes) -> st.SearchStrategy[bytes]:
    """A good file with some bytes changed, cut or put in; a header of any JSON; any bytes."""
    places = st.integers(0, len(good)) | st.integers(0, 120)
    return (st.builds(lambda first, junk, skip: good[:first] + junk + good[first + skip:], places, st.binary(max_size=12), st.integers(0, 40))
            | st.builds(lambda first: good[:first], places)
            | st.builds(lambda header, rest: len(text := json.dumps(header).encode()).to_bytes(8, "little") + text + rest, HEADERS, st.binary(max_size=64))
            | st.builds(lambda length, rest: length.to_bytes(8, "little") + rest, st.integers(0, 2**64 - 1), st.binary(max_size=40))
            | st.binary(max_size=200))


def test_any_checkpoint(folder, ledger, capsys):
    path, run = folder / "fit.safetensors", checkpoint.key("fit", 1, seed=0)
    checkpoint.save_checkpoint(path, {"w": torch.arange(6.0), "g": torch.arange(5, dtype=torch.uint8)}, {"step": 3, "history": []}, run)
    good = path.read_bytes()

    @given(mutated(good))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        capsys.readouterr()
        with ledger.attempt("mutation", "checkpoint"):
            found = checkpoint.load_checkpoint(path, run)
            if found is not None:
                assert torch.equal(found[0]["w"], torch.arange(6.0)) and found[1]["step"] == 3, "altered and not noticed"
            else:
                assert capsys.readouterr().err.count("\n") == 1

    check()


@pytest.mark.parametrize("which", ["bridge", "captioner"])
def test_any_weights_and_any_config(folder, ledger, which):
    root = folder / which
    if which == "bridge":
        kind = DiffusionLink
        DiffusionLink.from_config(BridgeConfig(num_blocks=1), 4).save_pretrained(root)
    else:
        kind = LLMCaptioner
        config = CaptionerConfig(language_model=str(tiny_language_model(folder / "llama")), projector_width=4, dtype="float32", lora_r=1)
        LLMCaptioner(4, config).save_pretrained(root)
    good = {name: (root / name).read_bytes() for name in ("model.safetensors", "config.json")}
    values = json.loads(good["config.json"])
    changed = st.builds(lambda name, value: json.dumps({**values, name: value}).encode(), st.sampled_from([*values, "more"]),
                        st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | TEXT | st.lists(st.integers(), max_size=2))

    @settings(max_examples=settings().max_examples // (1 if which == "bridge" else 4))
    @given(st.tuples(st.just("model.safetensors"), mutated(good["model.safetensors"])) | st.tuples(st.just("config.json"), changed | st.binary(max_size=50)))
    def check(change: tuple[str, bytes]) -> None:
        for name, content in good.items():
            (root / name).write_bytes(change[1] if name == change[0] else content)
        with ledger.attempt("mutation", f"{which}'s folder"):
            try:
                model = kind.from_pretrained(root)
            except (ValueError, FileNotFoundError) as error:
                assert "\n" not in str(error), error
            else:
                assert all(value.numel() < 10**7 for value in model.parameters())

    check()


# ------------------------------------------------------------------------------------------------------------------ settings
def test_any_value_on_the_command_line(ledger):
    """``-p NAME VALUE``: a literal or the text itself; nothing is ever run."""
    @given(TEXT | st.text("()[]{}-+*'\"1a_.: ,\\", max_size=200) | st.builds(lambda n: "(" * n, st.integers(0, 3000)) | st.builds(lambda n: "-" * n + "1", st.integers(0, 3000)))
    @example("{[]: 1}")
    @example("-" * 3000 + "1")
    @example("-" * 90_000 + "1")
    @example("1e400")
    def check(text: str) -> None:
        with ledger.attempt("mutation", "setting"):
            value = literal(text)
            assert value is text or type(value).__module__ == "builtins"

    check()


# -------------------------------------------------------------------------------------------------------------------- sounds
@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_sounds(tmp_path, ledger, count):
    """Real recordings in five formats, damaged: heard or refused, one by one; a crash of the decoder would be counted, not hidden."""
    at, lines, peak = 0, [], 0
    while at < count:
        done = subprocess.run([sys.executable, REPO / "tests/reliability/mutate.py", tmp_path, str(at), str(count), "1"], capture_output=True, text=True,
                              check=False, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}, timeout=1800)
        found = [line for line in done.stdout.splitlines() if line[:1].isdigit()]
        lines += found
        peak = max([peak, *(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK"))])
        at += max(len(found), 1)
        if done.returncode:
            lines[-1:] = [f"{lines[-1] if lines else at} BAD ended with code {done.returncode} {done.stderr[-300:]}"]
    bad = [line for line in lines if line.split()[2:3] not in (["HEARD"], ["REFUSED"])]
    ledger.add("mutation", "sound", good=len(lines) - len(bad), bad=len(bad))
    assert not bad and len(lines) == count, bad[:10]
    refusals = sum("REFUSED" in line for line in lines)
    assert 0.1 * count < refusals < 0.95 * count, "the mutations are too weak or too strong to say anything"
    ledger.measure("peak memory of the sound reader", peak, 600, "MB")
