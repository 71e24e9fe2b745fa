"""``python -m ncsn_fast.info``: versions, devices, the build, and which backend serves which operator, or why not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from . import __version__, memory, threads
from .ops import dispatch, extension
from .ops.algorithms import COMPOSED, CONV_ALGORITHMS

_PACKAGES = ("triton", "numpy", "safetensors", "huggingface_hub")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": processor(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return devices


def _threads(build: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "count": torch.get_num_threads(),
        "processors": threads.processors(),
        "quota": threads.cpu_quota(),
        "kernels_by": build and ("own" if build["threads"] == "own" else "torch"),
    }


def processor() -> str:
    """The CPU's name."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _operators(device_type: str) -> dict[str, dict[str, Any]]:
    table = {}
    for op in dispatch.OPERATORS:
        reasons = {
            backend: dispatch.why_not(backend, op, device_type) for backend in dispatch.BACKENDS
        }
        auto = next(name for name in dispatch.AUTO[device_type] if reasons[name] is None)
        if auto == "reference" and op in dispatch.COMPOSITES:
            auto = COMPOSED
        table[op] = {"auto": auto, "why_not": reasons}
    return table


def collect() -> dict[str, Any]:
    """The facts as one dictionary that JSON can hold; every backend is really loaded to find out."""
    build = extension.build_config()
    device_types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        "ncsn_fast": __version__,
        "imported_from": str(Path(__file__).parent),
        "shadows": extension.shadowed(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        # torch's own word: the package's metadata may lack the build (+cpu, +cu130).
        "packages": {"torch": torch.__version__} | {name: _version(name) for name in _PACKAGES},
        "cuda_of_torch": torch.version.cuda,
        "devices": _devices(),
        "libraries": {name: extension.status(name) for name in ("cpu", "cuda", "triton")},
        "build": build,
        "threads": _threads(build),
        "freed_memory_kept": memory.kept(),
        "policy": dispatch.policy(),
        "environment": {
            name: os.environ[name]
            for name in (
                "NCSN_FAST_BACKEND",
                "NCSN_FAST_SIMD",
                "NCSN_FAST_DEBUG",
                "TRITON_INTERPRET",
                *threads.NAMES,
            )
            if name in os.environ
        },
        "operators": {device_type: _operators(device_type) for device_type in device_types},
        "conv_algorithms": [algorithm.facts() for algorithm in CONV_ALGORITHMS],
    }


def as_json() -> str:
    """The facts as JSON text."""
    return json.dumps(collect(), indent=2)


def render(info: dict[str, Any]) -> str:
    """The facts as text."""
    lines = [f"ncsn_fast {info['ncsn_fast']}   Python {info['python']}   {info['platform']}"]
    lines.append(f"package    {info['shadows'] or info['imported_from']}")
    packages = (f"{name} {version or '(absent)'}" for name, version in info["packages"].items())
    lines.append("packages   " + ", ".join(packages))
    for device in info["devices"]:
        facts = ", ".join(f"{k} {v}" for k, v in device.items() if k not in ("device", "name"))
        lines.append(f"device     {device['device']}: {device['name']} ({facts})")
    for name, reason in info["libraries"].items():
        lines.append(f"kernels    {name}: {reason or 'loaded'}")
    if info["build"]:
        facts = {k: v for k, v in info["build"].items() if v}
        lines += [
            f"build      {k}: {' '.join(v) if isinstance(v, list) else v}" for k, v in facts.items()
        ]
    lines.append(f"threads    {_render_threads(info['threads'])}")
    if info["freed_memory_kept"]:
        size = info["freed_memory_kept"] / 2**30
        lines.append(f"memory     what is freed is kept for the next result, up to {size:g} GiB")
    policy = ", ".join(f"{op}={name}" for op, name in info["policy"].items())
    lines.append(f"policy     {policy}")
    lines += [f"env        {k}={v}" for k, v in info["environment"].items()]
    for device_type, operators in info["operators"].items():
        lines.append("")
        lines.append(f"On {device_type}, auto takes:")
        for op, facts in operators.items():
            lines.append(f"  {op:24} {facts['auto']}")
            for backend, reason in facts["why_not"].items():
                if reason is not None:
                    lines.append(f"  {'':24}   not {backend}: {reason}")
    lines += ["", "The 3x3 convolution, by conv_algo:"]
    for facts in info["conv_algorithms"]:
        where = f"device {facts['device']}, dtype {facts['dtype']}"
        lines.append(f"  {facts['conv_algo']:24} {facts['backend']}: {where}")
        lines.append(f"  {'':24}   auto takes it {facts['auto takes it']}")
    return "\n".join(lines)


def _render_threads(facts: dict[str, Any]) -> str:
    words = f"{facts['count']} on {facts['processors']} processors"
    if facts["quota"] is not None:
        words += f", of which the control group allows {facts['quota']:g}"
    how = {
        "own": "our own, which wait asleep and for none that does not run",
        "torch": "those of torch (beside other work OMP_WAIT_POLICY=passive is faster)",
        None: None,
    }[facts["kernels_by"]]
    return words if how is None else f"{words}; the C++ kernels run on {how}"


def main(arguments: list[str] | None = None) -> int:
    """Prints the facts, as JSON with ``--json``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(a != "--json" for a in arguments):
        print("usage: python -m ncsn_fast.info [--json]", file=sys.stderr)
        return 2
    print(as_json() if arguments else render(collect()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
