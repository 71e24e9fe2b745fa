"""Inference engines as peers: turns, processes that are stopped, wrong, die or are not there; one real engine."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
from collections import namedtuple
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from ncsn_fast.benchmarks import command, comparisons, engine_child, engines, measure, report, suite
from ncsn_fast.benchmarks.cases import forward
from ncsn_fast.benchmarks.engines import Engine, EngineFailed, Process
from ncsn_fast.benchmarks.measure import Clock, Load, Timed
from ncsn_fast.benchmarks.results import Result
from ncsn_fast.benchmarks.suite import Bench, Case, Effort, Peer, Prepared, Settings
from ncsn_fast.cli import options
from ncsn_fast.threads import WAITING

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, F32 = torch.device("cpu"), torch.float32
X = torch.tensor([3.0, 4.0])
FACTS = dict.fromkeys(("device_name", "torch", "triton", "ncsn_fast", "commit", "date"), "?")
BENCH = Bench(
    Clock(CPU),
    {"copy GB/s": 10.0, "matmul float32 GFLOP/s": 100.0},
    FACTS | {"threads": 1},
    Effort(0.0, 3),
)
# An engine whose calls take the seconds that it is told, and which writes down its turns.
CHILD = """
import json, os, signal, sys
name, log = sys.argv[1:3]

def say(**what):
    print(json.dumps(what), flush=True)

{start}
say(ran="fake 1")
for line in sys.stdin:
    calls = json.loads(line)["calls"]
    with open(log, "a") as file:
        print(name, calls, file=file)
    {turn}
