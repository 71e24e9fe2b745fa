"""Training: it learns, resumes exactly, and loses nothing to Ctrl-C, a full disk or a damaged file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ncsn_fast import NCSN, NCSNConfig, ScoreMLP
from ncsn_fast.files import CheckpointError
from ncsn_fast.training import TrainingError, TrainingSettings, guards, read_losses, train
from ncsn_fast.training.checkpoints import load_checkpoint, load_model, save_checkpoint
from ncsn_fast.training.log import LossLog

CONFIG = NCSNConfig(in_channels=1, nf=4, num_classes=3, sigmas=(1.0, 0.3, 0.1))
SETTINGS = TrainingSettings(iterations=8, batch_size=4, checkpoint_every=3, warmup=0)
IMAGES = torch.rand(10, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1


def new_model(config=CONFIG):
    torch.manual_seed(0)
    return NCSN(config)


def run(out, model=None, settings=SETTINGS, images=IMAGES, **arguments):
    return train(model or new_model(), images, settings, out, verbose=False, **arguments)


def load(out):
    return load_checkpoint(out / "checkpoint.pt")


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


@pytest.mark.parametrize(("warmup", "decay"), [(False, 0.75), (True, 2 / 11)])
def test_the_average_is_the_average(tmp_path, warmup, decay):
    settings = dataclasses.replace(SETTINGS, ema_decay=0.75, lr_schedule="constant")
    one, two = (dataclasses.replace(settings, iterations=n, ema_warmup=warmup) for n in (1, 2))
    first = run(tmp_path / "one", settings=one)
    run(tmp_path / "two", settings=two)
    two = load_checkpoint(tmp_path / "two" / "checkpoint.pt")
    name = "end_conv.weight"
    assert torch.equal(first.state_dict()[name], load(tmp_path / "one").model[name])
    expected = decay * first.state_dict()[name] + (1 - decay) * two.model[name]
    torch.testing.assert_close(two.ema[name], expected)


def test_the_average_of_a_short_run_is_trained(tmp_path):
    """With the decay of a long run, 0.999, throughout, it would be nine tenths of the untrained weights."""
    images = IMAGES[:1].expand(8, -1, -1, -1)
    settings = TrainingSettings(iterations=100, batch_size=8, lr=3e-3, warmup=0)
    average = run(tmp_path, settings=settings, images=images)
    last = load(tmp_path).last_model()
    losses = [
        m.get_loss(images.repeat(8, 1, 1, 1), seed=1)[0] for m in (new_model(), last, average)
    ]
    assert losses[1] < 0.7 * losses[0]
    assert losses[2] < 1.1 * losses[1]


def test_last_weights(tmp_path):
    run(tmp_path)
    checkpoint = load(tmp_path)
    for path in (tmp_path, tmp_path / "checkpoint.pt"):
        last, size = load_model(path, weights="last")
        assert same(last.state_dict(), checkpoint.model) and size == (6, 6) and not last.training
        assert same(load_model(path, weights="ema")[0].state_dict(), checkpoint.ema)
    with pytest.raises(ValueError, match="holds one set of weights"):
        load_model(tmp_path / "model", weights="last")
    with pytest.raises(ValueError, match=r"weights must be one of \('ema', 'last'\), got 'best'"):
        load_model(tmp_path, weights="best")


def test_a_run_older_than_the_warm_up_goes_on_without_it(tmp_path):
    """To the same bits, whose checkpoint does not know the setting."""
    old = dataclasses.replace(SETTINGS, lr_schedule="constant", ema_warmup=False)
    run(tmp_path / "whole", settings=old)
    run(tmp_path / "parts", settings=dataclasses.replace(old, iterations=5))
    checkpoint = load(tmp_path / "parts")
    del checkpoint.settings["ema_warmup"]
    save_checkpoint(checkpoint, tmp_path / "parts" / "checkpoint.pt")
    unsaid = dataclasses.replace(old, ema_warmup=None)
    with pytest.raises(CheckpointError, match="ema_warmup is False there and True here"):
        run(tmp_path / "parts", settings=dataclasses.replace(old, ema_warmup=True), resume=True)
    run(tmp_path / "parts", settings=unsaid, resume=True)
    a, b = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert same(a.model, b.model) and same(a.ema, b.ema)
    assert b.settings["ema_warmup"] is False
    new = dataclasses.replace(unsaid, iterations=1)
    run(tmp_path / "new", settings=new)
    assert load(tmp_path / "new").settings["ema_warmup"] is True


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


def test_a_training_that_has_diverged(tmp_path):
    """Its loss is finite, but nothing like a loss any more."""
    run(tmp_path, settings=dataclasses.replace(SETTINGS, iterations=3, lr_schedule="constant"))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    wild = TrainingSettings(iterations=40, lr=1e3, warmup=0, grad_clip=0, checkpoint_every=40)
    with pytest.raises(TrainingError, match="the training has diverged: after step 40 the smooth"):
        run(tmp_path / "wild", settings=wild)
    assert not (tmp_path / "wild" / "checkpoint.pt").exists()
    assert not (tmp_path / "wild" / "model").exists()
    # One that had gone well keeps the checkpoint from before.
    log = LossLog(tmp_path / "losses.csv", 3, of_nothing=36.0)
    for _ in range(20):
        log.add(torch.tensor(1e9), 1e-3)
    with pytest.raises(TrainingError, match="no checkpoint was written of this state"):
        log.check()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("weighting", ["sigma2", "one", "learned"])
def test_no_false_alarm(tmp_path, weighting):
    """A small batch, a wide ladder and a weighting that differs by its square; a network far from zero at first."""
    config = dataclasses.replace(CONFIG, sigmas=(50.0, 1.0, 0.01))
    model = new_model(config)
    with torch.no_grad():
        model.end_conv.bias.fill_(30.0)
    settings = TrainingSettings(
        iterations=30, batch_size=1, weighting=weighting, checkpoint_every=1
    )
    run(tmp_path, model, settings)
    assert load(tmp_path).step == 30


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_images_that_are_not_finite(tmp_path, broken):
    images = IMAGES.clone()
    images[3, 0, 2, 4] = broken
    with pytest.raises(ValueError, match="finite"):
        run(tmp_path, images=images)
    with pytest.raises(ValueError, match="finite"):
        run(tmp_path, ScoreMLP(2, sigmas=(1.0, 0.1)), images=images[:, 0, 2, 3:5])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("default", ["float64", "bfloat16", "meta"])
def test_torchs_defaults_change_nothing(tmp_path, default):
    settings = {
        NCSN: SETTINGS,
        ScoreMLP: dataclasses.replace(SETTINGS, levels="continuous", weighting="learned"),
    }
    for kind, data in ((NCSN, IMAGES), (ScoreMLP, IMAGES.flatten(1))):
        results = []
        for name in ("plain", default):
            torch.manual_seed(0)
            model = (
                NCSN(CONFIG) if kind is NCSN else ScoreMLP(36, hidden=(8,), sigmas=(1.0, 0.3, 0.1))
            )
            out = tmp_path / f"{kind.__name__}-{name}"
            with torch_default(name):
                run(out, model, settings[kind], data)
            results.append(load(out))
        assert same(results[0].model, results[1].model)
        assert same(results[0].ema, results[1].ema)
        assert same(results[0].weighting, results[1].weighting)


@contextlib.contextmanager
def torch_default(name):
    before = torch.get_default_dtype()
    try:
        with torch.device(name if name == "meta" else "cpu"):
            torch.set_default_dtype(getattr(torch, name, before))
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.skipif(guards.fcntl is None, reason="no locks of this kind")
def test_two_runs_in_one_folder(tmp_path):
    with (
        guards.sole_run(tmp_path),
        pytest.raises(TrainingError, match="another run is training"),
    ):
        run(tmp_path)
    run(tmp_path)  # the lock is gone, and left nothing
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "losses.csv", "model"}


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
