"""The notebooks as stages: which have to run and why, how papermill runs them, and the records that they leave.

A stage's stamp holds the notebook's code, its parameters, the profile, the input files, the recipe numbers of ``dl``
and the stages before it. Any other edit of ``dl`` is said, and only a stage that lays out tables runs again for it.
Only the standard library is imported before a stage runs, so that ``--list`` works before an install.
"""
from __future__ import annotations

import errno
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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from dl.check import OWN_PATHS, missing_assets
from dl.config import AUDIO_SUFFIXES, REPO, SPLITS, Profile

if TYPE_CHECKING:
    from accelerate import Accelerator

KERNEL_START_S = 600         # s that a kernel may take to answer: a cold network disk is slow
KERNEL_ENDS_S = 2.0          # s, after which the kernel of a killed run is gone
PATIENCE = timedelta(hours=12)     # how long a process waits for the one that opens the encoder or fits a bridge
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")     # what a launcher of several processes sets
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)     # what a disk without file locks answers (NFS, Lustre)
METRICS = "metrics.csv"      # every stage keeps its own rows in it
SHARED = (METRICS, "table2.csv", "table2.md", "claims.csv", "claims.md")     # several stages write them
SEARCH = ("{results}/search.csv", "results/mini/search.csv")     # chosen on val; stage 06 writes it with --full
CAPTION_STAGES = ("07", "08", "11", "A3")                        # they open the language model


class StageError(RuntimeError):
    """A stage cannot run or failed; the message says what to do next."""


@dataclass(frozen=True)
class Stage:
    """One notebook; in ``reads`` stand {data}, {encoder} and {results} for the profile's own."""

    number: str                      # what --only and --from take
    notebook: str                    # file name in notebooks/
    after: tuple[str, ...] = ()      # numbers of the stages whose outputs it reads
    reads: tuple[str, ...] = ()      # files it reads, as patterns relative to the repository
    makes: tuple[str, ...] = ()      # files it promises, as patterns relative to results/<profile>/, at least one each
    default: bool = True             # False: it runs only when --only names it
    lays_out: bool = False           # it lays tables and report out: it runs again after every edit of dl


STAGES = (
    Stage("00", "00_check_setup.ipynb", makes=("figures/00_*",)),
    Stage("01", "01_hear_the_data.ipynb", reads=("{data}/**",), makes=("figures/01_*",)),
    Stage("02", "02_encode_audio_and_text.ipynb", reads=("{data}/**", "{encoder}"),
          makes=("cache/embeddings/*.safetensors", "figures/02_*")),
    Stage("03", "03_see_the_modality_gap.ipynb", ("02",), makes=(METRICS, "figures/03_*")),
    Stage("04", "04_build_the_bridge.ipynb", ("02",), SEARCH, ("cache/fits/bridge-*", "figures/04_*")),
    Stage("05", "05_cross_the_bridge.ipynb", ("02", "04"), SEARCH, (METRICS, "checkpoints/bridge/*", "figures/05_*")),
    Stage("06", "06_compare_bridges.ipynb", ("02", "04"), ("{data}/**", *SEARCH),
          (METRICS, "table1.csv", "table1.md", "claims.csv", "figures/06_*")),
    Stage("07", "07_caption_zero_shot.ipynb", ("02", "04"), ("{data}/**", *SEARCH),
          (METRICS, "table2.csv", "table2.md", "captions/zero_shot*.csv", "checkpoints/captioner/*", "figures/07_*")),
    Stage("08", "08_caption_supervised.ipynb", ("02", "04", "07"), ("{data}/**", *SEARCH),
          (METRICS, "captions/supervised*.csv", "figures/08_*")),
    Stage("09", "09_ablate_the_bridge.ipynb", ("02", "04"), ("{data}/**", *SEARCH),
          (METRICS, "ablations.csv", "ablations.md", "figures/09_*")),
    Stage("10", "10_replication_report.ipynb", ("03", "05", "06", "07", "08", "09"),
          ("results/paper.csv", "{results}/metrics.csv"), ("comparison.csv", "comparison.md", "report.html"),
          lays_out=True),
    Stage("11", "11_caption_your_own.ipynb", ("02", "05", "07"), ("data/mini/recordings/**",), ("figures/11_*",)),
    Stage("A1", "A1_build_mini_corpus.ipynb", (), ("data/mini/recordings/**",), ("figures/A1_*",), default=False),
    Stage("A2", "A2_train_mini_clap.ipynb", (), ("data/mini/**",), ("mini_clap.csv", "figures/A2_*"), default=False),
    Stage("A3", "A3_sample_the_bridge.ipynb", ("02", "04", "07"), ("{data}/**", *SEARCH), (METRICS, "figures/A3_*"),
          default=False),
)


