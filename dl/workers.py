"""Work that falls into independent parts, side by side: on a CPU, several processes of few threads do more than one of many.

Small matrices leave a second thread waiting most of the time, and a caption or a bridge is made of small matrices. A part is a
function of a module with its arguments; what it makes lies on disk afterwards, so that a killed run goes on where it was. The
number of processes, and so of threads in each, depends on the machine and on the number of parts alone: a run that goes on
from the cache gives the same bytes as one that was never stopped.
"""
from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor

import torch

MEMORY_GB = 7.0        # that all processes may take together; a laptop of 8 GB is enough


def side_by_side(function: Callable, parts: Iterable[tuple], processes: int = 0, gb_each: float = 0.6) -> list:
    """``[function(*part) for part in parts]``, several at a time.

    Args:
        function: importable by name (of a module, not of a notebook).
        parts: the arguments of each call, picklable, as the result must be.
        processes: at most so many; 0 takes one for each core. With one, or on a machine with a GPU, all is done in this process.
        gb_each: memory of one call, GB (10^9 bytes); ``MEMORY_GB`` bounds the sum.

    Returns:
        the results, in the order of ``parts``.

    Raises:
        Exception: what the first failing call raised; calls that have not begun are left out.
    """
    parts, cores = list(parts), os.cpu_count() or 1
    count = 1 if torch.accelerator.is_available() else min(processes or cores, cores, len(parts), int(MEMORY_GB / gb_each))
    if count < 2:
        return [function(*part) for part in parts]
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start, (cores // count,)) as pool:
        calls = [pool.submit(_call, pickle.dumps((function, part))) for part in parts]      # plain bytes: tensors would want shared memory
        try:
            return [call.result() for call in calls]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start(threads: int) -> None:
    """In a new process: its share of the cores, and an end when its parent ends, however that happens."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(call: bytes) -> object:
    function, part = pickle.loads(call)
    return function(*part)
