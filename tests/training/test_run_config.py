"""One merge of what a run is made from: presets, files, arguments and a run that goes on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ncsn_fast import NCSN, NCSNConfig, ScoreCNN, ScoreMLP
from ncsn_fast.data import open_images
from ncsn_fast.files import CheckpointError
from ncsn_fast.models.sampling_settings import load_sampling
from ncsn_fast.schedules import make_sigmas
from ncsn_fast.training import TrainingSettings, dry_run, presets, train
from ncsn_fast.training.checkpoints import load_checkpoint
from ncsn_fast.training.config import RunConfig, merge_config, save_config

IMAGES = torch.rand(10, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
SMALL = {"nf": 4, "num_classes": 3, "sigma_begin": 1.0, "sigma_end": 0.1, "batch_size": 4}


def test_the_digits_preset_is_the_demos_network_and_training():
    """As they stood in the demo's source: a run of then goes on, and its network is the same."""
    run = merge_config(preset="digits", seed=3)
    expected = NCSNConfig(
        in_channels=1,
        nf=32,
        num_classes=10,
        dilations=(1, 1, 2, 2),
        norm="instance++",
        sigmas=make_sigmas(5.0, 0.08, 10),
    )
    images = torch.zeros(2, 1, 8, 8)
    assert run.network_config(images) == expected
    assert run.settings == TrainingSettings(
        iterations=1000, lr=2e-3, ema_decay=0.995, checkpoint_every=200, seed=3
    )
    model = run.new_network(images)
    torch.manual_seed(3)
    for a, b in zip(model.parameters(), NCSN(expected).parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", presets.preset_names())
def test_every_preset_makes_a_network(name):
    run = merge_config(preset=name, data="digits")
    images = torch.zeros(2, run.channels, run.image_size, run.image_size)
    made = run.network_config(images)
    assert made.sigmas[0] == run.sigma_begin and made.nf == run.options["nf"]
    assert run.num_classes == len(made.sigmas)


def test_a_preset_without_data_does_not_train_on_the_digits(tmp_path):
    with pytest.raises(ValueError, match="preset 'ncsnv2-cifar10' has no data of its own"):
        merge_config(preset="ncsnv2-cifar10")
    file = tmp_path / "run.toml"
    file.write_text('data = "somewhere"\n')
    assert merge_config(preset="ncsnv2-cifar10", file=file).data == "somewhere"


def test_options_of_sampling_go_with_the_run(tmp_path):
    """From the preset into the folder of the run, and on to a run that goes on from there."""
    run = merge_config(
        preset="ncsnv2-cifar10",
        data="digits",
        channels=1,
        image_size=8,
        nf=4,
        num_classes=3,
        iterations=1,
        batch_size=2,
    )
    assert run.sampling["step_lr"] == 6.2e-6
    images = torch.rand(4, 1, 8, 8)
    train(run.new_network(images), images, run.settings, tmp_path, config=run, verbose=False)
    assert load_sampling(tmp_path) == load_sampling(tmp_path / "checkpoint.pt") == run.sampling
    assert merge_config(run=tmp_path).sampling == run.sampling
    save_config(RunConfig(), tmp_path)
    assert load_sampling(tmp_path) == {}
    for wrong in ({"steps": 3}, {"denoise": 1}, 3):
        with pytest.raises(ValueError, match="sampling"):
            merge_config(sampling=wrong)
    (tmp_path / "sampling.json").write_text("{")
    with pytest.raises(CheckpointError, match="does not hold options of sampling"):
        load_sampling(tmp_path)


def test_images_are_brought_into_the_range_of_the_network():
    assert merge_config().data_range == (-1, 1)
    assert merge_config(network="ncsnv2").data_range == (0, 1)
    assert merge_config(network="ncsnv2", rescaled=True).data_range == (-1, 1)
    digits = open_images("digits", 8, 1, data_range=(0.0, 1.0))
    assert digits.ends == (0.0, 1.0)
    with pytest.raises(ValueError, match="takes values of any range, such as logits"):
        merge_config(network="ncsnv2", logit_transform=True).data_range  # noqa: B018


def test_a_file_goes_over_the_preset_and_arguments_over_both(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('lr = 0.5\nnf = 16\nnorm = "instance"\n')
    run = merge_config(preset="digits", file=file, nf=24, sigma_end=None)
    assert (run.options["nf"], run.options["norm"], run.settings.lr) == (24, "instance", 0.5)
    assert (run.settings.iterations, run.sigma_end) == (1000, 0.08)  # the preset's
    assert run.options["dilations"] == [1, 1, 2, 2]
    assert merge_config() == RunConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1", "run.toml: 'learning_rate' is no name.*known are data.* lr,"),
        ("[training]\nlr = 1", "run.toml: 'training' is no name of a run"),
        ('network = "cnn"\ndilations = [1, 1, 2, 2]', "'dilations' is no name.*network 'cnn'"),
        ("lr = '1e-4'", "run.toml: lr must be a number, got the string '1e-4'"),
        ("nf = 1.5", "run.toml: nf must be an int >= 1, got 1.5"),
        ("dilations = [1, 2]", "run.toml: dilations must be exactly 4"),
        ("network = 'gan'", r"run.toml: network must be one of \(.*'ncsn'.*got 'gan'"),
        ("sigma_end = -1", "run.toml: sigma_end must be positive"),
        ("sigmas = [1, 2]", "sigmas must be strictly descending|strictly"),
        ("sigmas = 3", "run.toml: sigmas must be a list of numbers, got 3"),
        ("data = 3", "run.toml: data must be a path or a name, got 3"),
        ("image_size = 0", "run.toml: image_size must be an int >= 1"),
        ("lr = ", "run.toml is no TOML file"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_the_file(tmp_path, text, message):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        merge_config(file=file)


def test_other_mistakes(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"preset must be one of \('digits',.*\), got 'cats'"):
        merge_config(preset="cats")
    with pytest.raises(FileNotFoundError, match="nosuch.toml"):
        merge_config(file=tmp_path / "nosuch.toml")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
        merge_config(run=tmp_path)
    with pytest.raises(ValueError, match="^lr must be positive"):
        merge_config(preset="digits", lr=-1)
    with pytest.raises(ValueError, match="'cnn' takes images .* have the shape"):
        merge_config(network="cnn").network_config(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="'mlp' takes points .* have the shape"):
        merge_config(network="mlp").network_config(IMAGES)
    with pytest.raises(ValueError, match="takes square images, and these are 6 x 4"):
        merge_config(network="cnn", sigma_begin=1.0).network_config(IMAGES[..., :4])
    monkeypatch.setattr(presets, "tomllib", None)
    with pytest.raises(ImportError, match="take Python 3.11 or newer, or tomli: pip install tomli"):
        merge_config(preset="digits")


@pytest.mark.parametrize(
    ("network", "data", "options", "kind"),
    [
        ("cnn", IMAGES, {"nf": 8, "embedding": 6}, ScoreCNN),
        ("mlp", IMAGES.flatten(1), {"hidden": [5, 5]}, ScoreMLP),
        ("ncsn", IMAGES, {"nf": 4, "pool_padding": "zero"}, NCSN),
    ],
)
def test_a_run_of_every_network_goes_on_with_nothing_said_but_its_folder(
    tmp_path, network, data, options, kind
):
    ladder = {"num_classes": 3, "sigma_begin": 1.0, "sigma_end": 0.1}
    how = {"lr_schedule": "constant", "batch_size": 4, "seed": 5, "warmup": 0}
    first = merge_config(network=network, data="here", iterations=2, **options, **ladder, **how)
    first = first.resolved(data)
    model = first.new_network(data)
    assert type(model) is kind
    train(model, data, first.settings, tmp_path, verbose=False, config=first)
    assert merge_config(file=tmp_path / "config.toml").values() == first.values() | {
        name: list(value) for name, value in options.items() if isinstance(value, list)
    }
    again = merge_config(run=tmp_path, iterations=4)
    assert (again.data, again.network, again.settings.seed) == ("here", network, 5)
    assert again.network_config(data) == model.config
    train(
        again.new_network(data),
        data,
        again.settings,
        tmp_path,
        resume=True,
        verbose=False,
        config=again,
    )
    assert load_checkpoint(tmp_path / "checkpoint.pt").step == 4
    assert merge_config(run=tmp_path).settings.iterations == 4


def test_what_a_run_that_goes_on_cannot_change_is_refused(tmp_path):
    first = merge_config(**SMALL, iterations=2)
    train(first.new_network(IMAGES), IMAGES, first.settings, tmp_path, verbose=False)
    assert not (tmp_path / "config.toml").exists()  # of a run that was not made from one
    for given, message in (
        ({"nf": 5}, "another configuration: nf is 4 there and 5 here"),
        ({"sigma_begin": 2.0}, "another configuration: sigmas"),
        ({"lr": 0.1}, "other settings: lr is 0.001 there and 0.1 here"),
        ({"network": "cnn"}, "'dilations' is no name of a run with the network 'cnn'"),
    ):
        with pytest.raises((CheckpointError, ValueError), match=message):
            run = merge_config(run=tmp_path, **given)
            model = run.new_network(IMAGES)
            train(model, IMAGES, run.settings, tmp_path, resume=True, verbose=False)


def test_a_ladder_that_is_not_geometric_is_kept_whole(tmp_path):
    run = merge_config(nf=4, sigmas=[1.0, 0.9, 0.1], iterations=1, batch_size=2)
    train(run.new_network(IMAGES), IMAGES, run.settings, tmp_path, verbose=False, config=run)
    again = merge_config(run=tmp_path)
    assert again.network_config(IMAGES).sigmas == pytest.approx((1.0, 0.9, 0.1))
    assert merge_config(file=tmp_path / "config.toml").sigmas == run.sigmas
    other = merge_config(run=tmp_path, num_classes=4)
    assert len(other.network_config(IMAGES).sigmas) == 4
    assert merge_config(preset="digits", sigmas=[2, 1]).sigmas == (2.0, 1.0)


def test_a_run_of_python_keeps_what_followed_from_the_data(tmp_path):
    run = merge_config(nf=4, num_classes=3, sigma_end=0.1, iterations=1, batch_size=2)
    random = torch.get_rng_state()
    model = run.new_network(IMAGES)
    assert torch.equal(random, torch.get_rng_state())  # weights are of the seed, not of torch's
    assert torch.equal(model.end_conv.weight, run.new_network(IMAGES).end_conv.weight)
    train(model, IMAGES, run.settings, tmp_path, verbose=False, config=run)
    kept = merge_config(file=tmp_path / "config.toml")
    assert (kept.image_size, kept.channels) == (6, 1)
    assert kept.sigma_begin == run.resolved(IMAGES).sigma_begin
    assert kept.network_config(IMAGES) == model.config


def test_images_have_the_usual_size_where_none_is_given():
    for data, size in (("digits", (8, 1)), ("digits:heldout", (8, 1)), ("photos", (32, 3))):
        run = merge_config(data=data)
        assert (run.image_size, run.channels) == size
    run = merge_config(data="digits", image_size=16)
    assert (run.image_size, run.channels) == (16, 1)  # for the reader to refuse


def test_every_value_comes_back_from_the_file(tmp_path):
    run = merge_config(
        **SMALL, data='odd "näme"\\\n', ema_warmup=False, lr=1e-7, pool_padding="zero"
    )
    save_config(run, tmp_path)
    again = merge_config(file=tmp_path / "config.toml")
    assert again == run
    names = set(again.values())
    assert names >= {f.name for f in dataclasses.fields(TrainingSettings)}
    with pytest.raises(CheckpointError, match="could not write .*config.toml"):
        save_config(run, tmp_path / "nosuch")


@pytest.mark.parametrize("resume", [False, True])
def test_a_dry_run_measures_and_leaves_everything_as_it_is(tmp_path, resume):
    run = merge_config(**SMALL, iterations=4, ema_warmup=True, lr_schedule="constant")
    model = run.new_network(IMAGES)
    if resume:
        short = dataclasses.replace(run.settings, iterations=1)
        train(model, IMAGES, short, tmp_path / "run", verbose=False)
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = dry_run.estimate(model, IMAGES, run.settings, tmp_path / "run", resume=resume)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.parameters == count
    # Weights, average and Adam's two moments are 4 floats each; not every weight has a gradient.
    assert 4 * 4 * count < found.state_bytes <= 5 * 4 * count + 8192
    assert found.data_bytes == IMAGES.numel() * 4
    assert found.seconds_per_step > 0
    assert (found.steps_done, found.steps) == (int(resume), 4)
    left = 4 - resume
    assert found.seconds == pytest.approx(left * found.seconds_per_step)


def test_a_dry_run_counts_what_a_batch_keeps(tmp_path):
    """Twice the batch, about twice the memory."""
    found = []
    for size in (4, 8):
        run = merge_config(**SMALL | {"batch_size": size})
        model = run.new_network(IMAGES)
        found.append(dry_run.estimate(model, IMAGES, run.settings, tmp_path).batch_bytes)
    assert found[0] > 4 * 4 * 36 * 4
    assert 1.7 < found[1] / found[0] < 2.1


def test_a_dry_run_refuses_what_a_training_would(tmp_path):
    run = merge_config(**SMALL, iterations=1)
    model = run.new_network(IMAGES)
    train(model, IMAGES, run.settings, tmp_path, verbose=False)
    with pytest.raises(FileExistsError, match="exists: resume that run"):
        dry_run.estimate(model, IMAGES, run.settings, tmp_path)
