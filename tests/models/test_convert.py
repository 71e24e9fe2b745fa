"""Checkpoint files of the authors' programs: read, told apart, refused, and written back."""

from __future__ import annotations

import shutil
import zipfile
from collections import OrderedDict

import pytest
import torch
import yaml
from support.official_oracles import NETWORKS, ORACLES, PER_SAMPLE, read, worst_sample

from ncsn_fast.files import CheckpointError
from ncsn_fast.models.convert import load_official, save_official
from ncsn_fast.models.official import NCSNv2, OfficialNCSN
from ncsn_fast.schedules import make_sigmas

V1, V2 = ORACLES / "checkpoint_ncsn_v1.pth", ORACLES / "checkpoint_ncsnv2.pth"
V1_LEGACY = ORACLES / "checkpoint_ncsn_v1_legacy_cuda.pth"
V2_LEGACY = ORACLES / "checkpoint_ncsnv2_legacy_cuda.pth"
V1_CONFIG, V2_CONFIG = ORACLES / "checkpoint_ncsn_v1.config.yml", ORACLES / "checkpoint_ncsnv2.yml"


def states(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def saved(folder, contents):
    torch.save(contents, folder / "changed.pth")
    return folder / "changed.pth"


def settings(**changes):
    """The configuration of 2020 with changes such as ``model__ngf=8``; None takes an entry away."""
    config = yaml.safe_load(V2_CONFIG.read_text())
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


# --- reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [V1, V1_LEGACY], ids=["zip", "legacy"])
@torch.no_grad()
def test_2019(path):
    expected, _ = read("checkpoint_ncsn_v1.expected")
    model = load_official(path, config=V1_CONFIG)
    assert type(model) is OfficialNCSN and not model.training
    assert (
        worst_sample(model(expected["input"], expected["labels"]), expected["output"]) < PER_SAMPLE
    )
    torch.testing.assert_close(model.sigmas, make_sigmas(1.0, 0.01, 4), rtol=0, atol=0)
    raw = load_official(path, weights="raw", sigmas=make_sigmas(1.0, 0.01, 4))
    torch.testing.assert_close(raw.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(raw.sigmas, model.sigmas, rtol=0, atol=0)


@pytest.mark.parametrize("config", [None, V2_CONFIG, "mapping"], ids=["none", "file", "mapping"])
@pytest.mark.parametrize("path", [V2, V2_LEGACY], ids=["zip", "legacy"])
@torch.no_grad()
def test_2020(path, config):
    expected, _ = read("checkpoint_ncsnv2.expected")
    config = settings() if config == "mapping" else config
    x, labels = expected["input"], expected["labels"]
    model = load_official(path, config=config)
    assert type(model) is NCSNv2 and not model.training
    assert worst_sample(model(x, labels), expected["output_ema"]) < PER_SAMPLE
    raw = load_official(path, config=config, weights="raw")
    assert worst_sample(raw(x, labels), expected["output_raw"]) < PER_SAMPLE
    torch.testing.assert_close(model.sigmas, states(V2)[0]["module.sigmas"], rtol=0, atol=0)


def test_random_numbers_of_the_user_stay():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_official(V2)
    assert torch.equal(torch.rand(3), expected)


def test_without_a_ladder():
    model = load_official(V1)
    model(torch.rand(1, 3, 8, 8), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="not set"):
        model._require_sigmas()


def test_2020_program_with_the_2019_network(tmp_path):
    """Told from the names of the tensors, not from the length of the list."""
    net, optimizer = states(V1)
    average = {k.removeprefix("module."): v + 1 for k, v in net.items()}
    path = saved(tmp_path, [net, optimizer, 5, 12, average])
    model, raw = load_official(path), load_official(path, weights="raw")
    assert type(model) is type(raw) is OfficialNCSN
    for name, value in raw.state_dict().items():
        assert torch.equal(value, net[f"module.{name}"])
        assert torch.equal(model.state_dict()[name], value + 1)


def test_uniform_ladder_and_input_options():
    ladder = torch.linspace(5.0, 0.05, 4, dtype=torch.float64).float()
    config = settings(model__sigma_dist="uniform", data__rescaled=True, data__logit_transform=True)
    with pytest.raises(ValueError, match="ladders of the file and of the configuration differ"):
        load_official(V2, config=config)
    config = settings(model__sigma_dist="uniform", data__logit_transform=True) | {}
    config["model"]["sigma_begin"] = 5.0
    model = load_official(V1, config=config)
    assert torch.equal(model.sigmas, ladder) and model.config.logit_transform
    model = load_official(V2, config=settings(data__rescaled=True))
    assert model.config.rescaled and not model.config.logit_transform


def test_tags_are_read_as_plain_values(tmp_path):
    """A configuration that would run code with an unsafe loader makes nothing but a string."""
    text = V1_CONFIG.read_text() + "device: !!python/object/apply:os.system [touch HERE]\n"
    path = tmp_path / "config.yml"
    path.write_text(text.replace("HERE", str(tmp_path / "ran")))
    load_official(V1, config=path)
    assert not (tmp_path / "ran").exists()


# --- refusing ---------------------------------------------------------------------------------------


def test_missing_file_and_unknown_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        load_official(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="weights must be one of"):
        load_official(V2, weights="average")


@pytest.mark.parametrize("path", [V1, V1_LEGACY, V2, V2_LEGACY], ids=lambda p: p.stem)
@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_cut_files(path, part, tmp_path):
    cut = tmp_path / "cut.pth"
    cut.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="truncated|empty"):
        load_official(cut)


def test_damaged_file(tmp_path):
    contents = bytearray(V2.read_bytes())
    with zipfile.ZipFile(V2) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
        values = archive.read(record)
    contents[contents.index(values) + len(values) // 2] ^= 0xFF
    (tmp_path / "damaged.pth").write_bytes(contents)
    with pytest.raises(CheckpointError, match="damaged"):
        load_official(tmp_path / "damaged.pth")


def test_files_of_other_programs(tmp_path):
    (tmp_path / "text.pth").write_text("not a checkpoint at all")
    with pytest.raises(CheckpointError, match="not a file of tensors"):
        load_official(tmp_path / "text.pth")
    for contents, what in (
        ({"a": torch.zeros(1)}, "this is a dict"),
        ([1, 2, 3], "this is a list of 3"),
        ([torch.zeros(1), {}], "begins with a state dict"),
        ([{"module.conv.weight": torch.zeros(1)}, {}], "another network"),
        ([{"module.a": torch.zeros(1), "b": torch.zeros(1)}, {}], "some do not"),
        ([{"module.a": torch.zeros(1, dtype=torch.int64)}, {}], "must be a float32 tensor"),
    ):
        with pytest.raises(CheckpointError, match=what):
            load_official(saved(tmp_path, contents))


def change(net, **tensors):
    """The state dict with other tensors; None takes one away. ``__`` stands for a dot."""
    net = OrderedDict(net)
    for name, value in tensors.items():
        key = "module." + name.replace("__", ".")
        net.pop(key, None)
        if value is not None:
            net[key] = value
    return net


def test_networks_that_are_not_supported(tmp_path):
    v1, v2 = states(V1)[0], states(V2)[0]
    extra = torch.zeros(4)
    for net, what in (
        (change(v1, res5__0__conv1__bias=extra), "NCSNdeeper"),
        (
            change(v1, res5__0__conv1__bias=extra, normalizer__embed__weight=torch.zeros(4, 8)),
            "CondRefineNetDeeperDilated",
        ),
        (change(v2, sigmas=None), "RefineNetDilated"),
        (change(v2, normalizer__alpha=None), "another normalization"),
        (change(v2, refine4__crp__convs__1__weight=None), "refine4.crp.convs.1.weight"),
        (change(v2, surplus__weight=extra), "surplus.weight"),
        (change(v2, res5__0__conv1__bias=extra), "not of the NCSNv2Deeper"),
        (change(v2, end_conv__bias=extra), "end_conv.bias"),
    ):
        with pytest.raises(CheckpointError, match=what):
            load_official(saved(tmp_path, [net, {}, 5, 12]), weights="raw")


def test_moving_average_missing_or_of_another_network(tmp_path):
    net, optimizer, epoch, step, average = states(V2)
    path = saved(tmp_path, [net, optimizer, epoch, step])
    with pytest.raises(CheckpointError, match="no moving average .* weights='raw'"):
        load_official(path)
    load_official(path, weights="raw")
    some = dict(list(average.items())[:-6])
    with pytest.raises(CheckpointError, match="moving average .* lacks .* and 2 more"):
        load_official(saved(tmp_path, [net, optimizer, epoch, step, some]))
    other = average | {"end_conv.bias": torch.zeros(7)}
    with pytest.raises(CheckpointError, match="in another shape end_conv.bias"):
        load_official(saved(tmp_path, [net, optimizer, epoch, step, other]))


def test_wrong_ladders(tmp_path):
    with pytest.raises(ValueError, match="each of the 4 noise levels, got 3"):
        load_official(V1, sigmas=(3.0, 2.0, 1.0))
    with pytest.raises(ValueError, match="strictly descending"):
        load_official(V1, sigmas=(1.0, 2.0, 3.0, 4.0))
    with pytest.raises(ValueError, match="ladders of sigmas and of the file differ: level 3"):
        load_official(V2, sigmas=make_sigmas(5.0, 0.01, 4))
    with pytest.raises(ValueError, match="ladders of sigmas and of the configuration differ"):
        load_official(V1, config=V1_CONFIG, sigmas=make_sigmas(2.0, 0.01, 4))
    net = change(states(V2)[0], sigmas=torch.tensor([1.0, 2.0, 3.0, float("nan")]))
    with pytest.raises(ValueError, match="sigmas must be"):
        load_official(saved(tmp_path, [net, {}, 5, 12]), weights="raw")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model__ngf": 8}, "model.ngf is 8 there, and the checkpoint has 4"),
        ({"model__num_classes": 5}, "model.num_classes is 5"),
        ({"data__channels": 1}, "data.channels is 1"),
        ({"model__normalization": "BatchNorm"}, "model.normalization 'BatchNorm' is not supported"),
        ({"model__nonlinearity": "swish"}, "model.nonlinearity 'swish' is not supported"),
        ({"model__sigma_dist": "cosine"}, "model.sigma_dist 'cosine' is not supported"),
        ({"data__image_size": 15}, "multiples of 2"),
        ({"model__sigma_begin": 4.0}, "ladders of the file and of the configuration differ"),
    ],
)
def test_configurations_that_do_not_fit(changes, what):
    with pytest.raises(ValueError, match=what):
        load_official(V2, config=settings(**changes))


