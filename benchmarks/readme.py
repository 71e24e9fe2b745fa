"""Writes the README's figures from the committed results; with ``--check`` says whether they match.

Usage: ``python benchmarks/readme.py [--check]``
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def langevin() -> str:
    """Speed-ups of the CPU's Langevin step over eager PyTorch."""
    with (RESULTS / "cpu.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["op"] == "langevin_step_"]
    table: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        table[row["shape"]][row["backend"]] = row["speedup_over_eager"]
    backends = ["eager", "torch.compile", "reference", "native"]
    lines = [f"| state | {' | '.join(backends)} |", "| --- |" + " --- |" * len(backends)]
    for shape, speedups in table.items():
        cells = (f"{float(speedups[b]):.2g}x" for b in backends)
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    where = f"{rows[0]['device_name']}, torch {rows[0]['torch']}, {rows[0]['date']}"
    return "\n".join([*lines, "", f"({where}; float32; `benchmarks/results/cpu.csv`)"])


def demo() -> str:
    """The numbers of the digits demo."""
    run = json.loads((RESULTS / "demo-digits.json").read_text())
    assert not run["resumed"], "the seconds of a resumed run are not those of the training"
    lines = [
        "| | Frechet distance to held-out digits | nearest training digit (median distance) |",
        "| --- | --- | --- |",
        f"| samples | {run['frechet_samples']:.2f} | {run['nearest_samples']:.2f} |",
        f"| real digits | {run['frechet_training']:.2f} | {run['nearest_heldout']:.2f} |",
        f"| uniform noise | {run['frechet_noise']:.1f} | |",
        "",
        f"({run['samples']} samples, {run['iterations']} training steps in "
        f"{run['training_seconds']:.0f} s, sampled in {run['sampling_seconds']:.0f} s; "
        f"{run['device']}, {run['threads']} threads, torch {run['torch']}; "
        "`benchmarks/results/demo-digits.json`)",
    ]
    return "\n".join(lines)


BLOCKS = {"demo": demo, "langevin": langevin}


def rendered(text: str) -> str:
    """The README with every marked block written anew."""
    for name, block in BLOCKS.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, count = re.subn(pattern, lambda m, b=block: f"{m[1]}{b()}\n{m[2]}", text, flags=re.S)
        assert count == 1, f"README.md has {count} blocks named {name}"
    return text


def main(arguments: list[str]) -> int:
    """Writes the README, or compares."""
    old = README.read_text()
    new = rendered(old)
    if arguments == ["--check"]:
        return int(new != old)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