# ------------------------------------------------------------------------------------------------- what a stage reads
def sha256(data: bytes | str) -> str:
    """Hex sha256 of bytes, or of text in UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def read_notebook(path: Path) -> list[dict]:
    """The cells of a notebook with their ``source`` as one string; StageError if the file is no notebook."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [{**cell, "source": "".join(cell["source"])} for cell in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"notebooks/{path.name} is not a notebook ({type(error).__name__}): "
                         "git checkout -- notebooks") from None


def parameter_names(path: Path) -> list[str]:
    """Names assigned in the one cell tagged ``parameters``; StageError if it does not set ``profile``."""
    cells = read_notebook(path)
    tagged = [cell["source"] for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    names = re.findall(r"^(\w+) *=", "\n".join(tagged), re.MULTILINE)
    if len(tagged) != 1 or "profile" not in names:
        raise StageError(f"notebooks/{path.name}: one cell tagged 'parameters' must set 'profile'")
    return names


def recipes(package: Path) -> dict[str, str]:
    """The recipe numbers in the modules of ``package`` (``BRIDGE_RECIPE = 1``), read without importing any."""
    texts = [path.read_text(encoding="utf-8") for path in package.glob("*.py")]
    return dict(sorted(pair for text in texts for pair in re.findall(r"^(\w+_RECIPE) = (\d+)", text, re.MULTILINE)))


def source_sha256(package: Path) -> str:
    """Hash of the package's text. It decides nothing but whether tables and report are laid out anew."""
    return sha256("\n".join(path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))))


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder but hidden ones, those behind links too; a link to a folder above is not entered."""
    found = []
    for name, folders, files in os.walk(folder, followlinks=True):
        here = Path(name).resolve()
        folders[:] = [inner for inner in folders if not here.is_relative_to(Path(name, inner).resolve())]
        found += [Path(name, file) for file in files if not file.startswith(".") and Path(name, file).is_file()]
    return sorted(found)


@dataclass(frozen=True)
class Run:
    """One call of ``run_all.sh``: the profile, what was asked for, and where things lie."""

    profile: Profile
    stages: tuple[Stage, ...] = STAGES
    root: Path = REPO
    asked: dict[str, object] = field(default_factory=dict)          # parameters from the command line
    hashed: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)      # pattern -> what read_files found

    @property
    def results(self) -> Path:
        return self.profile.results_dir

    def source(self, stage: Stage) -> Path:
        return self.root / "notebooks" / stage.notebook

    def stamp_file(self, number: str) -> Path:
        return self.profile.cache_dir / "stamps" / f"{number}.json"

    def stamp(self, number: str) -> dict:
        """The stage's stamp; empty if it never finished, or the file is damaged."""
        try:
            stamp = json.loads(self.stamp_file(number).read_text())
            return stamp if {"notebook", "parts", "outputs", "wall_s", "finished"} <= stamp.keys() else {}
        except (OSError, ValueError, AttributeError):
            return {}

    def parameters(self, stage: Stage) -> dict:
        """What papermill passes: profile, and those of ``asked`` that the notebook takes."""
        known = parameter_names(self.source(stage))
        return {"profile": self.profile.name} | {name: value for name, value in self.asked.items() if name in known}

    def name(self, path: Path) -> str:
        """A path as the reader of a message wants it: relative to the repository where it lies in it."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def read_files(self, pattern: str) -> dict[str, str]:
        """sha256 of the files a pattern matches: those of its folder by name, each folder below it as one entry.

        AudioCaps' clips count by name and size: reading 43 GB at every start would take longer than the run.
        """
        if pattern not in self.hashed:
            places = {"data": self.profile.data_dir, "encoder": self.profile.encoder, "results": self.results}
            base = self.root / pattern.format(**places).removesuffix("**")
            entries: dict[str, list[str]] = {}
            for path in files_below(base) if pattern.endswith("**") else [base] if base.is_file() else []:
                clip = self.profile.name == "paper" and path.suffix.lower() in AUDIO_SUFFIXES
                content = str(path.stat().st_size) if clip else sha256(path.read_bytes())
                top = self.name(base.joinpath(*path.relative_to(base).parts[:1]))
                entries.setdefault(top, []).append(f"{path.relative_to(base.parent)} {content}")
            self.hashed[pattern] = {name: sha256("\n".join(lines)) for name, lines in entries.items()}
        return self.hashed[pattern]

    def parts(self, stage: Stage) -> dict[str, str]:
        """Everything the stage reads, by the name that a reason gives it, with its sha256."""
        code = [cell["source"] for cell in read_notebook(self.source(stage)) if cell["cell_type"] == "code"]
        settings = {key: value for key, value in asdict(self.profile).items() if not isinstance(value, Path)}
        parts = {f"notebooks/{stage.notebook}": sha256("\n".join(code))} | recipes(self.root / "dl")
        if stage.lays_out:
            parts["dl"] = source_sha256(self.root / "dl")
        parts[f"profile {self.profile.name}"] = sha256(json.dumps(settings, sort_keys=True))
        parts["parameters"] = json.dumps(self.parameters(stage), sort_keys=True)
        for pattern in stage.reads:
            parts |= self.read_files(pattern)
        for number in stage.after:
            stamp = self.stamp(number)
            made = {name: value for name, value in stamp.get("outputs", {}).items() if "figures/" not in name}
            read_and_made = json.dumps([stamp.get("parts"), made], sort_keys=True)
            parts[f"stage {number}"] = sha256(read_and_made) if stamp else "not run"
        return parts

    def outputs(self, stage: Stage) -> dict[str, str]:
        """The promised files that exist, with their sha256, or "shared" where several stages write them."""
        found = sorted({path for pattern in stage.makes for path in self.results.glob(pattern) if path.is_file()})
        return {path.relative_to(self.results).as_posix():
                "shared" if path.name in SHARED else sha256(path.read_bytes()) for path in found}

    def reason(self, stage: Stage) -> str | None:
        """Why the stage has to run; None if all it read and made is as recorded."""
        stamp = self.stamp(stage.number)
        if not stamp:
            return "it has not run yet"
        made = {name: value for name, value in self.outputs(stage).items() if name in stamp["outputs"]}
        before, now = stamp["parts"] | stamp["outputs"], self.parts(stage) | made
        for name in now | before:
            if before.get(name) != now.get(name):
                verb = "is missing" if name not in now else "changed" if name in before else "is new"
                return f"{name} ran again" if name.startswith("stage ") else f"{name} {verb}"
        return None

    def chosen(self, only: list[str] | None = None, start: str | None = None) -> list[Stage]:
        """The stages asked for, in order; StageError for an unknown number, or if there is no notebook to run."""
        numbers = [stage.number for stage in self.stages]
        if unknown := {*(only or []), start or numbers[0]} - {*numbers}:
            raise StageError(f"unknown stage {min(unknown)!r}: choose one of {' '.join(numbers)}")
        named = [stage for stage in self.stages if (stage.number in only if only else stage.default)]
        absent = [stage for stage in named if not self.source(stage).is_file()]
        if only and absent:
            raise StageError(f"notebooks/{absent[0].notebook} is not part of this version")
        if not (stages := [stage for stage in named if stage not in absent and stage.number >= (start or "")]):
            raise StageError("there is no notebook to run in notebooks/")
        return stages

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second run out of ``results/<profile>`` by a StageError; the lock falls with its process."""
        from filelock import FileLock, Timeout

        self.results.mkdir(parents=True, exist_ok=True)
        file = self.results / ".lock"
        lock = FileLock(file, blocking=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise StageError(f"another run (process {file.read_text().strip() or '?'}) is writing "
                             f"{self.name(self.results)}: wait for it, or stop it first") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"no file locks on this disk ({error.strerror}): start no second run of profile {self.profile.name}",
                  flush=True)
        if file.exists() and file.read_text():        # the run before was killed: its kernel may live on for a moment
            time.sleep(KERNEL_ENDS_S)
        file.write_text(str(os.getpid()))
        try:
            yield
        finally:
            file.write_text("")
            lock.release()


