"""The state dict's keys, what loading accepts, and saved models: good, truncated, foreign."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import safetensors.torch
import torch

from ncsn_fast import NCSN, NCSNConfig

NF, K, C = 4, 3, 2
CONFIG = NCSNConfig(in_channels=C, nf=NF, num_classes=K, sigmas=(1.0, 0.3, 0.1))


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Every key of the documented state dict, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {"sigmas": (K,)}

    def conv(name, out_channels=NF, in_channels=NF):
        shapes[f"{name}.weight"] = (out_channels, in_channels, 3, 3)
        shapes[f"{name}.bias"] = (out_channels,)

    def norm(name):
        shapes[f"{name}.embed.weight"] = (K, 2 * NF)

    def units(name):
        for u in (0, 1):
            for j in (1, 2):
                norm(f"{name}.units.{u}.norm{j}")
                conv(f"{name}.units.{u}.conv{j}.conv")

    conv("begin_conv", in_channels=C)
    for i in (1, 2, 3, 4):
        units(f"stage{i}")
    for r in (4, 3, 2, 1):
        for i in range(1 if r == 4 else 2):
            units(f"refine{r}.rcu_in.{i}")
            norm(f"refine{r}.msf.norms.{i}")
            conv(f"refine{r}.msf.convs.{i}")
        for i in range(4):
            norm(f"refine{r}.crp.norms.{i}")
            conv(f"refine{r}.crp.convs.{i}")
        units(f"refine{r}.rcu_out")
    norm("end_norm")
    conv("end_conv", out_channels=C)
    return shapes


def lucid_state_dict(model: NCSN) -> dict[str, torch.Tensor]:
    """A state dict as lucid saves it: running statistics under every norm."""
    state = dict(model.state_dict())
    for key in list(state):
        if key.endswith(".embed.weight"):
            norm = key.removesuffix(".embed.weight")
            state[f"{norm}.norm.running_mean"] = torch.randn(NF)
            state[f"{norm}.norm.running_var"] = torch.rand(NF)
    return state


def assert_same(one: NCSN, other: NCSN) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.fixture
def model() -> NCSN:
    torch.manual_seed(0)
    return NCSN(CONFIG)


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def test_keys_and_shapes(model):
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected_shapes()


def test_number_of_norms_and_convolutions_of_128_channels():
    with torch.device("meta"):
        keys = NCSN().state_dict().keys()
    norms = sum(key.endswith(".embed.weight") for key in keys)
    convs = sum(key.endswith(".weight") for key in keys) - norms - 2  # but begin_conv and end_conv
    assert (norms, convs) == (84, 83)


# --- load_state_dict ------------------------------------------------------------------------------


def test_lucids_running_statistics_are_dropped_and_announced_once(model):
    target = NCSN(in_channels=C, nf=NF, num_classes=K)
    state = lucid_state_dict(model)
    keys = set(state)
    with pytest.warns(UserWarning) as caught:
        target.load_state_dict(state)
    assert len(caught) == 1
    assert "dropped 168 running_mean and running_var entries" in str(caught[0].message)
    assert set(state) == keys  # the caller's dict is left alone
    assert_same(target, model)
    x, y = torch.randn(2, C, 5, 5), torch.tensor([0, 2])
    torch.testing.assert_close(target(x, y), model(x, y))


def test_lucids_running_statistics_inside_a_wrapper(model):
    wrapped = torch.nn.ModuleDict({"net": NCSN(CONFIG)})
    state = {f"net.{key}": value for key, value in lucid_state_dict(model).items()}
    with pytest.warns(UserWarning, match="dropped 168"):
        wrapped.load_state_dict(state)
    assert_same(wrapped["net"], model)


def test_nothing_is_announced_without_them(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NCSN(CONFIG).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "key",
    [
        "end_norm.norm.num_batches_tracked",
        "end_norm.norm.weight",
        "end_norm.running_mean",
        "begin_conv.norm.running_mean",
        "norm.running_mean",
        "stage1.units.2.norm1.norm.running_mean",
        "extra",
    ],
)
def test_any_other_key_is_refused(model, key):
    state = dict(model.state_dict()) | {key: torch.zeros(NF)}
    with pytest.raises(RuntimeError, match="Unexpected key") as caught:
        NCSN(CONFIG).load_state_dict(state)
    assert key in str(caught.value)


@pytest.mark.parametrize("key", ["sigmas", "refine4.msf.norms.0.embed.weight", "end_conv.bias"])
def test_a_missing_key_is_refused(model, key):
    state = dict(model.state_dict())
    del state[key]
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        NCSN(CONFIG).load_state_dict(state)
    assert key in str(caught.value)


def test_sigmas_come_with_the_state_dict(model):
    target = NCSN(in_channels=C, nf=NF, num_classes=K)
    x, y = torch.randn(1, C, 4, 4), torch.tensor([1])
    target.load_state_dict(NCSN(in_channels=C, nf=NF, num_classes=K).state_dict())
    with pytest.raises(RuntimeError, match="set_sigmas"):
        target(x, y)
    target.load_state_dict(model.state_dict())
    torch.testing.assert_close(target(x, y), model(x, y))
    # A model that had them loses them with a state dict that has none.
    target.load_state_dict(NCSN(in_channels=C, nf=NF, num_classes=K).state_dict())
    with pytest.raises(RuntimeError, match="set_sigmas"):
        target(x, y)


def test_loading_onto_the_meta_device(model):
    with torch.device("meta"):
        target = NCSN(CONFIG)
    target.load_state_dict(model.state_dict(), assign=True)
    assert_same(target, model)
    x, y = torch.randn(1, C, 4, 4), torch.tensor([1])
    torch.testing.assert_close(target(x, y), model(x, y))


# --- save_pretrained, from_pretrained -------------------------------------------------------------


def test_round_trip(model, saved, capfd):
    fields = json.loads((saved / "config.json").read_text())
    assert fields == {
        "in_channels": C,
        "nf": NF,
        "num_classes": K,
        "dilations": [1, 2, 4, 8],
        "scale_by_sigma": True,
        "sigmas": [1.0, 0.3, 0.1],
        "pool_padding": "neg_inf",
        "norm": "instance",
    }
    loaded = NCSN.from_pretrained(saved)
    assert loaded.config == model.config
    assert not loaded.training
    assert_same(loaded, model)
    assert capfd.readouterr() == ("", "")

    loaded.save_pretrained(saved / "again")
    assert (saved / "again/config.json").read_text() == (saved / "config.json").read_text()


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((1, 2, 3), {}),
        ((), {"nf": 2, "dilations": [2, 1, 1, 1], "pool_padding": "zero"}),
        ((), {"nf": 2, "num_classes": 2, "sigmas": torch.tensor([0.3, 0.1])}),
        ((NCSNConfig(1, 2, 3, (1, 1, 1, 1), False, (0.3, 0.2, 0.1), "zero"),), {}),
        ((), {"config": NCSNConfig(nf=2)}),
    ],
)
def test_round_trip_of_both_constructors(args, kwargs, tmp_path):
    model = NCSN(*args, **kwargs)
    model.save_pretrained(tmp_path)
    loaded = NCSN.from_pretrained(str(tmp_path))
    assert loaded.config == model.config
    assert_same(loaded, model)


def test_sigmas_set_later_win_over_the_config(model, tmp_path):
    model.set_sigmas([3.0, 2.0, 1.0])
    model.save_pretrained(tmp_path)
    loaded = NCSN.from_pretrained(tmp_path)
    assert loaded.sigmas.tolist() == [3.0, 2.0, 1.0]
    assert loaded.config == CONFIG


def test_overrides(model, tmp_path):
    safetensors.torch.save_file(lucid_state_dict(model), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"in_channels": C, "nf": NF, "num_classes": K})
    )
    with pytest.warns(UserWarning, match="dropped 168"):
        loaded = NCSN.from_pretrained(tmp_path, pool_padding="zero")
    assert loaded.config == NCSNConfig(C, NF, K, pool_padding="zero")
    assert_same(loaded, model)
    with pytest.raises(TypeError, match="colour"):
        NCSN.from_pretrained(tmp_path, colour="blue")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights(saved, size):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        NCSN.from_pretrained(saved)


def test_weights_of_another_kind(saved):
    torch.save({"a": torch.zeros(3)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        NCSN.from_pretrained(saved)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (NCSNConfig(C, 2 * NF, K), r"begin_conv\.weight.*8, 2, 3, 3.*4, 2, 3, 3"),
        (NCSNConfig(C, NF, K + 1), r"sigmas.*\[4\].*\[3\]"),
    ],
)
def test_weights_of_another_configuration(saved, tmp_path, other, message):
    NCSN(other).save_pretrained(tmp_path / "other")
    (tmp_path / "other/model.safetensors").replace(saved / "model.safetensors")
    with pytest.raises(RuntimeError) as caught:
        NCSN.from_pretrained(saved)
    text = str(caught.value)
    assert "model.safetensors holds other weights than those of NCSNConfig(in_channels=2" in text
    assert re.search(message, text, re.DOTALL)
    assert len(text) < 2000


def test_weights_of_another_network(saved):
    safetensors.torch.save_file({"layer.weight": torch.zeros(3)}, saved / "model.safetensors")
    with pytest.raises(RuntimeError, match="holds other weights") as caught:
        NCSN.from_pretrained(saved)
    text = str(caught.value)
    assert "model.safetensors" in text
    assert "Missing key" in text
    assert len(text) < 2000


def test_config_of_another_model(saved):
    (saved / "config.json").write_text('{"model_type": "bert", "hidden_size": 768}')
    with pytest.raises(ValueError, match=r"config\.json is not.*got also model_type, hidden_size"):
        NCSN.from_pretrained(saved)


def test_truncated_config(saved):
    (saved / "config.json").write_text((saved / "config.json").read_text()[:20])
    with pytest.raises(ValueError, match=r"config\.json is not the configuration of an NCSN"):
        NCSN.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        NCSN.from_pretrained(saved)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder on this machine"):
        NCSN.from_pretrained(tmp_path / "nowhere")


def test_a_file_in_place_of_the_folder(saved):
    with pytest.raises(FileNotFoundError, match="must be a folder written by save_pretrained"):
        NCSN.from_pretrained(saved / "model.safetensors")
