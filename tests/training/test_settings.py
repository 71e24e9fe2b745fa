"""Settings of a training run: numbers of any library, errors that name the field, and what follows at a step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ncsn_fast import NCSNConfig, ops
from ncsn_fast.training import TrainingSettings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("iterations", 0), ("batch_size", 1.5), ("lr", -1.0), ("lr", float("nan"))),
        *(("ema_decay", 1.0), ("lr_schedule", "triangular"), ("seed", -1), ("warmup", True)),
        *(("seed", 2**32), ("grad_clip", float("inf")), ("levels", None), ("weighting", 1)),
        *(("optimizer", "sgd"), ("weight_decay", 0.1), ("accumulate", 3), ("bf16", 1)),
        *(
            ("ema_decays", (0.9, 1.0)),
            ("ema_decays", "0.9"),
            ("keep_last", 0),
            ("objective", "nce"),
        ),
        *(("directions", 0), ("compile", "yes")),
        *(("ema_warmup", "false"), ("batch_size", np.bool_(True)), ("lr", torch.tensor(True))),
    ],
)
def test_settings_refuse(field, value):
    with pytest.raises((ValueError, TypeError), match=field):
        TrainingSettings(**{field: value})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(TrainingSettings)])
def test_a_value_of_another_type_is_told_by_the_fields_name(field):
    """As of a configuration file: a string for a number, nothing, a list."""
    fine = {"ema_warmup": [None], "ema_decays": [[]]}.get(field, [])
    for value in ("1e-4", "10", *(v for v in ([], None) if v not in fine), {}, 1j):
        with pytest.raises((TypeError, ValueError), match=f"{field} must be") as error:
            TrainingSettings(**{field: value})
        if isinstance(value, str):
            assert repr(value) in str(error.value)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.float32, np.array, torch.tensor])
def test_numbers_of_other_libraries(kind):
    whole = {"iterations": 7, "batch_size": 3, "warmup": 0, "seed": 5, "checkpoint_every": 2}
    real = {"lr": 1, "ema_decay": 0, "grad_clip": 2}
    given = {name: kind(value) for name, value in real.items()}
    if kind is not np.float32:
        given |= {name: kind(value) for name, value in whole.items()}
    settings = TrainingSettings(**whole | given)
    assert settings == TrainingSettings(**whole | real)
    for name, type_ in (*((n, int) for n in whole), *((n, float) for n in real)):
        assert type(getattr(settings, name)) is type_  # a checkpoint holds plain values


def test_integers_are_the_same_for_networks_and_operators():
    config = NCSNConfig(nf=np.int64(8), dilations=np.array([1, 2, 4, 8]), scale_by_sigma=np.True_)
    assert (config.nf, config.dilations, config.scale_by_sigma) == (8, (1, 2, 4, 8), True)
    assert type(config.scale_by_sigma) is bool
    x, weight = torch.ones(1, 2, 5, 5), torch.ones(2, 2, 3, 3)
    expected = ops.conv3x3(x, weight, None, dilation=2)
    assert torch.equal(ops.conv3x3(x, weight, None, dilation=np.int64(2)), expected)
    same = ops.philox_uniform((2, 3), seed=np.uint64(7), step=torch.tensor(1))
    assert torch.equal(same, ops.philox_uniform((2, 3), seed=7, step=1))
    for wrong in (True, np.True_, 1.0, "1"):
        with pytest.raises(TypeError, match="dilation must be an int"):
            ops.conv3x3(x, weight, None, dilation=wrong)
        with pytest.raises(TypeError, match="seed must be an int"):
            ops.philox_uniform((2, 3), seed=wrong)
        with pytest.raises(TypeError, match="nf must be an int"):
            NCSNConfig(nf=wrong)


def test_learning_rate():
    settings = TrainingSettings(iterations=100, lr=1.0, warmup=10, lr_schedule="constant")
    assert [settings.lr_at(s) for s in (0, 4, 9, 99)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    linear = dataclasses.replace(settings, lr_schedule="linear", warmup=0)
    assert [linear.lr_at(s) for s in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])
    cosine = dataclasses.replace(settings, lr_schedule="cosine", warmup=0)
    assert [cosine.lr_at(s) for s in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])


def test_settings_that_do_not_go_together():
    for given, message in (
        ({"batch_size": 6, "accumulate": 4}, "accumulate must divide batch_size, 6, got 4"),
        ({"weight_decay": 0.1}, "weight_decay takes optimizer \"adamw\", got 0.1 with 'adam'"),
        ({"objective": "ssm", "weighting": "learned"}, "objective 'ssm' takes the weighting"),
        ({"objective": "ssm_vr", "compile": True}, "second derivatives, which torch.compile"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainingSettings(**given)
    settings = TrainingSettings(ema_decay=0.9, ema_decays=[0.99, 0.9, 0.5])
    assert settings.ema_decays == (0.5, 0.99)  # sorted, each once
    assert settings.ema_decay_at(1000, 0.99) == 0.99


def test_decay_of_the_average():
    settings = TrainingSettings(ema_decay=0.9)
    steps = (0, 8, 80, 81, 1000)
    assert [settings.ema_decay_at(s) for s in steps] == pytest.approx([0.1, 0.5, 0.9, 0.9, 0.9])
    without = dataclasses.replace(settings, ema_warmup=False)
    assert [without.ema_decay_at(s) for s in steps] == [0.9] * 5
