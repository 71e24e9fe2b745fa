"""The trainer's parts: the objective, the order of the data, what is known of them again, and replacing one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ncsn_fast import NCSN, NCSNConfig, ScoreMLP
from ncsn_fast.data import ImageDataset, as_dataset
from ncsn_fast.files import CheckpointError
from ncsn_fast.losses import LearnedWeighting
from ncsn_fast.training import Observer, TrainingSettings, train
from ncsn_fast.training.checkpoints import load_checkpoint
from ncsn_fast.training.objective import Objective
from ncsn_fast.training.order import Batches
from ncsn_fast.training.trainer import Trainer

CONFIG = NCSNConfig(in_channels=1, nf=4, num_classes=3, sigmas=(1.0, 0.3, 0.1))
SETTINGS = TrainingSettings(iterations=4, batch_size=4, checkpoint_every=3, warmup=0)
IMAGES = torch.rand(10, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
POINTS = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))


def new_model():
    torch.manual_seed(0)
    return NCSN(CONFIG)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize("weighting", ["sigma2", "one", "learned"])
def test_the_objective_is_the_networks_loss_and_holds_what_is_learned(weighting):
    model, labels = new_model(), torch.tensor([0, 2, 1])
    objective = Objective(model, weighting)
    loss = objective(IMAGES[:3], labels=labels, seed=5)
    expected, _ = model.get_loss(
        IMAGES[:3], labels=labels, seed=5, weighting=objective.learned or weighting
    )
    assert torch.equal(loss, expected)
    loss.backward()
    learned = objective.learned
    assert isinstance(learned, LearnedWeighting) == (weighting == "learned")
    own = set() if learned is None else set(learned.parameters())
    assert set(objective.parameters()) == {*model.parameters(), *own}
    assert all(p.grad is not None for p in (*own, model.end_conv.weight))


def test_the_objective_takes_sigmas():
    model = ScoreMLP(2, hidden=(8,), sigmas=(1.0, 0.1))
    torch.nn.init.normal_(model.last.weight)
    sigma = torch.tensor([0.2, 0.7])
    loss = Objective(model)(POINTS[:2], sigma=sigma, seed=3)
    assert torch.equal(loss, model.get_loss(POINTS[:2], sigma=sigma, seed=3)[0])


def test_the_objective_is_what_data_parallelism_wraps():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        objective = Objective(new_model())
        parallel = torch.nn.parallel.DistributedDataParallel(objective)
        loss = parallel(IMAGES[:3], labels=torch.tensor([0, 2, 1]), seed=5)
        loss.backward()
        alone = Objective(new_model())
        alone(IMAGES[:3], labels=torch.tensor([0, 2, 1]), seed=5).backward()
        for ours, theirs in zip(objective.parameters(), alone.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_only_a_batch_is_moved_to_the_device():
    batches = Batches(IMAGES, SETTINGS, torch.empty(3, device="meta"))
    batch = batches.at(0)
    assert batch.x.device.type == batch.levels["labels"].device.type == "meta"
    assert batch.x.shape == (4, 1, 6, 6)
    assert batches.data.device.type == "cpu"


def test_data_in_a_memory_mapped_file_train_as_data_in_memory(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c"))
    for name, data in (("memory", IMAGES), ("file", mapped)):
        train(new_model(), data, SETTINGS, tmp_path / name, verbose=False)
    memory, file = (load_checkpoint(tmp_path / n / "checkpoint.pt") for n in ("memory", "file"))
    assert same(memory.model, file.model) and memory.data == file.data


def test_data_are_known_again():
    """By one fingerprint, that of the data set, however they are held."""
    here = as_dataset(POINTS).describe()
    assert here == as_dataset(POINTS.clone()).describe()
    for row in (0, 17, len(POINTS) - 1):
        other = POINTS.clone()
        other[row] += 1e-3
        assert as_dataset(other).describe() != here
    assert as_dataset(POINTS.flip(0)).describe() != here
    assert as_dataset(POINTS[:-1]).describe() != here


BYTES = torch.randint(0, 256, IMAGES.shape, generator=torch.Generator().manual_seed(1))


def test_bytes_train_as_the_values_that_they_are(tmp_path):
    values = BYTES.to(torch.uint8)
    data = ImageDataset(values)
    for name, given in (("bytes", data), ("tensor", data[:]), ("part", data.part(slice(None)))):
        train(new_model(), given, SETTINGS, tmp_path / name, verbose=False)
    runs = [load_checkpoint(tmp_path / n / "checkpoint.pt") for n in ("bytes", "tensor", "part")]
    assert all(same(runs[0].model, run.model) and runs[0].data == run.data for run in runs)


def test_augmented_batches_are_those_of_the_step_and_are_kept_as_such(tmp_path):
    data = ImageDataset(BYTES.to(torch.uint8), flips=True, dequantise=True)
    batches = Batches(data, SETTINGS, new_model().sigmas)
    again = Batches(data, SETTINGS, new_model().sigmas)
    assert torch.equal(batches.at(3).x, again.at(3).x)
    plain = Batches(data[:], SETTINGS, new_model().sigmas).at(3).x
    moved = (batches.at(3).x - plain).abs().amax((1, 2, 3))
    # Mirrored ones are far from what they were, the others by the noise of a byte at most.
    assert (moved > 0).all() and 0 < int((moved < 3 / 256).sum()) < 4
    train(new_model(), data, SETTINGS, tmp_path, verbose=False)
    kept = load_checkpoint(tmp_path / "checkpoint.pt").data
    assert (kept["flips"], kept["dequantise"]) == (True, True)
    longer = dataclasses.replace(SETTINGS, iterations=5)
    with pytest.raises(CheckpointError, match="another data set: flips is True there and False he"):
        train(new_model(), data[:], longer, tmp_path, resume=True, verbose=False)
    train(new_model(), data, longer, tmp_path, resume=True, verbose=False)


def test_a_data_set_that_is_not_finite_or_of_another_range(tmp_path):
    values = torch.zeros(3000, 1, 6, 6)
    values[2500, 0, 1, 2] = float("nan")
    with pytest.raises(
        ValueError, match=r"in 1 of 3000 samples: the first is nan at images\[2500, 0, 1, 2\]"
    ):
        train(new_model(), ImageDataset(values), SETTINGS, tmp_path, verbose=False)
    with pytest.raises(ValueError, match=r"images must be in \[-1, 1\], got .* to 3"):
        bright = ImageDataset(BYTES.to(torch.uint8), data_range=(0.0, 3.0))
        train(new_model(), bright, SETTINGS, tmp_path, verbose=False)
    assert not list(tmp_path.iterdir())


def test_a_part_can_be_replaced(tmp_path):
    class Doubled(Objective):
        def forward(self, x, **arguments):
            return 2 * super().forward(x, **arguments)

    trainer = Trainer(new_model(), IMAGES, SETTINGS, tmp_path)
    trainer.optimizer = torch.optim.SGD(trainer.parameters, lr=0.0)
    trainer.objective = Doubled(trainer.model)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    plain = Objective(trainer.model)(
        trainer.batches.at(0).x, **trainer.batches.at(0).levels, seed=0
    )
    trainer.settings = dataclasses.replace(SETTINGS, iterations=1)
    loss, rate = trainer.train_step()
    assert rate > 0 and loss > 1.9 * plain
    assert not same(before, trainer.model.state_dict())
    network = trainer.run(verbose=False)
    assert same(network.state_dict(), trainer.average.module.state_dict())


def test_observers_are_called_and_change_nothing(tmp_path):
    class Watching(Observer):
        def __init__(self):
            self.calls = []

        def on_start(self, trainer):
            self.calls.append(("start", trainer.step))

        def on_step(self, trainer, loss, rate):
            assert loss.ndim == 0 and rate > 0
            self.calls.append(("step", trainer.step))

        def on_checkpoint(self, trainer):
            path = trainer.out / "checkpoint.pt"
            before = load_checkpoint(path).step if path.exists() else 0
            self.calls.append(("checkpoint", trainer.step, before))
            return 1.0

        def on_end(self, trainer):
            written = load_checkpoint(trainer.out / "checkpoint.pt").step
            self.calls.append(("end", written, (trainer.out / "model").is_dir()))

    watching, more = Watching(), dataclasses.replace(SETTINGS, iterations=5, lr_schedule="constant")
    less = dataclasses.replace(more, iterations=4)
    train(new_model(), IMAGES, more, tmp_path / "plain", verbose=False)
    how = {"verbose": False, "observers": [Observer(), watching]}
    train(new_model(), IMAGES, less, tmp_path / "run", **how)
    assert watching.calls == [
        ("start", 0),
        *(("step", n) for n in (1, 2, 3)),
        ("checkpoint", 3, 0),
        ("step", 4),
        ("checkpoint", 4, 3),
        ("end", 4, True),
    ]
    watching.calls.clear()
    train(new_model(), IMAGES, more, tmp_path / "run", resume=True, **how)
    assert watching.calls == [("start", 4), ("step", 5), ("checkpoint", 5, 4), ("end", 5, True)]
    plain, watched = (load_checkpoint(tmp_path / n / "checkpoint.pt") for n in ("plain", "run"))
    assert same(plain.model, watched.model) and same(plain.ema, watched.ema)
