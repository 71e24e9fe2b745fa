"""Turns pytest-benchmark's JSON into the results that are kept: one CSV line a case, with device, versions and commit.

python benchmarks/record.py run.json benchmarks/results/NAME.csv
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

COLUMNS = (
    *("op", "backend", "device", "shape", "dtype", "median_us", "iqr_us", "rounds", "gb_per_s"),
    *("speedup_over_eager", "device_name", "torch", "triton", "ncsn_fast", "commit", "date"),
)


def rows(run: dict) -> list[dict]:
    """The cases of a run, each with its speed-up over the eager case of its group."""
    machine = run["machine_info"]["ncsn_fast"]
    names = {d["device"].split(":")[0]: d["name"] for d in machine["devices"]}
    eager = {
        case["group"]: case["stats"]["median"]
        for case in run["benchmarks"]
        if case["extra_info"]["backend"] == "eager"
    }
    table = []
    for case in run["benchmarks"]:
        facts, stats = case["extra_info"], case["stats"]
        table.append(
            {
                **{key: facts[key] for key in ("op", "backend", "device", "dtype")},
                "shape": "x".join(map(str, facts["shape"])),
                "median_us": f"{stats['median'] * 1e6:.2f}",
                "iqr_us": f"{stats['iqr'] * 1e6:.2f}",
                "rounds": stats["rounds"],
                "gb_per_s": f"{facts['bytes'] / stats['median'] / 1e9:.2f}",
                "speedup_over_eager": f"{eager[case['group']] / stats['median']:.2f}",
                "device_name": names[facts["device"]],
                "torch": machine["packages"]["torch"],
                "triton": machine["packages"]["triton"],
                "ncsn_fast": machine["ncsn_fast"],
                "commit": run["commit_info"].get("id", "unknown")[:12],
                "date": run["datetime"][:10],
            }
        )
    return table


def main(source: str, target: str) -> None:
    table = rows(json.loads(Path(source).read_text()))
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with open(target, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(table)
    print(f"{len(table)} results in {target}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/record.py RUN.json RESULTS.csv")
    main(*sys.argv[1:])
