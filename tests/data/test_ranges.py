"""Data in another range than a network expects: told once, or refused, and never where a look is not possible."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast import NCSN, NCSNConfig, ScoreCNN, ScoreMLP
from ncsn_fast.data import load_images
from ncsn_fast.data.ranges import DataRangeWarning, check_range
from ncsn_fast.schedules import estimate_sigma_begin, make_sigmas
from ncsn_fast.training import TrainingSettings, train

SIGMAS = make_sigmas(1.0, 0.1, 3)


def ncsn():
    return NCSN(NCSNConfig(in_channels=1, nf=8, num_classes=3, sigmas=SIGMAS.tolist()))


def cnn():
    model = ScoreCNN(1, nf=8)
    model.set_sigmas(SIGMAS)
    return model


def mlp():
    model = ScoreMLP(2, [8])
    model.set_sigmas(SIGMAS)
    return model


NETWORKS = pytest.mark.parametrize("make", [ncsn, cnn])


@pytest.fixture(autouse=True)
def every_warning():
    """The same warning from the same line is otherwise shown once in a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


def hints(record):
    return [str(w.message) for w in record if issubclass(w.category, DataRangeWarning)]


def hints_of(function, *args, **options):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        function(*args, **options)
    return hints(record)


# --- get_loss -------------------------------------------------------------------------------------


@NETWORKS
@pytest.mark.parametrize(
    ("x", "hint"),
    [
        (torch.rand(4, 1, 8, 8), r"x * 2 - 1"),
        (torch.rand(4, 1, 8, 8).round(), r"x * 2 - 1"),
        (torch.rand(4, 1, 8, 8) * 255, r"x / 127.5 - 1"),
    ],
    ids=["0..1", "mask", "0..255"],
)
def test_get_loss_hints_once(make, x, hint):
    model = make()
    (said,) = hints_of(model.get_loss, x)
    assert "expects data in [-1, 1]" in said and hint in said
    assert hints_of(model.get_loss, x) == []
    assert len(hints_of(make().get_loss, x)) == 1  # of each network


@NETWORKS
def test_the_hint_names_the_line_of_the_caller(make, tmp_path):
    x = torch.rand(4, 1, 8, 8)
    np.save(tmp_path / "a.npy", x.numpy())
    settings = TrainingSettings(iterations=1, batch_size=2)
    for call in (
        lambda: make().get_loss(x),
        lambda: train(make(), x, settings, tmp_path / "run", verbose=False),
        lambda: load_images(tmp_path / "a.npy", 8, 1),
    ):
        with pytest.warns(DataRangeWarning) as record:
            call()
        assert record[0].filename == __file__


@NETWORKS
def test_data_in_the_range_and_noise_are_silent(make):
    """Also the first batch of a network that is only tried, with standard normal numbers."""
    assert hints_of(make().get_loss, torch.rand(4, 1, 8, 8) * 2 - 1) == []
    assert hints_of(make().get_loss, torch.randn(16, 1, 8, 8)) == []
    assert hints_of(make().get_loss, (torch.rand(4, 1, 8, 8) * 2 - 1) * 1.2) == []


def test_the_look_follows_the_range_of_the_class():
    class Unit(ScoreCNN):
        data_range = (0.0, 1.0)

    def unit():
        model = Unit(1, nf=8)
        model.set_sigmas(SIGMAS)
        return model

    assert hints_of(unit().get_loss, torch.rand(4, 1, 8, 8)) == []
    (said,) = hints_of(unit().get_loss, torch.rand(4, 1, 8, 8) * 2 - 1)
    assert "in [0, 1]" in said and "x / 2 + 0.5" in said
    (said,) = hints_of(unit().get_loss, torch.rand(4, 1, 8, 8) * 255)
    assert "x / 255" in said
    assert hints_of(mlp().get_loss, torch.rand(8, 2) * 1000) == []  # points: any values


