"""Stages: the notebooks in order, each run only when something it reads has changed.

A stage is a notebook. Beside its outputs lies a stamp, ``results/<profile>/cache/stamps/NN.json``: the sha256 of everything it
read (the notebook's cells, the modules of ``dl`` it imports, the profile, the parameters, the data files, the outcome of the
stages before it) and of every file it promises. A stage is skipped while all of them are as recorded; else the first
difference is the reason that ``--dry-run`` prints. The text cells of a notebook count for the notebook itself, not for the
stages after it. Nothing heavy is imported until a stage has to run.
"""
from __future__ import annotations

import csv
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from dl.audiocaps import AUDIO_SUFFIXES
from dl.config import REPO, Profile
from dl.pipeline.notebook import StageError, module_closure, parameter_names, read_notebook

KERNEL_ENDS_S = 2.0          # s, after which the kernel of a killed run is gone
METRICS = "metrics.csv"      # every stage keeps its own rows in it
SHARED = (METRICS, "table2.csv", "table2.md", "claims.csv", "claims.md", "README.md")     # made by several stages, or by python -m dl readme: content does not count
SEARCH = ("{results}/search.csv", "results/mini/search.csv")     # what was chosen on val; stage 06 writes it anew with --full


@dataclass(frozen=True)
class Stage:
    """One notebook.

    Attributes:
        number: what ``--only`` and ``--from`` take.
        notebook: file name in ``notebooks/``.
        after: numbers of the stages whose outputs it reads.
        reads: files it reads, as patterns relative to the repository; ``{data}`` is the profile's data folder,
            ``{encoder}`` its encoder where that is a file, ``{results}`` its results folder.
        makes: files it promises, as patterns relative to ``results/<profile>/``; each must match at least one file.
        default: False: runs only when named by ``--only``.
    """

    number: str
    notebook: str
    after: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    default: bool = True


STAGES = (
    Stage("00", "00_check_setup.ipynb", makes=("figures/00_*",)),
    Stage("01", "01_hear_the_data.ipynb", reads=("{data}/**",), makes=("figures/01_*",)),
    Stage("02", "02_encode_audio_and_text.ipynb", reads=("{data}/**", "{encoder}"), makes=("cache/embeddings/*.safetensors", "figures/02_*")),
    Stage("03", "03_see_the_modality_gap.ipynb", after=("02",), makes=(METRICS, "figures/03_*")),
    Stage("04", "04_build_the_bridge.ipynb", after=("02",), reads=SEARCH, makes=("cache/fits/bridge-*", "figures/04_*")),
    Stage("05", "05_cross_the_bridge.ipynb", after=("02", "04"), reads=SEARCH, makes=(METRICS, "checkpoints/bridge/*", "figures/05_*")),
    Stage("06", "06_compare_bridges.ipynb", after=("02", "04"), reads=("{data}/**", *SEARCH),
          makes=(METRICS, "table1.csv", "table1.md", "claims.csv", "figures/06_*")),
    Stage("07", "07_caption_zero_shot.ipynb", after=("02", "04"), reads=("{data}/**", *SEARCH),
          makes=(METRICS, "table2.csv", "table2.md", "captions/zero_shot*.csv", "checkpoints/captioner/*", "figures/07_*")),
    Stage("08", "08_caption_supervised.ipynb", after=("02", "04", "07"), reads=("{data}/**", *SEARCH),
          makes=(METRICS, "captions/supervised*.csv", "figures/08_*")),
    Stage("09", "09_ablate_the_bridge.ipynb", after=("02", "04"), reads=("{data}/**", *SEARCH),
          makes=(METRICS, "ablations.csv", "ablations.md", "figures/09_*")),
    Stage("10", "10_replication_report.ipynb", after=("03", "05", "06", "07", "08", "09"), reads=("results/paper.csv", "{results}/metrics.csv"),
          makes=("comparison.csv", "comparison.md", "report.html")),
    Stage("11", "11_caption_your_own.ipynb", after=("02", "05", "07"), reads=("data/mini/recordings/**",), makes=("figures/11_*",)),
    Stage("A1", "A1_build_mini_corpus.ipynb", reads=("data/mini/recordings/**",), makes=("figures/A1_*",), default=False),
    Stage("A2", "A2_train_mini_clap.ipynb", reads=("data/mini/**",), makes=("mini_clap.csv", "figures/A2_*"), default=False),
    Stage("A3", "A3_sample_the_bridge.ipynb", after=("02", "04", "07"), reads=("{data}/**", *SEARCH), makes=(METRICS, "figures/A3_*"), default=False),
)


