"""Pictures: every pixel of a grid where it belongs, panels that hold what they were given, clear errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast import plots


def test_a_grid_holds_its_images():
    images = torch.stack([torch.full((1, 2, 3), v) for v in (-1.0, 0.0, 1.0, 3.0, -3.0)])
    grid = np.asarray(plots.image_grid(images, columns=2, scale=2, gap=1))
    assert grid.shape == (3 * (4 + 1) + 1, 2 * (6 + 1) + 1)
    tiles = [grid[1 + 5 * r : 5 + 5 * r, 1 + 7 * c : 7 + 7 * c] for r in range(3) for c in range(2)]
    assert [set(tile.flat) for tile in tiles] == [{0}, {128}, {255}, {255}, {0}, {255}]
    assert (grid[0] == 255).all() and (grid[:, 7] == 255).all()


def test_a_grid_in_colour_and_enlarged():
    image = torch.tensor([[[-1.0, 1.0]], [[1.0, -1.0]], [[-1.0, -1.0]]])[None]
    grid = plots.image_grid(image, scale=3, gap=0)
    assert grid.mode == "RGB" and grid.size == (6, 3)
    assert grid.getpixel((0, 0)) == (0, 255, 0) and grid.getpixel((5, 2)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 2, 4, 4), {}, r"\(N, 1, H, W\) or \(N, 3, H, W\).*got \(2, 2, 4, 4\)"),
        ((0, 1, 4, 4), {}, r"got \(0, 1, 4, 4\)"),
        ((1, 1, 4, 4), {"scale": 0}, "scale must be >= 1"),
        ((1, 1, 4, 4), {"columns": 0}, "columns"),
    ],
)
def test_a_grid_refuses(shape, options, message):
    with pytest.raises(ValueError, match=message):
        plots.image_grid(torch.zeros(shape), **options)


def test_panels_keep_their_pictures():
    grids = {"left": Image.new("L", (40, 30), 10), "right": Image.new("L", (20, 50), 200)}
    panel = np.asarray(plots.side_by_side(grids))
    assert (panel == 10).all(2).sum() >= 40 * 30 and (panel == 200).all(2).sum() >= 20 * 50
    with pytest.raises(ValueError, match="at least one picture"):
        plots.side_by_side({})


def test_the_annealing_has_a_column_for_each_level():
    frames = [torch.full((2, 1, 8, 8), v) for v in (-5.0, 0.0)]
    strip = np.asarray(plots.annealing_strip(frames, [1.0, 0.1], scale=2).convert("L"))
    assert (strip == 128).sum() >= 2 * 16 * 16
    with pytest.raises(ValueError, match="one sigma for each frame, got 2 frames and 1 sigmas"):
        plots.annealing_strip(frames, [1.0])


def test_files(tmp_path):
    frames = [Image.new("L", (8, 8), v) for v in (0, 100, 200)]
    plots.save_gif(frames, tmp_path / "a.gif", ms=50)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3
    plots.loss_curve([3.0, 2.0, 1.5], tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert min(picture.size) > 200 and len(np.unique(np.asarray(picture.convert("L")))) > 10
