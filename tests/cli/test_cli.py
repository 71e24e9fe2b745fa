"""The command ``ncsn-fast``: what each command makes, and every mistake as one line with exit status 2."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast import NCSN, NCSNv2, ScoreCNN, ScoreMLP, cli, info
from ncsn_fast.cli import errors, options, sample
from ncsn_fast.data import load_images
from ncsn_fast.training import TrainingInterrupted, read_losses
from ncsn_fast.training.checkpoints import load_checkpoint

SMALL = ["--nf", "4", "--num-classes", "3", "--sigma-end", "0.1", "--batch", "4"]


@pytest.fixture
def ncsn_fast(capsys):
    """``ncsn_fast("train", ...)`` runs a command in this process: its exit status, stdout and stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


@pytest.fixture
def refused(ncsn_fast):
    """Runs a command that must fail as a mistake of the user: one line on stderr, which is returned."""

    def run(*arguments):
        status, out, err = ncsn_fast(*arguments)
        last = err.splitlines()[-1]
        assert status == 2
        assert last.startswith("ncsn-fast: ")
        assert "Traceback" not in err + out
        return last

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *SMALL, "--iterations", "4", "--out", str(out)])
    assert stop.value.code == 0
    return out


# --- train ----------------------------------------------------------------------------------------


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


# --- sample ---------------------------------------------------------------------------------------


def test_sample_from_every_form_into_every_form(ncsn_fast, trained, tmp_path):
    draw = ["--n", 5, "--steps", 1, "--seed", 7]
    forms = {
        "a.npy": [trained],
        "b.npz": [trained / "checkpoint.pt", "--batch", 2],
        "c": [trained / "model"],
        "d.png": [trained],
    }
    for name, arguments in forms.items():
        assert ncsn_fast("sample", *arguments, *draw, "--out", tmp_path / "new" / name)[0] == 0
    images = np.load(tmp_path / "new" / "a.npy")
    assert images.shape == (5, 1, 8, 8) and images.dtype == np.float32
    assert np.abs(images).max() <= 1
    # Image i is image i, whatever the batch.
    np.testing.assert_allclose(np.load(tmp_path / "new" / "b.npz")["images"], images, atol=1e-4)
    files = sorted(p.name for p in (tmp_path / "new" / "c").iterdir())
    assert files == [f"000{i}.png" for i in range(5)] + ["manifest.json"]
    read = load_images(tmp_path / "new" / "c", 8, 1).numpy()
    np.testing.assert_allclose(read, images, atol=1 / 127)
    with Image.open(tmp_path / "new" / "d.png") as picture:
        assert min(picture.size) > 2 * 64
    model = NCSN.from_pretrained(trained / "model")
    lr = 0.2 * float(model.sigmas[-1]) ** 2
    expected = model.sample(5, 8, None, 1, lr, clip=False, denoise=True, seed=7, verbose=False)
    np.testing.assert_allclose(images, expected.clamp(-1, 1).numpy(), atol=1e-4)


def test_sample_options_reach_the_sampler(ncsn_fast, trained, tmp_path, monkeypatch):
    asked = []

    def sample(self, n, size, **options):
        asked.append((n, size, options))
        return torch.zeros(n, 1, 2, 2)

    monkeypatch.setattr(NCSN, "sample", sample)
    options = ["--clip", "--no-denoise", "--steps", 3, "--step-lr", 0.5, "--image-size", 9]
    out = ["--n", 5, "--batch", 3, "--out", tmp_path / "x.npy"]
    assert ncsn_fast("sample", trained, *options, *out)[0] == 0
    common = {"n_steps_each": 3, "step_lr": 0.5, "clip": True, "denoise": False, "seed": 0}
    common |= {"sampler": "ald"}
    assert asked == [(3, 9, common | {"sample_offset": 0}), (2, 9, common | {"sample_offset": 3})]