"""
ANSWER = "say(seconds=0.25)"


@pytest.fixture(autouse=True)
def load(monkeypatch):
    monkeypatch.setattr(suite, "Load", lambda: nullcontext(SimpleNamespace(others=0.0)))


@pytest.fixture
def start(tmp_path):
    """``start("name", turn=..., start=...)`` starts such an engine; its turns are in ``log``."""

    def run(name="fake", turn=ANSWER, start="", limit=60.0):
        script = tmp_path / f"{name}.py"
        script.write_text(CHILD.format(turn=turn, start=start))
        return Process([sys.executable, script, name, tmp_path / "log"], limit)

    return run


@pytest.fixture
def peer(start, tmp_path):
    """``peer("name", output, ...)`` is a peer in such an engine."""

    def make(name, output=X, **how):
        np.save(tmp_path / f"{name}.npy", output.numpy())

        def prepare():
            return engines.prepared(start(name, **how), tmp_path / f"{name}.npy")

        return Peer(name, "contiguous", prepare)

    return make


def case_of(*peers):
    work = Timed(lambda: X * 2)
    eager = Peer("eager", "contiguous", lambda: Prepared(work, lambda: (X,), "pytorch"))
    return Case(
        *("model", "network", "forward", (2,), F32, (eager, *peers), lambda: (X.double(),), 1e-6),
        flops=10**6,
    )


def status(process):
    return psutil.Process(process._process.pid).status()


# --- the process ----------------------------------------------------------------------------------


def test_a_process_is_stopped_but_in_its_turn(start, tmp_path):
    process = start(turn="assert os.getppid(); say(seconds=0.25 * calls)")
    assert process.ran == "fake 1" and status(process) == psutil.STATUS_STOPPED
    assert process.turn(1) == 0.25 and process.turn(3) == 0.75
    assert status(process) == psutil.STATUS_STOPPED
    assert (tmp_path / "log").read_text().split() == ["fake", "1", "fake", "3"]


@pytest.mark.parametrize("explicitly", [True, False])
def test_a_stopped_process_ends_with_its_object(start, explicitly):
    process = start()
    child = process._process
    if explicitly:
        process.close()
    del process
    gc.collect()
    assert child.returncode == -signal.SIGKILL and child.stdout.closed


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"turn": "say(error='ValueError: of no use')"}, "ValueError: of no use"),
        ({"turn": "os.kill(os.getpid(), signal.SIGSEGV)"}, r"the process ended \(SIGSEGV\)"),
        ({"turn": "sys.exit('out of paper')"}, r"the process ended \(status 1\): out of paper"),
        ({"turn": "print('hello', flush=True)"}, "it said b'hello"),
        ({"turn": "pass", "limit": 1.0}, "no answer in 1 seconds"),
    ],
)
def test_why_a_turn_fails(start, how, message):
    process = start(**how)
    with pytest.raises(EngineFailed, match=message):
        process.turn(1)
    assert process._process.returncode is not None


def test_why_a_start_fails(start):
    with pytest.raises(EngineFailed, match=r"^ImportError: no such library$"):
        start(start="say(error='ImportError: no such library')")
    with pytest.raises(EngineFailed, match=r"\(status 3\): $"):
        start(start="os._exit(3)")


def test_a_process_that_was_killed_meanwhile_fails_its_turn(start):
    process = start()
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(EngineFailed, match=r"the process ended \(SIGKILL\)"):
        process.turn(1)


def test_engines_wait_as_they_do_of_themselves(monkeypatch):
    for name, value in WAITING.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # somebody's own wish
    found = engines.environment()
    assert found["OMP_WAIT_POLICY"] == "active" and "GOMP_SPINCOUNT" not in found


def test_the_load_of_others_is_not_that_of_the_engines(monkeypatch, start):
    seconds = {}  # of each process
    cpu = namedtuple("cpu", "user system idle")
    process = start()
    pid = process._process.pid
    monkeypatch.setattr("psutil.cpu_count", lambda: 1)
    monkeypatch.setattr("psutil.cpu_times", lambda: cpu(sum(seconds.values()), 0.0, 0.0))
    monkeypatch.setattr(
        "psutil.Process",
        lambda pid=None: SimpleNamespace(cpu_times=lambda: cpu(seconds[pid], 0.0, 0.0)),
    )
    clock = itertools.count()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    seconds.update({None: 1.0, pid: 1.0, "other": 1.0})
    with Load() as load:
        seconds.update({None: 1.25, pid: 1.5, "other": 1.125})
    assert load.others == 0.125
    process.close()
    assert pid not in measure.measured_processes


# --- in a case ------------------------------------------------------------------------------------


def test_engines_take_turns_and_their_own_time(peer, tmp_path):
    eager, *rows = BENCH.run(case_of(peer("ncnn"), peer("mnn", turn="say(seconds=0.5)")))
    assert [(r.status, r.median_us, r.rounds) for r in rows] == [("ok", 25e4, 3), ("ok", 5e5, 3)]
    assert eager.median_us < 1e5 and rows[0].speedup == pytest.approx(eager.median_us / 25e4, 1e-2)
    assert {(r.backend, r.error, r.memory_mib, r.out_layout) for r in rows} == {
        ("fake 1", 0.0, None, "contiguous")
    }
    # A turn each to see how long a call takes, then rounds that begin with another peer each.
    turns = (tmp_path / "log").read_text().split()[::2]
    assert turns == ["ncnn", "mnn"] * 2 + ["ncnn", "mnn"] + ["mnn", "ncnn"]


def test_a_wrong_engine_gets_no_turn(peer, tmp_path):
    _, wrong, right = BENCH.run(case_of(peer("mnn", X * 1.01), peer("ncnn")))
    assert (wrong.status, wrong.median_us, wrong.error) == ("wrong", None, 0.01)
    assert wrong.note == "relative error 1.0e-02, tolerance 1e-06"
    assert right.status == "ok" and "mnn" not in (tmp_path / "log").read_text()


def test_an_engine_that_dies_fails_and_the_others_are_measured(peer):
    late = "os.path.getsize(log) > 30 and os._exit(7); " + ANSWER
    early = peer("mnn", start="sys.exit('no licence')")
    _, dead, never, right = BENCH.run(case_of(peer("opencv", turn=late), early, peer("ncnn")))
    assert (dead.status, dead.median_us) == (never.status, never.median_us) == ("failed", None)
    assert dead.note.startswith("EngineFailed: the process ended (status 7)")
    assert never.note == "EngineFailed: the process ended (status 1): no licence"
    assert (right.status, right.median_us) == ("ok", 25e4)


def test_an_engine_that_is_not_there_is_not_run_and_says_what_to_install():
    work = SimpleNamespace(inputs=lambda: (torch.zeros(2, 3), None))
    absent = Engine("mnn", {"no_such_module": "no-such-package", "no_such_tool": "no-such-tool"})
    lonely = Engine("ncnn", {}, one_image=True)
    missing = [name for name in engines.EXPORT if importlib.util.find_spec(name) is None]
    _, *rows = BENCH.run(case_of(*(engines.engine_peer(e, work) for e in (absent, lonely))))
    assert [(r.status, r.median_us) for r in rows] == [("not run", None)] * 2
    packages = " ".join([*missing, "no-such-package", "no-such-tool"])
    assert rows[0].note == f"not installed: pip install {packages}"
    if not missing:
        assert rows[1].note == "it takes one image at a time"


def test_engines_are_there_only_if_asked_for_and_only_in_float32_on_a_cpu():
    asked = Settings(CPU, (F32,), engines=True)
    names = [peer.name for peer in engines.peers(None, asked, F32)]
    assert names == [e.name for e in engines.ENGINES]
    assert set(names) == set(comparisons.ENGINES) == set(engine_child.LOADERS)
    assert (engines.INPUT, engines.OUTPUT) == (engine_child.INPUT, engine_child.OUTPUT)
    assert not engines.peers(None, asked, torch.bfloat16)
    assert not engines.peers(None, dataclasses.replace(asked, engines=False), F32)
    assert not engines.peers(None, dataclasses.replace(asked, device=torch.device("cuda")), F32)


def test_a_gpu_has_no_engines(monkeypatch):
    monkeypatch.setattr(options, "choose_device", torch.device)
    assert command.settings_of("cpu", None, None, quick=True, engines=True).engines
    with pytest.raises(ValueError, match="--peers are engines for a CPU, got device 'cuda:1'"):
        command.settings_of("cuda:1", None, None, quick=True, engines=True)


def test_nothing_of_an_engine_is_imported_in_this_process():
    modules = {name for engine in engines.ENGINES for name in engine.needs} | {*engines.EXPORT}
    script = "import sys; from ncsn_fast.benchmarks import command, suite; "
    script += "s = command.settings_of('cpu', None, None, quick=True, engines=True); "
    script += "assert any(c.group == 'network' for c in suite.find_cases(s)); "
    script += f"print(sorted({modules} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


# --- in a report ----------------------------------------------------------------------------------


def row(peer, us, error=1e-6):
    blank = {
        f.name: None if "None" in f.type else "" if f.type == "str" else 1
        for f in dataclasses.fields(Result)
    }
    case = {"suite": "model", "group": "network", "name": "forward", "shape": "1x3x32x32"}
    times = {"median_us": us, "q1_us": us, "q3_us": us, "status": "ok", "error": error}
    return Result(**blank | case | times | {"peer": peer, "layout": "contiguous"})


def test_a_report_compares_ours_with_the_fastest_engine():
    ours, eager = row("ncsn_fast", 100), row("eager", 400)
    found = [row("openvino", 50, 2e-5), ours, eager, row("onnxruntime", 200)]
    (comparison,) = comparisons.comparisons_of(found)
    assert comparison.our_families == ["ncsn_fast"] and comparison.ours() is ours
    assert comparison.engine_families == ["onnxruntime", "openvino"]
    text = report.case_table([comparison])
    assert "| onnxruntime | openvino | ncsn_fast | vs eager | vs engine |" in text
    assert "| 50 µs ±0 NCHW, 2e-05 off | 100 µs ±0 NCHW, 1e-06 off | 4.0x | **0.50x** |" in text
    text = report.short_table([comparison])
    assert "| 400 µs | 50 µs openvino | 100 µs | 4.0x | **0.50x** |" in text
    assert "inference engines" in report.render({"x": report.Run(found)}, {})


def test_a_report_without_engines_does_not_speak_of_them():
    found = [row("ncsn_fast", 100), row("eager", 400)]
    text = report.render({"x": report.Run(found)}, {})
    text += report.short_table(comparisons.comparisons_of(found))
    assert "engine" not in text and " off" not in text


# --- a real engine --------------------------------------------------------------------------------


@functools.cache
def forward_case(n):
    """One for all engines: the export takes most of the time."""
    settings = Settings(CPU, (F32,), engines=True)
    return forward.case(settings, F32, n, 8, 8, compiled_layouts=())


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", sorted(engines.ENGINES, key=lambda e: e.one_image), ids=lambda e: e.name
)
def test_a_real_engine(engine):
    n = 1 if engine.one_image else 2
    why = engine.why_not(n)
    if why is not None:
        pytest.skip(why)
    case = forward_case(n)
    chosen = [peer for peer in case.peers if peer.name in ("eager", engine.name)]
    *_, found = BENCH.run(dataclasses.replace(case, peers=tuple(chosen)))
    assert found.status in ("ok", "noisy"), found.note
    assert found.median_us > 0 and 0 < found.error < 1e-4 and found.speedup > 0
    assert found.backend.lower().startswith(engine.name)
