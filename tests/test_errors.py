"""Every row of the model's error table: the type of the error, and what its message says."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from ncsn_fast import NCSN, NCSNConfig

K = 3
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def model() -> NCSN:
    return NCSN(in_channels=2, nf=2, num_classes=K, sigmas=(1.0, 0.5, 0.1))


@pytest.fixture
def unset() -> NCSN:
    return NCSN(in_channels=2, nf=2, num_classes=K)


def check(error, message, function, *args, **kwargs):
    with pytest.raises(error, match=message) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is error
    return str(caught.value)


# --- make_sigmas, set_sigmas ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0.0, 0.01, 5), "sigma_begin must be positive and finite, got 0"),
        ((-1.0, 0.01, 5), "sigma_begin must be positive and finite, got -1"),
        ((NAN, 0.01, 5), "sigma_begin must be positive and finite, got nan"),
        ((INF, 0.01, 5), "sigma_begin must be positive and finite, got inf"),
        ((1.0, 0.0, 5), "sigma_end must be positive and finite, got 0"),
        ((1.0, -2.0, 5), "sigma_end must be positive and finite, got -2"),
        ((0.01, 1.0, 5), "sigma_begin must be greater than sigma_end"),
        ((1.0, 1.0, 5), "sigma_begin must be greater than sigma_end"),
        ((1.0, 0.1, 1), "num_scales must be at least 2, got 1"),
        ((1.0, 0.1, 0), "num_scales must be an int >= 1, got 0"),
    ],
)
def test_make_sigmas(args, message):
    check(ValueError, message, NCSN.make_sigmas, *args)


@pytest.mark.parametrize("args", [("1", 0.1, 5), (1.0, None, 5), (1.0, 0.1, 2.5), (1.0, 0.1, True)])
def test_make_sigmas_types(args):
    check(TypeError, "must be a", NCSN.make_sigmas, *args)


BAD_SIGMAS = [
    ([[1.0, 0.5, 0.1]], ValueError, r"one-dimensional, got shape \(1, 3\)"),
    (1.0, ValueError, r"one-dimensional, got shape \(\)"),
    ([1.0, 0.5], ValueError, "each of the 3 noise levels, got 2"),
    ([1.0, 0.5, 0.1, 0.05], ValueError, "each of the 3 noise levels, got 4"),
    ([], ValueError, "each of the 3 noise levels, got 0"),
    ([1.0, 0.5, 0.0], ValueError, r"positive and finite.*sigmas\[2\] = 0"),
    ([1.0, 0.5, -0.1], ValueError, r"positive and finite.*sigmas\[2\] = -0.1"),
    ([INF, 0.5, 0.1], ValueError, r"positive and finite.*sigmas\[0\] = inf"),
    ([1.0, NAN, 0.1], ValueError, r"positive and finite.*sigmas\[1\] = nan"),
    ([1.0, 1.0, 0.1], ValueError, r"strictly descending.*sigmas\[0\] = 1, then sigmas\[1\] = 1"),
    ([0.1, 0.5, 1.0], ValueError, "strictly descending"),
    (["a", "b", "c"], TypeError, "numbers"),
    (None, TypeError, "numbers"),
    ([True, True, False], TypeError, "real numbers"),
    (torch.ones(3, dtype=torch.complex64), TypeError, "real numbers"),
]


@pytest.mark.parametrize(("sigmas", "error", "message"), BAD_SIGMAS)
def test_set_sigmas(unset, sigmas, error, message):
    check(error, message, unset.set_sigmas, sigmas)
    assert not unset.sigmas.any()  # nothing was taken over


@pytest.mark.parametrize(
    ("sigmas", "error", "message"), [row for row in BAD_SIGMAS if row[0] is not None]
)
def test_config_sigmas(sigmas, error, message):
    check(error, message, NCSNConfig, num_classes=K, sigmas=sigmas)


# --- the configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["in_channels", "nf", "num_classes"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-3, ValueError),
        (True, TypeError),
        (np.True_, TypeError),
        (3.0, TypeError),
        ("3", TypeError),
        (None, TypeError),
    ],
)
def test_config_counts(field, value, error):
    message = check(error, f"{field} must be an int >= 1", NCSNConfig, **{field: value})
    assert str(value) in message
    check(error, f"{field} must be an int >= 1", NCSN, **{field: value})


@pytest.mark.parametrize(
    "dilations",
    [
        (1, 2, 4),
        (1, 2, 4, 8, 16),
        (),
        (1, 2, 4, 0),
        (1, 2, 4, -8),
        (1, 2, 4, 8.0),
        (1, 2, 4, True),
        "1248",
        5,
        None,
    ],
)
def test_config_dilations(dilations):
    message = check(
        ValueError, "dilations must be exactly 4 positive ints", NCSNConfig, dilations=dilations
    )
    assert repr(dilations) in message


@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_config_scale_by_sigma(value):
    check(TypeError, "scale_by_sigma must be a bool, got", NCSNConfig, scale_by_sigma=value)


@pytest.mark.parametrize("value", ["reflect", "", None, 0])
def test_config_pool_padding(value):
    check(ValueError, "pool_padding must be one of", NCSNConfig, pool_padding=value)


# --- before the sigmas are set --------------------------------------------------------------------


@pytest.mark.parametrize("scale_by_sigma", [True, False])
def test_unset_sigmas(scale_by_sigma):
    model = NCSN(in_channels=1, nf=2, num_classes=K, scale_by_sigma=scale_by_sigma)
    x, labels = torch.randn(1, 1, 4, 4), torch.tensor([0])
    check(RuntimeError, "set_sigmas", model, x, labels)
    check(RuntimeError, "set_sigmas", model.get_loss, x)
    check(RuntimeError, "set_sigmas", model.sample, 1, 4)
    model.set_sigmas([1.0, 0.5, 0.1])
    assert model(x, labels).isfinite().all()


# --- forward and get_loss -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(2, 4, 4), ValueError, r"\(N, 2, H, W\).*got \(2, 4, 4\)"),
        (torch.randn(1, 2, 4, 4, 4), ValueError, r"\(N, 2, H, W\).*got \(1, 2, 4, 4, 4\)"),
        (torch.randn(1, 3, 4, 4), ValueError, r"\(N, 2, H, W\).*got \(1, 3, 4, 4\)"),
        (torch.randn(1, 2, 0, 4), ValueError, r"at least 1, got \(1, 2, 0, 4\)"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.uint8), TypeError, "floating point, got torch.uint8"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (torch.zeros(1, 2, 4, 4).double(), TypeError, "torch.float32, got torch.float64"),
        (torch.zeros(1, 2, 4, 4).bfloat16(), TypeError, "torch.float32, got torch.bfloat16"),
        (np.zeros((1, 2, 4, 4)), TypeError, "must be a tensor, got ndarray"),
    ],
)
def test_images(model, x, error, message):
    check(error, message, model, x, torch.tensor([0]))
    check(error, message, model.get_loss, x)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 1, 2]), ValueError, r"\(2,\) or \(1,\), got \(3,\)"),
        (torch.tensor([[0, 1]]), ValueError, r"\(2,\) or \(1,\), got \(1, 2\)"),
        (torch.tensor(0), ValueError, r"\(2,\) or \(1,\), got \(\)"),
        (torch.tensor([0.0, 1.0]), TypeError, "integers, got torch.float32"),
        (torch.tensor([True, False]), TypeError, "integers, got torch.bool"),
        ([0, 1], TypeError, "tensor, got list"),
        (torch.tensor([0, K]), IndexError, r"in 0\.\.2, got 0\.\.3"),
        (torch.tensor([-1, 1]), IndexError, r"in 0\.\.2, got -1\.\.1"),
        (torch.tensor([K]), IndexError, r"in 0\.\.2, got 3\.\.3"),
    ],
)
def test_labels(model, labels, error, message):
    x = torch.randn(2, 2, 4, 4)
    check(error, message, model, x, labels)
    check(error, message, model.get_loss, x, labels=labels)


# --- sample ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_samples": 0}, ValueError, "n_samples must be an int >= 1, got 0"),
        ({"n_samples": -1}, ValueError, "n_samples must be an int >= 1, got -1"),
        ({"n_samples": 2.0}, TypeError, "n_samples must be an int >= 1"),
        ({"image_size": 0}, ValueError, "image_size must be an int >= 1, got 0"),
        ({"image_size": (4, 0)}, ValueError, "image_size must be an int >= 1, got 0"),
        ({"image_size": (4, 4, 4)}, ValueError, r"\(height, width\), got \(4, 4, 4\)"),
        ({"image_size": 4.0}, TypeError, "image_size must be an int >= 1"),
        ({"in_channels": 3}, ValueError, "in_channels must be the model's, 2, got 3"),
        ({"n_steps_each": 0}, ValueError, "n_steps_each must be an int >= 1, got 0"),
        ({"n_steps_each": 1.5}, TypeError, "n_steps_each must be an int >= 1"),
        ({"step_lr": 0.0}, ValueError, "step_lr must be positive and finite, got 0"),
        ({"step_lr": -1e-5}, ValueError, "step_lr must be positive and finite, got -1e-05"),
        ({"step_lr": NAN}, ValueError, "step_lr must be positive and finite, got nan"),
        ({"step_lr": INF}, ValueError, "step_lr must be positive and finite, got inf"),
        ({"step_lr": "1"}, TypeError, "step_lr must be a number"),
        ({"init_dist": "gaussian"}, ValueError, "init_dist must be one of.*got 'gaussian'"),
        ({"init": torch.zeros(1, 2, 4, 4)}, ValueError, r"\(2, 2, 4, 4\), got \(1, 2, 4, 4\)"),
        ({"init": torch.zeros(2, 2, 4, 4).long()}, TypeError, "floating point, got torch.int64"),
        ({"init": np.zeros((2, 2, 4, 4))}, TypeError, "must be a tensor, got ndarray"),
        ({"clip": 0.5}, TypeError, r"clip must be a bool.*got 0\.5"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"sample_offset": -1}, ValueError, "sample_offset"),
    ],
)
def test_sample(model, changes, error, message):
    arguments = {"n_samples": 2, "image_size": 4, "n_steps_each": 1, "verbose": False}
    check(error, message, model.sample, **(arguments | changes))


def test_messages_hold_no_object_addresses(model):
    with pytest.raises(TypeError) as caught:
        model.sample(object(), 4)
    assert re.search("n_samples must be an int >= 1.*of type object", str(caught.value))