# ------------------------------------------------------------------------------------------------- running the stages
def kernels() -> list:
    """The processes started by this one: the kernel and what it started."""
    import psutil

    return psutil.Process().children(recursive=True)


@contextmanager
def kernels_end_with_us() -> Iterator[None]:
    """Inside, a signal to stop kills the kernels at once, then raises KeyboardInterrupt with the signal's number."""
    def stop(signum: int, frame: object) -> None:
        for process in kernels():
            process.kill()
        raise KeyboardInterrupt(signum)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def watch(label: str) -> Iterator[list[float]]:
    """The kernels' resident memory, 10^6 bytes, sampled twice a second; off a terminal, a line of life each minute."""
    import psutil

    samples, ended = [0.0], threading.Event()

    def sample() -> None:
        for tick in count(1):
            if ended.wait(0.5):
                return
            total = 0
            for process in kernels():
                with suppress(psutil.Error):          # it ended meanwhile
                    total += process.memory_info().rss
            samples.append(total / 1e6)
            if tick % 120 == 0 and not sys.stderr.isatty():
                with suppress(BrokenPipeError):
                    print(f"        {label} … {tick // 120} min", flush=True)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def execute(run: Run, stage: Stage) -> None:
    """Run one notebook by papermill; the executed copy gets its name only when it is complete.

    Raises:
        StageError: a cell failed (the copy up to it is kept as ``*.failed.ipynb``), the kernel died or did not start,
            or a promised file is absent.
    """
    parameters = run.parameters(stage)
    from papermill import PapermillExecutionError, execute_notebook

    target = run.results / "notebooks" / stage.notebook
    partial, failed = target.with_name(f".{target.stem}.partial.ipynb"), target.with_suffix(".failed.ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    go_on = f"Repair it, then ./run_all.sh goes on from here (this stage alone: ./run_all.sh --only {stage.number})"
    try:
        execute_notebook(str(run.source(stage)), str(partial), parameters=parameters, kernel_name="python3",
                         cwd=str(run.root), progress_bar=sys.stderr.isatty(), autosave_cell_every=60,
                         start_timeout=KERNEL_START_S, extra_arguments=["--log-level=CRITICAL"])
        os.replace(partial, target)
    except PapermillExecutionError as error:
        os.replace(partial, failed)
        text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).rstrip() or f"{error.ename}: {error.evalue}"
        lines = "\n".join(f"    {line}" for line in text.splitlines()[-12:])
        raise StageError(f"stage {stage.number} failed in cell [{error.exec_count}] of {stage.notebook}:\n{lines}\n"
                         f"The executed copy up to there: {run.name(failed)}\n{go_on}") from None
    except (RuntimeError, LookupError) as error:          # it did not answer in time, or no kernel has this name
        reason = " ".join(str(error).split())[:200]
        raise StageError(f"stage {stage.number}: the kernel died, most often for lack of memory, or did not start "
                         f"({reason}): see whether python -m ipykernel --version answers. {go_on}") from None
    finally:
        partial.unlink(missing_ok=True)
    failed.unlink(missing_ok=True)
    if "report.html" in stage.makes:
        from dl.report import write_cards, write_report

        write_report(run.profile, target)
        if run.profile.name == "mini":
            write_cards(run.profile)
    if absent := [pattern for pattern in stage.makes if not any(run.results.glob(pattern))]:
        promised = f"{run.name(run.results)}/{absent[0]}"
        raise StageError(f"stage {stage.number}: {stage.notebook} ended without {promised}. {go_on}")


