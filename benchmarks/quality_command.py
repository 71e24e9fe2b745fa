"""``ncsn-fast bench --suite quality``: from options to data and networks, and what is measured on them.

Belongs here: opening what the options name, and which files are written. Does not belong here: measuring
(``quality.py``), tables and plots (``quality_report.py``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ncsn_fast.cli.options import DIGITS, load_image_network, open_data
from ncsn_fast.evaluation.tuning import Distances

from . import quality, quality_report
from .quality_report import CHECKERBOARD


def run(
    networks: Sequence[Path],
    data: str,
    heldout: str | None,
    *,
    samples: int,
    seeds: int,
    minutes: float | None,
    out: Path,
    picture: Path | None,
    device: torch.device,
    say: Callable[[str], object],
) -> None:
    """Measure all samplers and write results, table and plot; what the results hold already is not measured again.

    Args:
        networks: folders of trained networks of images; none for the checkerboard, which has an exact score.
        data: the training images by name, as of ``ncsn-fast train``, or ``"checkerboard"``.
        heldout: other images; of the digits theirs.
        samples: of a measurement.
        seeds: of the samples of each network.
        minutes: begin no measurement after them.
        out: the results, a JSON file; the table lies beside it.
        picture: the plot; ``None``: beside the results.
        device: of the networks.
        say: is told each result.

    Raises:
        ValueError: no network, or no held-out images; networks of other images than the data.
    """
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    arguments = {"samples": samples, "seeds": range(seeds), "until": until, "say": say}
    results = quality.Results(out, data)
    if data == CHECKERBOARD:
        if networks:
            raise ValueError("the checkerboard is measured with its exact score: give no --network")
        quality.measure_checkerboard(results, **arguments)
    else:
        heldout = f"{DIGITS}:heldout" if heldout is None and data == DIGITS else heldout
        if not networks or heldout is None:
            missing = "--heldout" if networks else "--network"
            raise ValueError(
                f"the quality of images takes --network and --heldout, got no {missing}"
            )
        distances = None
        for path in networks:
            model, size = load_image_network(path, device, "ema")
            if size is None:
                raise ValueError(f"{path} must say how large its images are")
            if distances is None:
                channels = model.sample_shape[0]
                distances = Distances(
                    *(open_data(d, size[0], channels)[:] for d in (data, heldout))
                )
            model = model.to(memory_format=torch.channels_last)
            quality.measure_network(results, path.name, model, size, distances, **arguments)
    if results.held["points"]:
        for path in (out, *quality_report.write(results.held, out, picture)):
            say(f"written: {path}")