def sha256(data: bytes | str) -> str:
    """Hex sha256 of bytes, or of text in UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


# --------------------------------------------------------------------------------------------------------- stamps and plans
@dataclass(frozen=True)
class Run:
    """One call of ``run_all.sh``: the profile, what was asked for, and where things lie."""

    profile: Profile
    stages: tuple[Stage, ...] = STAGES
    root: Path = REPO
    full: bool = False
    seeds: int | None = None
    extra: dict[str, object] = field(default_factory=dict)

    @property
    def asked(self) -> dict[str, object]:
        """Parameters given on the command line: ``--full``, ``--seeds``, and ``-p NAME VALUE`` (``extra``)."""
        return {name: value for name, value in {"full": self.full, "seeds": self.seeds}.items() if value} | self.extra

    @property
    def results(self) -> Path:
        """results/<profile>/."""
        return self.profile.results_dir

    def source(self, stage: Stage) -> Path:
        """The notebook in the repository."""
        return self.root / "notebooks" / stage.notebook

    def stamp_file(self, number: str) -> Path:
        """Where the stage's stamp lies."""
        return self.profile.cache_dir / "stamps" / f"{number}.json"

    def stamp(self, number: str) -> dict:
        """The stage's stamp; empty if it never finished, or the file is damaged."""
        try:
            stamp = json.loads(self.stamp_file(number).read_text())
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) and {"notebook", "parts", "outputs", "rows", "wall_s", "finished"} <= stamp.keys() else {}

    def parameters(self, stage: Stage) -> dict:
        """What papermill passes: profile, and those of ``asked`` that the notebook takes."""
        known = parameter_names(self.source(stage))
        return {"profile": self.profile.name} | {name: value for name, value in self.asked.items() if name in known}

    def name(self, path: Path) -> str:
        """A path as the reader of a message wants it: relative to the repository where it lies in it."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    @cached_property
    def _files(self) -> dict[str, dict[str, str]]:
        return {}

    def forget_files(self) -> None:
        """Hash the data files again at the next question: a stage ran and may have written them."""
        self._files.clear()

    def read_files(self, pattern: str) -> dict[str, str]:
        """sha256 of the files a pattern matches: each file of its folder by name, each folder below it as one entry.

        AudioCaps' clips count by name and size: reading 43 GB at every start would take longer than the run.
        """
        by_size = self.profile.data_dir if self.profile.name == "paper" else None
        if pattern not in self._files:
            base = Path(pattern.format(data=self.profile.data_dir, encoder=self.profile.encoder, results=self.results).removesuffix("**"))
            base = base if base.is_absolute() else self.root / base
            entries: dict[str, list[str]] = {}
            for path in sorted(base.rglob("*") if pattern.endswith("**") else [base]):
                if not path.is_file() or path.name.startswith("."):
                    continue
                top = path if path.parent == base or path == base else base / path.relative_to(base).parts[0]
                clip = base == by_size and path.suffix.lower() in AUDIO_SUFFIXES
                content = str(path.stat().st_size) if clip else sha256(path.read_bytes())
                entries.setdefault(self.name(top), []).append(f"{path.relative_to(base.parent)} {content}")
            self._files[pattern] = {name: sha256("\n".join(lines)) for name, lines in entries.items()}
        return self._files[pattern]

    def parts(self, stage: Stage) -> dict[str, str]:
        """Everything the stage reads, by the name that a reason gives it, with its sha256."""
        cells = read_notebook(self.source(stage))
        code = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "code")
        settings = {key: value for key, value in asdict(self.profile).items() if not isinstance(value, Path)}
        parts = {f"notebooks/{stage.notebook}": sha256(code)}
        parts[f"the text of notebooks/{stage.notebook}"] = sha256("\n".join(c["source"] for c in cells if c["cell_type"] != "code"))
        parts |= {self.name(path): sha256(path.read_bytes()) for path in module_closure(code, self.root / "dl")}
        parts[f"profile {self.profile.name}"] = sha256(json.dumps(settings, sort_keys=True))
        parts["parameters"] = json.dumps(self.parameters(stage), sort_keys=True)
        for pattern in stage.reads:
            parts |= self.read_files(pattern)
        for number in stage.after:
            stamp = self.stamp(number)
            read = {name: value for name, value in stamp.get("parts", {}).items() if not name.startswith("the text of")}
            made = {name: value for name, value in stamp.get("outputs", {}).items() if "figures/" not in name}
            parts[f"stage {number}"] = sha256(json.dumps([read, made], sort_keys=True)) if stamp else "not run"
        return parts

    def outputs(self, stage: Stage) -> dict[str, str]:
        """The promised files that exist, with their sha256; those that several stages write (``SHARED``) without one."""
        found = {path for pattern in stage.makes for path in self.results.glob(pattern) if path.is_file()}
        return {path.relative_to(self.results).as_posix(): "shared" if path.name in SHARED else sha256(path.read_bytes())
                for path in sorted(found)}

    def metric_rows(self) -> dict[str, str]:
        """``metrics.csv`` as a map from each row's key to its sha256."""
        key = ("experiment", "dataset", "split", "system", "space", "decoding", "metric", "seed", "noise_seed")   # results.METRIC_KEY
        try:
            with open(self.results / METRICS, newline="", encoding="utf-8") as file:
                return {"|".join(row.get(column) or "" for column in key): sha256(str(row)) for row in csv.DictReader(file)}
        except (OSError, ValueError, csv.Error):
            return {}

    def reason(self, stage: Stage) -> str | None:
        """Why the stage has to run; None if all it read and made is as recorded."""
        stamp = self.stamp(stage.number)
        if not stamp:
            return "it has not run yet"
        before, now = stamp["parts"], self.parts(stage)
        for name in now | before:
            if before.get(name) != now.get(name):
                verb = "changed" if name in before and name in now else "is new" if name in now else "is no longer read"
                return name + (" ran again" if name.startswith("stage ") else f" {verb}")
        outputs = self.outputs(stage)
        for name, value in stamp["outputs"].items():
            if outputs.get(name) != value:
                return f"{self.name(self.results / name)} " + ("differs from what was written" if name in outputs else "is missing")
        if lost := len(set(stamp["rows"]) - set(self.metric_rows())):
            return f"{lost} of its rows are missing in {self.name(self.results / METRICS)}"
        return None

    def chosen(self, only: list[str] | None = None, start: str | None = None) -> list[Stage]:
        """The stages asked for whose notebook exists, in order.

        Raises:
            StageError: an unknown number, or a stage named by ``--only`` that has no notebook.
        """
        numbers = [stage.number for stage in self.stages]
        for number in [*(only or []), *([start] if start else [])]:
            if number not in numbers:
                raise StageError(f"unknown stage {number!r}: choose one of {' '.join(numbers)}")
        named = [stage for stage in self.stages if (stage.number in only if only else stage.default)]
        if absent := [stage for stage in named if only and not self.source(stage).is_file()]:
            raise StageError(f"notebooks/{absent[0].notebook} is not part of this version")
        return [stage for stage in named if self.source(stage).is_file() and (not start or numbers.index(stage.number) >= numbers.index(start))]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second run out of ``results/<profile>``; the lock falls with the process that holds it.

        Raises:
            StageError: another run holds it.
        """
        import fcntl

        self.results.mkdir(parents=True, exist_ok=True)
        with open(self.results / ".lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise StageError(f"another run (process {file.read().strip() or '?'}) is writing {self.name(self.results)}: "
                                 "wait for it, or stop it first") from None
            file.seek(0)
            if file.read():                           # the run before was killed: its kernel notices that within a second, and may write until then
                time.sleep(KERNEL_ENDS_S)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)
