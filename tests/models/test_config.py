"""NCSNConfig and the two constructors of NCSN; noise ladders."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math

import numpy as np
import pytest
import torch

from ncsn_fast import NCSN, NCSNConfig
from ncsn_fast.schedules import check_sigmas, make_sigmas

LADDER = (1.0, 0.1, 0.01)


def test_defaults_are_those_of_the_model():
    config = NCSNConfig()
    signature = inspect.signature(NCSN.__init__).parameters
    for field in dataclasses.fields(NCSNConfig):
        assert getattr(config, field.name) == signature[field.name].default, field.name


def test_values_are_normalised():
    config = NCSNConfig(in_channels=np.int64(1), dilations=[1, np.int32(2), 4, 8], nf=8)
    assert type(config.in_channels) is int
    assert config.dilations == (1, 2, 4, 8)
    assert all(type(dilation) is int for dilation in config.dilations)
    assert config == NCSNConfig(in_channels=1, nf=8)
    assert hash(config) == hash(NCSNConfig(in_channels=1, nf=8))
    assert config != NCSNConfig(in_channels=1, nf=9)


@pytest.mark.parametrize(
    "sigmas",
    [
        list(LADDER),
        LADDER,
        np.array(LADDER),
        torch.tensor(LADDER, dtype=torch.float64),
        torch.nn.Parameter(torch.tensor(LADDER, dtype=torch.float64)),
    ],
    ids=["list", "tuple", "array", "tensor", "parameter"],
)
def test_sigmas_come_back_as_they_were_given(sigmas):
    config = NCSNConfig(num_classes=3, sigmas=sigmas)
    assert config.sigmas == LADDER
    assert all(type(sigma) is float for sigma in config.sigmas)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["sigmas"] == list(LADDER)


def test_config_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NCSNConfig().nf = 3


@pytest.mark.parametrize(
    "config",
    [
        NCSNConfig(),
        NCSNConfig(1, 8, 3, [2, 1, 3, 1], False, LADDER, "zero"),
        NCSNConfig(num_classes=10, sigmas=make_sigmas(50.0, 0.01, 10)),
    ],
)
def test_round_trip_through_json(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(config)))
    assert NCSNConfig.from_json_file(path) == config


def test_fields_that_are_absent_take_their_defaults():
    assert NCSNConfig.from_dict({"nf": 8}) == NCSNConfig(nf=8)


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match=r"fields in_channels, nf.*got also hidden_size, layers"):
        NCSNConfig.from_dict({"nf": 8, "hidden_size": 3, "layers": 2})
    with pytest.raises(TypeError, match=r"mapping.*list"):
        NCSNConfig.from_dict([1, 2])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"nf": "8"}', '{"nf": 0}', '{"hidden": 1}'])
def test_a_file_that_is_no_config_is_named(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not the configuration of an NCSN"):
        NCSNConfig.from_json_file(path)


def test_a_binary_file_is_no_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="is not the configuration of an NCSN"):
        NCSNConfig.from_json_file(path)


def test_both_constructors_make_the_same_model():
    config = NCSNConfig(in_channels=1, nf=4, num_classes=3, dilations=(1, 1, 2, 2), sigmas=LADDER)
    torch.manual_seed(0)
    first = NCSN(config)
    torch.manual_seed(0)
    second = NCSN(1, 4, 3, [1, 1, 2, 2], sigmas=LADDER)
    assert first.config is config
    assert NCSN(config=config).config is config
    assert second.config == config
    for (name, one), (_, other) in zip(
        first.state_dict().items(), second.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name
    torch.testing.assert_close(first.sigmas, torch.tensor(LADDER))


def test_fields_reach_the_layers():
    model = NCSN(in_channels=5, nf=4, num_classes=7, dilations=(3, 1, 4, 2), pool_padding="zero")
    assert model.begin_conv.weight.shape == (4, 5, 3, 3)
    assert model.end_conv.weight.shape == (5, 4, 3, 3)
    assert model.end_norm.embed.weight.shape == (7, 8)
    assert model.sigmas.shape == (7,)
    for stage, dilation in zip(
        (model.stage1, model.stage2, model.stage3, model.stage4), (3, 1, 4, 2), strict=True
    ):
        assert stage.units[1].conv2.conv.dilation == (dilation, dilation)
    assert model.refine1.crp.pool_padding == "zero"


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((NCSNConfig(), 128), {}),
        ((NCSNConfig(nf=4),), {"nf": 128}),  # the default, but given, and not what the config says
        ((NCSNConfig(),), {"sigmas": None}),
        ((NCSNConfig(),), {"config": NCSNConfig()}),
        ((3,), {"config": NCSNConfig()}),
        ((), {"nf": 4, "config": NCSNConfig()}),
    ],
)
def test_a_config_stands_alone(args, kwargs):
    with pytest.raises(TypeError, match="a config or separate arguments, got both"):
        NCSN(*args, **kwargs)


def test_a_config_of_another_type_is_refused():
    with pytest.raises(TypeError, match="config must be an NCSNConfig, got dict"):
        NCSN(config={"nf": 4})


def test_a_subclass_may_take_a_config_and_more():
    class Named(NCSN):
        def __init__(self, config, name):
            super().__init__(config)
            self.name = name

    config = NCSNConfig(nf=4)
    assert Named(config, name="x").config is config


# --- ladders --------------------------------------------------------------------------------------


def test_make_sigmas_worked_values():
    sigmas = NCSN.make_sigmas(10, 0.01, 5)
    assert sigmas.dtype == torch.float32
    expected = torch.tensor([10, 1.77828, 0.316228, 0.0562341, 0.01])
    torch.testing.assert_close(sigmas, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("begin", "end", "k"), [(50.0, 0.01, 10), (1, 0.01, 2), (378, 0.01, 2311)])
def test_make_sigmas_is_geometric_and_meets_its_ends(begin, end, k):
    sigmas = make_sigmas(begin, end, k)
    assert sigmas.shape == (k,)
    assert sigmas[0] == torch.tensor(float(begin))
    assert sigmas[-1] == torch.tensor(float(end))
    ratio = math.exp(math.log(end / begin) / (k - 1))
    torch.testing.assert_close(sigmas[1:] / sigmas[:-1], torch.full((k - 1,), ratio))
    check_sigmas(sigmas, k)


def test_check_sigmas_rounds_first():
    torch.testing.assert_close(check_sigmas([2, 1], 2), torch.tensor([2.0, 1.0]))
    with pytest.raises(ValueError, match=r"positive and finite in float32, got sigmas\[1\] = 0"):
        check_sigmas([1.0, 1e-60], 2)
    with pytest.raises(ValueError, match="strictly descending in float32"):
        check_sigmas([1.0, 1.0 - 1e-12], 2)
