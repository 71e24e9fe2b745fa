"""Figures: the ladder, perturbed data, the loss curve, score fields, data beside samples, trajectories, image grids.

Every function plots into the ``axes`` it is given, or into a new figure, writes a PNG to ``path`` if there is one, and
returns the Axes (an array of them where there are several panels); ``axes.figure`` is the figure.

Belongs here: turning tensors and numbers into figures. Does not belong here: computing those numbers (``evaluation``),
sampling, colours and files (``style.py``), pictures of nothing but pixels (``pictures.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..losses import perturb
from ..streams import STREAM_PLOTS
from . import style
from .pictures import image_grid
from .style import BLUE, GREY, MAGNITUDES, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = 3.2  # inches, the side of one of several panels
ARROWS = 19  # along each side of a score field
SHOWN = 2000  # points at most in one panel: more run into one another


def ladder(
    sigmas: Sequence[float] | Tensor,
    step_lr: float | None = None,
    path: str | Path | None = None,
    *,
    axes: Axes | None = None,
) -> Any:
    """The noise levels on a logarithmic axis; and the step size at each, if ``step_lr`` is given.

    Args:
        sigmas: the ladder; at least one.
        step_lr: step size at the last level; that of level i is larger by the square of the ratio of sigmas. The step
            sizes have a panel of their own, so ``axes`` cannot be given with it.
        path, axes: see the module.

    Returns:
        The Axes; with ``step_lr`` an array of two.
    """
    sigmas = [float(sigma) for sigma in sigmas]
    numbers = range(len(sigmas))
    if step_lr is None:
        panels = [_axes(axes, (6, 4))]
    else:
        panels = _panels(1, 2, (3.5, 4))[0]
        steps = [step_lr * (sigma / sigmas[-1]) ** 2 for sigma in sigmas]
        panels[1].plot(numbers, steps, "o-", color=VERMILION)
        title = f"step sizes, {step_lr:g} at the last level"
        panels[1].set(xlabel="level", ylabel="step size", title=title)
    panels[0].plot(numbers, sigmas, "o-", color=BLUE)
    panels[0].set(xlabel="level", ylabel="sigma", title=f"{len(sigmas)} noise levels")
    for panel in panels:
        panel.set_yscale("log")
        style.grid(panel)
        panel.xaxis.get_major_locator().set_params(integer=True)
    return _done(panels[0] if step_lr is None else panels, path)


def loss_curve(
    losses: Sequence[float],
    path: str | Path | None = None,
    title: str = "Training loss",
    *,
    axes: Axes | None = None,
) -> Axes:
    """The loss of every step, faint, and its running mean.

    The mean is over the last fiftieth of the steps seen (at least 10), so that it follows the fast fall at the start.
    The axis is logarithmic if all losses are positive.

    Args:
        losses: of the steps 1, 2, ...; at least one.
        path, axes: see the module.
        title: above the curve.

    Raises:
        ValueError: no losses.
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    if not losses:
        raise ValueError("losses must hold at least one number, got none")
    axes = _axes(axes, (7, 4))
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(steps, running_mean(losses).tolist(), color=BLUE, linewidth=1.8, label="running mean")
    if min(losses) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss, summed over a sample", title=title)
    style.grid(axes)
    axes.legend()
    return _done(axes, path)


def perturbed(
    data: Tensor,
    sigmas: Sequence[float] | Tensor,
    levels: Sequence[int] = (0, 3, 6, 9),
    path: str | Path | None = None,
    *,
    seed: int = 0,
) -> np.ndarray:
    """Points with the noise of chosen levels, a panel each; every panel has axes of its own size.

    Args:
        data: points ``(N, 2)``.
        sigmas: the ladder.
        levels: which of its levels.
        path: see the module.
        seed: of the noise.

    Returns:
        An array of Axes, one for each level.
    """
    panels = _panels(1, len(levels), (PANEL, 1.12 * PANEL))[0]
    noise = ops.philox_normal(data.shape, seed=seed, stream=STREAM_PLOTS, device="cpu")
    for panel, level in zip(panels, levels, strict=True):
        sigma = float(sigmas[level])
        noisy = perturb(data.cpu(), torch.tensor([sigma], dtype=torch.float32, device="cpu"), noise)
        _scatter(panel, noisy, BLUE)
        panel.set(title=f"level {level}: sigma {sigma:.3g}", **_square(noisy[:SHOWN], 0.05))
    return _done(panels, path)


