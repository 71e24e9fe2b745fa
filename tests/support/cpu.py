"""What the tests of the C++ kernels share: memory full of NaN, numbers of threads, SIMD levels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import deterministic

from ncsn_fast.ops import extension

TESTS = Path(__file__).parents[1]


def between_nans(t: Tensor) -> Tensor:
    """A copy with the same strides, at an odd offset, and NaN on both sides; integers as they are."""
    if not t.is_floating_point():
        return t
    memory = torch.full((t.numel() + 160,), float("nan"), dtype=t.dtype)
    return memory[77:].as_strided(t.shape, t.stride()).copy_(t)


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fresh memory is NaN: an element that nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deterministic, "fill_uninitialized_memory", True)
            assert torch.empty(1).isnan()
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_threads_give_the_same_bits(
    call: Callable[[], Sequence[Tensor]], threads: Sequence[int] = (1, 2, 3, 7)
) -> Sequence[Tensor]:
    """The results of ``call()``, which must not depend on the number of threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in threads:
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    return results[0]


def at_every_level(module: str) -> list[str]:
    """What ``check_level()`` of a test module returns at each SIMD level that this CPU has, as text.

    Each in a process of its own: the level is chosen once.
    """
    build = extension.build_config()
    levels = build["simd_levels"][: build["simd_levels"].index(build["simd_level"]) + 1]
    assert levels[0] == "baseline"
    code = (
        f"import sys, {module} as t; from ncsn_fast.ops import extension as e;"
        "assert e.build_config()['simd_level'] == sys.argv[1], e.build_config();"
        "print(t.check_level())"
    )
    answers = []
    for level in levels:
        paths = [str(TESTS / "ops"), str(TESTS), *sys.path]
        environment = {"NCSN_FAST_SIMD": level, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-c", code, level],
            env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, f"{level}: {result.stderr}"
        answers.append(result.stdout)
    return answers