def test_sample_mistakes(refused, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (trained / "checkpoint.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "other.pt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for source, message in {
        "nowhere": "nowhere does not exist",
        "cut.pt": "cut.pt is truncated",
        "other.pt": "other.pt is not a checkpoint of ncsn_fast",
        "empty": "the folder empty holds neither checkpoint.pt nor a model",
        "model": "model.safetensors does not exist",
    }.items():
        assert message in refused("sample", source)
    NCSN.from_pretrained(trained / "model").save_pretrained(tmp_path / "published")
    assert "give --image-size" in refused("sample", "published")
    assert "must end in .png, .npy or .npz" in refused("sample", trained, "--out", "a.jpg")
    assert "cannot make the folder cut.pt" in refused("sample", trained, "--out", "cut.pt/a.png")
    assert "n_steps_each must be" in refused("sample", trained, "--steps", 0)
    assert "step_lr must be" in refused("sample", trained, "--step-lr", -1)
    assert "--n" in refused("sample", trained, "--n", 0)
    assert not list(tmp_path.glob("*.png"))


def test_sample_into_a_folder_goes_on_where_it_was(ncsn_fast, refused, trained, tmp_path):
    command = ["sample", trained, "--n", 7, "--batch", 3, "--steps", 1, "--out", tmp_path / "x"]
    assert ncsn_fast(*command)[0] == 0
    files = {f: f.read_bytes() for f in (tmp_path / "x").glob("*.png")}
    assert len(files) == 7
    times = {f: f.stat().st_mtime_ns for f in files}
    lost = tmp_path / "x" / "0004.png"
    lost.unlink()
    (tmp_path / "x" / ".0004.png.1.tmp").write_text("half a picture")
    assert ncsn_fast(*command)[0] == 0
    assert {f: f.read_bytes() for f in (tmp_path / "x").glob("*.png")} == files
    assert [f.name for f in files if f.stat().st_mtime_ns == times[f] and f != lost] != []
    again = sorted(f.name for f in files if f.stat().st_mtime_ns != times[f])
    assert again == ["0003.png", "0004.png", "0005.png"]
    assert not list((tmp_path / "x").glob(".*"))
    assert "other settings: seed is 0 there and 1 here" in refused(*command, "--seed", 1)
    assert "other settings: batch is 3 there and 4 here" in refused(*command, "--batch", 4)
    assert "is one of 7 samples, and 5 were asked for" in refused(*command, "--n", 5)
    (tmp_path / "x" / "manifest.json").unlink()
    assert "holds 0000.png but no manifest.json" in refused(*command)


def test_sample_shards_pictures_and_samplers(ncsn_fast, trained, tmp_path):
    out = tmp_path / "x"
    pictures = []
    for kind in ("grid.png", "strip.png", "gif.gif"):
        pictures += [f"--{kind[:-4]}", tmp_path / kind]
    command = ["sample", trained, "--n", 5, "--batch", 2, "--steps", 1, "--clip", "--bf16"]
    assert ncsn_fast(*command, "--out", out, "--format", "npz", *pictures)[0] == 0
    shards = sorted(out.glob("*.npz"))
    assert [f.name for f in shards] == ["0000-0001.npz", "0002-0003.npz", "0004-0004.npz"]
    images = np.concatenate([np.load(f)["images"] for f in shards])
    assert ncsn_fast(*command, "--out", tmp_path / "y.npy", *pictures)[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), images)
    for name, frames in {"grid.png": 1, "strip.png": 1, "gif.gif": 4}.items():
        with Image.open(tmp_path / name) as picture:
            assert getattr(picture, "n_frames", 1) == frames
    pc = ["sample", trained, "--n", 1, "--steps", 1, "--sampler", "pc", "--predictor", "ancestral"]
    assert ncsn_fast(*pc, "--snr", 0.2, "--out", tmp_path / "pc.npy")[0] == 0
    model = NCSN.from_pretrained(trained / "model")
    options = {"sampler": "pc", "snr": 0.2, "predictor": "ancestral", "n_steps_each": 1}
    expected = model.sample(1, 8, clip=False, denoise=True, seed=0, verbose=False, **options)
    got = np.load(tmp_path / "pc.npy")
    np.testing.assert_allclose(got, expected.clamp(-1, 1).numpy(), atol=1e-4)


def test_sample_with_few_passes(ncsn_fast, refused, trained, tmp_path):
    command = ["sample", trained, "--n", 2, "--sampler", "ancestral", "--passes", 4]
    command += ["--corrector-steps", 1, "--out", tmp_path / "x.npy"]
    pictures = ["--strip", tmp_path / "strip.png", "--gif", tmp_path / "levels.gif"]
    assert ncsn_fast(*command, *pictures)[0] == 0
    model = NCSN.from_pretrained(trained / "model")
    options = {"sampler": "ancestral", "passes": 4, "corrector_steps": 1}
    expected = model.sample(2, 8, clip=False, seed=0, verbose=False, **options)
    got = np.load(tmp_path / "x.npy")
    np.testing.assert_allclose(got, expected.clamp(-1, 1).numpy(), atol=1e-4)
    with Image.open(tmp_path / "levels.gif") as film:
        assert film.n_frames == 2  # the second level, and the end
    assert "takes passes, and no n_steps_each" in refused(*command, "--steps", 3)
    assert "takes no denoise=False" in refused(*command, "--no-denoise")
    assert "'ald' takes no passes" in refused("sample", trained, "--sampler", "ald", "--passes", 4)


def test_a_broken_network_is_one_line(refused, trained, tmp_path):
    model = NCSN.from_pretrained(trained / "model")
    torch.nn.init.constant_(model.end_conv.bias, float("nan"))
    model.save_pretrained(tmp_path / "broken")
    line = refused("sample", tmp_path / "broken", "--image-size", 8, "--out", tmp_path / "x.png")
    assert "the score was NaN or infinite, first at level 0" in line
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampler", "pc", "--step-lr", 0.1], "sampler 'pc' takes no step_lr"),
        (["--snr", 0.1], "sampler 'ald' takes no snr"),
        (["--sampler", "cas", "--predictor", "ancestral"], "sampler 'cas' takes no predictor"),
        (["--sampler", "pc", "--clip"], "sampler 'pc' clamps at the end only"),
        (["--grid", "file/grid.png"], "cannot make the folder file"),
        (["--strip", "folder.png"], "folder.png: is a folder"),
        (["--gif", "file/a.gif"], "cannot make the folder file"),
        (["--grid", "grid.jpg"], "--grid makes a .png file, got grid.jpg"),
        (["--gif", "x.png"], "--gif makes a .gif file, got x.png"),
        (["--grid", "a.png", "--strip", "./a.png"], "--grid and --strip name the same file"),
        (["--out", "a.png", "--grid", "a.png"], "--out and --grid name the same file"),
        (["--out", "a.jpg"], "must end in .png, .npy or .npz"),
    ],
)
def test_sample_refuses_before_any_work(refused, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(sample, "load_image_network", lambda *_: pytest.fail("work was begun"))
    assert message in refused("sample", "run", *options)


def test_a_missing_pillow_is_told_before_any_work(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_image_network", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setitem(sys.modules, "PIL", None)
    out = ["--out", tmp_path / "x.npy", "--grid", tmp_path / "x.png"]
    assert "pictures take pillow" in refused("sample", "run", *out)


def test_schedule_refuses_its_plot_before_any_work(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "open_images", lambda *_, **__: pytest.fail("work was begun"))
    assert "is a folder" in refused("schedule", "--plot", tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot make the folder" in refused("schedule", "--plot", tmp_path / "file" / "x.png")


def test_a_folders_name_may_hold_a_dot(ncsn_fast, trained, tmp_path):
    (tmp_path / "x.jpg").mkdir()  # a folder that is there is one, whatever its name
    for name in ("samples_lr0.01", "v1.2/set", ".hidden", "x.jpg"):
        assert ncsn_fast("sample", trained, "-n", 2, "--steps", 1, "--out", tmp_path / name)[0] == 0
        assert len(list((tmp_path / name).glob("*.png"))) == 2


def test_a_folder_is_extended_and_damage_is_told(ncsn_fast, trained, tmp_path):
    command = ["sample", trained, "--batch", 4, "--steps", 1, "--out", tmp_path / "x"]
    assert ncsn_fast(*command, "-n", 6)[0] == 0
    assert ncsn_fast(*command, "-n", 9)[0] == 0
    (tmp_path / "x" / "0002.png").write_bytes(b"")
    status, _, err = ncsn_fast(*command, "-n", 9)
    assert status == 0 and "1 damaged files are drawn again: 0002.png" in err
    command[-1] = tmp_path / "y"
    assert ncsn_fast(*command, "-n", 9)[0] == 0
    x, y = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "xy")
    assert x == y and len(x) == 10


def test_cas_has_a_default_step(ncsn_fast, trained, tmp_path):
    options = ["-n", 1, "--steps", 1, "--sampler", "cas", "--out", tmp_path / "x.npy"]
    assert ncsn_fast("sample", trained, *options)[0] == 0


def test_a_model_without_a_ladder_is_one_line(refused, tmp_path):
    NCSN(in_channels=1, nf=4, num_classes=3).save_pretrained(tmp_path)
    line = refused("sample", tmp_path, "--image-size", 8, "--out", tmp_path / "x.png")
    assert "has no noise levels" in line


@pytest.mark.parametrize("kind", ["cnn", "official"])
def test_sample_from_any_network_of_images(ncsn_fast, tmp_path, kind):
    sigmas = [1.0, 0.5]
    model = ScoreCNN(1, 8, 8, sigmas=sigmas) if kind == "cnn" else NCSNv2(1, 2, 2, sigmas=sigmas)
    model.save_pretrained(tmp_path)
    out = tmp_path / "x.npy"
    more = ["--sampler", "ode"] if kind == "cnn" else ["--clip", "--strip", tmp_path / "strip.png"]
    command = ["sample", tmp_path, "-n", 3, "--steps", 1, "--image-size", 8, "--out", out, *more]
    assert ncsn_fast(*command)[0] == 0
    images, steps = np.load(out), {"n_steps_each": 1, "denoise": True, "seed": 0}
    if kind == "cnn":
        expected = model.sample(3, sampler="ode", **steps).clamp(-1, 1)
    else:  # their data are in [0, 1], and files in [-1, 1]
        expected = 2 * model.sample(3, 8, clip=True, **steps) - 1
        assert (tmp_path / "strip.png").is_file()
    np.testing.assert_allclose(images, expected.numpy(), atol=1e-5)
    assert images.min() < -0.5 and images.max() > 0.5


def test_sample_of_points_is_one_line(refused, tmp_path):
    ScoreMLP(2, sigmas=[1.0, 0.5]).save_pretrained(tmp_path)
    line = refused("sample", tmp_path, "--out", tmp_path / "x.png")
    assert "is of a ScoreMLP of points, and this command is for images" in line


# --- schedule -------------------------------------------------------------------------------------


def test_schedule(ncsn_fast, refused, tmp_path):
    status, text, _ = ncsn_fast("schedule", "digits", "--plot", tmp_path / "ladder.png")
    assert status == 0
    assert "sigma_begin 9.63" in text and "technique 2: overlap 0.5" in text
    with Image.open(tmp_path / "ladder.png") as picture:
        assert min(picture.size) > 100
    images = np.zeros((2, 32, 32, 3), np.float32)
    images[1, :25, :25] = 1.0  # 1,875 values, a distance of 43.3
    np.save(tmp_path / "x.npy", images)
    arguments = ["schedule", tmp_path / "x.npy", "--num-classes", 232, "--sigma-end", 0.01]
    status, text, _ = ncsn_fast(*arguments)
    assert (
        status == 0
        and "sigma_begin 43.3 " in text
        and "num_classes 232 (given)" in " ".join(text.split())
    )
    assert "step_lr     6" in text and "--steps 5 --step-lr 6" in text
    assert "at least two different" in refused("schedule", _one_image(tmp_path))


def _one_image(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros((1, 32, 32, 3), np.uint8))
    return tmp_path / "one.npy"


# --- demo -----------------------------------------------------------------------------------------


def test_demo_options_reach_it_and_fresh_forgets_the_network(ncsn_fast, monkeypatch, tmp_path):
    from ncsn_fast.demos import digits as demo

    asked = []
    monkeypatch.setattr(demo, "run", lambda out, **options: asked.append((out, options)))
    (tmp_path / "checkpoint.pt").write_text("of an earlier demo")
    options = ["--out", tmp_path, "--seed", 3, "--iterations", 5, "--samples", 7]
    assert ncsn_fast("demo", *options)[0] == 0
    assert (tmp_path / "checkpoint.pt").exists()
    assert ncsn_fast("demo", *options, "--fresh")[0] == 0
    assert not (tmp_path / "checkpoint.pt").exists()
    assert asked == [(tmp_path, {"seed": 3, "iterations": 5, "n_samples": 7})] * 2


def test_demo_tells_how_to_go_on(ncsn_fast, monkeypatch, tmp_path):
    from ncsn_fast.demos import digits as demo

    def run(out, **options):
        raise TrainingInterrupted(4, out / "checkpoint.pt")

    monkeypatch.setattr(demo, "run", run)
    status, _, err = ncsn_fast("demo", "--out", tmp_path)
    assert status == 130
    assert err.endswith(
        f"checkpoint written to {tmp_path}/checkpoint.pt; the same command goes on\n"
    )


# --- the rest -------------------------------------------------------------------------------------


def test_info(ncsn_fast):
    status, text, _ = ncsn_fast("info")
    assert status == 0 and "langevin_step_" in text
    status, text, _ = ncsn_fast("info", "--json")
    assert status == 0 and json.loads(text)["operators"]["cpu"]["langevin_step_"]["auto"]


def test_help_names_every_command_and_its_defaults(ncsn_fast):
    status, text, _ = ncsn_fast()
    assert status == 0
    commands = ("train", "sample", "schedule", "demo", "info")
    assert all(name in text for name in commands)
    for command in commands:
        status, text, _ = ncsn_fast(command, "--help")
        assert status == 0 and "Usage: ncsn-fast" in text
    assert "ncsn-fast: No such command 'draw'." in ncsn_fast("draw")[2]
    assert ncsn_fast("--version")[1].startswith("ncsn_fast ")


def test_without_typer_it_says_what_to_install():
    script = (
        "import sys; sys.modules['typer'] = None; from ncsn_fast.cli import main; main(['info'])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 2
    expected = 'ncsn-fast: the command line takes typer: pip install "ncsn_fast[cli]"\n'
    assert (run.stdout, run.stderr) == ("", expected)


def test_a_missing_extra_is_one_line(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    line = refused("train", "--out", tmp_path)
    assert line == 'ncsn-fast: the digits come with scikit-learn: pip install "ncsn_fast[demo]"'


# --- errors of our own, no standard streams, the environment, sources beside an installed one -----


def child(code, *arguments, cwd=None, path=None, **environment):
    """A program of its own: what it printed, and how it ended."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NCSN_FAST_BACKEND")}
    kept |= {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *(["-c", code] if code else []), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "error", [TypeError, AttributeError, KeyError, RuntimeError, AssertionError]
)
def test_an_error_of_our_own_shows_its_traceback(ncsn_fast, monkeypatch, error):
    def broken():
        raise error("a fault")

    monkeypatch.setattr(info, "collect", broken)
    status, out, err = ncsn_fast("info")
    assert status == 1 and not out
    assert "Traceback" in err and "in broken" in err
    assert err.splitlines()[-1].startswith(f"ncsn-fast: unexpected {error.__name__}, a fault of ")


def test_debug_shows_the_traceback_of_an_expected_error(ncsn_fast, monkeypatch):
    monkeypatch.delenv(errors.DEBUG, raising=False)
    assert "Traceback" not in ncsn_fast("sample", "nowhere")[2]
    monkeypatch.setenv(errors.DEBUG, "1")
    status, _, err = ncsn_fast("sample", "nowhere")
    assert status == 2 and "Traceback" in err
    assert err.splitlines()[-1].startswith("ncsn-fast: ")
    for empty in ("", "0"):
        monkeypatch.setenv(errors.DEBUG, empty)
        assert "Traceback" not in ncsn_fast("sample", "nowhere")[2]
    monkeypatch.setenv(errors.DEBUG, "0")
    assert "Traceback" in ncsn_fast("--debug", "sample", "nowhere")[2]


WINDOWED = """
import sys, torch
sys.stdout = sys.stderr = None
from ncsn_fast import NCSN, cli
from ncsn_fast.training import TrainingSettings, train
def command(*arguments):
    try:
        cli.main(list(arguments))
    except SystemExit as stop:
        return stop.code
out = sys.argv[1]
model = NCSN(in_channels=1, nf=4, num_classes=3, sigmas=[1.0, 0.3, 0.1])
model.sample(1, 4, n_steps_each=1)
train(model, torch.zeros(4, 1, 8, 8), TrainingSettings(iterations=1, batch_size=2), out)
draw = ["sample", out, "-n", "2", "--steps", "1", "--out"]
codes = [command(*draw, out + "/x.npy"), command(*draw, out + "/folder"), command("sample", "none")]
codes += [command("--help"), command("info"), command("nosuch")]
assert codes == [0, 0, 2, 0, 0, 2], codes
"""


def test_without_standard_streams(tmp_path):
    """As under pythonw."""
    (tmp_path / "windowed.py").write_text(
        f"try:\n{_indented(WINDOWED)}\nexcept BaseException:\n"
        "    import traceback\n    open(sys.argv[1] + '.log', 'w').write(traceback.format_exc())\n    raise\n"
    )
    run = child(None, tmp_path / "windowed.py", tmp_path / "run")
    log = tmp_path / "run.log"
    assert run.returncode == 0, log.read_text() if log.exists() else run.returncode
    assert (run.stdout, run.stderr) == ("", "")


def _indented(code):
    return "\n".join(f"    {line}" for line in code.splitlines())


@pytest.mark.parametrize(
    "name", ["NCSN_FAST_BACKEND", "NCSN_FAST_SIMD", "NCSN_FAST_DEBUG", "TRITON_INTERPRET"]
)
def test_a_variable_set_to_nothing_is_one_not_set(name):
    code = "import ncsn_fast; print(ncsn_fast.ops.dispatch.policy()); ncsn_fast.ops.philox_normal((1, 4), seed=0)"
    run = child(code, **{name: ""})
    assert (run.returncode, run.stdout) == (0, "{'*': 'auto'}\n"), run.stderr


def test_a_wrong_backend_of_the_environment_is_named():
    run = child("import ncsn_fast", NCSN_FAST_BACKEND="fast")
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert "NCSN_FAST_BACKEND: backend must be one of" in last and "got 'fast'" in last


# As where no editable install is: its finder would lead back to the sources under test.
PLAIN = """
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "_frozen" in repr(finder)]
"""
INFO = f"{PLAIN}runpy.run_module('ncsn_fast.info', run_name='__main__', alter_sys=True)"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Sources as a clone has them, nothing built, beside an installed package of that name."""
    package, folder = Path(cli.__file__).parents[1], tmp_path_factory.mktemp("clone")
    leave = shutil.ignore_patterns("*.so", "__pycache__", "benchmarks")
    shutil.copytree(package, folder / "clone" / "ncsn_fast", ignore=leave)
    (folder / "installed" / "ncsn_fast").mkdir(parents=True)
    (folder / "installed" / "ncsn_fast" / "__init__.py").write_text("")
    return folder


def test_info_says_what_hides_what(clone):
    path = str(clone / "installed")
    run = child(INFO, cwd=clone / "clone", PYTHONPATH=path)
    assert run.returncode == 0, run.stderr
    here, there = (clone / name / "ncsn_fast" for name in ("clone", "installed"))
    hides = f"imported from {here}, which hides the one installed at {there}"
    assert f"package    {hides}" in run.stdout
    assert f"cpu: the C++ extension is not beside the sources that run: {hides}" in run.stdout
    assert "python -P" in run.stdout and "-e ." in run.stdout
    alone = child(INFO, "--json", cwd=clone / "clone")
    assert json.loads(alone.stdout)["shadows"] is None
    assert "is not built" in json.loads(alone.stdout)["libraries"]["cpu"]


def test_only_bench_needs_the_benchmarks(clone):
    code = f"{PLAIN}from ncsn_fast.cli import main; main(sys.argv[1:])"
    where = clone / "clone"
    for command in ("sample", "train", "schedule", "demo", "info"):
        run = child(code, command, "--help", cwd=where)
        assert run.returncode == 0 and "Usage" in run.stdout, run.stderr
    assert "bench" in child(code, "--help", cwd=where).stdout
    run = child(code, "bench", "--quick", cwd=where)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "benchmarks" in run.stderr.splitlines()[-1]


def test_bench_has_its_own_help(ncsn_fast):
    status, out, _ = ncsn_fast("bench", "--help")
    assert status == 0 and "--report" in out and "ncsn-fast bench" in out
    status, _, err = ncsn_fast("bench", "--nosuch")
    assert status == 2 and "No such option" in err.splitlines()[-1]
