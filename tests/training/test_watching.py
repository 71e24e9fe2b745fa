"""Watching a run: its log, held-out losses, pictures and boards; none changes what is trained."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast import NCSN, NCSNConfig, ScoreMLP
from ncsn_fast.evaluation import losses_by_level
from ncsn_fast.files import CheckpointError
from ncsn_fast.plots import image_grid
from ncsn_fast.progress import progress
from ncsn_fast.training import (
    HeldOut,
    Observer,
    Samples,
    TrainingInterrupted,
    TrainingSettings,
    Watch,
    read_log,
    read_losses,
    train,
)
from ncsn_fast.training.boards import TensorBoard, WeightsAndBiases, boards_of
from ncsn_fast.training.checkpoints import load_checkpoint
from ncsn_fast.training.live import live_line, machine, peak_memory
from ncsn_fast.training.log import RunLog
from ncsn_fast.training.trainer import Trainer
from ncsn_fast.training.watch_settings import WatchSettings, held_out_rows
from ncsn_fast.training.watching import sample_pictures

CONFIG = NCSNConfig(in_channels=1, nf=4, num_classes=3, sigmas=(1.0, 0.3, 0.1))
SETTINGS = TrainingSettings(
    iterations=25, batch_size=4, checkpoint_every=15, warmup=0, lr_schedule="constant"
)
IMAGES = torch.rand(14, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
HELD_OUT, TRAINED = IMAGES[:4], IMAGES[4:]
CPU = torch.device("cpu")


def run(out, iterations=25, settings=SETTINGS, **arguments):
    torch.manual_seed(0)
    settings = dataclasses.replace(settings, iterations=iterations)
    return train(NCSN(CONFIG), TRAINED, settings, out, verbose=False, **arguments)


def watch(held_out_every=10, samples_every=10, n=4, **arguments):
    return Watch(
        HeldOut(HELD_OUT, losses_by_level, held_out_every),
        Samples(image_grid, samples_every, n=n, passes=3),
        **arguments,
    )


def without_chance(records):
    """What does not depend on when and where it was."""
    chance = ("time", "images_per_second", "memory_bytes")
    return [{k: v for k, v in r.items() if k not in chance} for r in records if "machine" not in r]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    out = tmp_path_factory.mktemp("watched") / "run"
    run(out, observers=[watch()])
    return out


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_what_the_log_holds(watched):
    first, *records = read_log(watched / "log.jsonl")
    assert first["step"] == 0 and first["machine"] == machine(CPU)
    assert {"processor", "threads", "torch", "ncsn_fast", "device"} <= set(first["machine"])
    trained = [r for r in records if "loss" in r]
    assert [r["step"] for r in trained] == [10, 20, 25]
    _, losses = read_losses(watched / "losses.csv")
    for begin, record in zip((0, 10, 20), trained, strict=True):
        some = losses[begin : record["step"]]
        assert record["loss"] == pytest.approx(sum(some) / len(some), rel=1e-5)
        assert record["lr"] == 1e-3
        assert record["images_per_second"] > 0
        assert record["memory_bytes"] > 1e7
        assert record["time"].endswith("+00:00")


def test_the_held_out_loss_is_of_the_average_with_fixed_noise(watched):
    found = [r for r in read_log(watched / "log.jsonl") if "held_out" in r]
    assert [r["step"] for r in found] == [10, 20, 25]
    average = load_checkpoint(watched / "checkpoint.pt").ema_model()
    expected = losses_by_level(average, HELD_OUT)
    last = found[-1]["held_out"]
    assert last["loss_by_level"] == pytest.approx(expected, rel=1e-5)
    assert last["loss"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert last["sigmas"] == pytest.approx([1.0, 0.3, 0.1])
    assert found[0]["held_out"]["loss"] != last["loss"]


def test_pictures_are_of_the_average_and_the_same_noise(watched):
    pictures = sample_pictures(watched)
    assert [(step, path.name) for step, path in pictures] == [
        (n, f"step_{n:08d}.png") for n in (10, 20, 25)
    ]
    average = load_checkpoint(watched / "checkpoint.pt").ema_model()
    how = {"sampler": "dpmpp_2m_sde", "passes": 3, "seed": 0, "clip": True, "verbose": False}
    expected = np.asarray(image_grid(average.sample(4, 6, **how)))
    shown = [np.asarray(Image.open(path)) for _, path in pictures]
    assert np.array_equal(shown[-1], expected)
    assert not np.array_equal(shown[0], shown[-1])


def test_pictures_of_a_network_with_another_range(tmp_path):
    """0 is black to it, not grey."""
    drawn = torch.tensor([0.0, 0.5, 1.0]).expand(1, 1, 1, 3)
    model = types.SimpleNamespace(
        data_range=(0.0, 1.0), conditioned_on="sigma", sample=lambda n, size, **how: drawn
    )
    trainer = types.SimpleNamespace(
        average=types.SimpleNamespace(module=model), data={"shape": (1, 1, 1, 3)}
    )
    seen = Samples(lambda images: images, 1).draw(trainer)
    assert seen.flatten().tolist() == [-1.0, 0.0, 1.0]


def test_it_changes_nothing(watched, tmp_path):
    torch.manual_seed(5)
    run(tmp_path)
    generator = torch.get_rng_state()
    plain, seen = (load_checkpoint(out / "checkpoint.pt") for out in (tmp_path, watched))
    assert same(plain.model, seen.model) and same(plain.ema, seen.ema)
    assert torch.equal(plain.torch_rng, seen.torch_rng) and torch.equal(generator, seen.torch_rng)
    assert (tmp_path / "losses.csv").read_text() == (watched / "losses.csv").read_text()
    assert not (tmp_path / "log.jsonl").exists()


class Killed(BaseException):
    """As SIGKILL would: nothing runs after it."""


class KilledAt(Observer):
    def __init__(self, step):
        self.step = step

    def on_step(self, trainer, loss, rate):
        if trainer.step == self.step:
            raise Killed


def test_a_killed_run_that_goes_on_has_the_log_of_one_that_was_not(watched, tmp_path):
    """The log ran ahead of the checkpoint of step 15, by a record that was not whole too."""
    with pytest.raises(Killed):
        run(tmp_path, observers=[watch(), KilledAt(23)])
    assert load_checkpoint(tmp_path / "checkpoint.pt").step == 15
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 20
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 23, "lo')
    (tmp_path / "samples" / "step_00000099.png").write_bytes(b"of a step yet to come")
    (tmp_path / "samples" / "0099.png").write_bytes(b"someone else's")
    run(tmp_path, resume=True, observers=[watch()])
    assert (tmp_path / "samples" / "0099.png").read_bytes() == b"someone else's"
    resumed, whole = (read_log(out / "log.jsonl") for out in (tmp_path, watched))
    assert without_chance(resumed) == without_chance(whole)
    assert [r["step"] for r in resumed if "machine" in r] == [0, 15]
    for (a, one), (b, other) in zip(
        sample_pictures(tmp_path), sample_pictures(watched), strict=True
    ):
        assert a == b and one.read_bytes() == other.read_bytes()


class InterruptedAt(KilledAt):
    """As Ctrl-C."""

    def on_step(self, trainer, loss, rate):
        if trainer.step == self.step:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupted_run_notes_its_last_steps_and_goes_on(watched, tmp_path):
    with pytest.raises(TrainingInterrupted):
        run(tmp_path, observers=[watch(), InterruptedAt(13)])
    last = read_log(tmp_path / "log.jsonl")[-1]
    _, losses = read_losses(tmp_path / "losses.csv")
    assert (last["step"], last["lr"], len(losses)) == (13, 1e-3, 13)
    assert last["loss"] == pytest.approx(sum(losses[10:]) / 3, rel=1e-5)
    run(tmp_path, resume=True, observers=[watch()])
    trained = [r for r in read_log(tmp_path / "log.jsonl") if "loss" in r]
    _, losses = read_losses(tmp_path / "losses.csv")
    assert [r["step"] for r in trained] == [10, 13, 20, 25]
    assert trained[2]["loss"] == pytest.approx(sum(losses[13:20]) / 7, rel=1e-5)
    whole = load_checkpoint(watched / "checkpoint.pt")
    assert same(load_checkpoint(tmp_path / "checkpoint.pt").model, whole.model)


def test_a_run_begun_anew_begins_its_records_anew(tmp_path):
    run(tmp_path, observers=[watch()])
    run(tmp_path, 5, overwrite=True, observers=[watch()])
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [0, 5, 5]
    assert [step for step, _ in sample_pictures(tmp_path)] == [5]


def test_the_time_of_looking_is_not_the_trainings(tmp_path, monkeypatch):
    """A clock that each step moves by a second, and each look and checkpoint by an hour."""
    now = [0.0]
    monkeypatch.setattr("ncsn_fast.training.watching.time.perf_counter", lambda: now[0])

    def later(function, seconds):
        def slow(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return slow

    monkeypatch.setattr(Trainer, "train_step", later(Trainer.train_step, 1))
    monkeypatch.setattr(Trainer, "checkpoint", later(Trainer.checkpoint, 3600))
    slow_measure = later(losses_by_level, 3600)
    run(tmp_path, observers=[Watch(HeldOut(HELD_OUT, slow_measure, 7))])
    trained = [r for r in read_log(tmp_path / "log.jsonl") if "loss" in r]
    assert [r["images_per_second"] for r in trained] == [4.0, 4.0, 4.0]


def test_a_loss_that_is_measured_at_a_checkpoint_is_the_checkpoints(tmp_path):
    seen = []

    class Asked(Watch):
        def on_checkpoint(self, trainer):
            seen.append((trainer.step, super().on_checkpoint(trainer)))

    run(tmp_path, observers=[Asked(HeldOut(HELD_OUT, lambda network, data: [1.0, 2.0, 3.0], 10))])
    assert seen == [(15, None), (25, 2.0)]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    log = RunLog(tmp_path / "log.jsonl", 0)
    log.add(3, loss=math.nan, many=[1.23456789, math.inf], inside={"a": -math.inf, "b": None})
    log.write()
    line = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)
    assert line.pop("time")
    assert line == {
        "step": 3,
        "loss": None,
        "many": [1.23457, None],
        "inside": {"a": None, "b": None},
    }
    assert read_log(tmp_path / "nosuch.jsonl") == []


def test_what_is_no_record_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n[1]\n{"step": "2"}\nnull\n\n{"step": true}\n{"step": 9}\n{"st')
    assert [r["step"] for r in read_log(path)] == [1, 9]
    assert [r["step"] for r in RunLog(path, 5).kept] == [1]
    assert path.read_text() == '{"step": 1}\n'


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log.jsonl").mkdir()
    with pytest.raises(CheckpointError, match="could not write .*log.jsonl"):
        run(tmp_path / "a", observers=[Watch()])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "samples").write_text("")
    with pytest.raises(CheckpointError, match="could not write .*step_00000005.png"):
        run(tmp_path / "b", 5, observers=[watch()])


def test_pictures_take_images(tmp_path):
    model = ScoreMLP(2, hidden=(8,), sigmas=(1.0, 0.1))
    settings = dataclasses.replace(SETTINGS, iterations=1)
    with pytest.raises(ValueError, match=r"samples_every takes images .* got data of shape"):
        train(
            model,
            torch.zeros(4, 2),
            settings,
            tmp_path,
            verbose=False,
            observers=[Watch(None, Samples(image_grid, 1))],
        )


def test_a_network_that_cannot_be_sampled_trains_on(tmp_path, monkeypatch):
    """Its picture is left out, which is told."""

    class Broken(Observer):
        def on_start(self, trainer):
            network = trainer.average.module
            forward = network.forward
            monkeypatch.setattr(network, "forward", lambda *a, **k: forward(*a, **k) * math.nan)

    with pytest.warns(UserWarning, match="no picture of samples after step 5: "):
        run(tmp_path, 5, observers=[Broken(), Watch(None, Samples(image_grid, 5, n=2, passes=2))])
    assert load_checkpoint(tmp_path / "checkpoint.pt").step == 5
    assert sample_pictures(tmp_path) == []


# --- settings -------------------------------------------------------------------------------------


def test_held_out_rows_are_spread_and_of_nothing_but_the_share():
    rows = held_out_rows(100, 0.05)
    assert rows.nonzero().flatten().tolist() == [10, 30, 50, 70, 90]
    assert held_out_rows(10, 0.001).sum() == 1
    assert held_out_rows(10, 0.5).sum() == 5
    for n, share in ((1, 0.5), (3, 0.9)):
        with pytest.raises(ValueError, match="leaves none to train on"):
            held_out_rows(n, share)


def test_watch_settings():
    assert WatchSettings(held_out="0.05").held_out == 0.05
    assert WatchSettings(held_out="0.05").share == 0.05
    other = WatchSettings(held_out="digits:heldout")
    assert (other.held_out, other.share) == ("digits:heldout", None)
    for given, message in (
        ({"held_out": 1.5}, r"held_out must be a share in \(0, 1\), or a path, got 1.5"),
        ({"held_out": True}, "held_out must be a number"),
        ({"held_out": "nan"}, "held_out must be finite"),
        ({"evaluate_every": 5}, "evaluate_every takes held-out data"),
        ({"samples_every": 0}, "samples_every must be an int >= 1"),
        ({"tensorboard": "yes"}, "tensorboard must be a bool"),
        ({"wandb": ""}, "wandb must be the name of a project"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            WatchSettings(**given)


# --- the live line --------------------------------------------------------------------------------


def test_the_live_line():
    with progress(100, shown=True, file=None, mininterval=0) as bar:
        shown = live_line(bar, 1.23456, 1e-3, 64, CPU)
        assert shown["loss"] == "1.235" and shown["lr"] == "1.0e-03"
        assert peak_memory(CPU) is None or shown["memory"].endswith("GB")
    rates = types.SimpleNamespace(format_dict={"rate": 25.0})
    assert live_line(rates, 1.0, 1e-3, 64, CPU)["images/s"] == "1,600"
    rates.format_dict["rate"] = None
    assert "images/s" not in live_line(rates, 1.0, 1e-3, 64, CPU)


def test_a_run_shows_the_live_line(tmp_path, capsys):
    torch.manual_seed(0)
    train(NCSN(CONFIG), TRAINED, dataclasses.replace(SETTINGS, iterations=10), tmp_path)
    said = capsys.readouterr().err
    assert "10/10" in said and "loss=" in said and "lr=1.0e-03" in said and "images/s=" in said


# --- boards ---------------------------------------------------------------------------------------


def test_tensorboard_has_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Killed):
        run(tmp_path, observers=[watch(boards=[TensorBoard()]), KilledAt(23)])
    run(tmp_path, resume=True, observers=[watch(boards=[TensorBoard()])])
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    records = read_log(tmp_path / "log.jsonl")
    for name, of in (
        ("loss", lambda r: r.get("loss")),
        ("lr", lambda r: r.get("lr")),
        ("held_out/mean", lambda r: r.get("held_out", {}).get("loss")),
        ("held_out/sigma_0.1", lambda r: r.get("held_out", {}).get("loss_by_level", [None])[-1]),
    ):
        expected = [(r["step"], of(r)) for r in records if of(r) is not None]
        events = found.Scalars(name)
        assert [e.step for e in events] == [10, 20, 25] == [step for step, _ in expected]
        assert [e.value for e in events] == pytest.approx([v for _, v in expected], rel=1e-5)
    assert [e.step for e in found.Images("samples")] == [10, 20, 25]
    assert found.Tags()["tensors"]


class FakeWandb(types.ModuleType):
    """What of wandb is used, as its documentation has it."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.inits.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1

    def Image(self, picture):
        return picture.size


def test_wandb_is_given_the_same_numbers(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(tmp_path, 10, observers=[watch(boards=[WeightsAndBiases("scores")])])
    run(tmp_path, 20, resume=True, observers=[watch(boards=[WeightsAndBiases("scores")])])
    first, second = fake.inits
    assert first["project"] == "scores" and first["config"]["nf"] == 4
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert fake.finished == 2
    steps = {step for step, values in fake.logged if "loss" in values}
    assert steps == {10, 20}
    assert sum("samples" in values for _, values in fake.logged) == 2
    run(tmp_path, 10, overwrite=True, observers=[Watch(boards=[WeightsAndBiases("scores")])])
    assert fake.inits[-1]["id"] != first["id"]


@pytest.mark.parametrize(
    ("settings", "hidden", "extra"),
    [
        ({"tensorboard": True}, "torch.utils.tensorboard", "tensorboard"),
        ({"wandb": "scores"}, "wandb", "wandb"),
    ],
)
def test_a_missing_package_is_told(monkeypatch, settings, hidden, extra):
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(ImportError, match=rf'pip install "ncsn_fast\[{extra}\]"'):
        boards_of(WatchSettings(**settings))
    assert boards_of(WatchSettings()) == []
