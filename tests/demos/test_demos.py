"""The demos, shortened: every file they promise, and numbers that tell noise from data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ncsn_fast import ScoreMLP, cli
from ncsn_fast.data import load_digits, two_gaussians
from ncsn_fast.demos import digits as demo
from ncsn_fast.demos import points as toy_demos

FILES = ("samples.png", "annealing.png", "annealing.gif", "loss.png", "checkpoint.pt", "losses.csv")


@pytest.mark.slow
def test_demo_writes_what_it_says_and_goes_on(tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(demo, "STEPS_EACH_LEVEL", 1)
    numbers = demo.run(tmp_path, iterations=2, n_samples=9, seed=3)
    for name in FILES:
        assert (tmp_path / name).stat().st_size > 0
    for name in FILES[:4]:
        Image.open(tmp_path / name).verify()
    assert json.loads((tmp_path / "metrics.json").read_text()) == numbers
    assert "Frechet distance to held-out digits" in capsys.readouterr().out
    again = demo.run(tmp_path, iterations=2, n_samples=9, seed=3, verbose=False)
    assert not numbers["resumed"] and again["resumed"]
    distances = [name for name in numbers if name.startswith(("frechet", "nearest"))]
    assert all(again[name] == numbers[name] for name in distances)  # same network, same samples


def test_numbers_tell_noise_copies_and_data_apart():
    images, heldout = load_digits("train"), load_digits("heldout")
    noise = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
    of_noise, of_copies = (demo.measure(x, images, heldout) for x in (noise, images[:100]))
    assert of_noise["frechet_samples"] > 10 * of_noise["frechet_training"]
    assert of_noise["frechet_samples"] == pytest.approx(of_noise["frechet_noise"], rel=0.2)
    assert of_copies["nearest_samples"] == 0 and of_copies["nearest_heldout"] > 1
    assert of_noise["nearest_samples"] > of_noise["nearest_heldout"]


def test_too_few_samples(tmp_path):
    with pytest.raises(ValueError, match="at least 2, got 1"):
        demo.run(tmp_path, n_samples=1)


@pytest.mark.parametrize(
    ("run", "figures"),
    [
        (
            toy_demos.run_two_gaussians,
            ("ladder", "perturbed", "loss", "score_fields", "errors", "samples", "trajectories"),
        ),
        (toy_demos.run_checkerboard, ("loss", "score_fields", "samples", "trajectories")),
    ],
)
def test_demos_on_points_write_what_they_say(tmp_path, capsys, monkeypatch, run, figures):
    from PIL import Image

    monkeypatch.setattr(toy_demos, "STEPS_EACH_LEVEL", 2)
    monkeypatch.setattr(toy_demos, "N_DATA", 600)
    numbers = run(tmp_path, iterations=2, n_samples=50, seed=1)
    for name in figures:
        Image.open(tmp_path / f"{name}.png").verify()
    assert json.loads((tmp_path / "metrics.json").read_text()) == numbers
    assert len(numbers["relative_error_by_level"]) == len(numbers["sigmas"]) == 10
    if run is toy_demos.run_two_gaussians:
        assert sum(numbers["mode_weights"]) == pytest.approx(1)
    else:
        assert numbers["share_in_dark_squares_of_data"] == 1
        assert 0 < numbers["share_in_dark_squares"] < 0.6  # hardly trained
    assert "relative error by level: [" in capsys.readouterr().out


def test_the_error_of_the_exact_score_is_zero_and_of_none_is_one():
    points = two_gaussians()
    model = ScoreMLP(sigmas=[2.0, 0.5])  # its last layer is zero
    x = points.sample(200)
    assert toy_demos.score_errors(model, x, points.score) == [1.0, 1.0]
    model.score = lambda x, level: points.score(x, float(model.sigmas[level]))
    assert toy_demos.score_errors(model, x, points.score) == [0.0, 0.0]


@pytest.mark.parametrize("name", ["two-gaussians", "checkerboard", "digits"])
def test_the_command_runs_the_demo_of_the_name(name, tmp_path, monkeypatch):
    asked = []
    for module, function, which in (
        (demo, "run", "digits"),
        (toy_demos, "run_two_gaussians", "two-gaussians"),
        (toy_demos, "run_checkerboard", "checkerboard"),
    ):
        monkeypatch.setattr(
            module,
            function,
            lambda out, which=which, **options: asked.append((which, out, options)),
        )
    monkeypatch.chdir(tmp_path)
    for arguments in ([name], [name, "--samples", "9", "--out", "here", "--seed", "2"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["demo", *arguments])
        assert stop.value.code == 0
    default = "ncsn_demo" if name == "digits" else f"ncsn_demo_{name.replace('-', '_')}"
    assert asked == [
        (name, Path(default), {"seed": 0, "iterations": None}),
        (name, Path("here"), {"seed": 2, "iterations": None, "n_samples": 9}),
    ]
