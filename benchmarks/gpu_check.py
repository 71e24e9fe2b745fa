"""All that only a GPU can tell, in one command: build, facts, memory checks, GPU tests, benchmarks.

    python benchmarks/gpu_check.py              # everything, in under ten minutes
    python benchmarks/gpu_check.py norm pool    # some parts, each with all the time it needs

Runs with the Python and the torch that are there and fetches nothing. Every part is run even if one before it failed;
what each showed is in benchmarks/results/, the exit status is 1 if any failed. A benchmark that the time was too short
for says in its results which cases it left out; asked for by name it has more.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()
RESULTS = ROOT / "benchmarks" / "results"
TIMED_OUT = 124  # as the command timeout reports it
LIMIT_SECONDS = 570  # for all of it
CUDA_TESTS = [f"tests/test_cuda{part}.py" for part in ("", "_network", "_sampling")]
PARTS = ("build", "info", "tests", "memcheck")
# Benchmarks: their options, and the most seconds each has when everything is run.
BENCHMARKS = {
    "norm": (["--suite", "ops", "--match", "cond_instance_norm_elu"], 150),
    "pool": (["--suite", "ops", "--match", "max_pool5"], 60),
    "langevin": (["--suite", "ops", "--match", "langevin_step_"], 50),
    "conv": (["--suite", "ops", "--match", "norm_elu_conv3x3", "--quick"], 50),
    "network": (["--suite", "model", "--suite", "train", "--suite", "sample", "--quick"], 120),
}


def main(wanted: list[str] | None = None) -> int:
    wanted = sys.argv[1:] if wanted is None else wanted
    unknown = set(wanted) - {*PARTS, *BENCHMARKS}
    if unknown:
        print(f"parts are {', '.join([*PARTS, *BENCHMARKS])}; got {unknown}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + LIMIT_SECONDS
    python = sys.executable
    gpu = device_name(python)
    if gpu is None:
        print("gpu-check needs a CUDA device that this Python's torch can see", file=sys.stderr)
        return 1
    RESULTS.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    stem = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    summary: dict[str, dict[str, float]] = {}

    def run(name: str, command: list[str], limit: float, **environment: str) -> int:
        if wanted and name.split()[0] not in wanted:
            return 0
        limit = min(limit, deadline - time.monotonic())
        print(f"== {name} ==", flush=True)
        start = time.monotonic()
        # A group of its own: a compiler or a test's child must not outlive the limit.
        process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
        try:
            status = process.wait(timeout=max(limit, 0))
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {limit:.0f} s")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = TIMED_OUT
        summary[name] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
        return status

    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    install += ["--editable", "."]
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", capability(python))
    allow = {"PIP_BREAK_SYSTEM_PACKAGES": "1"}
    if run("build", install, 240, NCSN_FAST_BUILD="cuda", TORCH_CUDA_ARCH_LIST=archs, **allow):
        # The rest then shows what Triton does alone.
        run("build without CUDA", install, 60, NCSN_FAST_BUILD="none", **allow)
    write = "import sys; from ncsn_fast import info; open(sys.argv[1], 'w').write(info.as_json())"
    run("info", [python, "-c", write, str(RESULTS / f"{stem}-info.json")], 60)
    tests = [python, "-m", "pytest", "-q", "-m", "cuda", *CUDA_TESTS]
    run("tests", tests, 240)
    if shutil.which("compute-sanitizer"):
        sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
        small = ["-k", "native and not graph and not more_than"]
        run("memcheck", [*sanitizer, *tests, *small], 120)
    else:
        print("compute-sanitizer is absent: no memory check")
    for name, (options, share) in BENCHMARKS.items():
        # A case that has begun is let end: none begins in the last half minute.
        limit = deadline - time.monotonic() if wanted else share
        minutes = max(0.0, min(limit, deadline - time.monotonic()) - 30) / 60
        bench = [python, "-c", "from ncsn_fast.cli import main; main()", "bench", *options]
        bench += ["--device", "cuda", "--minutes", f"{minutes:.2f}"]
        run(name, [*bench, "--out", str(RESULTS / f"{stem}-{name}.json")], limit)
    path = RESULTS / f"{stem}-check.json"
    before = json.loads(path.read_text()) if wanted and path.exists() else {}
    path.write_text(json.dumps(before | summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    return int(any(part["status"] != 0 for part in summary.values()))


def ask_torch(python: str, expression: str) -> str | None:
    code = f"import torch; print({expression} if torch.cuda.is_available() else '')"
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    return answer or None


def device_name(python: str) -> str | None:
    return ask_torch(python, "torch.cuda.get_device_name()")


def capability(python: str) -> str:
    return ask_torch(python, "'{}.{}'.format(*torch.cuda.get_device_capability())") or ""


if __name__ == "__main__":
    sys.exit(main())
