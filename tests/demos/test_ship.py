"""The networks that come with the package: that they load without a network, draw from data, and are small."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from ncsn_fast import NCSN, ScoreCNN, cli, load_pretrained
from ncsn_fast.data import load_digits
from ncsn_fast.demos import digits as demo
from ncsn_fast.demos import ship
from ncsn_fast.models import pretrained
from ncsn_fast.models.sampling_settings import load_sampling
from ncsn_fast.models.shipped import SHIPPED, find_saved, shipped_names
from ncsn_fast.training import TrainingSettings, train
from ncsn_fast.training.checkpoints import load_model

SIGMAS = (2.0, 0.5, 0.1)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """In an empty folder, and without the Hub."""
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments, **options):
        raise AssertionError("a network of the package is not to be downloaded")

    monkeypatch.setattr(pretrained, "hf_hub_download", refuse)


def test_all_that_can_be_shipped_are_there():
    assert shipped_names() == tuple(sorted(ship.NETWORKS))


@pytest.mark.parametrize("name", shipped_names())
def test_a_network_of_the_package_loads_as_float32_and_is_small(name):
    files = {path.name: path.stat().st_size for path in (SHIPPED / name).iterdir()}
    held = {"config.json", "model.safetensors", "image_size.json", "sampling.json", "README.md"}
    assert set(files) == held and sum(files.values()) < 2_000_000
    weights = safetensors.torch.load_file(SHIPPED / name / "model.safetensors")
    halves = [key for key, value in weights.items() if value.dtype == torch.float16]
    assert set(weights) - set(halves) == {"sigmas"}
    model, size = load_model(name)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert not model.training and len(model.sigmas) >= 10
    fields = json.loads((SHIPPED / name / "config.json").read_text())
    assert model.sigmas.tolist() == pytest.approx(fields["sigmas"])
    for key in halves:
        assert torch.equal(model.state_dict()[key], weights[key].float())
    again = model.sample(2, size, sampler="dpmpp_2m", passes=4, seed=0)
    assert again.shape == (2, *model.sample_shape[:1], *size) and again.isfinite().all()
    assert (SHIPPED / name / "README.md").read_text().startswith(f"# {name}\n")


def test_the_digits():
    model = NCSN.from_pretrained("digits")
    assert type(model) is NCSN and type(load_pretrained("digits")) is NCSN
    assert (model.config.nf, model.config.num_classes, model.config.norm) == (32, 10, "instance++")
    options = load_sampling("digits") | {"n_steps_each": 10}  # half as many, for time
    samples = model.sample(64, 8, **options, seed=1, verbose=False).clamp(-1, 1)
    numbers = demo.measure(samples, load_digits("train"), load_digits("heldout"))
    assert numbers["frechet_samples"] < 0.25 * numbers["frechet_noise"]
    assert numbers["nearest_samples_smallest"] > 0.2  # no copies
    with pytest.raises(ValueError, match="is of a ScoreCNN, not of an NCSN"):
        NCSN.from_pretrained("fashion-mnist")


def test_a_folder_of_that_name_goes_first(tmp_path):
    assert find_saved("digits") == SHIPPED / "digits"
    ScoreCNN(1, nf=8, sigmas=SIGMAS).save_pretrained("digits")
    assert str(find_saved("digits")) == "digits"
    assert type(load_pretrained("digits")) is type(load_model("digits")[0]) is ScoreCNN
    assert load_sampling("digits") == {}
    assert find_saved(tmp_path / "none") == tmp_path / "none"


def test_a_name_that_nobody_knows(monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"comes with the package \(digits"):
        load_model("digit")

    def away(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(pretrained, "hf_hub_download", away)
    with pytest.raises(FileNotFoundError, match=r"none of the networks that come.*\(digits"):
        load_pretrained("digit")


def test_the_command_draws_from_a_network_of_the_package(tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "digits", "-n", "3", "--steps", "3", "--out", "x.npy"])
    assert stop.value.code == 0
    drawn = np.load("x.npy")
    assert drawn.shape == (3, 1, 8, 8)
    # Where to start, the step size and that nothing is clamped on the way come from what is saved.
    options = load_sampling("digits") | {"n_steps_each": 3}
    model = NCSN.from_pretrained("digits").to(memory_format=torch.channels_last)
    same = model.sample(3, 8, **options, seed=0, verbose=False)
    np.testing.assert_allclose(drawn, same.clamp(-1, 1), atol=1e-3)


def test_a_run_is_shipped(tmp_path, capsys):
    torch.manual_seed(0)
    settings = TrainingSettings(iterations=2, batch_size=4)
    images = torch.rand(12, 1, 12, 12) * 2 - 1
    train(ScoreCNN(1, nf=8, sigmas=SIGMAS), images, settings, tmp_path / "run", verbose=False)
    ship.main(["fashion-mnist", "--from", str(tmp_path / "run"), "--out", str(tmp_path / "made")])
    folder = tmp_path / "made" / "fashion-mnist"
    assert str(folder) in capsys.readouterr().out
    model, size = load_model(folder)
    averaged, _ = load_model(tmp_path / "run")
    assert tuple(size) == (12, 12)
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-6)
    assert torch.equal(model.sigmas, averaged.sigmas)
    assert "the moving average of 2 steps" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="name must be one of"):
        ship.ship("cats", tmp_path / "run")


def test_weights_that_float16_cannot_hold():
    assert (
        ship.halved({"w": torch.ones(2), "sigmas": torch.ones(2)})["sigmas"].dtype is torch.float32
    )
    with pytest.raises(ValueError, match="got w beyond it"):
        ship.halved({"w": torch.tensor([1e6])})