def test_bad_configurations(tmp_path):
    path = tmp_path / "config.yml"
    for text, error, what in (
        ("a: [", ValueError, "not YAML"),
        ("a: 1", ValueError, "no section model"),
        ("- 1", TypeError, "must be a mapping"),
    ):
        path.write_text(text)
        with pytest.raises(error, match=what):
            load_official(V2, config=path)
    with pytest.raises(ValueError, match="data.rescaled with a network of 2019"):
        load_official(V1, config=settings(data__rescaled=True))


# --- writing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_same_bits_there_and_back(name, tmp_path):
    ladder = make_sigmas(5.0, 0.05, 5)
    model = NETWORKS[name](2, 5, 5, sigmas=ladder)
    model.to(memory_format=torch.channels_last)
    save_official(model, tmp_path / "one.pth")
    for weights in ("ema", "raw"):
        back = load_official(
            tmp_path / "one.pth", weights=weights, sigmas=ladder if name == "ncsn_v1" else None
        )
        assert type(back) is type(model) and torch.equal(back.sigmas, model.sigmas)
        torch.testing.assert_close(back.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("path", [V1, V2], ids=["2019", "2020"])
def test_file_written_as_the_authors_write_it(path, tmp_path):
    theirs = states(path)
    average = {} if path == V1 else {"ema": theirs[4], "epoch": theirs[2], "step": theirs[3]}
    model = load_official(path, weights="raw")
    save_official(model, tmp_path / "ours.pth", optimizer=theirs[1], **average)
    ours = states(tmp_path / "ours.pth")
    assert len(ours) == len(theirs) and list(ours[0]) == list(theirs[0])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_optimizer_of_a_written_file(tmp_path):
    save_official(load_official(V1), tmp_path / "ours.pth")
    optimizer = states(tmp_path / "ours.pth")[1]
    assert len(optimizer["param_groups"][0]["params"]) == 173
    model = load_official(V1)
    torch.optim.Adam(model.parameters()).load_state_dict(optimizer)
    torch.optim.Adam(model.parameters()).load_state_dict(states(V1)[1])


def test_what_is_not_written(tmp_path):
    shutil.copy(V1, tmp_path / "kept.pth")
    before = (tmp_path / "kept.pth").read_bytes()
    model = load_official(V2)
    for wrong, error, what in (
        (lambda: save_official(torch.nn.Linear(1, 1), tmp_path / "kept.pth"), TypeError, "Linear"),
        (
            lambda: save_official(load_official(V2).half(), tmp_path / "kept.pth"),
            TypeError,
            "float32",
        ),
        (
            lambda: save_official(NCSNv2(3, 4, 5), tmp_path / "kept.pth"),
            RuntimeError,
            "not set",
        ),
        (lambda: save_official(model, tmp_path / "kept.pth", ema={}), ValueError, "lacks"),
        (
            lambda: save_official(load_official(V1), tmp_path / "kept.pth", ema={}),
            ValueError,
            "2019",
        ),
    ):
        with pytest.raises(error, match=what):
            wrong()
    assert (tmp_path / "kept.pth").read_bytes() == before
