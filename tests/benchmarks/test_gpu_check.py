"""The GPU check without a GPU: its plan with a clock and parts made up, what it writes, what GPU tests rest on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from support import calm
from support.matrix import matrix

from ncsn_fast.benchmarks import gpu_check, gpu_report, suite
from ncsn_fast.benchmarks.gpu_check import BENCHMARKS, NAMES, PARTS, Check
from ncsn_fast.benchmarks.results import Result, csv_text, load
from ncsn_fast.benchmarks.suite import Settings
from ncsn_fast.benchmarks.tf32 import tf32

ROOT = Path(__file__).parents[2]
GPU = "NVIDIA H100 80GB HBM3"
STEM = "nvidia-h100-80gb-hbm3"
FILES = ["report.md", "check.json", "gpu.json", "gpu.csv", "tests.xml", "matrix.xml", "log.txt"]


def row(**fields: object) -> dict:
    """A row of a benchmark."""
    values = {name: "" for name in Result.__dataclass_fields__} | {"median_us": 2.0, "threads": 1}
    numbers = ("q1_us", "q3_us", "rounds", "speedup", "memory_mib", "gb_per_s", "gflop_per_s")
    values |= dict.fromkeys((*numbers, "limit_share", "error", "graphs"), None)
    return values | {"group": "norm", "peer": "eager", "status": "ok"} | fields


def held(*rows: dict) -> str:
    return json.dumps({"results": rows, "machine": {}, "limits": {}, "warnings": []})


class Machine:
    """Parts that take made-up seconds on a made-up clock, write what they are told to, and are stopped at their limit.

    Attributes:
        seconds: that a part's command takes, by the name of its log; else one.
        status: of its exit; else 0.
        output: that it writes to the log.
        calls: part, limit, command and environment of each.
    """

    def __init__(self, tmp_path: Path) -> None:
        self.now, self.calls = 1000.0, []
        self.seconds: dict[str, float] = {}
        self.status: dict[str, int] = {}
        self.output: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self.during = lambda name: None
        self.paths = {"work": tmp_path / "work", "results": tmp_path / "results"}
        self.copy_to = tmp_path / "out" / "copies"

    def run(self, command, log, limit, environment, tick):
        name = log.stem
        self.calls.append((name, limit, command, environment))
        with log.open("a") as file:
            file.write(self.output.get(name, "") + "\n")
        for file, text in self.files.items():
            if Path(file).stem == name:
                (log.parent / file).write_text(text)
        tick()
        self.during(name)
        kind = environment.get("NCSN_FAST_BUILD", "") if name == "build" else ""
        seconds = self.seconds.get(name + kind, self.seconds.get(name, 1.0))
        self.now += min(seconds, limit)
        return None if seconds > limit else self.status.get(name + kind, 0)

    def check(self, *wanted: str, minutes: float = 9.5) -> tuple[Check, int]:
        options = {"minutes": minutes, "copy_to": self.copy_to, **self.paths}
        check = Check(GPU, "9.0", clock=lambda: self.now, run=self.run, **options)
        return check, check.run(wanted)

    @property
    def limits(self) -> dict[str, float]:
        return {name: limit for name, limit, *_ in self.calls}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: f"/cuda/{name}")
    monkeypatch.setattr(gpu_check, "in_parallel", lambda: ["-n", "8"])
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return Machine(tmp_path)


# --- the plan -------------------------------------------------------------------------------------


def test_order_and_time(machine):
    """Network and sampling come before the tests, compiled peers after all that is quick."""
    check, status = machine.check()
    assert status == 0 and [name for name, *_ in machine.calls] == list(NAMES)
    order = ("build", "info", "network", "sampling", "tests", "norm", "memcheck", "compiled")
    assert sorted(order, key=NAMES.index) == list(order)
    assert {outcome.status for outcome in check.outcomes.values()} == {"ok"}
    assert sum(part.share for part in PARTS) <= 60 * gpu_check.MINUTES - gpu_check.CLOSING_SECONDS


def test_parts_that_all_take_too_long_get_their_shares(machine):
    start = machine.now
    machine.seconds = dict.fromkeys(NAMES, 1e6)
    check, status = machine.check()
    statuses = {name: outcome.status for name, outcome in check.outcomes.items()}
    assert status == 1 and statuses == dict.fromkeys(NAMES, "ended") | {"build": "failed"}
    assert machine.now - start <= 60 * gpu_check.MINUTES - gpu_check.CLOSING_SECONDS + 1e-6
    scale = (60 * gpu_check.MINUTES - gpu_check.CLOSING_SECONDS) / sum(p.share for p in PARTS)
    for part in PARTS[1:]:  # the build has three tries
        assert machine.limits[part.name] == pytest.approx(scale * part.share, abs=1.0)


def test_time_that_is_left_flows_on(machine):
    machine.check()
    first = machine.limits
    assert first["network"] > 75 + 100 and first["matrix"] > 400
    machine.calls.clear()
    machine.seconds = {"network": 100.0}
    machine.check()
    assert first["sampling"] - machine.limits["sampling"] == pytest.approx(99)


def test_parts_by_name_share_all_the_time(machine):
    check, _ = machine.check("pool", "norm")
    assert list(check.outcomes) == ["norm", "pool"]
    assert machine.limits["norm"] > 340 and machine.limits["pool"] > 550
    for _, _, command, _ in machine.calls:
        minutes = float(command[command.index("--minutes") + 1])
        assert 60 * minutes > 300


def test_no_part_begins_without_time(machine):
    check, _ = machine.check(minutes=0.5)
    assert {o.status for o in check.outcomes.values()} >= {"not run"}
    assert machine.now - 1000 <= 20
    assert "not run" in (machine.copy_to / "report.md").read_text()


def test_the_build_is_for_this_gpu_and_falls_back_to_cpu(machine, monkeypatch):
    check, status = machine.check("build", "memcheck")
    assert status == 0 and len(machine.calls) == 2
    environment = machine.calls[0][3]
    assert environment["NCSN_FAST_BUILD"] == "cuda" and environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    command = machine.calls[1][2]
    assert command[command.index("-k") + 1] == "native"

    machine.calls.clear()
    machine.status = {"buildcuda": 1}
    check, status = machine.check("build", "memcheck")
    tried = [
        environment["NCSN_FAST_BUILD"] for name, *_, environment in machine.calls if name == "build"
    ]
    assert tried == ["cuda", "cpu"] and status == 1
    assert check.outcomes["build"].status == "failed" and check.outcomes["build"].note == "only cpu"
    text = (machine.copy_to / "report.md").read_text()
    assert "NCSN_FAST_BUILD=cuda failed" in text and "only cpu" in text
    command = machine.calls[-1][2]
    assert command[command.index("-k") + 1] == "triton"  # there is no native kernel to check

    machine.calls.clear()
    machine.status, machine.seconds = {}, {"buildcuda": 1e6}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    check, _ = machine.check("build", "info")
    assert check.outcomes["build"].note == "only cpu"  # time was left for it
    assert machine.calls[0][3]["TORCH_CUDA_ARCH_LIST"] == "8.0"


def test_a_build_that_fails_twice_leaves_what_triton_does(machine):
    machine.status, machine.seconds = {"buildcuda": 1}, {"buildcpu": 1e6}
    check, status = machine.check("build")
    assert status == 1 and check.outcomes["build"].note == "only none"
    assert len(check.notes) == 2 and "NCSN_FAST_BUILD=cpu ended" in check.notes[1]


def test_without_a_sanitizer(machine, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: None)
    check, status = machine.check("memcheck", "racecheck")
    assert status == 0 and not machine.calls
    assert {outcome.status for outcome in check.outcomes.values()} == {"absent"}


# --- what is written ------------------------------------------------------------------------------

LOG = """\
tests/test_cuda.py::test_a[native-x y]
[gw0] [  5%] PASSED tests/test_cuda.py::test_a[native-x y]
[gw1] [ 10%] FAILED tests/test_cuda.py::test_b
"""


def test_what_a_killed_part_had_is_in_the_report(machine):
    machine.output["tests"] = LOG
    machine.files["network.json"] = held(row(), row(peer="native", median_us=1.0))
    machine.seconds = {"tests": 1e6, "network": 1e6}
    check, status = machine.check()
    assert status == 1 and check.outcomes["tests"].status == "ended"
    for text in (
        (machine.copy_to / "report.md").read_text(),
        (machine.paths["results"] / f"{STEM}-report.md").read_text(),
    ):
        assert "| tests | ended |" in text and "1 passed, 1 failed" in text
        assert "`tests/test_cuda.py::test_b`" in text and "2.00 |" in text
    assert len(load(machine.copy_to / "gpu.json").results) == 2


def test_results_are_written_while_a_part_runs(machine):
    """A kill that nothing can catch loses at most what came since the last copy."""
    machine.files["network.json"] = held(row())
    seen = {}

    def during(name):
        if name == "network":
            seen["report"] = (machine.copy_to / "report.md").read_text()
            seen["rows"] = len(load(machine.copy_to / "gpu.json").results)

    machine.during = during
    machine.check()
    assert seen["rows"] == 1
    assert "| network | running |" in seen["report"] and "| build | ok |" in seen["report"]


def test_a_signal_ends_the_check_with_a_report(machine):
    def during(name):
        if name == "sampling":
            sys.exit(1)

    machine.during = during
    with pytest.raises(SystemExit):
        machine.check()
    text = (machine.copy_to / "report.md").read_text()
    assert "| sampling | ended |" in text and "| network | ok |" in text


def test_copies_are_few_and_small(machine, monkeypatch):
    monkeypatch.setattr(gpu_report, "MOST_BYTES", 10_000)
    machine.output = {name: f"first {name}\n" + "x" * 50_000 + f"\nlast {name}" for name in NAMES}
    machine.files["tests.xml"] = "<testsuites/>"
    machine.files["matrix.xml"] = "<" + "x" * 20_000
    machine.files["network.json"] = held(row())
    machine.check()
    sizes = {path.name: path.stat().st_size for path in machine.copy_to.iterdir()}
    assert len(sizes) <= 8 and max(sizes.values()) <= 10_000
    assert set(sizes) == {*FILES} - {"matrix.xml"} | {"matrix.xml.txt"}
    log = (machine.copy_to / "log.txt").read_text()
    for name in NAMES:
        assert f"===== {name} =====" in log and f"first {name}" in log and f"last {name}" in log
    assert "bytes left out" in log


def test_rows_of_all_benchmarks_are_one_results_file(machine):
    """Of a case that two parts ran the later one counts, unless it timed nothing."""
    machine.files["network.json"] = held(
        row(group="a", median_us=5.0), row(group="b", median_us=5.0)
    )
    again = row(group="a", median_us=4.0)
    skipped = row(group="b", median_us=None, status="not run")
    machine.files["compiled.json"] = held(again, row(group="a", peer="compile"), skipped)
    machine.check()
    results = load(machine.copy_to / "gpu.json").results
    assert [(r.group, r.peer, r.median_us) for r in results] == [
        ("a", "eager", 4.0),
        ("a", "compile", 2.0),
        ("b", "eager", 5.0),
    ]
    assert (machine.copy_to / "gpu.csv").read_text() == csv_text(results)
    # Some parts alone join what is there; a whole run begins anew, and an old part's rows are not told again.
    machine.files = {"norm.json": held(row(group="c"))}
    machine.check("norm")
    stored = machine.paths["results"] / f"{STEM}.json"
    assert {r.group for r in load(stored).results} == {"a", "b", "c"}
    assert {r.group for r in load(machine.copy_to / "gpu.json").results} >= {"c"}
    machine.check()
    assert {r.group for r in load(stored).results} == {"c"}


def test_tests_are_read_from_any_log(tmp_path):
    log = tmp_path / "tests.log"
    log.write_text(LOG)
    assert gpu_report.counts_of(log) == "1 passed, 1 failed"
    log.write_text(
        "tests/a.py::test_x[1 - 2] PASSED [ 50%]\ntests/a.py::test_y SKIPPED (no GPU) [ 99%]\n"
    )
    assert gpu_report.tests_of(log) == {
        "tests/a.py::test_x[1 - 2]": "PASSED",
        "tests/a.py::test_y": "SKIPPED",
    }
    assert gpu_report.counts_of(tmp_path / "none.log") == "no tests"


# --- processes ------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    """Whether the process runs; not if it is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("ignores", [False, True], ids=["interrupted", "killed"])
def test_a_limit_ends_the_whole_group(tmp_path, ignores):
    """First with Ctrl-C, at which a command writes what it has; then for good, with its children."""
    code = (
        "import signal, subprocess, sys, time\n"
        f"signal.signal(signal.SIGINT, {'signal.SIG_IGN' if ignores else 'signal.default_int_handler'})\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; "
        "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)'])\n"
        "print('child', child.pid, flush=True)\n"
        "try:\n"
        "    time.sleep(600)\n"
        "except KeyboardInterrupt:\n"
        "    print('summary', flush=True)\n"
    )
    log, ticks = tmp_path / "part.log", []
    status = gpu_check.run_process(
        [sys.executable, "-c", code], log, 8.0, dict(os.environ), lambda: ticks.append(1)
    )
    text = log.read_text()
    assert status is None and ticks and ("\nsummary\n" in text) != ignores
    pid = int(re.search(r"child (\d+)", text)[1])
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_the_status_of_a_command_that_ends(tmp_path):
    log = tmp_path / "part.log"
    for expected in (0, 3):
        command = [sys.executable, "-c", f"print('here'); raise SystemExit({expected})"]
        assert gpu_check.run_process(command, log, 60, dict(os.environ), lambda: None) == expected
    assert log.read_text().count("here\n") == 2