def run_stage(run: Run, stage: Stage, device: str) -> None:
    """Execute a stage, then write its row of ``timing.csv`` and its stamp."""
    from dl.store import RowFile, atomic_write

    timing = RowFile(run.results / "timing.csv", ("stage", "device", "wall_s", "peak_memory_mb"), ("stage", "device"))
    try:
        timing.read()
    except ValueError as error:
        raise StageError(str(error)) from None
    parts = run.parts(stage)
    run.stamp_file(stage.number).unlink(missing_ok=True)
    began = time.monotonic()
    try:
        with watch(stage.number) as memory:
            execute(run, stage)
    finally:
        run.hashed.clear()                            # it may have written what other stages read
    wall_s, peak_mb = round(time.monotonic() - began, 1), max(memory)
    timing.add([{"stage": stage.number, "device": device, "wall_s": wall_s, "peak_memory_mb": round(peak_mb)}])
    for pattern in stage.reads:
        if pattern.startswith("{results}"):           # a file that it may have written anew itself
            parts |= run.read_files(pattern)
    stamp = {"notebook": stage.notebook, "parts": parts, "outputs": run.outputs(stage), "wall_s": wall_s,
             "finished": datetime.now(UTC).isoformat(timespec="seconds"), "dl": source_sha256(run.root / "dl")}
    atomic_write(run.stamp_file(stage.number), json.dumps(stamp, indent=1))
    print(f"        {stage.number} done in {duration(began)}, peak memory {peak_mb / 1000:.1f} GB", flush=True)