@torch.no_grad()
def score_fields(
    score: Callable[[Tensor, int], Tensor],
    sigmas: Sequence[float] | Tensor,
    data: Tensor,
    levels: Sequence[int] = (0, 3, 6, 9),
    path: str | Path | None = None,
    *,
    exact: Callable[[Tensor, float], Tensor] | None = None,
) -> np.ndarray:
    """The score as arrows over the data, a panel for each of some levels.

    Lengths are what can be read: an arrow fills its cell of the grid where the score is as large as in a tenth of the
    area or larger, and is shorter elsewhere by the square root of the ratio, so that weak parts of a field still show
    where they point. The colour tells the magnitude itself. Both rows have the scale of the first.

    Args:
        score: ``score(x, level)`` at points ``(M, 2)``, such as a network's method ``score``.
        sigmas: the ladder.
        data: points ``(N, 2)`` to show beneath, on whose area and a margin the field is plotted.
        levels: which levels.
        path: see the module.
        exact: ``exact(x, sigma)``, such as that of a :class:`~ncsn_fast.data.GaussianMixture`, for a second row.

    Returns:
        An array of Axes, ``(rows, len(levels))``.
    """
    rows = {"learned": score}
    if exact is not None:
        rows["exact"] = lambda x, level: exact(x, float(sigmas[level]))
    panels = _panels(len(rows), len(levels), (PANEL * 1.25, PANEL))
    area = _square(data, 0.15)
    plain = {"dtype": torch.float32, "device": "cpu"}
    grid = torch.cartesian_prod(
        *(torch.linspace(*area[limits], ARROWS, **plain) for limits in area)
    )
    cell = (area["xlim"][1] - area["xlim"][0]) / (ARROWS - 1)
    for column, level in zip(panels.T, levels, strict=True):
        fields = [row(grid.to(data.device), level).cpu().float() for row in rows.values()]
        large = float(fields[0].norm(dim=1).nanquantile(0.9)) or 1.0
        for panel, name, arrows in zip(column, rows, fields, strict=True):
            size = arrows.norm(dim=1, keepdim=True)
            length = cell * (size / large).clamp(max=1).sqrt()
            shown = arrows / size.clamp(min=1e-30) * length
            _scatter(panel, data, GREY, alpha=0.25)
            plotted = panel.quiver(
                *grid.T.tolist(),
                *shown.T.tolist(),
                size[:, 0].tolist(),
                cmap=MAGNITUDES,
                clim=(0, large),
                angles="xy",
                scale_units="xy",
                scale=1,
                width=0.006,
                zorder=3,
            )
            panel.figure.colorbar(plotted, ax=panel, shrink=0.8, extend="max")
            panel.set(title=f"{name}, sigma {float(sigmas[level]):.3g}", **area)
    panels[0, -1].figure.suptitle("score fields: colour is the magnitude of the score", fontsize=11)
    return _done(panels, path)


def compare(
    data: Tensor,
    samples: Tensor,
    path: str | Path | None = None,
    titles: tuple[str, str] = ("data", "samples"),
) -> np.ndarray:
    """Points of the data beside samples, as many of the one as of the other, in axes of one size.

    Args:
        data: ``(N, 2)``.
        samples: ``(M, 2)``.
        path: see the module.
        titles: of the two panels.

    Returns:
        An array of two Axes.
    """
    n = min(len(data), len(samples), SHOWN)
    low, high = data.cpu().amin(0), data.cpu().amax(0)
    margin = 0.1 * float((high - low).max())
    width, height = (high - low + 2 * margin).tolist()
    panels = _panels(1, 2, (5.0, 0.8 + 4.4 * max(0.4, min(height / width, 1.5))))[0]
    for panel, x, color, title in zip(
        panels, (data, samples), (BLUE, VERMILION), titles, strict=True
    ):
        _scatter(panel, x[:n], color)
        panel.set(
            title=f"{title} ({n} points)",
            xlim=(float(low[0]) - margin, float(high[0]) + margin),
            ylim=(float(low[1]) - margin, float(high[1]) + margin),
        )
    return _done(panels, path)


