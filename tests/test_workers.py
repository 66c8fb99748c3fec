"""Parts side by side: the same results in the same order, its share of the cores each, nothing left running."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from dl import experiments
from dl.experiments import side_by_side

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="with a GPU there is one process")


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    monkeypatch.setattr(experiments.joblib, "cpu_count", lambda: 4)


def test_results_come_in_the_order_of_the_parts_from_other_processes():
    assert side_by_side(divmod, [(7, 2), (9, 4), (5, 5)], 2) == [(3, 1), (2, 1), (1, 0)]
    assert os.getpid() not in side_by_side(os.getpid, [()] * 2, 2)


def test_the_cores_are_shared_out():
    assert side_by_side(torch.get_num_threads, [()] * 2, 2) == [2, 2]


@pytest.mark.parametrize(("parts", "processes", "gb_each"), [(1, 0, 1), (3, 1, 1), (3, 0, 4)])
def test_what_is_alone_stays_in_this_process(parts, processes, gb_each):
    """One part, one process asked for, or no memory for two."""
    assert side_by_side(os.getpid, [()] * parts, processes, gb_each) == [os.getpid()] * parts


def test_the_first_error_is_raised_and_the_rest_is_left_out(tmp_path):
    with pytest.raises(ValueError, match="invalid literal"):
        side_by_side(int, [("x",), *[(str(i),) for i in range(50)]], 2)


def test_processes_end_with_their_parent():
    script = ("import time; from dl.experiments import side_by_side\n"
              "if __name__ == '__main__': side_by_side(time.sleep, [(120,), (120,)], 2)")
    parent = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60                                        # two children, and a tracker of files
    while len(children := psutil.Process(parent.pid).children(recursive=True)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert len(children) >= 2
    assert psutil.wait_procs(children, timeout=30)[1] == []
