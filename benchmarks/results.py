"""A result, the files that hold results, and what changed between two of them.

One row is one peer in one case. The CSV holds the rows; the JSON holds the same rows, the facts of the machine and the
limits that were measured.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncsn_fast import info
from ncsn_fast.files import write_atomically

OK, NOISY, WRONG, FAILED, NOT_RUN = "ok", "noisy", "wrong", "failed", "not run"
STATUSES = (OK, NOISY, WRONG, FAILED, NOT_RUN)

Key = tuple[str, ...]


class NotRun(RuntimeError):
    """A peer cannot run here, which is no fault: what it takes is not installed."""


@dataclass(frozen=True)
class Result:
    """One peer in one case. Numbers that were not measured are None."""

    suite: str  # ops, model, train or sample
    group: str  # the operator, layer or loop
    name: str  # what of it: forward, backward, step, ...
    shape: str  # 8x128x32x32
    dtype: str
    setting: str  # what else varies, such as nf=128
    device: str  # cpu or cuda
    peer: str
    layout: str  # of the input
    backend: str  # what really ran: pytorch, inductor, or backends by operator
    status: str  # one of STATUSES
    note: str  # why it is not ok
    median_us: float | None
    q1_us: float | None  # quartiles of the rounds
    q3_us: float | None
    rounds: int | None
    speedup: float | None  # over the fastest eager peer of the case
    memory_mib: float | None  # peak of a call beyond what was there before
    gb_per_s: float | None  # the bytes that must move, over the time
    gflop_per_s: float | None
    # Of the copy's GB/s or of the matrix product's GFLOP/s, measured in this run.
    limit_share: float | None
    error: float | None  # relative L2, against float64
    out_layout: str
    graphs: int | None  # that torch.compile made
    threads: int
    device_name: str
    torch: str
    triton: str
    ncsn_fast: str
    commit: str
    date: str

    @property
    def case(self) -> Key:
        """What all peers of a case have in common."""
        return (
            *(self.suite, self.group, self.name, self.shape, self.dtype, self.setting),
            self.device,
        )

    @property
    def key(self) -> Key:
        """What names a row within a file."""
        return (*self.case, self.peer, self.layout)

    @property
    def timed(self) -> bool:
        return self.median_us is not None

    @property
    def spread_us(self) -> float:
        """Half the distance between the quartiles."""
        return 0.0 if self.median_us is None else (self.q3_us - self.q1_us) / 2


COLUMNS = tuple(field.name for field in dataclasses.fields(Result))
_TYPES = {field.name: field.type for field in dataclasses.fields(Result)}


@dataclass(frozen=True)
class Run:
    """The results of a run with the facts of the machine; what a file holds."""

    results: list[Result]
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)


def case_groups(results: Iterable[Result]) -> dict[Key, list[Result]]:
    """The results by case, in their order."""
    groups: dict[Key, list[Result]] = {}
    for result in results:
        groups.setdefault(result.case, []).append(result)
    return groups


def fastest(results: Iterable[Result], *peers: str) -> Result | None:
    """The fastest timed result, of the peers whose names begin so, if given."""
    timed = [r for r in results if r.timed and (not peers or r.peer.startswith(peers))]
    return min(timed, key=lambda r: r.median_us, default=None)


def commit() -> str:
    """The commit of a checkout, with a + if files that it tracks were changed; "unknown" elsewhere."""
    where = Path(__file__).resolve().parent.parent
    # Without .git this is an installed package, perhaps within another project's checkout.
    if not (where / ".git").exists():
        return "unknown"
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        answer = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return answer.stdout.strip() or "unknown"


# --- files ----------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What ``info`` tells, but where on a disk the package lies: results are for others to read."""
    return {k: v for k, v in info.collect().items() if k not in ("imported_from", "shadows")}


def csv_text(results: Iterable[Result]) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in results:
        row = dataclasses.asdict(result)
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
    return text.getvalue()


def json_text(run: Run) -> str:
    """The run as JSON."""
    return json.dumps(dataclasses.asdict(run), indent=1) + "\n"


def save(run: Run, path: Path) -> list[Path]:
    """Writes ``path`` and its twin: a .json and a .csv of the same stem."""
    paths = [path.with_suffix(".json"), path.with_suffix(".csv")]
    for target, text in zip(paths, (json_text(run), csv_text(run.results)), strict=True):
        write_atomically(target, text.encode())
    return paths


def load(path: Path) -> Run:
    """Reads a .json or .csv that :func:`save` wrote.

    Raises:
        ValueError: the file is of another kind; names the file.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            rows = csv.DictReader(io.StringIO(text))
            if tuple(rows.fieldnames or ()) != COLUMNS:
                raise ValueError(f"its columns are {rows.fieldnames}")
            return Run([_from_text(row) for row in rows])
        held = json.loads(text)
        return Run(**held | {"results": [Result(**row) for row in held["results"]]})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold benchmark results: {error}") from error


def _from_text(row: dict[str, str]) -> Result:
    def parse(name: str, text: str) -> Any:
        if "None" in _TYPES[name] and text == "":
            return None
        return {"float": float, "int": int, "str": str}[_TYPES[name].split(" ")[0]](text)

    return Result(**{name: parse(name, text) for name, text in row.items()})


# --- what changed ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One row in two files."""

    before: Result | None
    after: Result | None

    @property
    def ratio(self) -> float | None:
        """Time after over time before."""
        if self.before is None or self.after is None:
            return None
        if not (self.before.timed and self.after.timed):
            return None
        return self.after.median_us / self.before.median_us

    @property
    def beyond_spread(self) -> float | None:
        """How far the medians lie apart beyond the spread of both, in microseconds with sign; 0 within it."""
        if self.ratio is None:
            return None
        difference = self.after.median_us - self.before.median_us
        spread = self.before.spread_us + self.after.spread_us
        beyond = max(0.0, abs(difference) - spread)
        return beyond if difference > 0 else -beyond

    @property
    def verdict(self) -> str:
        if self.before is None or self.after is None:
            return "new" if self.before is None else "gone"
        if self.ratio is None:
            same = self.before.status == self.after.status
            return "not timed" if same else f"{self.before.status} -> {self.after.status}"
        if NOISY in (self.before.status, self.after.status):
            return "noisy"
        if self.beyond_spread == 0:
            return "same"
        return "slower" if self.beyond_spread > 0 else "faster"


def compare(before: Sequence[Result], after: Sequence[Result]) -> list[Change]:
    """Every row of either, matched by its key, in the order of the first, then of the second."""
    old, new = ({r.key: r for r in results} for results in (before, after))
    return [Change(old.get(key), new.get(key)) for key in old | new]