def trajectories(
    states: Tensor,
    data: Tensor,
    path: str | Path | None = None,
    *,
    shown: int = 12,
    axes: Axes | None = None,
) -> Axes:
    """The way of some samples from noise to data, on axes that are linear over the data and logarithmic beyond.

    Args:
        states: ``(M, N, 2)``, the start first; one state for each level can be read best.
        data: points to show beneath.
        path, axes: see the module.
        shown: how many of the samples.
    """
    axes = _axes(axes, (7, 6))
    from matplotlib.collections import LineCollection
    from matplotlib.ticker import NullLocator

    states = states[:, :shown].cpu()
    _scatter(axes, data, GREY, alpha=0.25)
    numbers = np.arange(1, len(states))
    for way in states.transpose(0, 1).numpy():
        pieces = np.stack([way[:-1], way[1:]], 1)
        lines = LineCollection(pieces, cmap=MAGNITUDES, array=numbers, linewidth=1.5, alpha=0.9)
        lines.set_clim(1, max(2, len(numbers)))
        plotted = axes.add_collection(lines)
    axes.scatter(*states[0].T, s=30, marker="x", color=GREY, zorder=3, label="start")
    axes.scatter(*states[-1].T, s=26, color=VERMILION, zorder=4, label="end")
    reach = math.ceil(float(data.abs().max()))
    far = max(2 * reach, math.ceil(1.1 * float(states.abs().max())))
    axes.set(title=f"{states.shape[1]} samples on their way", xlim=(-far, far), ylim=(-far, far))
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("symlog", linthresh=reach, linscale=2)
        ticks = [-far, -reach, 0, reach, far]
        axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.set_minor_locator(NullLocator())
    for line in (-reach, reach):
        axes.axvline(line, color=GREY, linewidth=0.6, linestyle=":")
        axes.axhline(line, color=GREY, linewidth=0.6, linestyle=":")
    axes.figure.colorbar(plotted, ax=axes, label="state, first to last", shrink=0.8)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.05), ncols=2, frameon=False)
    return _done(axes, path)


def errors(
    sigmas: Sequence[float] | Tensor,
    values: Sequence[float],
    path: str | Path | None = None,
    *,
    axes: Axes | None = None,
) -> Axes:
    """The relative error of a learned score at each noise level, both axes logarithmic.

    Args:
        sigmas: the ladder.
        values: an error for each level, positive.
        path, axes: see the module.
    """
    axes = _axes(axes, (6, 4))
    axes.loglog([float(sigma) for sigma in sigmas], values, "o-", color=BLUE)
    axes.set(xlabel="sigma", ylabel="relative error", title="learned score against the exact one")
    style.grid(axes)
    return _done(axes, path)


def images(
    batch: Tensor,
    path: str | Path | None = None,
    title: str = "",
    *,
    columns: int | None = None,
    axes: Axes | None = None,
) -> Axes:
    """A grid of images, :func:`image_grid`, in Axes.

    Args:
        batch: ``(N, C, H, W)`` in [-1, 1], C = 1 or 3.
        path, axes: see the module.
        title: above the grid.
        columns: images in a row; ``None``: as many as make the grid about square.
    """
    axes = _axes(axes, (6, 6))
    grid = np.asarray(image_grid(batch, columns=columns))
    axes.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title)
    return _done(axes, path)


def running_mean(losses: Sequence[float]) -> Tensor:
    """Mean, at each step, over the last fiftieth of the steps so far (at least 10); float64 ``(N,)``."""
    totals = torch.tensor([0.0, *losses], dtype=torch.float64, device="cpu").cumsum(0)
    ends = torch.arange(1, len(losses) + 1, dtype=torch.int64, device="cpu")
    begins = (ends - (ends // 50).clamp(min=10)).clamp(min=0)
    return (totals[ends] - totals[begins]) / (ends - begins)


def _scatter(axes: Axes, x: Tensor, color: str, alpha: float = 0.6) -> None:
    axes.scatter(*x[:SHOWN].detach().cpu().T.tolist(), s=4, color=color, alpha=alpha, linewidths=0)
    axes.set_aspect("equal")


def _square(x: Tensor, margin: float) -> dict[str, tuple[float, float]]:
    """Limits of a square around points, with a margin as a part of its side."""
    low, high = x.cpu().amin(0), x.cpu().amax(0)
    half = (0.5 + margin) * float((high - low).max())
    middle = ((low + high) / 2).tolist()
    return {f"{name}lim": (c - half, c + half) for name, c in zip("xy", middle, strict=True)}


def _axes(axes: Axes | None, size: tuple[float, float]) -> Axes:
    """Those that were given, or new ones."""
    return style.new_figure(size).add_subplot() if axes is None else axes


def _panels(rows: int, columns: int, size: tuple[float, float]) -> np.ndarray:
    """New Axes, ``(rows, columns)`` of a size each."""
    figure = style.new_figure((columns * size[0], rows * size[1]))
    return figure.subplots(rows, columns, squeeze=False)


def require() -> None:
    """ImportError, which says what to install, if matplotlib is missing: before work whose end is a plot."""
    style.new_figure((1, 1))


def _done(axes: Any, path: str | Path | None) -> Any:
    """The Axes, their figure written to ``path`` if there is one."""
    if path is not None:
        first = axes if not isinstance(axes, np.ndarray) else axes.flat[0]
        style.write(first.figure, path)
    return axes
