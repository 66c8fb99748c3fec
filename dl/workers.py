"""Work that falls into independent parts, side by side: on a CPU, several processes of few threads do more than one of many.

Small matrices leave a second thread waiting most of the time, and a caption or a bridge is made of small matrices. A fit, or the
captions of a row, lie on disk afterwards, so that a killed run goes on where it was; scores are quick and come back as they are. The
number of processes, and so of threads in each, depends on the machine and on the number of parts alone: a run that goes on gives the
same bytes as one that was never stopped.
"""
from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from functools import cache

import torch
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor

MEMORY_GB = 5.0        # that the processes may take together, beside this one, which may hold a decoder too; a laptop of 8 GB is enough


def side_by_side(function: Callable, parts: Iterable[tuple], processes: int = 0, gb_each: float = 0.6) -> list:
    """``[function(*part) for part in parts]``, several at a time.

    Args:
        function: of a module; its arguments and results are copied from process to process.
        parts: the arguments of each call.
        processes: at most so many; 0 takes one for each core, or for each part where there are fewer than twice as many parts as
            cores. With one, or on a machine with a GPU, all is done in this process.
        gb_each: memory of one call, GB (10^9 bytes); ``MEMORY_GB`` bounds the sum.

    Returns:
        the results, in the order of ``parts``.

    Raises:
        Exception: what the first failing call raised; calls that have not begun are left out.
    """
    parts, cores = list(parts), os.cpu_count() or 1
    wanted = processes or (len(parts) if len(parts) < 2 * cores else cores)          # three parts on two cores: together, not two and then one
    count = 1 if torch.accelerator.is_available() else min(wanted, len(parts), int(MEMORY_GB / gb_each))
    if count < 2:
        return [function(*part) for part in parts]
    try:
        with parallel_config("loky", inner_max_num_threads=max(1, cores // count)):
            return Parallel(count, batch_size=1, pre_dispatch=count)(delayed(_call)(function, part, os.getpid()) for part in parts)
    finally:
        get_reusable_executor().shutdown(kill_workers=True)                 # idle ones would keep their memory


def _call(function: Callable, part: tuple, parent: int) -> object:
    _end_with(parent)
    return function(*part)


@cache
def _end_with(parent: int) -> None:
    """From now on this process ends when its parent does, however that happens."""
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
