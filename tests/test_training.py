"""Training: it learns, resumes exactly, and loses nothing to Ctrl-C, a full disk or a damaged file."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ncsn_fast import NCSN, NCSNConfig
from ncsn_fast.checkpoints import CheckpointError, load_checkpoint, load_model
from ncsn_fast.training import TrainingError, TrainingSettings, read_losses, train

CONFIG = NCSNConfig(in_channels=1, nf=4, num_classes=3, sigmas=(1.0, 0.3, 0.1))
SETTINGS = TrainingSettings(iterations=8, batch_size=4, checkpoint_every=3, warmup=0)
IMAGES = torch.rand(10, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1


def new_model(config=CONFIG):
    torch.manual_seed(0)
    return NCSN(config)


def run(out, model=None, settings=SETTINGS, images=IMAGES, **arguments):
    return train(model or new_model(), images, settings, out, verbose=False, **arguments)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_it_learns(tmp_path):
    """One image over and over: its score is easy, and the loss falls well below that of predicting zero."""
    settings = TrainingSettings(iterations=150, batch_size=8, lr=3e-3, warmup=0, ema_decay=0.9)
    model = new_model()
    averaged = run(tmp_path, model, settings, images=IMAGES[:1].expand(8, -1, -1, -1))
    _, losses = read_losses(tmp_path / "losses.csv")
    assert sum(losses[-30:]) / 30 < 0.6 * sum(losses[:5]) / 5
    assert not averaged.training
    held = averaged.get_loss(IMAGES[:1].expand(64, -1, -1, -1), seed=1)[0]
    assert held < 36 * 0.6  # 36 pixels of unit noise


def test_what_is_written(tmp_path):
    averaged = run(tmp_path)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt", CONFIG)
    assert checkpoint.step == 8
    assert same(checkpoint.ema, averaged.state_dict())
    assert not same(checkpoint.ema, checkpoint.model)
    steps, losses = read_losses(tmp_path / "losses.csv")
    assert steps == list(range(1, 9)) and all(loss > 0 for loss in losses)
    for path in (tmp_path, tmp_path / "checkpoint.pt", tmp_path / "model"):
        model, size = load_model(path)
        assert same(model.state_dict(), averaged.state_dict())
        assert size == (6, 6)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "losses.csv", "model"}


def test_the_average_is_the_average(tmp_path):
    settings = dataclasses.replace(SETTINGS, iterations=2, ema_decay=0.75, checkpoint_every=1)
    first = run(
        tmp_path / "one",
        settings=dataclasses.replace(settings, iterations=1, lr_schedule="constant"),
    )
    run(tmp_path / "two", settings=dataclasses.replace(settings, lr_schedule="constant"))
    two = load_checkpoint(tmp_path / "two" / "checkpoint.pt")
    name = "end_conv.weight"
    expected = 0.75 * first.state_dict()[name] + 0.25 * two.model[name]
    torch.testing.assert_close(two.ema[name], expected)


def test_resumed_is_uninterrupted(tmp_path):
    whole = run(tmp_path / "whole")
    short = dataclasses.replace(SETTINGS, iterations=5, lr_schedule="constant")
    long = dataclasses.replace(short, iterations=8)
    run(tmp_path / "whole2", settings=long)
    run(tmp_path / "parts", settings=short)
    torch.manual_seed(123)  # whatever happened in between
    resumed = run(tmp_path / "parts", NCSN(CONFIG), settings=long, resume=True)
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole2", "parts"))
    assert same(a.model, b.model) and same(a.ema, b.ema)
    texts = [(tmp_path / name / "losses.csv").read_text() for name in ("whole2", "parts")]
    assert texts[0] == texts[1]
    assert same(resumed.state_dict(), b.ema)
    assert not same(whole.state_dict(), resumed.state_dict())  # another schedule


def test_batches_cover_the_data_each_epoch(tmp_path):
    seen = []
    model = new_model()
    get_loss = model.get_loss

    def watched(x, **arguments):
        seen.append((x, arguments["labels"], arguments["seed"]))
        return get_loss(x, **arguments)

    model.get_loss = watched
    run(tmp_path, model, dataclasses.replace(SETTINGS, iterations=4, batch_size=5))
    for epoch in (seen[:2], seen[2:]):
        pixels = torch.cat([x[:, 0, 0, 0] for x, _, _ in epoch])
        assert torch.equal(pixels.sort().values, IMAGES[:, 0, 0, 0].sort().values)
    assert not torch.equal(seen[0][0], seen[2][0])
    assert len({seed for _, _, seed in seen}) == 4


def test_learning_rate():
    settings = TrainingSettings(iterations=100, lr=1.0, warmup=10, lr_schedule="constant")
    assert [settings.lr_at(s) for s in (0, 4, 9, 99)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    cosine = dataclasses.replace(settings, lr_schedule="cosine", warmup=0)
    assert [cosine.lr_at(s) for s in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])


def test_nothing_is_overwritten_unasked(tmp_path):
    run(tmp_path)
    with pytest.raises(FileExistsError, match="exists: resume that run, overwrite it"):
        run(tmp_path)
    run(tmp_path, overwrite=True)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
        run(tmp_path / "new", resume=True)


def test_a_checkpoint_of_something_else(tmp_path):
    run(tmp_path)
    wider = new_model(dataclasses.replace(CONFIG, nf=5))
    with pytest.raises(CheckpointError, match="another configuration: nf"):
        run(tmp_path, wider, resume=True)
    with pytest.raises(CheckpointError, match="other settings: batch_size"):
        run(tmp_path, settings=dataclasses.replace(SETTINGS, batch_size=2), resume=True)
    with pytest.raises(CheckpointError, match="another data set: fingerprint"):
        run(tmp_path, images=IMAGES.flip(0), resume=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "is truncated"),
        (lambda content: content[:100], "is truncated"),
        (lambda content: b"", "is empty"),
        (lambda content: b"not a checkpoint at all", "is not a checkpoint"),
    ],
)
def test_damaged_checkpoints(tmp_path, damage, message):
    run(tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of ncsn_fast"):
        load_model(path)


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not write"):
        run(tmp_path / "file" / "out")


def test_a_loss_that_is_not_finite(tmp_path):
    model = new_model()
    with torch.no_grad():
        model.end_conv.bias.fill_(float("inf"))
    with pytest.raises(TrainingError, match="the loss of step 1, or its gradient, is"):
        run(tmp_path, model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("iterations", 0), ("batch_size", 1.5), ("lr", -1.0), ("lr", float("nan"))),
        *(("ema_decay", 1.0), ("lr_schedule", "linear"), ("seed", -1), ("warmup", True)),
    ],
)
def test_settings_refuse(field, value):
    with pytest.raises((ValueError, TypeError), match=field):
        TrainingSettings(**{field: value})


def test_images_refuse(tmp_path):
    with pytest.raises(ValueError, match=r"images must be floating point \(N, C, H, W\)"):
        run(tmp_path, images=IMAGES[0])
    with pytest.raises(ValueError, match="channel|shape"):
        run(tmp_path, images=IMAGES.expand(-1, 3, -1, -1))


# --- in a process of its own ----------------------------------------------------------------------

SCRIPT = """
import sys, torch
from ncsn_fast import NCSN, NCSNConfig
from ncsn_fast.training import TrainingError, TrainingSettings, read_losses, train
torch.set_num_threads(1)
torch.manual_seed(0)
config = NCSNConfig(in_channels=1, nf=4, num_classes=3, sigmas=(1.0, 0.3, 0.1))
settings = TrainingSettings(iterations=int(sys.argv[2]), batch_size=4, checkpoint_every=10)
images = torch.rand(10, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
if len(sys.argv) > 3:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
train(NCSN(config), images, settings, sys.argv[1], resume=len(sys.argv) > 3, verbose=False)
"""


def test_ctrl_c_leaves_a_checkpoint(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path, "100000"], stderr=subprocess.PIPE, text=True
    )
    losses = tmp_path / "losses.csv"
    deadline = time.monotonic() + 60
    while not (losses.exists() and losses.read_text().count("\n") > 10):  # it is in the loop
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "TrainingInterrupted: interrupted after step" in stderr
    step = load_checkpoint(tmp_path / "checkpoint.pt").step
    assert f"after step {step}; checkpoint written to {tmp_path}" in stderr
    assert load_model(tmp_path / "model")[0].config == CONFIG


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of file sizes are POSIX's")
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    """A limit on file sizes stands for the full disk: the write fails half-way, as there."""
    first = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path, "10"], capture_output=True)
    assert first.returncode == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    second = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, "40", str(len(before) // 2)],
        capture_output=True,
        text=True,
    )
    assert second.returncode != 0
    assert "could not write the checkpoint" in second.stderr
    assert "the one written before it is kept" in second.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "losses.csv", "model"}
