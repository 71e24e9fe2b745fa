"""The published settings: each preset against the table of the papers' configurations, and what follows from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from ncsn_fast import ScoreMLP
from ncsn_fast.models.official import NCSNv2, NCSNv2Deeper, NCSNv2Deepest, OfficialNCSN
from ncsn_fast.models.sampling_settings import check_tuned
from ncsn_fast.schedules import make_sigmas
from ncsn_fast.training.config import merge_config
from ncsn_fast.training.presets import preset_names, read_few_passes, read_preset
from ncsn_fast.training.published import few_pass_settings, official_settings
from ncsn_fast.training.settings import TrainingSettings

# Network, parameters, image size, channels, nf, levels, largest sigma, iterations, batch, learning rate, average.
TRAINED = {
    "ncsn-mnist": (OfficialNCSN, 7_638_657, 28, 1, 64, 10, 1, 200_000, 128, 1e-3, 0),
    "ncsn-cifar10": (OfficialNCSN, 30_117_635, 32, 3, 128, 10, 1, 200_000, 128, 1e-3, 0),
    "ncsn-celeba": (OfficialNCSN, 30_117_635, 32, 3, 128, 10, 1, 200_000, 128, 1e-3, 0),
    "ncsn-cifar10-2020": (OfficialNCSN, 30_117_635, 32, 3, 128, 10, 1, 300_000, 128, 1e-3, 0),
    "ncsnv2-cifar10": (NCSNv2, 29_694_083, 32, 3, 128, 232, 50, 300_000, 128, 1e-4, 0.999),
    "ncsnv2-celeba": (NCSNv2, 29_694_083, 64, 3, 128, 500, 90, 210_000, 128, 1e-4, 0.999),
    "ncsnv2-church": (NCSNv2Deeper, 83_445_379, 64, 3, 128, 788, 140, 200_000, 128, 1e-4, 0.999),
    "ncsnv2-bedroom": (NCSNv2Deeper, 83_445_379, 128, 3, 128, 1086, 190, 150_000, 128, 1e-4, 0.999),
    "ncsnv2-tower": (NCSNv2Deeper, 83_445_379, 128, 3, 128, 1086, 190, 150_000, 128, 1e-4, 0.999),
    "ncsnv2-ffhq": (NCSNv2Deepest, 94_132_611, 256, 3, 128, 2311, 348, 80_000, 32, 1e-4, 0.999),
}
# Steps at each level, step size, denoised; then what follows: step size at level 0, passes of the network for an image.
SAMPLED = {
    "ncsn-mnist": (100, 2e-5, False, 0.2, 1000),
    "ncsn-cifar10": (100, 2e-5, False, 0.2, 1000),
    "ncsn-celeba": (100, 2e-5, False, 0.2, 1000),
    "ncsn-cifar10-2020": (100, 2e-5, False, 0.2, 1000),
    "ncsnv2-cifar10": (5, 6.2e-6, True, 155, 1161),
    "ncsnv2-celeba": (5, 3.3e-6, True, 267.3, 2501),
    "ncsnv2-church": (4, 4.9e-6, True, 960.4, 3153),
    "ncsnv2-bedroom": (3, 1.8e-6, True, 649.8, 3259),
    "ncsnv2-tower": (3, 1.8e-6, True, 649.8, 3259),
    "ncsnv2-ffhq": (3, 9e-7, True, 1089.9, 6934),
}
# What is done to images: half of them mirrored (not digits), grey levels spread (for the networks of 2019).
MIRRORED = set(TRAINED) - {"ncsn-mnist"}
DEQUANTISED = {name for name in TRAINED if name.startswith("ncsn-")}
SETTINGS = {field.name for field in dataclasses.fields(TrainingSettings)}


def test_all_published_settings_are_there():
    assert set(TRAINED) <= set(preset_names())


@pytest.mark.parametrize("name", TRAINED)
def test_published_settings(name):
    network, count, size, channels, nf, levels, begin, steps, batch, rate, ema = TRAINED[name]
    each, step_lr, denoise, first_step, passes = SAMPLED[name]
    preset = read_preset(name)
    sampling = preset.pop("sampling")
    settings = TrainingSettings(**{k: v for k, v in preset.items() if k in SETTINGS})
    shape = {k: v for k, v in preset.items() if k not in SETTINGS}
    assert shape == {
        "image_size": size,
        "channels": channels,
        "network": network.__name__.lower(),
        "nf": nf,
        "num_classes": levels,
        "sigma_begin": begin,
        "sigma_end": 0.01,
        **({"flips": True} if name in MIRRORED else {}),
        **({"dequantise": True} if name in DEQUANTISED else {}),
    }
    assert (settings.iterations, settings.batch_size) == (steps, batch)
    # Their rate is constant, nothing is clipped, the average has its decay from the first step on.
    for step in (0, 1, steps - 1):
        assert settings.lr_at(step) == rate and settings.ema_decay_at(step) == ema
    assert settings.grad_clip == 0 and settings.weighting == "sigma2"
    assert settings.checkpoint_every == 5000 and settings.levels == "ladder"
    assert sampling == {
        "n_steps_each": each,
        "step_lr": step_lr,
        "denoise": denoise,
        "init_dist": "uniform",
        "clip": True,
    }
    sigmas = make_sigmas(begin, 0.01, levels)
    assert step_lr * float(sigmas[0] / sigmas[-1]) ** 2 == pytest.approx(first_step, rel=1e-3)
    assert each * levels + denoise == passes
    with torch.device("meta"):
        model = network(channels, nf, levels)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_takes_the_preset(name):
    config = merge_config(preset=name, data="somewhere")
    assert (config.flips, config.dequantise) == (name in MIRRORED, name in DEQUANTISED)


def test_the_table_of_the_page_is_that_of_the_presets():
    page = (Path(__file__).parents[2] / "docs" / "official.md").read_text()
    for name in TRAINED:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        p, sampling = read_preset(name), read_preset(name)["sampling"]
        assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
            f"{p['image_size']}x{p['image_size']}x{p['channels']}",
            f"{p['num_classes']}, {p['sigma_begin']:g}",
            f"{p['iterations']:,}, {p['batch_size']}",
            f"{p['lr']:g}",
            f"{p['ema_decay'] or 'none'}",
            str(sampling["n_steps_each"]),
            f"{sampling['step_lr']:g}",
            "yes" if sampling["denoise"] else "no",
        ]


@pytest.mark.parametrize("name", ["ncsnv2-cifar10", "ncsn-mnist"])
def test_settings_of_a_network_with_a_published_ladder(name):
    network, _, _, channels, _, levels, begin = TRAINED[name][:7]
    model = network(channels, 4, levels, sigmas=make_sigmas(begin, 0.01, levels))
    assert official_settings(model) == official_settings(name) == read_preset(name)["sampling"]
    model.set_sigmas(make_sigmas(begin, 0.02, levels))
    with pytest.raises(ValueError, match="of no published settings"):
        official_settings(model)
    with pytest.raises(ValueError, match="'digits' has no settings for sampling"):
        official_settings("digits")


def test_ladder_of_2019():
    printed = [1, 0.5995, 0.3594, 0.2154, 0.1292, 0.0774, 0.0464, 0.0278, 0.0167, 0.01]
    torch.testing.assert_close(make_sigmas(1.0, 0.01, 10), torch.tensor(printed), rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("ncsnv2")])
def test_the_few_passes_of_the_fine_ladders(name):
    """A setting that sample takes, apart from the paper's."""
    few = few_pass_settings(name)
    assert check_tuned(few) == few == read_few_passes(name)
    assert few["passes"] < read_preset(name)["num_classes"]
    assert "few_passes" not in read_preset(name)


def test_no_few_passes():
    with pytest.raises(ValueError, match="preset 'ncsn-mnist' has no setting for few passes"):
        few_pass_settings("ncsn-mnist")
    with pytest.raises(ValueError, match="this ScoreMLP's ladder has no setting for few passes"):
        few_pass_settings(ScoreMLP(2, sigmas=(1.0, 0.1)))
