"""How many threads there are and how they wait, which OpenMP reads once: when torch is loaded.

Belongs here: the defaults of the command ``ncsn-fast``, set before torch is loaded, and how many processors a process
may use. Does not belong here: the threads themselves (``csrc/cpu/pool.h``), torch, which this module must not import.

OpenMP's threads spin at the end of every parallel loop until the last one has come. Alone on a machine that is fast;
beside other processes each spins while another would have work, several times as slow in all.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

# Some 50 microseconds, what a thread costs to wake; then it sleeps. A runtime reads the names that it knows.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
COUNT = "OMP_NUM_THREADS"
NAMES = (*WAITING, COUNT)


def is_command() -> bool:
    """Whether this process is ``ncsn-fast`` or ``python -m ncsn_fast``, and no program that imports the package.

    ``ncsn-fast bench`` counts as one that does: it is to measure what such a program gets, PyTorch above all.
    """
    words = sys.orig_argv
    for i, word in enumerate(words):
        named = i < 2 and Path(word).name in ("ncsn-fast", "ncsn-fast.exe")
        if named or words[max(i - 1, 0) : i + 1] == ["-m", "ncsn_fast"]:
            rest = [word for word in words[i + 1 :] if not word.startswith("-")]
            return rest[:1] != ["bench"]
    return False


def set_defaults() -> None:
    """Let threads wait asleep, and be no more than the processors of the control group; where nothing else was asked.

    Only in the command, and only while torch is not loaded.
    """
    if "torch" in sys.modules or not is_command():
        return
    if not any(name in os.environ for name in WAITING):
        os.environ.update(WAITING)
    quota = cpu_quota()
    if COUNT not in os.environ and quota is not None and math.ceil(quota) < processors():
        os.environ[COUNT] = str(math.ceil(quota))


def processors() -> int:
    """How many this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """How many processors' time this process's control groups allow (Linux, v1 and v2); None without a limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            tops = [root / controllers, root / "cpu"]
        else:
            continue
        for top in tops:
            # In a container the path may be the host's, of which only the top can be seen.
            folder = top / path.strip("/")
            quotas += [
                _quota_of(place)
                for place in (folder, *folder.parents)
                if top in (place, *place.parents)
            ]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # no such files; "max"
        return None
