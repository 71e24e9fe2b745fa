"""``ncsn-fast train``: what it makes, how it goes on, and every mistake as one line with exit status 2."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from support.command_line import SMALL

from ncsn_fast import NCSN
from ncsn_fast.training import read_losses
from ncsn_fast.training.checkpoints import load_checkpoint


def test_train_on_the_digits(trained):
    checkpoint = load_checkpoint(trained / "checkpoint.pt")
    assert (checkpoint.config.nf, checkpoint.config.num_classes, checkpoint.step) == (4, 3, 4)
    assert checkpoint.config.sigmas[0] == pytest.approx(9.63)  # of the digits' distances
    assert checkpoint.data["shape"] == (1540, 1, 8, 8)
    assert checkpoint.settings["batch_size"] == 4
    assert read_losses(trained / "losses.csv")[0] == [1, 2, 3, 4]
    assert NCSN.from_pretrained(trained / "model").config == checkpoint.config


def test_train_on_a_folder(ncsn_fast, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    out = tmp_path / "new" / "run"
    where = ["--data", tmp_path, "--image-size", 6, "--out", out]
    status, text, _ = ncsn_fast("train", *SMALL, *where, "--iterations", 2, "--sigma-begin", 5)
    assert status == 0
    assert text.startswith("3 images of (3, 6, 6); ")
    assert load_checkpoint(out / "checkpoint.pt").image_size == (6, 6)


def test_what_is_odd_about_the_data_is_told_once(ncsn_fast, tmp_path):
    """Once, though the loader, the training and its first batch all look at them; as a line, like every message."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((6, 8, 8), np.float32))
    where = ["--data", tmp_path / "x.npy", "--image-size", 8, "--channels", 1, "--sigma-begin", 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none is left to Python
        status, _, err = ncsn_fast(
            "train", *SMALL, *where, "--iterations", 1, "--out", tmp_path / "run"
        )
    told = [line for line in err.splitlines() if "x * 2 - 1" in line]
    assert status == 0 and len(told) == 1 and told[0].startswith("ncsn-fast: the network expects")


def test_what_is_skipped_in_a_folder_is_one_line(ncsn_fast, tmp_path):
    for i in range(2):
        Image.new("L", (8, 8), 255 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "._0.png").write_bytes(b"")
    status, _, err = ncsn_fast("schedule", tmp_path)
    assert status == 0
    assert err.splitlines() == [f"ncsn-fast: skipped 1 name in {str(tmp_path)!r}: 1 hidden"]


def test_resume_takes_the_settings_of_the_run(ncsn_fast, refused, tmp_path):
    command = ["train", *SMALL, "--out", tmp_path, "--lr-schedule", "constant"]
    assert ncsn_fast(*command, "--iterations", 3)[0] == 0
    assert "exists: resume that run" in refused(*command, "--iterations", 5)
    # Nothing but the folder, and then the whole command again.
    resume = ["train", "--out", tmp_path, "--resume"]
    assert ncsn_fast(*resume, "--iterations", 4)[0] == 0
    assert ncsn_fast(*command, "--iterations", 5, "--resume")[0] == 0
    assert load_checkpoint(tmp_path / "checkpoint.pt").step == 5
    assert "another configuration: nf is 4 there and 5 here" in refused(*resume, "--nf", 5)
    assert "other settings: lr is 0.001 there and 0.1 here" in refused(*resume, "--lr", 0.1)
    assert "another configuration: sigmas" in refused(*resume, "--sigma-begin", 3)
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8), np.uint8))
    assert "another data set: shape" in refused(*resume, "--data", tmp_path / "x.npy")
    assert load_checkpoint(tmp_path / "checkpoint.pt").step == 5
    assert ncsn_fast(*command, "--iterations", 2, "--overwrite")[0] == 0
    assert load_checkpoint(tmp_path / "checkpoint.pt").step == 2


def test_a_preset_a_file_and_options_are_merged_and_kept(ncsn_fast, tmp_path):
    file, out = tmp_path / "mine.toml", tmp_path / "run"
    file.write_text("nf = 8\nbatch_size = 4\nlr = 1e-4\n")
    sources = ["--preset", "digits", "--config", file, "--lr", 1e-3, "--iterations", 2]
    status, text, _ = ncsn_fast("train", *sources, "--set", "pool_padding=zero", "--out", out)
    assert status == 0 and "10 sigmas from 5 to 0.08" in text
    checkpoint = load_checkpoint(out / "checkpoint.pt")
    assert (checkpoint.config.nf, checkpoint.config.norm) == (8, "instance++")
    assert checkpoint.config.pool_padding == "zero"
    assert (checkpoint.settings["lr"], checkpoint.settings["batch_size"]) == (1e-3, 4)
    kept = (out / "config.toml").read_text()
    # What is kept makes the same run again.
    again = ["--config", out / "config.toml", "--out", tmp_path / "again"]
    assert ncsn_fast("train", *again)[0] == 0
    assert (tmp_path / "again" / "config.toml").read_text() == kept
    other = load_checkpoint(tmp_path / "again" / "checkpoint.pt")
    assert all(torch.equal(other.model[name], checkpoint.model[name]) for name in other.model)


def test_a_resumed_run_knows_its_data(ncsn_fast, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8))
    out = tmp_path / "run"
    where = ["--data", tmp_path / "x.npy", "--image-size", 8, "--channels", 1, "--sigma-begin", 5]
    constant = ["--lr-schedule", "constant"]
    assert ncsn_fast("train", *SMALL, *where, *constant, "--iterations", 1, "--out", out)[0] == 0
    assert ncsn_fast("train", "--resume", "--iterations", 2, "--out", out)[0] == 0
    assert load_checkpoint(out / "checkpoint.pt").step == 2