def test_as_a_script(tmp_path):
    """With nothing but the standard library beside it; wrong arguments are told before a GPU is looked for."""
    script = str(ROOT / "benchmarks" / "gpu_check.py")
    command = [sys.executable, "-S", script]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0 and "--copy-to" in shown.stdout and "memcheck" in shown.stdout
    wrong = subprocess.run([*command, "norm", "typo"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "typo" in wrong.stderr
    without = subprocess.run([*command, "norm"], capture_output=True, text=True)
    assert without.returncode == 1 and "needs a CUDA device" in without.stderr


# --- what the parts call --------------------------------------------------------------------------


def collected(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    answer = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return [line for line in answer.stdout.splitlines() if "::" in line]


def test_few_tests_are_representative_and_about_twenty_are_sanitized():
    everything = collected(*gpu_check.CUDA_TESTS)
    representative = collected(*gpu_check.CUDA_TESTS, "-m", gpu_check.REPRESENTATIVE)
    rest = collected(*gpu_check.CUDA_TESTS, "-m", gpu_check.MATRIX)
    assert sorted(representative + rest) == sorted(everything)
    assert len(representative) < 200 < len(rest)
    chosen = [f"{file}::{test}" for file, names in gpu_check.SANITIZED.items() for test in names]
    for backend in ("native", "triton"):
        names = collected(*chosen, "-m", gpu_check.REPRESENTATIVE, "-k", backend)
        assert 15 <= len(names) <= 30
        assert {name.split("[")[0] for name in names} == set(chosen)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_options_of_the_benchmarks(name, monkeypatch):
    """Each is a command that ncsn-fast bench takes, and finds cases; without compiled peers where it says so."""
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    from ncsn_fast import cli
    from ncsn_fast.benchmarks import command

    seen = []

    def measure(console, settings, suites, match, minutes, out):
        seen.append((settings, suites, match))

    monkeypatch.setattr(command, "_measure", measure)
    arguments = ["bench", *BENCHMARKS[name], "--device", "cpu", "--minutes", "1.50"]
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert not stop.value.code
    ((settings, suites, match),) = seen
    cases = suite.find_cases(settings, suites)
    assert any(match is None or match in f"{case.suite} {case.label}" for case in cases)
    assert any("compile" in peer.name for case in cases for peer in case.peers) == (
        "--no-compiled" not in BENCHMARKS[name]
    )


# --- TF32 -----------------------------------------------------------------------------------------


def precisions() -> list[object]:
    backends = torch.backends
    operators = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    flags = [backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32]
    return [*(o.fp32_precision for o in operators), *flags, torch.get_float32_matmul_precision()]


def test_tf32_is_set_everywhere_and_given_back():
    before = precisions()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tf32(False):
            assert precisions() == ["ieee"] * 3 + [False, False, "highest"]
            with tf32(True):
                assert precisions() == ["tf32"] * 3 + [True, True, "high"]
            assert precisions() == ["ieee"] * 3 + [False, False, "highest"]
            with pytest.raises(KeyError), tf32(True):
                raise KeyError
            assert precisions() == ["ieee"] * 3 + [False, False, "highest"]
    assert precisions() == before


@pytest.mark.parametrize("allowed", [False, True])
def test_a_case_runs_with_tf32_as_it_says(allowed):
    seen = []

    def prepare():
        seen.append(torch.backends.cudnn.conv.fp32_precision)
        raise RuntimeError("enough")

    case = suite.Case(
        *("ops", "conv", "forward", (1,), torch.float32),
        peers=(suite.Peer("eager", "contiguous", prepare),),
        expected=lambda: seen.append(torch.backends.cudnn.conv.fp32_precision) or (torch.ones(1),),
        tolerance=1.0,
        flops=1,
        tf32=allowed,
    )
    facts = dict.fromkeys(("device_name", "torch", "triton", "ncsn_fast", "commit", "date"), "?")
    clock = suite.Clock(torch.device("cpu"))
    bench = suite.Bench(clock, {}, facts | {"threads": 1}, suite.Effort(0.0, 1))
    (result,) = bench.run(case)
    assert seen == (["tf32"] if allowed else ["ieee"]) * 2
    assert result.dtype == ("tf32" if allowed else "float32")


def test_tf32_has_rows_of_its_own_on_a_gpu():
    def cases(device):
        dtypes = (torch.bfloat16, torch.float32)
        return suite.find_cases(Settings(torch.device(device), dtypes, quick=False))

    on_gpu = cases("cuda")
    for case in on_gpu:
        twins = [c for c in on_gpu if c.tf32 and c.label == case.label.replace("float32", "tf32")]
        convolves = case.dtype == torch.float32 and case.flops > 0 and not case.tf32
        assert len(twins) == int(convolves or case.tf32), case.label
        if convolves:  # wide enough for TF32, far from the 1 of a mistake
            assert 1e-3 <= twins[0].tolerance <= 0.2
    assert {c.group for c in on_gpu if c.tf32} >= {
        "norm_elu_conv3x3",
        "network",
        "training",
        "sampling",
    }
    assert not any(case.tf32 for case in cases("cpu"))


# --- what the GPU's tests rest on -----------------------------------------------------------------


def test_the_calm_network_is_calm_and_does_something():
    """Weights that differ in the seventh digit give the same samples, to a tenth of what the tests allow."""
    options = {"n_steps_each": 40, "step_lr": 0.5 * 0.8**2, "seed": 5, "verbose": False}
    x = calm.calm_network().sample(4, 8, **options)
    other, silent = calm.calm_network(), calm.calm_network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 1e-6 * torch.randn_like(parameter))
        silent.end_conv.weight.zero_()
    least = calm.TOLERANCE["atol"]
    assert (other.sample(4, 8, **options) - x).abs().max() < least / 10
    assert (silent.sample(4, 8, **options) - x).abs().max() > 1000 * least


def test_matrix_keeps_the_telling_first_and_marks_the_rest():
    parameters = matrix("a, b", [1, 2], ["x", (3, 4)], telling=[(2, (3, 4))]).args[1]
    assert [p.values for p in parameters] == [(2, (3, 4)), (1, "x"), (1, (3, 4)), (2, "x")]
    assert [bool(p.marks) for p in parameters] == [False, True, True, True]
    assert parameters[0].id == "2-3x4"
    with pytest.raises(ValueError, match="no combination"):
        matrix("a", [1, 2], telling=[(3,)])


LOST = """
import os, pytest, torch
torch.cuda.synchronize = lambda: None
pytestmark = pytest.mark.cuda

def test_precision():
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"

def test_breaks():
    def lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.synchronize = lost
    assert False, "its own reason"

def test_an_ordinary_failure():
    assert torch.cuda.synchronize() is None and False

def test_after():
    torch.cuda.synchronize()
"""


@pytest.mark.parametrize("parallel", [False, True])
def test_a_lost_gpu_fails_one_test_only(tmp_path, parallel):
    if parallel:
        pytest.importorskip("xdist")
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path / "own_conftest.py")
    hook = "import torch\ntorch.cuda.is_available = lambda: True\nfrom own_conftest import *\n"
    (tmp_path / "conftest.py").write_text(hook)
    (tmp_path / "test_lost.py").write_text(LOST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cuda: needs a GPU\n")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "test_lost.py"]
    command += ["-n", "1"] if parallel else []
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for name in [n for n in environment if n.startswith(("PYTEST_", "COV_"))]:
        del environment[name]
    answer = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    log = tmp_path / "log"
    log.write_text(answer.stdout)
    outcomes = {test.split("::")[1]: o for test, o in gpu_report.tests_of(log).items()}
    expected = {"test_precision": "PASSED", "test_breaks": "FAILED"}
    if parallel:  # a new process takes the others
        expected |= {"test_an_ordinary_failure": "FAILED", "test_after": "PASSED"}
    else:
        assert "state was lost in test_lost.py::test_breaks" in answer.stdout
    assert outcomes == expected, answer.stdout + answer.stderr
    assert "its own reason" in answer.stdout
