"""What gpu_check writes: a report, the rows of all its benchmarks as one results file, the log; whole or cut to size.

Only the standard library is imported here: what is to be checked may be broken.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MOST_BYTES = 15 << 20  # of a file in the folder of --copy-to
CASE = ("suite", "group", "name", "shape", "dtype", "setting", "device")
# As pytest -v writes them, with pytest-xdist and without.
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
_PARALLEL = re.compile(rf"^\[gw\d+\].*?\b({OUTCOMES}) (\S+::.*?)\s*$", re.M)
_SERIAL = re.compile(rf"^(\S+::.*?) ({OUTCOMES})\b", re.M)


@dataclass(frozen=True)
class Found:
    """What is known of a run so far.

    Attributes:
        gpu: its name.
        notes: what the report begins with.
        outcomes: status, seconds and note of each part that was begun.
        work: the folder with the parts' logs and results.
        names: of all parts, in their order.
        partial: whether it is of some parts alone.
    """

    gpu: str
    notes: Sequence[str]
    outcomes: dict[str, dict]
    work: Path
    names: Sequence[str]
    partial: bool = False


def write(found: Found, results: Path, stem: str) -> None:
    """Report, outcomes and rows; those of some parts alone join what an earlier run left there."""
    results.mkdir(parents=True, exist_ok=True)
    names = (f"{stem}-check.json", f"{stem}.json")
    checked, rows = (_read(results / name) if found.partial else None for name in names)
    outcomes = (checked or {}) | found.outcomes
    _write(results / names[0], json.dumps(outcomes, indent=1) + "\n")
    run = merged(found, rows)
    if run["results"]:
        _write(results / f"{stem}.json", json.dumps(run, indent=1) + "\n")
        _write(results / f"{stem}.csv", csv_text(run["results"]))
    _write(results / f"{stem}-report.md", report(found, run["results"]))


def copy(found: Found, folder: Path) -> None:
    """At most seven files, none above MOST_BYTES: report.md, check.json, gpu.json, gpu.csv, two XML files, log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    run = merged(found, None)
    files = {
        "report.md": cut(report(found, run["results"])),
        "check.json": json.dumps(found.outcomes, indent=1) + "\n",
        "gpu.json": json.dumps(run, indent=1) + "\n",
        "gpu.csv": csv_text(run["results"]),
        "log.txt": log(found),
    }
    for name in ("tests", "matrix"):
        if (text := _text(found.work / f"{name}.xml")) is not None:
            files[f"{name}.xml"] = text
    for name, text in files.items():
        # Only the tables and the XML can be so large, and half of one could not be read.
        if len(text.encode()) > MOST_BYTES:
            text, name = f"{name} is larger than {MOST_BYTES} bytes\n", f"{name}.txt"
        _write(folder / name, text)


# --- rows -----------------------------------------------------------------------------------------


def merged(found: Found, before: dict | None) -> dict:
    """The benchmarks' files as one, in the format of results.py. Of a case that several ran, the last that timed it."""
    runs = [_read(found.work / f"{name}.json") for name in found.names]
    runs = [run for run in [before, *runs] if isinstance(run, dict) and "results" in run]
    machine = _read(found.work / "info.json") or {}
    whole: dict = {"results": [], "machine": machine, "limits": {}, "warnings": []}
    cases: dict[tuple, list[dict]] = {}
    for run in runs:
        for key in ("machine", "limits"):
            whole[key] = whole[key] | run[key]
        whole["warnings"] += [w for w in run["warnings"] if w not in whole["warnings"]]
        of_run: dict[tuple, list[dict]] = {}
        for row in run["results"]:
            of_run.setdefault(tuple(row[name] for name in CASE), []).append(row)
        for key, rows in of_run.items():
            if key not in cases or any(row["median_us"] is not None for row in rows):
                cases[key] = rows
    whole["results"] = [row for rows in cases.values() for row in rows]
    return whole