def duration(began: float) -> timedelta:
    """The whole seconds since a moment of ``time.monotonic()``."""
    return timedelta(seconds=round(time.monotonic() - began))


def run_stages(run: Run, only: list[str] | None = None, start: str | None = None, force: bool = False,
               dry_run: bool = False) -> int:
    """Run the stages asked for that are not up to date; say RUN or SKIP for each, and why.

    Args:
        only: stage numbers; None takes the default stages.
        start: first stage to consider.

    Returns:
        Exit code: 0 done, 1 a stage failed, 2 a wrong call or a second run at the same time, 130 (143) interrupted.
    """
    began, device, done, stage = time.monotonic(), None, 0, None
    try:
        stages = run.chosen(only, start)
        if "profile" in run.asked:
            raise StageError("choose the profile by --profile, not by -p")
        for name in run.asked:
            if not any(name in parameter_names(run.source(stage)) for stage in stages):
                option = f"--{name}" if name in ("full", "seeds") else f"-p {name}"
                raise StageError(f"none of these stages takes the parameter '{name}': leave {option} out")
        print(f"profile {run.profile.name}: {len(stages)} stages, results in {run.name(run.results)}/", flush=True)
        if dry_run:
            plan(run, stages, force)
            return 0
        captions = any(stage.number in CAPTION_STAGES for stage in stages)
        if run.profile.name == "paper" and (missing := missing_assets(run.profile, captions)):
            last = "nothing was run or written; python -m dl check --profile paper looks again"
            print(*missing, OWN_PATHS, f"run_all: {last}", sep="\n", file=sys.stderr, flush=True)
            return 2
        with run.lock(), kernels_end_with_us():
            prepare_kernels(run.profile)
            for stage in stages:
                reason = "--force" if force else run.reason(stage)
                say(run, stage, reason)
                if reason:
                    device = device or find_device()
                    run_stage(run, stage, device)
                    done += 1
            if done:
                record_provenance(run)
            print(f"\n{done} stages run, {len(stages) - done} up to date, in {duration(began)}")
            last_screen(run)
            return 0
    except StageError as error:
        print(f"run_all: {error}", file=sys.stderr, flush=True)
        return 1 if stage else 2
    except KeyboardInterrupt as interrupt:
        where = f"stage {stage.number}" if stage else "its preparations"
        print(f"\nrun_all: stopped in {where} after {duration(began)}; ./run_all.sh goes on from there",
              file=sys.stderr, flush=True)
        return 143 if signal.SIGTERM in interrupt.args else 130
    except BrokenPipeError:
        raise
    except OSError as error:                                  # a full disk, a results folder that may not be written
        print(f"run_all: {error}. Free space or change the folder's owner, or set DL_RESULTS to another folder; "
              "finished stages stay finished", file=sys.stderr, flush=True)
        return 1


