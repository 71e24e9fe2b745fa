"""All that only a GPU can tell, in one command and in under ten minutes.

    python3 benchmarks/gpu_check.py                          # everything
    python3 benchmarks/gpu_check.py norm pool                # some parts, which then share all the time
    python3 benchmarks/gpu_check.py --copy-to FOLDER         # the results also there, in seven files

Runs with the Python and the torch that are there and fetches nothing. The parts, in their order, are in PARTS. A part
has its share of the time and what those before it left; at its limit it is ended with all that it started, and the next
one begins. What each showed is written while it runs: to build/gpu_check/ as it comes, from there every ten seconds to
benchmarks/results/ and to the folder of --copy-to. The exit status is 1 if a part failed or was ended.

Only the standard library is imported here: what is to be checked may be broken.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__:
    from . import gpu_report
else:  # run as a script, before anything is installed
    import gpu_report

ROOT = Path(__file__).parent.parent.resolve()
WORK = ROOT / "build" / "gpu_check"
RESULTS = ROOT / "benchmarks" / "results"
MINUTES = 9.5
CLOSING_SECONDS = 10  # of the total, for the last report
LEAST_SECONDS = 5  # no part begins with less
REFRESH_SECONDS = 10  # from one copy of the results to the next
GRACE_SECONDS = 10  # at its limit a part is interrupted; it is killed so much later
LAST_CASE_SECONDS = 20  # before its limit a benchmark begins no more cases

CUDA_TESTS = [f"tests/gpu/test_cuda_{part}.py" for part in ("operators", "network", "sampling")]
REPRESENTATIVE, MATRIX = "cuda and not matrix", "cuda and matrix"
# Every kernel once, at sizes that a sanitizer is through with in seconds.
SANITIZED = {
    "tests/gpu/test_cuda_operators.py": (
        "test_seeded_is_explicit",
        "test_device_tensors_are_numbers",
        "test_clip_keeps_nan",
        "test_a_sample_does_not_know_its_batch",
    ),
    "tests/gpu/test_cuda_network.py": (
        "test_norm_at_an_offset",
        "test_norm_of_other_ranks",
        "test_norm_second_order",
        "test_norm_keeps_nan_in_its_plane",
        "test_pool_at_an_offset",
        "test_graph_capture",
    ),
}


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: of the part, on the command line and of its files.
        share: seconds it may take if nothing is left over from those before it.
        what: it does, for the report.
    """

    name: str
    share: float
    what: str


PARTS = (
    Part("build", 120, "the kernels, for this GPU alone"),
    Part("info", 15, "versions, devices, which backend serves what"),
    Part("network", 60, "network and training step beside eager PyTorch"),
    Part("sampling", 40, "sampling beside eager PyTorch"),
    # Everybody's default, which the quick parts, in half precision, leave out.
    Part("float32", 30, "the network in float32, with TF32 and without, beside eager PyTorch"),
    Part("tests", 95, "the GPU tests, less their matrix"),
    Part("norm", 40, "conditional instance norm + ELU beside eager PyTorch"),
    Part("pool", 25, "5x5 max pool beside eager PyTorch"),
    Part("langevin", 20, "Langevin step beside eager PyTorch"),
    Part("conv", 25, "norm, ELU and convolution beside eager PyTorch"),
    Part("memcheck", 25, "some twenty tests under compute-sanitizer: accesses"),
    Part("racecheck", 20, "the same: races in shared memory"),
    Part("compiled", 30, "network and sampling beside torch.compile"),
    Part("matrix", 15, "the rest of the GPU tests"),
)
NAMES = tuple(part.name for part in PARTS)
BENCHMARKS = {
    "network": ["--suite", "model", "--suite", "train", "--quick", "--no-compiled"],
    "sampling": ["--suite", "sample", "--quick", "--no-compiled"],
    "float32": ["--suite", "model", "--quick", "--no-compiled", "--dtype", "float32"],
    "norm": ["--suite", "ops", "--match", "cond_instance_norm_elu", "--no-compiled"],
    "pool": ["--suite", "ops", "--match", "max_pool5", "--no-compiled"],
    "langevin": ["--suite", "ops", "--match", "langevin_step_", "--no-compiled"],
    "conv": ["--suite", "ops", "--match", "norm_elu_conv3x3", "--quick", "--no-compiled"],
    "compiled": ["--suite", "model", "--suite", "train", "--suite", "sample", "--quick"],
}


@dataclass
class Outcome:
    """What became of a part: ``status`` is ok, failed, ended (at its limit), absent, not run, or running."""

    status: str
    seconds: float = 0.0
    note: str = ""