@NETWORKS
def test_bytes_are_refused_with_what_to_do(make):
    with pytest.raises(TypeError, match=r"got torch.uint8; .*x.float\(\) / 127.5 - 1"):
        make().get_loss(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


# --- where a look is not possible -----------------------------------------------------------------


@NETWORKS
def test_torch_func_is_not_disturbed(make):
    model = make()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model.get_loss(x, labels=torch.zeros(2, dtype=torch.int64), seed=1)[0]

    loss, x = Loss(), torch.rand(2, 1, 8, 8)
    named = {f"model.{name}": p for name, p in parameters.items()}

    def compute(named):
        return torch.func.functional_call(loss, named, (x,))

    def batch(x):
        return model.get_loss(x, labels=torch.zeros(2, dtype=torch.int64), seed=1)[0]

    assert hints_of(torch.func.grad(compute), named) == []
    assert hints_of(torch.func.grad(batch), x) == []
    assert len(hints_of(batch, x)) == 1  # the look was not spent on what could not be seen


def test_one_graph_without_a_look():
    model = cnn()
    compiled = torch.compile(
        lambda x: model.get_loss(x, sigma=torch.full((2,), 0.5), seed=1)[0],
        fullgraph=True,
        backend="eager",
    )
    assert hints_of(compiled, torch.rand(2, 1, 8, 8)) == []


@pytest.mark.slow
def test_a_compiled_loss_of_the_ncsn_does_not_look():
    model, labels, x = ncsn(), torch.tensor([0, 1]), torch.rand(2, 1, 8, 8)

    def loss(x, labels):
        return model.get_loss(x, labels=labels, seed=1)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert hints_of(compiled, x, labels) == []
    torch.testing.assert_close(compiled(x, labels), loss(x, labels))


def test_tensors_without_values():
    from torch._subclasses import FakeTensorMode

    from ncsn_fast.data.ranges import hint_range

    model = ncsn()
    assert hints_of(hint_range, model, torch.rand(2, 1, 8, 8, device="meta")) == []
    with FakeTensorMode():
        assert hints_of(hint_range, model, torch.rand(2, 1, 8, 8)) == []
    assert len(hints_of(hint_range, model, torch.rand(2, 1, 8, 8))) == 1


@pytest.mark.cuda
def test_a_capture_is_not_broken():
    from ncsn_fast.data.ranges import hint_range

    model = ncsn().cuda()
    x = torch.rand(2, 1, 8, 8, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        hint_range(model, x)
        x * 2
    assert len(hints_of(hint_range, model, x)) == 1


# --- whole data sets ------------------------------------------------------------------------------


def run(model, images, folder):
    settings = TrainingSettings(iterations=1, batch_size=2, checkpoint_every=10)
    return train(model, images, settings, folder, verbose=False)


@NETWORKS
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(4, 1, 8, 8) * 255, r"must be in \[-1, 1\], got .*x / 127.5 - 1"),
        (torch.rand(4, 1, 8, 8) * 2 - 0.5, r"must be in \[-1, 1\], got"),
        (torch.full((4, 1, 8, 8), torch.nan), "must be finite"),
        (torch.full((4, 1, 8, 8), torch.inf), "must be finite"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), r"torch.uint8 .*x.float\(\) / 127.5 - 1"),
        (torch.zeros(4, 1, 0, 8), "images must be"),
    ],
    ids=["bytes", "outside", "nan", "inf", "uint8", "empty"],
)
def test_train_refuses(make, images, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(make(), images, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_points_may_have_any_finite_values(tmp_path):
    assert hints_of(run, mlp(), torch.rand(8, 2) * 1000, tmp_path / "run") == []
    with pytest.raises(ValueError, match="must be finite"):
        run(mlp(), torch.tensor([[0.0, torch.nan]]), tmp_path / "other")


@NETWORKS
def test_train_hints_once(make, tmp_path):
    said = hints_of(run, make(), torch.rand(4, 1, 8, 8), tmp_path / "run")
    assert len(said) == 1 and "x * 2 - 1" in said[0]
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    images[1:] = images[1:].abs()  # a batch of these alone would look odd
    assert hints_of(run, make(), images, tmp_path / "other") == []


def test_rounding_is_not_refused():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        images = torch.linspace(-1, 1, 9, dtype=dtype)
        images[-1] += torch.finfo(dtype).eps
        check_range(images, (-1.0, 1.0))
    with pytest.raises(ValueError, match=r"in \[-1, 1\], got -1 to 1.01$"):
        check_range(torch.tensor([-1, 1.01]), (-1.0, 1.0))


# --- loaders --------------------------------------------------------------------------------------


def test_arrays_from_zero_to_one_get_a_hint(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((3, 4, 4)))
    (said,) = hints_of(load_images, tmp_path / "a.npy", 4, 1)
    assert "x * 2 - 1" in said


@pytest.mark.parametrize("kind", ["png", "npy"])
def test_masks_as_bytes_get_a_hint(tmp_path, kind):
    mask = np.array([[0, 1], [1, 0]], np.uint8)
    if kind == "png":
        Image.fromarray(mask).save(tmp_path / "a.png")
    else:
        np.save(tmp_path / "a.npy", mask[None])
    (said,) = hints_of(load_images, tmp_path / f"a.{kind}", 2, 1)
    assert "more bits than they have" in said


def test_bright_images_get_none(tmp_path):
    """Values of a known scale are not taken for others, however bright."""
    bright = np.random.default_rng(0).integers(128, 256, (4, 4), np.uint8)
    Image.fromarray(bright).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", bright[None])
    assert hints_of(load_images, tmp_path / "a.png", 4, 1) == []
    assert hints_of(load_images, tmp_path / "a.npy", 4, 1) == []


def test_the_largest_distance_takes_no_bytes():
    with pytest.raises(TypeError, match=r"torch.uint8; .*x.float\(\) / 127.5 - 1"):
        estimate_sigma_begin(torch.zeros(3, 4, dtype=torch.uint8))
