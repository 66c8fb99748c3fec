"""What a notebook is to its stage: cells, parameters, and the modules of ``dl`` that its code imports."""
from __future__ import annotations

import ast
import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

from dl.check import OWN_PATHS, missing_assets
from dl.config import AUDIO_SUFFIXES, REPO, SPLITS, Profile


class StageError(RuntimeError):
    """A stage cannot run or failed; the message says what to do next."""


def read_notebook(path: Path) -> list[dict]:
    """The cells of a notebook with their ``source`` as one string.

    Raises:
        StageError: the file is no notebook.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [{**cell, "source": "".join(cell["source"])} for cell in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"notebooks/{path.name} is not a notebook ({type(error).__name__}): git checkout -- notebooks") from None


def parameter_names(path: Path) -> list[str]:
    """Names assigned in the cell tagged ``parameters``.

    Raises:
        StageError: no such cell, or it does not set ``profile`` (papermill itself would only warn).
    """
    tagged = [cell for cell in read_notebook(path) if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise StageError(f"notebooks/{path.name} has {len(tagged)} cells tagged 'parameters': it needs exactly one")
    body = ast.parse(tagged[0]["source"]).body
    names = [target.id for node in body if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)]
    if "profile" not in names:
        raise StageError(f"notebooks/{path.name}: the cell tagged 'parameters' does not set 'profile'")
    return names


def recipes(package: Path) -> dict[str, str]:
    """The recipe numbers in the modules of ``package`` (``BRIDGE_RECIPE = 1``), read without importing any."""
    found = [pair for path in sorted(package.glob("*.py")) for pair in re.findall(r"^(\w+_RECIPE) = (\d+)", path.read_text(encoding="utf-8"), re.MULTILINE)]
    return dict(sorted(found))


def source_sha256(package: Path) -> str:
    """Hash of the package's text. It decides nothing but whether tables and report are laid out anew."""
    return sha256("\n".join(path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))))


# ----------------------------------------------------------------------------------------------------
# Stages: the notebooks in order, each run only when something it reads has changed.


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
        lays_out: True: it lays tables and report out from files of results; an edit of ``dl`` makes it run again.
    """

    number: str
    notebook: str
    after: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    default: bool = True
    lays_out: bool = False


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
          makes=("comparison.csv", "comparison.md", "report.html"), lays_out=True),
    Stage("11", "11_caption_your_own.ipynb", after=("02", "05", "07"), reads=("data/mini/recordings/**",), makes=("figures/11_*",)),
    Stage("A1", "A1_build_mini_corpus.ipynb", reads=("data/mini/recordings/**", "data/mini/build_corpus.py"), makes=("figures/A1_*",), default=False),
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
        parts |= recipes(self.root / "dl")
        if stage.lays_out:
            parts["dl"] = source_sha256(self.root / "dl")
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




# ----------------------------------------------------------------------------------------------------
# Running stages: papermill, wall time, peak memory, and what stands on the screen.


HEADLINE_SYSTEMS = ("raw", "ridge", "diffusion_bridge", "seed", "diffusion_link", "diffusion_link_ddim")
CAPTION_STAGES = ("07", "08", "11", "A3")      # they open the language model
HEADLINE_METRICS = ("pair_cosine", "centroid_gap", "recall_at_10", "effective_rank")


def seconds_text(seconds: float) -> str:
    """``7 s``, ``3 min 04 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def kernels() -> list:
    """The processes started by this one: the kernel and what it started."""
    import psutil

    return psutil.Process().children(recursive=True)


def stop_kernels(signum: int, frame: object) -> None:
    """Signal handler: kill the kernels at once, then raise KeyboardInterrupt.

    Raises:
        KeyboardInterrupt: always, with the signal's number.
    """
    for process in kernels():
        process.kill()
    raise KeyboardInterrupt(signum)