def plan(run: Run, stages: list[Stage], force: bool = False) -> dict[str, str | None]:
    """Say RUN (with its reason) or SKIP (None) for each stage, as if each stage that runs changed its outputs."""
    reasons: dict[str, str | None] = {}
    for stage in stages:
        reason = "--force" if force else run.reason(stage)
        first = next((number for number in stage.after if reasons.get(number)), None)
        reasons[stage.number] = reason or (f"stage {first} runs first" if first else None)
        say(run, stage, reasons[stage.number])
    return reasons


def say(run: Run, stage: Stage, reason: str | None) -> None:
    """One line: ``RUN  05 cross_the_bridge: BRIDGE_RECIPE changed``."""
    title = Path(stage.notebook).stem.partition("_")[2]
    edited = run.stamp(stage.number).get("dl") not in (None, source_sha256(run.root / "dl"))
    note = f"; dl has changed since {stage.number} ran (--force runs it again)" if edited else ""
    print(f"RUN  {stage.number} {title}: {reason}" if reason else f"SKIP {stage.number} {title}: up to date{note}",
          flush=True)


def prepare_kernels(profile: Profile) -> None:
    """Set this process's environment, which the kernels inherit."""
    try:
        Path.home()
    except RuntimeError:
        raise StageError("there is no home folder, where Jupyter and the language model keep files: "
                         "set HOME to a folder that can be written") from None
    if profile.encoder == "mini":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")          # all it needs is installed: no wait for a network
    for name in ("JPY_SESSION_NAME", "JUPYTER_PATH", *LAUNCHED):   # a front end, kernels and a launcher of others
        os.environ.pop(name, None)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"               # of two kernels called python3, this environment's


