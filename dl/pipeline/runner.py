"""Running stages: papermill, wall time, peak memory, and what stands on the screen.

The notebook runs in a kernel of its own with the repository's root as working directory; its executed copy goes to
``results/<profile>/notebooks/``. A stage's stamp is written the moment it ends, so that a run killed anywhere goes on at the
stage it was killed in.
"""
from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from dl.pipeline.check import OWN_PATHS, missing_assets
from dl.pipeline.notebook import StageError, parameter_names
from dl.pipeline.stages import METRICS, Run, Stage

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
    from dl.results import RowFile, atomic_write

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
             "wall_s": round(wall_s, 1), "finished": datetime.now(UTC).isoformat(timespec="seconds")}
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
        say(stage, reasons[stage.number])
    return reasons


def say(stage: Stage, reason: str | None) -> None:
    """One line: ``RUN  05 cross_the_bridge: dl/bridge/network.py changed``."""
    title = Path(stage.notebook).stem.split("_", 1)[-1]
    print(f"RUN  {stage.number} {title}: {reason}" if reason else f"SKIP {stage.number} {title}: up to date", flush=True)


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
            say(stage, reason)
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
    done = subprocess.run([sys.executable, "-c", "from dl.results import device_name; print(device_name())"], capture_output=True, text=True,
                          check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise StageError(f"torch does not load: {(done.stderr.strip().splitlines() or ['no message'])[-1]}; run python -m dl check")
    return done.stdout.strip()


def record_provenance(run: Run) -> None:
    """``provenance.json``: what ``dl.results`` records, and every stage's notebook, time and end."""
    from dl.results import atomic_write, write_provenance

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