class Check:
    """Runs parts in their order within a time, and keeps the report up to date.

    Attributes:
        gpu: its name.
        capability: such as ``"9.0"``.
        outcomes: of the parts so far, by name.
        notes: what the report begins with.
    """

    def __init__(
        self,
        gpu: str,
        capability: str,
        *,
        minutes: float = MINUTES,
        copy_to: Path | None = None,
        work: Path = WORK,
        results: Path = RESULTS,
        clock: Callable[[], float] = time.monotonic,
        run: Callable[..., int | None] | None = None,
    ) -> None:
        self.gpu, self.capability = gpu, capability
        self.copy_to, self.work, self.results = copy_to, work, results
        self.clock, self._run = clock, run or run_process
        self.end = clock() + 60 * minutes - CLOSING_SECONDS
        self.outcomes: dict[str, Outcome] = {}
        self.notes: list[str] = []
        self.native = True  # until the build says otherwise
        self.partial = False

    # --- the plan ---------------------------------------------------------------------------------

    def limits(self, wanted: Sequence[Part]) -> Callable[[int], float]:
        """The seconds of the part at an index, when it begins: all that is left but the shares of those after it."""
        scale = (self.end - self.clock()) / sum(part.share for part in wanted)

        def limit(index: int) -> float:
            later = scale * sum(part.share for part in wanted[index + 1 :])
            return self.end - self.clock() - later

        return limit

    def run(self, wanted: Sequence[str] = ()) -> int:
        """Runs the parts of these names, all if there are none; 1 if one failed or was ended, else 0."""
        parts = [part for part in PARTS if not wanted or part.name in wanted]
        self.partial = bool(wanted)
        for part in parts:  # what an earlier run left must not be told again
            for path in self.work.glob(f"{part.name}.*"):
                path.unlink()
        limit = self.limits(parts)
        try:
            for index, part in enumerate(parts):
                self._run_part(part, limit(index))
        finally:  # of a signal too
            self.write()
        bad = [name for name, o in self.outcomes.items() if o.status in ("failed", "ended")]
        print(f"report: {self.results / f'{self.stem}-report.md'}")
        return int(bool(bad))

    def _run_part(self, part: Part, limit: float) -> None:
        if limit < LEAST_SECONDS:
            self.outcomes[part.name] = Outcome("not run", note="no time was left")
            return
        print(f"== {part.name}: at most {limit:.0f} s ==", flush=True)
        outcome = self.outcomes[part.name] = Outcome("running")
        self.write()
        start = self.clock()
        try:
            outcome.status = self._do(part.name, start + limit, outcome)
        except OSError as error:
            outcome.status, outcome.note = "failed", str(error)
        except BaseException:
            outcome.status, outcome.note = "ended", "the check was ended"
            raise
        finally:
            outcome.seconds = round(self.clock() - start, 1)
        print(f"{part.name}: {outcome.status}, {outcome.seconds:.0f} s {outcome.note}", flush=True)
        self.write()

    def command(self, name: str, command: list[str], end: float, **environment: str) -> str:
        """Runs a command as (a step of) a part until ``end``; its output goes to the part's log."""
        left = end - self.clock()
        if left <= 0:
            return "ended"
        self.work.mkdir(parents=True, exist_ok=True)
        log = self.work / f"{name}.log"
        status = self._run(command, log, left, os.environ | environment, self.write)
        return "ended" if status is None else "failed" if status else "ok"

    # --- the parts --------------------------------------------------------------------------------

    def _do(self, name: str, end: float, outcome: Outcome) -> str:
        python = sys.executable
        if name == "build":
            return self._build(end, outcome)
        if name == "info":
            code = "import sys; from ncsn_fast import info; open(sys.argv[1], 'w').write(info.as_json())"
            return self.command(name, [python, "-c", code, str(self.work / "info.json")], end)
        if name in BENCHMARKS:
            minutes = max(0.0, end - self.clock() - LAST_CASE_SECONDS) / 60
            bench = [python, "-c", "from ncsn_fast.cli import main; main()", "bench"]
            bench += [*BENCHMARKS[name], "--device", "cuda", "--minutes", f"{minutes:.2f}"]
            return self.command(name, [*bench, "--out", str(self.work / f"{name}.json")], end)
        if name in ("memcheck", "racecheck"):
            return self._sanitize(name, end, outcome)
        tests = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", *CUDA_TESTS]
        tests += ["-m", REPRESENTATIVE if name == "tests" else MATRIX]
        tests += [f"--junitxml={self.work / f'{name}.xml'}", *in_parallel()]
        # One thread each: eight processes share the cores.
        status = self.command(name, tests, end, OMP_NUM_THREADS="2")
        outcome.note = gpu_report.counts_of(self.work / f"{name}.log")
        return status

    def _build(self, end: float, outcome: Outcome) -> str:
        """With CUDA; if that fails without, so that the rest shows what Triton and C++ do; at last without either."""
        install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
        install += ["--verbose", "--editable", str(ROOT)]
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or self.capability
        environment = {"PIP_BREAK_SYSTEM_PACKAGES": "1", "TORCH_CUDA_ARCH_LIST": archs}
        # Each leaves time for those after it.
        start, shares = self.clock(), {"cuda": 0.6, "cpu": 0.9, "none": 1.0}
        for kind, share in shares.items():
            until = start + share * (end - start)
            status = self.command("build", install, until, NCSN_FAST_BUILD=kind, **environment)
            if status == "ok":
                outcome.note = f"{kind}, for {archs}" if kind == "cuda" else f"only {kind}"
                break
            self.notes.append(f"The build with NCSN_FAST_BUILD={kind} {status}: see log.txt.")
        self.native = status == "ok" and kind == "cuda"
        return "ok" if self.native else "failed"

    def _sanitize(self, tool: str, end: float, outcome: Outcome) -> str:
        sanitizer = shutil.which("compute-sanitizer", path=sanitizer_path())
        if sanitizer is None:
            outcome.note = "there is no compute-sanitizer"
            return "absent"
        backend = "native" if self.native else "triton"
        tests = [f"{file}::{test}" for file, names in SANITIZED.items() for test in names]
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m"]
        command += [
            "pytest",
            "-v",
            "-p",
            "no:cacheprovider",
            "-m",
            REPRESENTATIVE,
            "-k",
            backend,
            *tests,
        ]
        # An allocation of its own for each tensor: PyTorch's cache would hide an access beyond one.
        status = self.command(tool, command, end, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        outcome.note = gpu_report.counts_of(self.work / f"{tool}.log")
        return status

    # --- what is written --------------------------------------------------------------------------

    @property
    def stem(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")

    def write(self) -> None:
        """All that is known so far, to the results' folder and to that of --copy-to. Never raises for a full disk."""
        outcomes = {name: vars(outcome) for name, outcome in self.outcomes.items()}
        found = gpu_report.Found(self.gpu, self.notes, outcomes, self.work, NAMES, self.partial)
        try:
            gpu_report.write(found, self.results, self.stem)
            if self.copy_to is not None:
                gpu_report.copy(found, self.copy_to)
        except OSError as error:
            print(f"could not write: {error}", file=sys.stderr, flush=True)


def run_process(
    command: list[str],
    log: Path,
    limit: float,
    environment: dict[str, str],
    tick: Callable[[], None],
) -> int | None:
    """Runs a command in a process group of its own, its output appended to a log.

    Args:
        command: and its arguments.
        log: the file.
        limit: seconds. A little before, the command is interrupted, as by Ctrl-C, so that it writes what it has; at the
            limit its whole group is killed: no compiler and no test's child outlives it.
        environment: of the command.
        tick: called every REFRESH_SECONDS.

    Returns:
        The exit status; None if it was ended.
    """
    end = time.monotonic() + limit
    interrupt = end - min(GRACE_SECONDS, limit / 4)
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        for until, stop in ((interrupt, signal.SIGINT), (end, None)):
            while (left := until - time.monotonic()) > 0:
                try:
                    status = process.wait(timeout=min(left, REFRESH_SECONDS))
                    return status if until == interrupt else None
                except subprocess.TimeoutExpired:
                    tick()
            if stop is not None:
                process.send_signal(stop)
        return None
    finally:
        # What it started may live on after it, and hold the GPU.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def in_parallel() -> list[str]:
    """Options for eight processes, if pytest-xdist is there."""
    found = subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True)
    return ["-n", "8", "--dist", "worksteal"] if found.returncode == 0 else []


def sanitizer_path() -> str:
    """The path, and where toolkits keep the sanitizer."""
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    places = [str(home / "bin"), str(home / "compute-sanitizer")]
    return os.pathsep.join([os.environ.get("PATH", ""), *places])


def ask_torch() -> tuple[str, str] | None:
    """The GPU's name and compute capability, if this Python's torch sees one."""
    code = (
        "import torch; a, b = torch.cuda.get_device_capability(); "
        "print(torch.cuda.get_device_name(), f'{a}.{b}', sep='\\n')"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = answer.stdout.split("\n")
    return (lines[-3], lines[-2]) if answer.returncode == 0 else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="All that only a GPU can tell.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(NAMES))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--copy-to", type=Path, help="a folder that gets all results, in few files")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.parts) - set(NAMES)):
        parser.error(f"parts are {', '.join(NAMES)}; got {', '.join(unknown)}")
    if not options.minutes * 60 > CLOSING_SECONDS:
        parser.error(
            f"--minutes must be more than {CLOSING_SECONDS / 60:.2g}, got {options.minutes}"
        )
    start = time.monotonic()
    found = ask_torch()
    if found is None:
        print("gpu_check needs a CUDA device that this Python's torch can see", file=sys.stderr)
        return 1
    # A plain kill ends the part and writes the report too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    minutes = options.minutes - (time.monotonic() - start) / 60
    return Check(*found, minutes=minutes, copy_to=options.copy_to).run(options.parts)


if __name__ == "__main__":
    sys.exit(main())
