"""csrc/cpu/pool.h, compiled by itself: every item runs once, whoever calls, and nobody waits for a thread in vain."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SANITIZERS = {"plain": [], "thread": ["-fsanitize=thread", "-g"]}


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request, tmp_path_factory) -> Path:
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not found:
        pytest.skip("no C++ compiler (CXX, c++ or g++)")
    out = tmp_path_factory.mktemp("pool") / request.param
    command = [*found.split(), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    command += [*SANITIZERS[request.param], f"-I{HERE.parents[1] / 'csrc'}"]
    result = subprocess.run(
        [*command, str(HERE / "pool.cpp"), "-o", str(out)], capture_output=True, text=True
    )
    if result.returncode != 0 and "cannot find" in result.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert result.returncode == 0, result.stderr
    return out


def check(program: Path, name: str) -> list[str]:
    result = subprocess.run([program, name], capture_output=True, text=True, timeout=100)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.split()
    assert lines.pop() == "ok"
    return lines


@pytest.mark.parametrize("name", ["items", "callers", "errors"])
def test_every_item_runs_once(program, name):
    check(program, name)


@pytest.mark.skipif(sys.platform != "linux", reason="the kinds of scheduling are Linux's")
def test_a_thread_that_does_not_run_holds_nothing_up(program):
    """2000 loops and a worker that gets no core: waiting for it would take a turn of the scheduler each time."""
    if "thread" in program.name:
        pytest.skip("a question of time")
    (seconds,) = check(program, "starved")
    assert float(seconds) < 1
