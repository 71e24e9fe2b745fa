"""Pictures: every pixel of a grid where it belongs, panels that hold what they were given, clear errors."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast import plots
from ncsn_fast.data import two_gaussians


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


@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_a_file_that_cannot_be_written_leaves_the_old_one(name, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "the disk is full")

    path = tmp_path / name
    path.write_bytes(b"what was there")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        if name == "a.gif":
            plots.save_gif([Image.new("L", (8, 8))], path)
        else:
            plots.loss_curve([2.0, 1.0], path)
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


# --- plots with axes ------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    """The path for a plot; afterwards a picture of some size with something on it must be there."""
    path = tmp_path / "plot.png"
    yield path
    with Image.open(path) as picture:
        assert min(picture.size) > 200 and len(np.unique(np.asarray(picture.convert("L")))) > 10


POINTS = two_gaussians()
DATA = POINTS.sample(500)
SIGMAS = [10.0, 1.0, 0.1]


def test_the_ladder(written):
    axes = plots.ladder(SIGMAS, path=written)
    assert axes.get_yscale() == "log" and "sigma" in axes.get_ylabel()
    assert axes.lines[0].get_ydata().tolist() == SIGMAS
    both = plots.ladder(torch.tensor(SIGMAS), 0.002)
    np.testing.assert_allclose(both[1].lines[0].get_ydata(), [20.0, 0.2, 0.002], rtol=1e-5)


def test_the_loss_curve_into_given_axes():
    axes = plots.loss_curve([4.0, 2.0, 1.0])
    assert axes.get_yscale() == "log" and [len(line.get_xdata()) for line in axes.lines] == [3, 3]
    assert plots.loss_curve([-1.0, 2.0], axes=axes) is axes
    assert plots.loss_curve([-1.0, 2.0]).get_yscale() == "linear"
    with pytest.raises(ValueError, match="at least one number"):
        plots.loss_curve([])


def test_perturbed_data_have_independent_noise_of_the_level(written):
    panels = plots.perturbed(DATA, SIGMAS, (0, 2), written)
    assert [panel.get_title() for panel in panels] == ["level 0: sigma 10", "level 2: sigma 0.1"]
    for panel, sigma in zip(panels, (10.0, 0.1), strict=True):
        noise = np.asarray(panel.collections[0].get_offsets()) - DATA.numpy()
        assert noise.std() == pytest.approx(sigma, rel=0.1)
        together = np.corrcoef(np.concatenate([noise.T, np.abs(noise).T, DATA.T.numpy()]))
        assert np.abs(together[:4, 4:]).max() < 0.2


def test_score_fields_point_where_the_score_points(written):
    calls = []

    def score(x, level):
        calls.append(level)
        return POINTS.score(x, SIGMAS[level])

    panels = plots.score_fields(score, SIGMAS, DATA, (0, 1), written, exact=POINTS.score)
    assert panels.shape == (2, 2) and calls == [0, 1]
    learned, exact = (panel.collections[1] for panel in panels[:, 1])
    np.testing.assert_allclose(learned.U, exact.U, rtol=1e-5, atol=1e-6)
    x = torch.tensor(np.stack([learned.X, learned.Y], 1), dtype=torch.float32)
    s, arrows = POINTS.score(x, 1.0), torch.tensor(np.stack([learned.U, learned.V], 1))
    cosine = (s * arrows).sum(1) / (s.norm(dim=1) * arrows.norm(dim=1))
    assert cosine.min() > 0.999
    cell = float(x[1, 1] - x[0, 1])
    assert arrows.norm(dim=1).max() == pytest.approx(cell, rel=1e-3)
    np.testing.assert_allclose(learned.get_array(), s.norm(dim=1), rtol=1e-4)


def test_data_beside_samples_in_the_same_axes(written):
    left, right = plots.compare(DATA, DATA[:100] * 3, written)
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    assert left.get_title() == "data (100 points)" and right.get_title() == "samples (100 points)"


def test_trajectories_begin_and_end_where_they_do(written):
    states = torch.stack([20 * DATA[:5], 2 * DATA[:5], DATA[:5]])
    axes = plots.trajectories(states, DATA, written, shown=3)
    *lines, start, end = axes.collections[1:]
    assert len(lines) == 3
    np.testing.assert_allclose(start.get_offsets(), states[0, :3], rtol=1e-5)
    np.testing.assert_allclose(end.get_offsets(), states[-1, :3], rtol=1e-5)
    for line, way in zip(lines, states[:, :3].transpose(0, 1), strict=True):
        np.testing.assert_allclose(line.get_segments(), np.stack([way[:-1], way[1:]], 1), rtol=1e-5)


def test_errors_and_images(written, tmp_path):
    axes = plots.errors(SIGMAS, [0.1, 0.2, 0.3], written)
    assert axes.lines[0].get_xdata() == pytest.approx(SIGMAS)
    batch = torch.rand(5, 1, 4, 4) * 2 - 1
    axes = plots.images(batch, tmp_path / "images.png", "five", columns=3)
    shown = np.asarray(axes.images[0].get_array())
    assert np.array_equal(shown, np.asarray(plots.image_grid(batch, columns=3)))
