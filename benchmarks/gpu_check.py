"""All that only a GPU can tell, in one command: build, facts, memory checks, GPU tests, benchmarks.

    python benchmarks/gpu_check.py

Runs with the Python and the torch that are there and fetches nothing. Every part is run even if one before it failed;
what each showed is in benchmarks/results/, the exit status is 1 if any failed.
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


def main() -> int:
    deadline = time.monotonic() + LIMIT_SECONDS
    RESULTS.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    python = sys.executable

    def run(name: str, command: list[str], limit: float, **environment: str) -> int:
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

    summary: dict[str, dict[str, float]] = {}
    gpu = device_name(python)
    if gpu is None:
        print("gpu-check needs a CUDA device that this Python's torch can see", file=sys.stderr)
        return 1
    stem = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    build = run(
        "build",
        [*pip, "--editable", "."],
        240,
        NCSN_FAST_BUILD="cuda",
        PIP_BREAK_SYSTEM_PACKAGES="1",
        TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", capability(python)),
    )
    if build == 0:
        write = (
            "import sys; from ncsn_fast import info; open(sys.argv[1], 'w').write(info.as_json())"
        )
        run("info", [python, "-c", write, str(RESULTS / f"{stem}-info.json")], 60)
        files = ["tests/test_cuda.py", "tests/test_cuda_sampling.py"]
        tests = [python, "-m", "pytest", "-q", "-m", "cuda", *files]
        run("tests", tests, 240)
        if shutil.which("compute-sanitizer"):
            sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
            small = ["-k", "native and not graph and not more_than"]
            run("memcheck", [*sanitizer, *tests, *small], 120)
        else:
            print("compute-sanitizer is absent: no memory check")
        bench = [python, "-c", "from ncsn_fast.cli import main; main()", "bench"]
        limit = max(0.0, deadline - time.monotonic() - 60) / 60  # a case that has begun is let end
        out = str(RESULTS / f"{stem}.json")
        run(
            "benchmarks",
            [*bench, "--device", "cuda", "--quick", "--minutes", f"{limit:.1f}", "--out", out],
            400,
        )
    (RESULTS / f"{stem}-check.json").write_text(json.dumps(summary, indent=2) + "\n")
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
