"""What ``quality.py`` measured as a table and a plot.

Belongs here: means and spreads over networks and seeds, Markdown, the figure. Does not belong here: measuring.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ncsn_fast.files import write_atomically
from ncsn_fast.plots import style
from ncsn_fast.sampling.samplers import SAMPLERS

from .measure import NOISY_LOAD

COLOURS = {
    "ald": style.GREY,
    "dpmpp_2m_sde": style.VERMILION,
    "ancestral": style.BLUE,
    "dpmpp_2m": style.GREEN,
    "heun": style.PURPLE,
    "euler": style.ORANGE,
}
NAMES = {
    "distance": "Frechet distance to held-out images (principal components)",
    "share": "share of points outside the dark squares",
}
CHECKERBOARD = "checkerboard"


def rows(held: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Measurements with the same ladder and options as one row: means, spreads, how many.

    Sorted by the number of levels, sampler and passes.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for point in held["points"]:
        groups.setdefault(f"{point['levels']} {sorted(point['options'].items())}", []).append(point)
    found = []
    for points in groups.values():
        first, options = points[0], dict(points[0]["options"])
        row = {"levels": first["levels"], "sampler": options.pop("sampler")}
        row |= {"passes": first["passes"], "spacing": options.pop("levels", "")}
        row["options"] = ", ".join(
            f"{name} {value:g}"
            for name, value in options.items()
            if name in ("n_steps_each", "corrector_steps", "snr", "churn")
        )
        for name in ("tuning", "heldout"):
            values = [point[name] for point in points]
            row[name] = statistics.mean(values)
            row[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else 0.0
        quiet = [point for point in points if point.get("others", 0.0) < NOISY_LOAD]
        row["noisy"] = not quiet
        row["seconds"] = statistics.mean(
            point["seconds"] * 1000 / point["samples"] for point in quiet or points
        )
        row["networks"] = len({point["network"] for point in points})
        row["sets"], row["samples"] = len(points), min(point["samples"] for point in points)
        found.append(row)
    order = list(SAMPLERS)
    return sorted(found, key=lambda r: (r["levels"], order.index(r["sampler"]), r["passes"]))


def markdown(held: Mapping[str, Any]) -> str:
    """The table, with the values of real data and noise, and where it was measured."""
    about, references = held["about"], held["references"]
    what = NAMES["share" if held["data"] == CHECKERBOARD else "distance"]
    lines = [
        f"# Quality: {held['data']}",
        "",
        f"{what[0].upper()}{what[1:]}: mean ± standard deviation over sets (networks times seeds). Real data "
        f"{references['real']:.3f}, noise {references['noise']:.3g}. Seconds are for 1,000 samples; "
        f"`~`: beside other work, not to be relied on. {about['device']}, {about['threads']} threads, "
        f"torch {about['torch']}, commit {about['commit']}.",
        "",
        "| ladder | sampler | passes | levels taken | options | distance | seconds | sets | networks | samples |",
        "| ---: | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    places = 4 if held["data"] == CHECKERBOARD else 3
    for row in rows(held):
        seconds = f"{'~' * row['noisy']}{row['seconds']:.3g}"
        lines.append(
            f"| {row['levels']} | {row['sampler']} | {row['passes']} | {row['spacing']} | {row['options']} | "
            f"{row['heldout']:.{places}f} ± {row['heldout_spread']:.{places}f} | {seconds} | "
            f"{row['sets']} | {row['networks']} | {row['samples']} |"
        )
    if "speed" in held:
        one = held["speed"]
        lines += [
            "",
            f"The documented loop, {one['documented_passes']} passes in eager PyTorch, takes "
            f"{one['documented_seconds']:.3g} s for {one['images']} images of the network {one['network']}; ours with "
            f"{one['few_passes']} passes {one['few_seconds']:.3g} s, in the same run: "
            f"**{one['times_as_fast']:.0f} times as fast**.",
        ]
    return "\n".join(lines) + "\n"


def plot(held: Mapping[str, Any], path: Path) -> None:
    """Distance against passes and against seconds: a line a sampler, with its best options at each number of passes.

    The best by the distance to the tuning data, which is not the one that is shown.
    """
    figure = style.new_figure((9, 4), 150, extra="bench")
    panels = figure.subplots(1, 2, sharey=True)
    best: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
    for row in rows(held):
        line = best.setdefault((row["levels"], row["sampler"]), {})
        if row["passes"] not in line or row["tuning"] < line[row["passes"]]["tuning"]:
            line[row["passes"]] = row
    ladders = sorted({levels for levels, _ in best})
    for axes, along in zip(panels, ("passes", "seconds"), strict=True):
        for (levels, sampler), line in best.items():
            points = [line[passes] for passes in sorted(line)]
            if along == "seconds":
                points = [point for point in points if not point["noisy"]]
            if not points:
                continue
            axes.errorbar(
                [p[along] for p in points],
                [p["heldout"] for p in points],
                [p["heldout_spread"] for p in points],
                fmt="o" + ("-" if levels == ladders[-1] else ":"),
                ms=4,
                capsize=2,
                color=COLOURS.get(sampler, "black"),
                label=f"{sampler}, {levels} levels" if len(ladders) > 1 else sampler,
            )
        axes.axhline(held["references"]["real"], color="black", ls="--", lw=1, label="real data")
        axes.set(xscale="log", yscale="log")
        style.plain_ticks(axes.xaxis)
        style.plain_ticks(axes.yaxis)
        axes.set_xlabel("passes" if along == "passes" else "seconds for 1,000 samples")
        style.grid(axes)
    share = held["data"] == CHECKERBOARD
    panels[0].set_ylabel("share outside dark squares" if share else "Frechet distance, held out")
    panels[0].legend(fontsize=7)
    noise = held["references"]["noise"]
    figure.suptitle(f"{held['data']}: distance of samples to data (noise: {noise:.3g})")
    style.write(figure, path)


def write(held: Mapping[str, Any], path: Path, picture: Path | None = None) -> list[Path]:
    """The table beside the results, and the plot; their paths."""
    table = path.with_suffix(".md")
    write_atomically(table, markdown(held).encode())
    if picture is None:
        picture = path.with_suffix(".png")
    plot(held, picture)
    return [table, picture]