class Watch(threading.Thread):
    """Samples the memory of the kernel's process tree twice a second and says every minute that a stage is alive.

    Attributes:
        peak_mb: the largest sum of resident memory seen, MB (10^6 bytes); pages shared by two processes count twice.
    """

    def __init__(self, label: str) -> None:
        super().__init__(daemon=True)
        self.label, self.peak_mb, self._end = label, 0.0, threading.Event()

    def run(self) -> None:
        """The thread's loop; ends at :meth:`stop`."""
        import psutil

        started, said = time.monotonic(), 0
        while not self._end.wait(0.5):
            total = 0
            for process in kernels():
                try:
                    total += process.memory_info().rss
                except psutil.Error:      # it ended meanwhile
                    continue
            self.peak_mb = max(self.peak_mb, total / 1e6)
            if not sys.stderr.isatty() and (minutes := int((time.monotonic() - started) // 60)) > said:
                said = minutes
                print(f"        {self.label} … {minutes} min", flush=True)

    def stop(self) -> float:
        """End the thread and return ``peak_mb``."""
        self._end.set()
        self.join()
        return self.peak_mb


def execute(run: Run, stage: Stage) -> Path:
    """Run one notebook by papermill; the executed copy appears under its name only when it is complete.

    Returns:
        The executed notebook.

    Raises:
        StageError: a cell failed (the copy up to it is kept as ``*.failed.ipynb``), the kernel died, or a promised file is absent.
    """
    parameters = run.parameters(stage)
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError, execute_notebook

    target = run.results / "notebooks" / stage.notebook
    partial, failed = target.with_name(f".{target.stem}.partial.ipynb"), target.with_suffix(".failed.ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    go_on = f"Repair it, then ./run_all.sh goes on from here (this stage alone: ./run_all.sh --only {stage.number})"
    try:
        execute_notebook(str(run.source(stage)), str(partial), parameters=parameters, kernel_name="python3", cwd=str(run.root),
                         progress_bar=sys.stderr.isatty(), autosave_cell_every=60, extra_arguments=["--log-level=CRITICAL"])
    except PapermillExecutionError as error:
        os.replace(partial, failed)
        text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).rstrip().splitlines() or [f"{error.ename}: {error.evalue}"]
        lines = "\n".join(f"    {line}" for line in text[-12:])
        raise StageError(f"stage {stage.number} failed in cell [{error.exec_count}] of {stage.notebook}:\n{lines}\n"
                         f"The executed copy up to there: {run.name(failed)}\n{go_on}") from None
    except DeadKernelError:
        raise StageError(f"stage {stage.number}: the kernel died, most often because memory ran out. {go_on}") from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, target)
    failed.unlink(missing_ok=True)
    if absent := [pattern for pattern in stage.makes if not any(run.results.glob(pattern))]:
        raise StageError(f"stage {stage.number}: {stage.notebook} ended without {run.name(run.results)}/{absent[0]}. {go_on}")
    return target


def run_stage(run: Run, stage: Stage, device: str) -> None:
    """Execute a stage, then write its row of ``timing.csv`` and its stamp.

    Raises:
        StageError: see :func:`execute`; also a ``timing.csv`` that nothing can be added to, before the stage begins.
    """
    from dl.store import RowFile, atomic_write

    timing = RowFile(run.results / "timing.csv", ("stage", "device", "wall_s", "peak_memory_mb"), ("stage", "device"))
    try:
        timing.read()
    except ValueError as error:
        raise StageError(str(error)) from None
    parts, rows_before, stamp_before = run.parts(stage), run.metric_rows(), run.stamp(stage.number)
    run.stamp_file(stage.number).unlink(missing_ok=True)
    watch, started = Watch(stage.number), time.monotonic()
    watch.start()
    try:
        execute(run, stage)
    finally:
        peak_mb, wall_s = watch.stop(), time.monotonic() - started
        run.forget_files()
    rows_now = run.metric_rows()
    rows = {key for key, value in rows_now.items() if rows_before.get(key) != value} | (set(stamp_before.get("rows", [])) & set(rows_now))
    timing.add([{"stage": stage.number, "device": device, "wall_s": round(wall_s, 1), "peak_memory_mb": round(peak_mb)}])
    for pattern in stage.reads:
        if pattern.startswith("{results}"):       # a file that it may have written anew itself
            parts |= run.read_files(pattern)
    stamp = {"notebook": stage.notebook, "parts": parts, "outputs": run.outputs(stage), "rows": sorted(rows),
             "wall_s": round(wall_s, 1), "finished": datetime.now(UTC).isoformat(timespec="seconds"), "dl": source_sha256(run.root / "dl")}
    atomic_write(run.stamp_file(stage.number), json.dumps(stamp, indent=1))
    print(f"        {stage.number} done in {seconds_text(wall_s)}, peak memory {peak_mb / 1000:.1f} GB", flush=True)


def run_stages(run: Run, only: list[str] | None = None, start: str | None = None, force: bool = False, dry_run: bool = False) -> int:
    """Run the stages asked for that are not up to date; say RUN or SKIP for each, and why.

    Args:
        run: the profile and where things lie.
        only: stage numbers; None takes the default stages.
        start: first stage to consider.
        force: run them even if nothing changed.
        dry_run: say what would run, and run nothing.

    Returns:
        Exit code: 0 done, 1 a stage failed, 2 a wrong call or a second run at the same time, 130 (143) interrupted.
    """
    began = time.monotonic()
    done: dict[str, list[str]] = {"run": [], "skipped": []}
    try:
        stages = run.chosen(only, start)
        if not stages:
            raise StageError("there is no notebook to run in notebooks/")
        if "profile" in run.extra:
            raise StageError("choose the profile by --profile, not by -p")
        for name in run.asked:
            if not any(name in parameter_names(run.source(stage)) for stage in stages):
                raise StageError(f"none of these stages takes the parameter '{name}': leave {f'-p {name}' if name in run.extra else f'--{name}'} out")
        print(f"profile {run.profile.name}: {len(stages)} stages, results in {run.name(run.results)}/", flush=True)
        if dry_run:
            plan(run, stages, force)
            return 0
        if run.profile.name == "paper" and (missing := missing_assets(run.profile, any(stage.number in CAPTION_STAGES for stage in stages))):
            print("\n".join([*missing, OWN_PATHS, "run_all: nothing was run or written; python -m dl check --profile paper looks again"]), file=sys.stderr, flush=True)
            return 2
        with run.lock():
            return _run_locked(run, stages, force, began, done)
    except StageError as error:
        print(f"run_all: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:                                  # a full disk, a results folder that may not be written
        print(f"run_all: {error}. Free space or change the folder's owner, or set DL_RESULTS to another folder; finished stages stay finished",
              file=sys.stderr, flush=True)
        return 1


def plan(run: Run, stages: list[Stage], force: bool = False) -> dict[str, str | None]:
    """Print and return RUN (with its reason) or SKIP (None) for each stage, as if each stage that runs changed its outputs."""
    reasons: dict[str, str | None] = {}
    for stage in stages:
        earlier = [number for number in stage.after if reasons.get(number)]
        reasons[stage.number] = "--force" if force else run.reason(stage) or (f"stage {earlier[0]} runs first" if earlier else None)
        say(run, stage, reasons[stage.number])
    return reasons


def say(run: Run, stage: Stage, reason: str | None) -> None:
    """One line: ``RUN  05 cross_the_bridge: BRIDGE_RECIPE changed``."""
    title = Path(stage.notebook).stem.split("_", 1)[-1]
    edited = run.stamp(stage.number).get("dl") not in (None, source_sha256(run.root / "dl"))
    note = f"; dl has changed since {stage.number} ran (--force runs it again)" if edited else ""
    print(f"RUN  {stage.number} {title}: {reason}" if reason else f"SKIP {stage.number} {title}: up to date{note}", flush=True)


def _run_locked(run: Run, stages: list[Stage], force: bool, began: float, done: dict[str, list[str]]) -> int:
    device = None
    try:
        Path.home()
    except RuntimeError:
        raise StageError("there is no home folder, where Jupyter and the language model keep files: set HOME to a folder that can be written") from None
    if run.profile.encoder == "mini":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")      # everything it needs is installed: nothing may wait for a network
    os.environ.pop("JPY_SESSION_NAME", None)              # started from a notebook: its front end is not the stages'
    handlers = {number: signal.signal(number, stop_kernels) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    stage = stages[0]
    try:
        for stage in stages:
            reason = "--force" if force else run.reason(stage)
            say(run, stage, reason)
            if reason:
                device = device or find_device()
                run_stage(run, stage, device)
            done["run" if reason else "skipped"].append(stage.number)
        if done["run"]:
            record_provenance(run)
        last_screen(run, done, time.monotonic() - began)
        return 0
    except StageError as error:
        print(f"run_all: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        print(f"\nrun_all: stopped in stage {stage.number} after {seconds_text(time.monotonic() - began)}; "
              "./run_all.sh goes on from there", file=sys.stderr, flush=True)
        return 143 if number == signal.SIGTERM else 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def find_device() -> str:
    """The device the notebooks compute on, asked in a process of its own so that this one keeps no GPU memory."""
    done = subprocess.run([sys.executable, "-c", "from dl.store import device_name; print(device_name())"], capture_output=True, text=True,
                          check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise StageError(f"torch does not load: {(done.stderr.strip().splitlines() or ['no message'])[-1]}; run python -m dl check")
    return done.stdout.strip()


def record_provenance(run: Run) -> None:
    """``provenance.json``: what ``dl.store`` records, and every stage's notebook, time and end."""
    from dl.store import atomic_write, write_provenance

    data = run.profile.data_dir
    inputs = [*sorted(data.glob("*.csv")), data / "recordings", data / "mini_clap"]       # AudioCaps' audio is too large to hash
    path = write_provenance(run.profile, {run.name(path): path for path in inputs if path.exists()})
    record = json.loads(path.read_text())
    stamps = {stage.number: run.stamp(stage.number) for stage in run.stages}
    record["command"] = " ".join(["run_all.sh", *sys.argv[2:]])
    record["stages"] = {number: {"notebook": stamp["notebook"], "wall_s": stamp["wall_s"], "finished": stamp["finished"],
                                 "notebook_sha256": stamp["parts"][f"notebooks/{stamp['notebook']}"]}
                        for number, stamp in stamps.items() if stamp}
    atomic_write(path, json.dumps(record, indent=2, sort_keys=True) + "\n")


def last_screen(run: Run, done: dict[str, list[str]], seconds: float) -> None:
    """What was made, where, how long it took, and the headline figures of Table 1 if it exists."""
    print(f"\n{len(done['run'])} stages run, {len(done['skipped'])} up to date, in {seconds_text(seconds)}")
    where = run.results
    tables = [path.name for path in sorted(where.glob("*.md"))] + [name for name in (METRICS, "timing.csv", "provenance.json")
                                                                   if (where / name).is_file()]
    figures = len({path.stem for path in where.glob("figures/*") if path.suffix in (".png", ".pdf", ".svg")})
    print(f"in {run.name(where)}/: {', '.join(tables)}" + (f"; {figures} figures in figures/" if figures else "")
          + "; executed notebooks in notebooks/")
    if not (where / "table1.csv").is_file():
        return
    with open(where / "table1.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("system") in HEADLINE_SYSTEMS and row.get("space", "text") == "text"]
    metrics = [name for name in HEADLINE_METRICS if rows and name in rows[0]]
    if metrics:
        print("table1.csv, split test:\n  " + f"{'system':<22}" + "".join(f"{name:>16}" for name in metrics))
        for row in rows:
            print(f"  {row['system']:<22}" + "".join(f"{float(row[name]) if row[name] else float('nan'):>16.3f}" for name in metrics))


def list_stages(run: Run) -> None:
    """One line a stage: number, name, what it reads and makes, and when it last ended."""
    for stage in run.stages:
        reads = [pattern.format(data=run.name(run.profile.data_dir), encoder="encoder", results=run.name(run.results)).removesuffix("/**") for pattern in stage.reads]
        reads += [f"stage {number}" for number in stage.after]
        state = run.stamp(stage.number).get("finished", "not run" if run.source(stage).is_file() else "no notebook")
        print(f"{stage.number:<3} {Path(stage.notebook).stem.split('_', 1)[-1]:<26} reads: {', '.join(dict.fromkeys(reads)) or '-':<42} "
              f"makes: {', '.join(stage.makes) or '-'}  ({state}{'' if stage.default else '; only by --only'})")




# ----------------------------------------------------------------------------------------------------
# The two long jobs of profile paper in several processes: ``python -m dl embed`` and ``python -m dl fit``, alone or under accelerate.


PATIENCE = timedelta(hours=12)     # how long a process waits for the one that opens the encoder, fits a bridge or embeds the captions


def start(cpu: bool | None = None) -> Accelerator:
    """This process among its kind; alone, where nothing was launched.

    Args:
        cpu: None takes a GPU where there is one.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    return Accelerator(cpu=not torch.accelerator.is_available() if cpu is None else cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


def embed(profile: Profile) -> int:
    """Embed all splits, each process its part of the clips; a killed call goes on where it was. Returns the exit code."""
    from dl.clap import ClapEncoder, embed_split
    from dl.data import load_split

    accelerator = start()
    with accelerator.main_process_first():                            # the first converts a .pt
        encoder = ClapEncoder.from_pretrained(profile.encoder, device=str(accelerator.device))
    for name in SPLITS:
        split, began = load_split(profile, name), time.perf_counter()
        embeddings = embed_split(profile, split, encoder, progress=accelerator.is_main_process, accelerator=accelerator)
        seconds = time.perf_counter() - began
        accelerator.print(f"{name}: {len(embeddings.clip_ids):,} clips embedded, {len(embeddings.skipped)} unusable, {len(split.missing)} not on disk; "
                          f"{seconds:.1f} s, {len(split) / seconds:.1f} clips/s in {accelerator.num_processes} process(es) on {accelerator.device.type}")
    return 0


def fit(profile: Profile, decoder: str, seed: int) -> int:
    """Train one decoder of Table 2 into the cache, the processes sharing its batches.

    Args:
        decoder: "text" (zero-shot, notebook 07), "raw" or "diffusion_link" (supervised, notebook 08), or another of ``dl.experiments``.
        seed: the training seed.

    Returns:
        the exit code.
    """
    from dl.clap import load_embeddings
    from dl.experiments import decoder_fit

    accelerator = start()
    train, val = load_embeddings(profile, "train"), load_embeddings(profile, "val")
    with accelerator.main_process_first():                            # the first fits the mapping, the others read it
        planned = decoder_fit(profile, decoder, seed, train, val)
    began = time.perf_counter()
    history = planned.load(progress=True, accelerator=accelerator).history
    accelerator.print(f"{planned.path.name}: {int(history.step.iloc[-1])} steps, loss {history.loss.iloc[-1]:.3f}, {time.perf_counter() - began:.0f} s "
                      f"in {accelerator.num_processes} process(es) on {accelerator.device.type}")
    return 0