def test_train_another_network(ncsn_fast, tmp_path):
    options = ["--network", "cnn", "--nf", 8, "--set", "embedding=6", "--levels", "continuous"]
    small = ["--batch", 4, "--num-classes", 3, "--sigma-begin", 5, "--sigma-end", 0.1]
    run = ["train", *options, *small, "--out", tmp_path, "--lr-schedule", "constant"]
    assert ncsn_fast(*run, "--iterations", 2)[0] == 0
    config = load_checkpoint(tmp_path / "checkpoint.pt").config
    assert type(config).__name__ == "ScoreCNNConfig"
    assert (config.in_channels, config.image_size, config.nf, config.embedding) == (1, 8, 8, 6)
    assert ncsn_fast("train", "--resume", "--iterations", 3, "--out", tmp_path)[0] == 0
    assert load_checkpoint(tmp_path / "checkpoint.pt").step == 3


def test_train_a_network_of_another_range(ncsn_fast, tmp_path):
    """The authors' networks take images in [0, 1]; the ladder is of those too."""
    small = ["--network", "officialncsn", "--nf", 8, "--batch", 2, "--num-classes", 3]
    run = ["train", *small, "--sigma-end", 0.1, "--iterations", 1, "--out", tmp_path]
    assert ncsn_fast(*run)[0] == 0
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    assert type(checkpoint.config).__name__ == "OfficialNCSNConfig"
    assert checkpoint.config.sigmas[0] == pytest.approx(9.63 / 2, rel=1e-2)


def test_a_dry_run_says_what_would_happen_and_writes_nothing(ncsn_fast, refused, trained, tmp_path):
    out = tmp_path / "run"
    status, text, _ = ncsn_fast("train", *SMALL, "--iterations", 50, "--dry-run", "--out", out)
    assert status == 0
    assert text.startswith("1540 images of (1, 8, 8); ")
    for part in (
        "nf 4",
        "iterations 50",
        "data digits",
        " MB for a batch",
        "s a step, about ",
        "50 s",
    ):
        assert part in text
    assert "nothing was written" in text and not out.exists()
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    resume = ["train", "--resume", "--iterations", 9, "--lr-schedule", "cosine", "--dry-run"]
    assert "for 5 steps" in ncsn_fast(*resume, "--out", trained)[1]
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before
    assert "exists: resume that run" in refused("train", *SMALL, "--dry-run", "--out", trained)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "the data path nowhere does not exist"),
        (["--preset", "cats"], "preset must be one of ('digits'"),
        (["--config", "nosuch.toml"], "nosuch.toml: No such file or directory"),
        (["--config", "bad.toml"], "bad.toml: 'lrate' is no name of a run with the network 'ncsn'"),
        (["--image-size", "16"], "image_size must be 8 and channels 1, got 16 and 1"),
        (["--channels", "3"], "image_size must be 8 and channels 1, got 8 and 3"),
        (["--network", "gan"], "network must be one of ("),
        (["--network", "cnn", "--norm", "instance"], "'norm' is no name of a run with the networ"),
        (["--network", "mlp"], "network 'mlp' with these options takes values of any range"),
        (["--set", "nf"], "--set takes NAME=VALUE, got 'nf'"),
        (["--set", "nf=many"], "nf must be an int >= 1, got the string 'many'"),
        (["--data", "{tmp}/empty"], "holds no image"),
        (["--data", "{tmp}/text.png"], "cannot read {tmp}/text.png as an image"),
        (["--out", "{tmp}/text.png/run"], "could not write {tmp}/text.png/run"),
        (["--out", "{tmp}/run", "--resume"], "no checkpoint file {tmp}/run/checkpoint.pt"),
        (["--dilations", "1,2"], "dilations must be exactly 4"),
        (["--dilations", "1,b"], "dilations must be integers with commas, got '1,b'"),
        (["--batch", "0"], "batch_size must be an int >= 1, got 0"),
        (["--lr", "nan"], "lr must be positive and finite, got nan"),
        (["--num-classes", "1"], "num_scales must be at least 2"),
        (["--sigma-begin", "0.001"], "sigma_begin must be greater than sigma_end"),
        (["--device", "gpu"], 'device must be "auto", "cpu", "cuda" or "cuda:N", got \'gpu\''),
        (["--device", "cuda:99"], "device 'cuda:99' is not there"),
        (["--nf", "many"], "Invalid value for '--nf'"),
        (["--nosuch"], "No such option"),
        (["--ema-decays", "0.9,b"], "ema_decays must be numbers with commas, got '0.9,b'"),
        (["--lr-schedule", "triangular"], "Invalid value for '--lr-schedule'"),
    ],
)
def test_train_mistakes(refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "bad.toml").write_text("lrate = 1")
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    assert message.format(tmp=tmp_path) in refused("train", *arguments)
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_ctrl_c_writes_a_checkpoint_and_resume_goes_on(tmp_path):
    out = tmp_path / "run"
    entry = [sys.executable, "-c", "from ncsn_fast.cli import main; main()", "train"]
    command = [*entry, *SMALL, "--iterations", "100000", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen = b""
    deadline = time.monotonic() + 60
    while b"loss=" not in seen:  # the bar: it is in the loop
        assert process.poll() is None and time.monotonic() < deadline
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1].decode()
    step = load_checkpoint(out / "checkpoint.pt").step
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == (
        f"ncsn-fast: interrupted after step {step}; checkpoint written to {out / 'checkpoint.pt'}; "
        "the same command with --resume goes on"
    )
    assert "Traceback" not in stderr
    more = [*entry, "--out", str(out), "--resume", "--iterations", str(step + 2)]
    assert subprocess.run(more, capture_output=True).returncode == 0
    assert read_losses(out / "losses.csv")[0] == list(range(1, step + 3))
