"""Whether the kernels are right on this machine: ``ncsn-fast check`` and ``ncsn_fast.check()``.

Belongs here: a look of under a minute at every operator of every backend, on a few shapes and dtypes, against float64.
Does not belong here: careful timing (``suite.py``), the tests of the project, which are many more.

The work and its proof are those of the benchmark cases: what ran is asserted, not assumed.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch

from ncsn_fast import info, ops
from ncsn_fast.models.ncsn import NCSN
from ncsn_fast.ops import dispatch

from .measure import Clock
from .suite import Case, Peer, Prepared, Settings, WrongMode, dtype_name, find_cases, worst_error

OK, WRONG, UNAVAILABLE = "ok", "wrong", "unavailable"
DTYPES = (torch.float32, torch.bfloat16)
CALLS = 5  # of each peer, timed
# Elements 4 to 7 of sample 7 at step 3 of the stream of Langevin noise, seed 1234: from an implementation in NumPy.
KNOWN_COUNTER = {"seed": 1234, "sample_offset": 7, "step": 3, "stream": 1}
KNOWN_NORMALS = (-0.1643242, -0.2739533, -1.2092067, 0.6880306)


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found of one operator in one backend.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        what: the operator, or ``"noise"`` or ``"sampling"``.
        backend: which ran.
        status: ``"ok"``, ``"wrong"``, or ``"unavailable"``.
        error: the largest relative L2 distance from float64, gradients included; None where nothing ran.
        speedup: how many times as fast as eager PyTorch, roughly: the median over what was checked; None if unknown.
        note: what is wrong, or why it is unavailable.
        remedy: the line of Python that switches a wrong backend off.
    """

    device: str
    what: str
    backend: str
    status: str
    error: float | None = None
    speedup: float | None = None
    note: str = ""
    remedy: str = ""


