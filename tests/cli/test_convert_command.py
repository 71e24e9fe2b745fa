"""The command convert: from the authors' files to a model of this project, to samples, and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from support.official_oracles import ORACLES

from ncsn_fast import NCSN, NCSNConfig, cli
from ncsn_fast.models.base import load_pretrained
from ncsn_fast.models.convert import load_official, save_official
from ncsn_fast.models.official import NCSNv2, NCSNv2Deeper, OfficialNCSN
from ncsn_fast.models.sampling_settings import load_sampling
from ncsn_fast.schedules import make_sigmas
from ncsn_fast.training import TrainingSettings, train
from ncsn_fast.training.checkpoints import load_checkpoint, load_model

V1, V2 = ORACLES / "checkpoint_ncsn_v1.pth", ORACLES / "checkpoint_ncsnv2.pth"
V1_CONFIG, V2_CONFIG = ORACLES / "checkpoint_ncsn_v1.config.yml", ORACLES / "checkpoint_ncsnv2.yml"


@pytest.fixture
def command(capsys):
    """Runs ``ncsn-fast convert ...``: its exit status and the last line that it printed."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(["convert", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return stop.value.code, (out + err).splitlines()[-1]

    return run


@pytest.fixture
def refused(command):
    def run(*arguments):
        status, line = command(*arguments)
        assert status == 2
        return line

    return run


def same(one, other):
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert torch.equal(one.sigmas, other.sigmas)


# --- to a model of this project ---------------------------------------------------------------------


def test_2020(command, tmp_path):
    status, line = command(V2, "--config", V2_CONFIG, "--out", tmp_path / "model")
    assert status == 0 and line.startswith(
        "NCSNv2, 29,687 parameters, 4 noise levels from 5 to 0.05"
    )
    model, size = load_model(tmp_path / "model")
    assert type(model) is NCSNv2 and size == (32, 32)
    same(model, load_official(V2))
    assert load_sampling(tmp_path / "model") == {
        "n_steps_each": 2,
        "step_lr": 6.2e-6,
        "denoise": True,
        "init_dist": "uniform",
        "clip": True,
    }
    images = model.sample(2, 8, **load_sampling(tmp_path / "model"), seed=0)
    assert images.min() >= 0 and images.max() <= 1
    status, _ = command(V2, "--out", tmp_path / "last", "--weights", "last")
    assert status == 0
    model, size = load_model(tmp_path / "last")
    same(model, load_official(V2, weights="raw"))
    assert size is None and load_sampling(tmp_path / "last") == {}


def test_2019(command, tmp_path):
    assert command(V1, "--config", V1_CONFIG, "--out", tmp_path / "model")[0] == 0
    model, size = load_model(tmp_path / "model")
    assert type(model) is OfficialNCSN and size == (32, 32)
    same(model, load_official(V1, config=V1_CONFIG))
    ends = ("--sigma-begin", 1, "--image-size", 16)
    assert command(V1, "--out", tmp_path / "ends", *ends)[0] == 0
    other, size = load_model(tmp_path / "ends")
    same(model, other)
    assert size == (16, 16)


def test_published_ladder(command, tmp_path):
    """How a network with a published ladder is sampled is known without its configuration."""
    save_official(NCSNv2(3, 4, 232, sigmas=make_sigmas(50.0, 0.01, 232)), tmp_path / "c.pth")
    assert command(tmp_path / "c.pth", "--out", tmp_path / "model")[0] == 0
    sampling = load_sampling(tmp_path / "model")
    assert (sampling["n_steps_each"], sampling["step_lr"], sampling["denoise"]) == (5, 6.2e-6, True)


def test_samples_of_a_converted_model(command, tmp_path, capsys):
    """``ncsn-fast sample`` draws them as the configuration says, unless something else is asked for."""
    folder, out = tmp_path / "model", tmp_path / "samples.npy"
    assert command(V2, "--config", V2_CONFIG, "--out", folder)[0] == 0
    model, how = load_official(V2), load_sampling(folder)

    def drawn(*options):
        with pytest.raises(SystemExit) as stop:
            cli.main(["sample", str(folder), "-n", "2", "--out", str(out), *options])
        assert stop.value.code == 0, capsys.readouterr().err
        return torch.from_numpy(np.load(out)).float()

    def expected(**options):
        return 2 * model.sample(2, 32, seed=0, **how | options).clamp(0, 1) - 1

    torch.testing.assert_close(drawn(), expected(), rtol=0, atol=1e-3)
    other = ("--steps", "1", "--step-lr", "1e-6", "--no-denoise")
    got, wanted = drawn(*other), expected(n_steps_each=1, step_lr=1e-6, denoise=False)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3)
    assert (wanted - expected()).abs().max() > 0.1


