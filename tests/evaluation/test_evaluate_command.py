"""``ncsn-fast evaluate`` of small runs: what it writes, what it compares with, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast import NCSN, NCSNConfig, ScoreCNN, ScoreModel, register
from ncsn_fast.cli import main
from ncsn_fast.data import load_digits
from ncsn_fast.models import registry
from ncsn_fast.models.sampling_settings import load_sampling, save_sampling
from ncsn_fast.training import TrainingSettings, train

CONFIG = NCSNConfig(in_channels=1, nf=4, num_classes=2, dilations=(1, 1, 1, 1), sigmas=(1.0, 0.2))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    settings = TrainingSettings(iterations=2, batch_size=4)
    train(NCSN(CONFIG), load_digits(), settings, folder, verbose=False)
    return folder


def evaluate(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *map(str, arguments), "--steps", "1", "--device", "cpu"])
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def test_the_digits_with_their_own_held_out_images(run, capsys):
    status, said, _ = evaluate(capsys, run)
    assert status == 0 and "257 samples are drawn: as many as there are held-out images" in said
    report = json.loads((run / "evaluation" / "report.json").read_text())
    assert report["n"] == 257 and report["heldout"] == "digits:heldout"
    assert set(report["sets"]) == {"samples", "held-out images", "noise"}
    losses = report["loss_by_level"]
    assert losses["sigmas"] == pytest.approx([1.0, 0.2])
    assert len(losses["training images"]) == len(losses["held-out images"]) == 2
    assert (run / "evaluation" / "report.txt").read_text().strip() in said
    with Image.open(run / "evaluation" / "nearest.png") as picture:
        assert picture.width > 2 * 6 * 64 and picture.height > 10 * 64


def test_data_of_ones_own(run, capsys, tmp_path):
    digits = load_digits()
    np.save(tmp_path / "a.npy", digits.numpy())
    options = ["--data", tmp_path / "a.npy", "--n", 20, "--out", tmp_path / "out"]
    assert evaluate(capsys, run, *options)[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["sets"]) == {"samples", "real images", "noise"} and report["n"] == 20
    assert report["reference"] == 770  # the other half
    assert report["sets"]["real images"]["nearest"] > 0
    assert set(report["loss_by_level"]) == {"sigmas", "training images"}
    again = [*options, "--heldout", "digits:heldout", "--features", "pca"]
    assert evaluate(capsys, run, *again)[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["reference"] == 1540 and "held-out images" in report["sets"]


def test_the_likelihood_of_a_network_of_any_sigma(capsys, tmp_path):
    """And how samples are drawn comes from what is saved with the network."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8)
    np.save(tmp_path / "bytes.npy", pixels)
    torch.manual_seed(0)
    network = ScoreCNN(1, nf=8, image_size=8, sigmas=(5.0, 0.5, 0.05))
    settings = TrainingSettings(iterations=2, batch_size=4)
    train(network, load_digits()[:40], settings, tmp_path / "run", verbose=False)
    start = {"step": 0, "time": "2026-01-01T00:00:00+00:00", "machine": {"processor": "A"}}
    records = [start, {"step": 1, "time": "2026-01-01T00:00:10+00:00"}]
    start = {"step": 1, "time": "2026-01-01T01:00:00+00:00", "machine": {"processor": "B"}}
    records += [start, {"step": 2, "time": "2026-01-01T01:00:05+00:00"}]
    (tmp_path / "run" / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    save_sampling(tmp_path / "run", {"sampler": "euler", "denoise": True})
    command = ["evaluate", tmp_path / "run", "--data", tmp_path / "bytes.npy", "--likelihood", 4]
    command += ["--heldout", tmp_path / "bytes.npy", "--n", 6, "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in command])
    said = capsys.readouterr()
    assert end.value.code == 0, said.err
    report = json.loads((tmp_path / "run" / "evaluation" / "report.json").read_text())
    assert report["sampling"]["sampler"] == "euler" and report["sampling"]["n_steps_each"] is None
    assert report["training"] == {"steps": 2, "seconds": 15, "machine": {"processor": "B"}}
    assert report["machine"]["device"] == "cpu"
    found = report["bits_per_dim"]
    assert set(found) == {"training images", "held-out images"}
    for bits in found.values():
        assert bits["images"] == 4 and 7 < bits["mean"] < 20 and 0 < bits["standard_error"] < 1
        assert f"{bits['mean']:.3f}, standard error {bits['standard_error']:.3f}" in said.out


def test_a_network_of_the_package(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate(capsys, "digits", "--n", 10)[0] == 0
    report = json.loads((tmp_path / "ncsn_digits" / "evaluation" / "report.json").read_text())
    saved = load_sampling("digits")
    assert report["sampling"]["step_lr"] == saved["step_lr"] and report["bits_per_dim"] is None
    assert report["sampling"]["init_dist"] == "normal" and report["sampling"]["n_steps_each"] == 1
    assert report["training"] is None
    # The digits are 8x8, whatever the network.
    status, _, error = evaluate(capsys, "fashion-mnist")
    assert status == 2 and "the images of digits must be (1, 28, 28)" in error


def test_mistakes(run, capsys, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 16, 16), np.uint8))
    for arguments, message in (
        ([tmp_path / "none"], "does not exist"),
        ([run, "--data", tmp_path / "a.npy"], "(N, 1, 8, 8)"),
        ([run, "--data", tmp_path / "nowhere"], "does not exist"),
        ([run, "--step-lr", "1", "--sampler", "pc"], "takes no step_lr"),
        ([run, "--likelihood", "4"], "NCSN knows the levels of its ladder only"),
    ):
        status, _, error = evaluate(capsys, *arguments)
        assert status == 2 and message in error


def test_a_network_of_another_range(capsys, tmp_path, monkeypatch):
    """One for data in [0, 1], with a configuration of its own fields, sees its own range; sets are compared in ours."""
    monkeypatch.setattr(registry, "NETWORKS", dict(registry.NETWORKS))
    seen = []

    @dataclasses.dataclass(frozen=True)
    class UnitConfig:
        sigmas: tuple[float, ...] | None = None

    @register
    class UnitNet(ScoreModel):
        """Its score draws everything to 0.75."""

        Config = UnitConfig
        data_range = (0.0, 1.0)

        def __init__(self, config):
            super().__init__(config)
            self.scale = torch.nn.Parameter(torch.ones(()))

        @property
        def sample_shape(self):
            return (1, 8, 8)

        def forward(self, x, sigma):
            if x.requires_grad or self.training or len(x) == 64:
                seen.append(x.detach())
            return (0.75 - x) * self.scale / self.check_input(x, sigma).view(-1, 1, 1, 1) ** 2

    model = UnitNet(UnitConfig((1.0, 0.001)))
    model.save_pretrained(tmp_path / "unit")
    (tmp_path / "unit" / "image_size.json").write_text("[8, 8]")
    options = ["--features", "pca", "--sampler", "euler", "--passes", 2, "--n", 100]
    command = ["evaluate", tmp_path / "unit", *options, "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in command])
    assert end.value.code == 0, capsys.readouterr().err
    nearly_clean = seen[-1]  # of the loss at sigma 0.001
    assert -0.1 < nearly_clean.min() < 0.1 and 0.9 < nearly_clean.max() < 1.1
    report = json.loads((tmp_path / "unit" / "evaluation" / "report.json").read_text())
    assert report["sampling"]["passes"] == 2 and report["sampling"]["sampler"] == "euler"
    # All samples are grey of 0.75, so 0.5 in [-1, 1], and the nearest digit is as far from that as it is.
    expected = (load_digits() - 0.5).flatten(1).norm(dim=1).min()
    assert report["sets"]["samples"]["nearest"] == pytest.approx(float(expected), rel=1e-2)
