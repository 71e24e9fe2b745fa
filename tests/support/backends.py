"""The backends that a test of an operator runs on: one fixture's parameters, for every operator.

Triton has no kernels for the CPU but its interpreter, which needs TRITON_INTERPRET=1 before Triton is imported:
tests/kernels/test_triton.py runs the tests of tests/ops once more, in such a process, on Triton alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from ncsn_fast.ops.extension import interpreting

BACKENDS = ("triton",) if interpreting() else ("native", "reference")


def few(values: Sequence) -> Sequence:
    """The values; in the interpreter, which takes some 50 ms a program, the first two."""
    return values[:2] if interpreting() else values


def expected_record(backend: str, *operators: str) -> list[tuple[str, str]]:
    """What ``record_backends`` has seen if the operators ran on the backend; the reference is no operator's call."""
    return [] if backend == "reference" else [(operator, backend) for operator in operators]