def csv_text(rows: Sequence[dict]) -> str:
    """The rows as results.py writes them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
    return text.getvalue()


# --- text -----------------------------------------------------------------------------------------


def report(found: Found, rows: Sequence[dict]) -> str:
    """The run in Markdown: parts, tests that failed, rows that are wrong, the fastest peers of each case."""
    lines = [f"# {found.gpu}", "", *(f"**{note}**\n" for note in found.notes)]
    lines += ["| part | status | seconds | |", "| --- | --- | ---: | --- |"]
    for name in found.names:
        if (outcome := found.outcomes.get(name)) is not None:
            lines.append(
                f"| {name} | {outcome['status']} | {outcome['seconds']} | {outcome['note']} |"
            )
    failures = [
        (name, test)
        for name in found.names
        for test, outcome in tests_of(found.work / f"{name}.log").items()
        if outcome in ("FAILED", "ERROR")
    ]
    if failures:
        lines += [
            "",
            "## Tests that failed",
            "",
            *(f"- {name}: `{test}`" for name, test in failures),
        ]
    bad = [row for row in rows if row["status"] in ("wrong", "failed")]
    if bad:
        lines += ["", "## Peers that are wrong or failed", ""]
        lines += [
            f"- {_case(r)}: {r['peer']} {r['layout']} {r['status']}: {r['note']}" for r in bad
        ]
    lines += ["", "## Benchmarks", "", "| case | eager µs | compile µs | ours µs | speed-up |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |", *_table(rows)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[dict]) -> list[str]:
    cases: dict[tuple, dict[str, float]] = {}
    for row in rows:
        best = cases.setdefault(tuple(row[name] for name in CASE), {})
        peer = row["peer"]
        kind = "eager" if peer.startswith("eager") else "compile" if "compile" in peer else "ours"
        if row["median_us"] is not None:
            best[kind] = min(best.get(kind, row["median_us"]), row["median_us"])
    lines = []
    for case, best in cases.items():
        cells = [f"{best[kind]:g}" if kind in best else "" for kind in ("eager", "compile", "ours")]
        gain = f"{best['eager'] / best['ours']:.2f}" if {"eager", "ours"} <= set(best) else ""
        label = " ".join(part for part in case[:-1] if part)
        lines.append(f"| {label} | {' | '.join(cells)} | {gain} |")
    return lines


def _case(row: dict) -> str:
    return " ".join(row[name] for name in CASE[:-1] if row[name])


def log(found: Found) -> str:
    """The logs of all parts, each cut to an equal share of the most that a file may hold."""
    texts = {name: _text(found.work / f"{name}.log") for name in found.names}
    texts = {name: text for name, text in texts.items() if text is not None}
    most = MOST_BYTES // max(len(texts), 1) - 100
    return "".join(f"===== {name} =====\n{cut(text, most)}\n" for name, text in texts.items())


def cut(text: str, most: int = MOST_BYTES) -> str:
    """The text, or its beginning and its end with a line between them that says what is missing."""
    data = text.encode()
    if len(data) <= most:
        return text
    half = most // 2 - 50
    parts = (data[:half], data[-half:])
    first, last = (part.decode(errors="ignore") for part in parts)
    return f"{first}\n[... {len(data) - 2 * half} bytes left out ...]\n{last}"


# --- tests ----------------------------------------------------------------------------------------


def tests_of(log: Path) -> dict[str, str]:
    """Each test that a log of ``pytest -v`` tells the end of, and how it ended: also if pytest was killed."""
    text = _text(log) or ""
    found = {test: outcome for outcome, test in _PARALLEL.findall(text)}
    return found or {test: outcome for test, outcome in _SERIAL.findall(text)}


def counts_of(log: Path) -> str:
    """Such as ``"41 passed, 1 failed"``."""
    counts = Counter(tests_of(log).values())
    return ", ".join(f"{n} {outcome.lower()}" for outcome, n in counts.most_common()) or "no tests"


# --- files ----------------------------------------------------------------------------------------


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _read(path: Path) -> dict | None:
    """JSON; None if it is not there, or was being written when its process was killed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