def check(
    devices: Sequence[str] | None = None, tell: Callable[[str], None] = lambda what: None
) -> list[Row]:
    """Compare every operator of every backend with the float64 reference on this machine.

    Outputs and first gradients, in float32 and bfloat16, contiguous and channels_last; the noise's known answers; a
    sampling run replayed from CUDA graphs against one that is not. In under a minute.

    Args:
        devices: ``"cpu"``, ``"cuda"``; None for all that are there.
        tell: called with what is being done, for a progress display.

    Returns:
        A row for each operator and backend of each device.

    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    there = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for device in devices or ():
        if device not in there:
            raise ValueError(f"devices must be of {', '.join(there)} here, got {device!r}")
    rows = []
    for device in devices or there:
        rows += _operators(torch.device(device), tell)
        tell(f"{device}: noise")
        rows += [_noise(device, backend) for backend in dispatch.AUTO[device]]
        tell(f"{device}: sampling")
        rows.append(_sampling(device))
    return rows


def render(rows: Sequence[Row]) -> str:
    """The rows as a table, and what to do about the wrong ones."""
    table = [("device", "what", "backend", "", "error", "vs eager", "")]
    for row in rows:
        error = "" if row.error is None else f"{row.error:.0e}"
        speed = "" if row.speedup is None else f"{row.speedup:.1f}x"
        table.append((row.device, row.what, row.backend, row.status, error, speed, row.note))
    widths = [max(map(len, column)) for column in list(zip(*table, strict=True))[:-1]]
    lines = [
        "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in table
    ]
    lines += [f"to do without it: {row.remedy}" for row in rows if row.remedy]
    wrong = sum(row.status == WRONG for row in rows)
    right = sum(row.status == OK for row in rows)
    lines.append(f"{right} ok, {wrong} wrong, {len(rows) - right - wrong} unavailable")
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> str:
    """The rows and the facts of the machine, for a bug report."""
    return json.dumps(
        {"check": [dataclasses.asdict(row) for row in rows], "info": info.collect()}, indent=2
    )


def _operators(device: torch.device, tell: Callable[[str], None]) -> Iterator[Row]:
    settings = Settings(device, DTYPES, batches=(2,), quick=True, compiled=False)
    found: dict[tuple[str, str], list[_Finding]] = {}
    cases = [case for case in find_cases(settings, ("ops",)) if not case.tf32]
    for case in cases:
        tell(f"{device.type}: {case.label}")
        for backend, finding in _findings(case, Clock(device)):
            found.setdefault((case.group, backend), []).append(finding)
    for group in dict.fromkeys(case.group for case in cases):
        for backend in dispatch.AUTO[device.type]:
            findings = found.get((group, backend))
            if findings:
                yield _row(device.type, group, backend, findings)
            elif group in dispatch.OPERATORS and backend != "reference":
                reason = dispatch.why_not(backend, group, device.type)
                if reason is not None:
                    yield Row(device.type, group, backend, UNAVAILABLE, note=reason)


@dataclasses.dataclass(frozen=True)
class _Finding:
    label: str
    dtype: str
    error: float | None
    right: bool
    speedup: float | None = None
    note: str = ""


def _findings(case: Case, clock: Clock) -> Iterator[tuple[str, _Finding]]:
    """What each of our peers of a case gives, beside eager PyTorch in the same layout."""
    expected = case.expected()
    eager: dict[str, float] = {}
    for peer in sorted(case.peers, key=lambda peer: peer.name != "eager"):
        try:
            prepared = peer.prepare()
            if peer.name == "eager":
                eager[peer.layout] = _median(clock, prepared)
                continue
            error = worst_error(prepared.outputs(), expected)
            seconds = _median(clock, prepared)
        except WrongMode as error:
            # Another backend answered: right where this one must not serve the dtype.
            served = case.dtype == torch.float32
            yield peer.name, _Finding(*_label(case, peer), None, not served, note=str(error))
            continue
        except Exception as error:  # a kernel that raises is as wrong as one that errs
            if peer.name != "eager":
                text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                yield peer.name, _Finding(*_label(case, peer), None, False, note=text)
            continue
        base = eager.get(peer.layout)
        speedup = base / seconds if base else None
        yield peer.name, _Finding(*_label(case, peer), error, error <= case.tolerance, speedup)


def _median(clock: Clock, prepared: Prepared) -> float:
    return statistics.median(clock.turn(prepared.timed, 1) for _ in range(CALLS))


def _label(case: Case, peer: Peer) -> tuple[str, str]:
    return f"{case.label} {peer.layout}", dtype_name(case.dtype)


def _row(device: str, group: str, backend: str, findings: list[_Finding]) -> Row:
    errors = [f.error for f in findings if f.error is not None]
    speeds = [f.speedup for f in findings if f.speedup is not None]
    wrong = [f for f in findings if not f.right]
    unserved = dict.fromkeys(f.dtype for f in findings if f.right and f.error is None)
    note = f"not in {', '.join(unserved)}" if unserved else ""
    remedy = ""
    if wrong:
        first = wrong[0]
        note = f"{len(wrong)} of {len(findings)}, such as {first.label}: "
        note += first.note or f"relative error {first.error:.1e}"
        remedy = f'ncsn_fast.set_backend("reference", "{group}")'
        if group not in dispatch.OPERATORS:
            remedy = 'ncsn_fast.set_backend("reference")'
    return Row(
        device,
        group,
        backend,
        WRONG if wrong else OK,
        max(errors, key=lambda e: (e != e, e)) if errors else None,  # NaN is the largest
        statistics.median(speeds) if speeds else None,
        note,
        remedy,
    )


def _noise(device: str, backend: str) -> Row:
    reason = dispatch.why_not(backend, "philox_", device)
    if reason is not None:
        return Row(device, "noise", backend, UNAVAILABLE, note=reason)
    remedy = 'ncsn_fast.set_backend("reference", "philox_")'
    try:
        z = ops.philox_normal((1, 8), **KNOWN_COUNTER, device=device, backend=backend)
    except Exception as error:
        return Row(device, "noise", backend, WRONG, note=str(error), remedy=remedy)
    error = float((z[0, 4:].cpu() - torch.tensor(KNOWN_NORMALS)).abs().max())
    if error < 1e-5:
        return Row(device, "noise", backend, OK, error)
    return Row(device, "noise", backend, WRONG, error, note="not the known numbers", remedy=remedy)


def _sampling(device: str) -> Row:
    """A few steps of a small network, from CUDA graphs and without."""
    if device == "cpu":
        return Row(device, "sampling", "graphs", UNAVAILABLE, note="CUDA graphs take a CUDA device")
    torch.manual_seed(0)
    model = NCSN(1, 8, 2, sigmas=[1.0, 0.5]).to(device)
    remedy = "model.sample(..., cuda_graph=False)"
    run = {"n_steps_each": 25, "seed": 1, "verbose": False, "step_lr": 1e-4}
    try:
        plain, graphed = (model.sample(2, 8, cuda_graph=graph, **run) for graph in (False, True))
    except Exception as error:
        return Row(device, "sampling", "graphs", WRONG, note=str(error), remedy=remedy)
    error = worst_error((graphed,), (plain.double(),))
    if error == 0:
        return Row(device, "sampling", "graphs", OK, error)
    note = "a sample replayed from graphs is another one"
    return Row(device, "sampling", "graphs", WRONG, error, note=note, remedy=remedy)