def find_device() -> str:
    """The device the notebooks compute on, asked in a process of its own so that this one keeps no GPU memory."""
    done = subprocess.run([sys.executable, "-c", "from dl.store import device_name; print(device_name())"],
                          capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise StageError(f"torch does not load ({reason}): run python -m dl check")
    return done.stdout.strip()


def record_provenance(run: Run) -> None:
    """``provenance.json``: what ``dl.store`` records, and every stage's notebook, time and end."""
    from dl.store import atomic_write, write_provenance

    data = run.profile.data_dir
    inputs = [*sorted(data.glob("*.csv")), data / "recordings", data / "mini_clap"]       # no AudioCaps: 43 GB
    path = write_provenance(run.profile, {run.name(path): path for path in inputs if path.exists()})
    stages = {}
    for stage in run.stages:
        if stamp := run.stamp(stage.number):
            stages[stage.number] = {name: stamp[name] for name in ("notebook", "wall_s", "finished")}
            stages[stage.number]["notebook_sha256"] = stamp["parts"][f"notebooks/{stamp['notebook']}"]
    command = " ".join(["run_all.sh", *sys.argv[2:]])
    record = json.loads(path.read_text()) | {"command": command, "stages": stages}
    atomic_write(path, json.dumps(record, indent=2, sort_keys=True) + "\n")


def last_screen(run: Run) -> None:
    """What was made, and where."""
    names = [*(path.name for path in sorted(run.results.glob("*.md"))), METRICS, "timing.csv", "provenance.json"]
    made = [name for name in names if (run.results / name).is_file()]
    figures = len({path.stem for path in run.results.glob("figures/*")})
    print(f"in {run.name(run.results)}/: {', '.join(made)}; {figures} figures in figures/; "
          "executed notebooks in notebooks/")


def list_stages(run: Run) -> None:
    """One line a stage: number, name, what it reads and makes, and when it last ended."""
    names = {"data": run.name(run.profile.data_dir), "encoder": "encoder", "results": run.name(run.results)}
    for stage in run.stages:
        reads = [pattern.format(**names).removesuffix("/**") for pattern in stage.reads]
        listed = ", ".join(dict.fromkeys([*reads, *(f"stage {number}" for number in stage.after)])) or "-"
        state = run.stamp(stage.number).get("finished", "not run" if run.source(stage).is_file() else "no notebook")
        print(f"{stage.number:<3} {Path(stage.notebook).stem.partition('_')[2]:<26} reads: {listed:<42} "
              f"makes: {', '.join(stage.makes) or '-'}  ({state}{'' if stage.default else '; only by --only'})")


# -------------------------------------------------- two long jobs of profile paper, alone or under accelerate launch
def start() -> Accelerator:
    """This process among its kind; alone, where nothing was launched. It takes a GPU where there is one."""
    if os.environ.get("MASTER_ADDR") is None:                 # left by another job: no launcher set it for this one
        for name in LAUNCHED:
            os.environ.pop(name, None)
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patience])


def embed(profile: Profile) -> int:
    """Embed all splits, each process its part of the clips; a killed call goes on. Returns the exit code."""
    from dl.clap import ClapEncoder, embed_split
    from dl.data import load_split

    accelerator = start()
    encoder = ClapEncoder.from_pretrained(profile.encoder, device=str(accelerator.device))
    for name in SPLITS:
        split, began = load_split(profile, name), time.perf_counter()
        found = embed_split(profile, split, encoder, progress=accelerator.is_main_process, accelerator=accelerator)
        seconds = time.perf_counter() - began
        accelerator.print(f"{name}: {len(found.clip_ids):,} clips embedded, {len(found.skipped)} unusable, "
                          f"{len(split.missing)} not on disk; {seconds:.1f} s, {len(split) / seconds:.1f} clips/s "
                          f"in {accelerator.num_processes} process(es) on {accelerator.device.type}")
    return 0


def fit(profile: Profile, decoder: str, seed: int) -> int:
    """Train one decoder of Table 2 into the cache, the processes sharing its batches. Returns the exit code.

    Args:
        decoder: "text" (zero-shot, notebook 07), "raw" or "diffusion_link" (supervised, notebook 08), or another of
            ``dl.experiments``.
        seed: the training seed.
    """
    from dl.clap import load_embeddings
    from dl.experiments import decoder_fit

    accelerator = start()
    train, val = load_embeddings(profile, "train"), load_embeddings(profile, "val")
    with accelerator.main_process_first():                            # the first fits the mapping, the others read it
        planned = decoder_fit(profile, decoder, seed, train, val)
    began = time.perf_counter()
    history = planned.load(progress=True, accelerator=accelerator).history
    steps, loss, seconds = int(history.step.iloc[-1]), history.loss.iloc[-1], time.perf_counter() - began
    accelerator.print(f"{planned.path.name}: {steps} steps, loss {loss:.3f}, {seconds:.0f} s in "
                      f"{accelerator.num_processes} process(es) on {accelerator.device.type}")
    return 0