# --- and back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "config"), [(V1, V1_CONFIG), (V2, V2_CONFIG)], ids=["2019", "2020"]
)
def test_there_and_back(checkpoint, config, command, tmp_path):
    """The same weights, and the same configuration."""
    assert command(checkpoint, "--config", config, "--out", tmp_path / "model")[0] == 0
    back = tmp_path / "back" / "checkpoint.pth"
    assert command(tmp_path / "model", "--to", "official", "--out", back)[0] == 0
    written = back.with_suffix(".yml")
    same(load_official(back, config=written), load_official(checkpoint, config=config))
    if checkpoint == V1:  # which its program can read only with these tags
        assert written.read_text() == config.read_text()
    else:
        assert yaml.safe_load(written.read_text()) == yaml.safe_load(config.read_text())


@pytest.mark.parametrize("name", ["NCSNv2Deeper", "OfficialNCSN"])
def test_a_run_of_ours(name, command, tmp_path):
    """Trained here, in the authors' form and back: the same bits, Adam's state and the average too."""
    network = {"NCSNv2Deeper": NCSNv2Deeper, "OfficialNCSN": OfficialNCSN}[name]
    torch.manual_seed(0)
    model = network(1, 4, 5, sigmas=make_sigmas(5.0, 0.05, 5))
    settings = TrainingSettings(iterations=6, batch_size=4, warmup=0, lr_schedule="constant")
    run = tmp_path / "run"
    train(model, torch.rand(8, 1, 8, 8), settings, run, verbose=False)
    held, back = load_checkpoint(run / "checkpoint.pt"), tmp_path / "checkpoint.pth"
    assert command(run, "--to", "official", "--out", back)[0] == 0
    config = back.with_suffix(".yml")
    theirs = torch.load(back, weights_only=True)
    assert len(theirs) == (2 if network is OfficialNCSN else 5)
    same(load_official(back, config=config), held.ema_model())
    if network is NCSNv2Deeper:
        same(load_official(back, config=config, weights="raw"), held.last_model())
        assert theirs[2:4] == [3, 6]  # epochs of two batches, steps
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.load_state_dict(theirs[1])
    for got, expected in zip(
        optimizer.state_dict()["state"].values(), held.optimizer["state"].values(), strict=True
    ):
        torch.testing.assert_close(got["exp_avg"], expected["exp_avg"], rtol=0, atol=0)
    assert command(back, "--config", config, "--out", tmp_path / "model")[0] == 0
    same(load_pretrained(tmp_path / "model"), held.ema_model())
    assert json.loads((tmp_path / "model" / "image_size.json").read_text()) == [8, 8]
    written = yaml.load(config.read_text(), Loader=yaml.BaseLoader)
    if network is NCSNv2Deeper:
        assert written["data"]["dataset"] == "LSUN"


# --- refused ----------------------------------------------------------------------------------------


def test_what_is_refused(refused, command, tmp_path):
    out = tmp_path / "model"
    assert "there is no checkpoint file" in refused(tmp_path / "none.pth", "--out", out)
    assert "holds no noise levels" in refused(V1, "--out", out)
    assert "ladders" in refused(V2, "--out", out, "--sigma-begin", 4, "--sigma-end", 0.05)
    assert "none.yml" in refused(V2, "--out", out, "--config", tmp_path / "none.yml")
    assert "multiples of 2" in refused(V2, "--out", out, "--image-size", 15)
    (tmp_path / "cut.pth").write_bytes(V2.read_bytes()[:5000])
    assert "truncated" in refused(tmp_path / "cut.pth", "--out", out)
    assert not out.exists()

    assert command(V2, "--out", out)[0] == 0
    assert "give --overwrite" in refused(V2, "--out", out)
    assert command(V2, "--out", out, "--overwrite")[0] == 0
    back = tmp_path / "back.pth"
    assert "--config is of" in refused(
        out, "--to", "official", "--out", back, "--config", V2_CONFIG
    )
    back.with_suffix(".yml").write_text("")
    assert "back.yml is there already" in refused(out, "--to", "official", "--out", back)
    assert not back.exists()
    assert command(out, "--to", "official", "--out", back, "--overwrite")[0] == 0

    other = tmp_path / "other"
    NCSN(NCSNConfig(nf=4, num_classes=2, sigmas=(1.0, 0.5))).save_pretrained(other)
    assert "is of NCSN, which" in refused(other, "--to", "official", "--out", tmp_path / "o.pth")
    uneven = tmp_path / "uneven"
    NCSNv2(3, 4, 3, sigmas=(5.0, 1.0, 0.9)).save_pretrained(uneven)
    line = refused(uneven, "--to", "official", "--out", tmp_path / "u.pth")
    assert "geometric or uniform" in line and not (tmp_path / "u.pth").exists()
