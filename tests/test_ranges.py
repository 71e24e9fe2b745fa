"""Data in another range than the network's: refused or hinted at, never taken in silence."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad

from ncsn_fast import NCSN, NCSNConfig, ScoreCNN, ScoreMLP
from ncsn_fast.data import load_images
from ncsn_fast.ranges import DataRangeWarning
from ncsn_fast.schedules import estimate_sigma_begin, make_sigmas
from ncsn_fast.training import TrainingSettings, train

SIGMAS = make_sigmas(1.0, 0.1, 2)
SETTINGS = TrainingSettings(iterations=1, batch_size=2)
UNIT = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def ncsn():
    return NCSN(NCSNConfig(in_channels=1, nf=4, num_classes=2, sigmas=SIGMAS))


def cnn():
    return ScoreCNN(nf=8, image_size=8, sigmas=SIGMAS)


NETWORKS = pytest.mark.parametrize("make", [ncsn, cnn])


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, DataRangeWarning)]


@NETWORKS
@pytest.mark.parametrize(
    ("images", "hint"),
    [
        (UNIT, "x * 2 - 1"),
        (UNIT.round(), "x * 2 - 1"),
        (UNIT * 255, "x / 127.5 - 1"),
    ],
    ids=["0..1", "mask", "0..255"],
)
def test_get_loss_hints_once(make, images, hint):
    model = make()
    said = warned(lambda: model.get_loss(images))
    assert len(said) == 1 and hint in said[0] and "[-1, 1]" in said[0]
    assert warned(lambda: model.get_loss(images)) == []


@NETWORKS
def test_data_that_may_be_right_is_taken_in_silence(make):
    for images in (UNIT * 2 - 1, torch.randn(4, 1, 8, 8), (UNIT * 2 - 1) * 1.2):
        model = make()
        assert warned(lambda images=images, model=model: model.get_loss(images)) == []


def test_points_may_have_any_values():
    model = ScoreMLP(sigmas=SIGMAS, hidden=(4,))
    assert warned(lambda: model.get_loss(torch.rand(8, 2))) == []
    assert warned(lambda: model.get_loss(100 * torch.rand(8, 2))) == []


@NETWORKS
def test_train_refuses_what_is_outside(make, tmp_path):
    for images, message in (
        (UNIT * 255, r"must be in \[-1, 1\].*x / 127.5 - 1"),
        (UNIT * 2, r"must be in \[-1, 1\], got 0"),
        ((UNIT * 255).to(torch.uint8), r"uint8.*x.float\(\) / 127.5 - 1"),
        (UNIT.where(UNIT < 0.9, torch.nan), "must be finite"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            train(make(), images, SETTINGS, tmp_path / "run", verbose=False)
    assert not (tmp_path / "run").exists()


@NETWORKS
def test_train_warns_once(make, tmp_path):
    said = warned(lambda: train(make(), UNIT, SETTINGS, tmp_path / "run", verbose=False))
    assert len(said) == 1 and "x * 2 - 1" in said[0]


def test_rounding_is_no_error(tmp_path):
    train(ncsn(), (UNIT * 2 - 1) * 1.00001, SETTINGS, tmp_path / "run", verbose=False)


def test_loaders_hint(tmp_path):
    np.save(tmp_path / "masks.npy", UNIT.round().numpy())
    said = warned(lambda: load_images(tmp_path / "masks.npy", 8, 1))
    assert len(said) == 1 and "x * 2 - 1" in said[0]
    np.save(tmp_path / "bytes.npy", (UNIT * 255).numpy())
    with pytest.raises(ValueError, match="x / 127.5 - 1"):
        load_images(tmp_path / "bytes.npy", 8, 1)
    np.save(tmp_path / "dark.npy", UNIT.round().to(torch.uint8).numpy())
    said = warned(lambda: load_images(tmp_path / "dark.npy", 8, 1))
    assert len(said) == 1 and "more bits" in said[0]


def test_schedules_take_no_integers():
    with pytest.raises(TypeError, match=r"floating point, got torch.uint8; bytes become"):
        estimate_sigma_begin((UNIT * 255).to(torch.uint8))


@pytest.mark.slow
def test_a_compiled_loss_does_not_look():
    model = ncsn()
    compiled = torch.compile(
        lambda x, labels: model.get_loss(x, labels=labels, seed=1)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    labels = torch.tensor([0, 1, 0, 1])
    assert warned(lambda: compiled(UNIT, labels)) == []
    torch.testing.assert_close(
        compiled(UNIT, labels), model.get_loss(UNIT, labels=labels, seed=1)[0]
    )


def test_a_transform_does_not_look():
    model = ncsn()
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    labels = torch.tensor([0, 1, 0, 1])

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model.get_loss(x, labels=labels, seed=1)[0]

    def loss(parameters):
        return functional_call(Loss(), {f"model.{n}": p for n, p in parameters.items()}, (UNIT,))

    assert warned(lambda: grad(loss)(parameters)) == []
