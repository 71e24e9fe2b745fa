"""The pages on adding something are walked through: their code runs, and does what they say."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import runpy
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ncsn_fast import NCSNv2, ScoreCNN, ScoreMLP, ScoreModel, cli, save_official, training
from ncsn_fast.models import registry
from ncsn_fast.sampling import samplers
from ncsn_fast.schedules import make_sigmas
from ncsn_fast.training import TrainingSettings, config
from ncsn_fast.training.checkpoints import load_model

DOCS = Path(__file__).parents[1] / "docs"


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)


def run(page, monkeypatch, **names):
    """Run the page's blocks of Python one after the other, as a module; what they defined."""
    assert blocks_of(page)
    module = ModuleType(page.removesuffix(".md"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(names)
    for block in blocks_of(page):
        exec(compile(block, page, "exec"), module.__dict__)
    return vars(module)


@pytest.fixture(autouse=True)
def own_tables(monkeypatch, tmp_path):
    """What a page adds is gone afterwards."""
    monkeypatch.setattr(registry, "NETWORKS", dict(registry.NETWORKS))
    for table in ("SAMPLERS", "OPTIONS"):
        kept = dict(getattr(samplers, table))
        monkeypatch.setattr(samplers, table, kept)
    monkeypatch.chdir(tmp_path)


SITE = runpy.run_path(str(DOCS / "site.py"))


@pytest.mark.parametrize("module", SITE["PUBLIC"])
def test_every_public_name_has_a_docstring(module):
    """They are the API pages of the site."""
    found = importlib.import_module(module)
    names = SITE["public_names"](module)
    assert names
    for name in names:
        value = getattr(found, name)
        assert inspect.getdoc(value), f"{module}.{name}"
        members = vars(value).items() if inspect.isclass(value) else ()
        missing = [
            member
            for member, its in members
            if inspect.isfunction(its)
            and member[0] != "_"
            and not inspect.getdoc(getattr(value, member))
        ]
        assert not missing, f"{module}.{name}: {missing}"
        assert f"::: {module}.{name}" in SITE["api_page"](module)


def test_links_between_pages_hold_on_the_site():
    relinked = SITE["relinked"]
    assert (
        relinked("[a](docs/data.md) [b](../benchmarks/results/x.md)")
        == "[a](data.md) [b](results/x.md)"
    )
    assert (
        relinked("[c](../CHANGELOG.md) [d](sampling.md#e)")
        == "[c](CHANGELOG.md) [d](sampling.md#e)"
    )
    assert (
        relinked("[e](../examples/a_b.md) ![f](../docs/images/g.png)")
        == "[e](a_b.md) ![f](images/g.png)"
    )


def test_adding_a_network(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = run("adding_a_network.md", monkeypatch)
    model = names["network"]
    assert type(model).__name__ == "TinyNet" and names["images"].shape == (4, 1, 8, 8)
    loaded, size = load_model("tiny_run")  # a run of it is found by its name, as the commands do
    assert type(loaded) is type(model) and tuple(size) == (8, 8)
    assert torch.equal(loaded.sigmas, model.sigmas)
    with pytest.raises(ValueError, match=r"x must have shape"):
        model(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "tiny_run", "-n", "2", "--steps", "1", "--out", "x.npy"])
    assert stop.value.code in (0, None) and Path("x.npy").is_file()


def test_adding_a_sampler(monkeypatch):
    names = run("adding_a_sampler.md", monkeypatch)
    assert names["points"].shape == (5, 2) and names["points"].isfinite().all()
    torch.manual_seed(0)
    model = ScoreMLP(sigmas=(2.0, 1.0, 0.5))
    run_of = {"n_steps_each": 3, "seed": 0, "verbose": False}
    same = model.sample(5, sampler="ald", **run_of)
    as_hot = model.sample(5, sampler="tempered", temperature=1.0, **run_of)
    assert torch.allclose(as_hot, same, atol=1e-5)  # Langevin dynamics are of temperature 1
    one = model.sample(1, sampler="tempered", sample_offset=2, **run_of)
    assert torch.allclose(one[0], as_hot[2], atol=1e-6)
    with pytest.raises(ValueError, match="sampler 'ald' takes no temperature"):
        model.sample(1, sampler="ald", temperature=2.0, **run_of)
    assert "tempered" in samplers.markdown_table() and "tempered" in samplers.sampler_help()
    assert "tempered" in samplers.option_help("temperature")


# --- every other page -----------------------------------------------------------------------------

# Pages whose blocks other tests run, or another file.
ELSEWHERE = ("adding_a_network.md", "adding_a_sampler.md", "adding_an_operator.md")
PAGES = [
    path.name
    for path in sorted(DOCS.glob("*.md"))
    if path.name not in ELSEWHERE and blocks_of(path.name)
]
ORACLES = Path(__file__).parent / "oracles" / "official"


@pytest.fixture
def quick(monkeypatch):
    """The pages' runs in seconds: few samples, small images, few steps; torch.compile without its code generator."""
    sample, merge, compiled = ScoreModel.sample, config.merge_config, ScoreModel.compile

    def few(model, n_samples, image_size=None, **options):
        if options.get("n_steps_each"):
            options["n_steps_each"] = 1
        size = (8,) if image_size else ()
        return sample(model, min(n_samples, 2), *size, **{**options, "verbose": False})

    def short(**values):
        return merge(**values, iterations=2, nf=4, batch_size=4, num_classes=2)

    monkeypatch.setattr(ScoreModel, "sample", few)
    monkeypatch.setattr(ScoreModel, "compile", lambda model: compiled(model, backend="eager"))
    monkeypatch.setattr(config, "merge_config", short)
    monkeypatch.setattr(training, "train", functools.partial(training.train, overwrite=True))


def checkpoint_of_cifar10(folder):
    """As the authors' program writes it, of a narrow network with the published noise levels."""
    levels = dict(sigma_begin=50.0, sigma_end=0.01, num_classes=232)
    network = NCSNv2(in_channels=3, nf=4, sigmas=make_sigmas(*levels.values()))
    save_official(network, folder / "checkpoint_300000.pth")
    settings = (ORACLES / "checkpoint_ncsnv2.yml").read_text()
    for name, value in levels.items():
        settings = re.sub(rf"\b{name}: .*", f"{name}: {value}", settings)
    (folder / "cifar10.yml").write_text(settings)


@pytest.mark.filterwarnings("ignore:CUDA is not available")  # of autocast
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, quick, monkeypatch, tmp_path):
    """With what the page speaks of: a network, images, some held out of them, settings, a checkpoint of the authors."""
    checkpoint_of_cifar10(tmp_path)
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = ScoreCNN(in_channels=1, nf=8, sigmas=(1.0, 0.1), image_size=8)
    names = {"torch": torch, "model": model, "images": images, "held_out": images[:4]}
    names["settings"] = TrainingSettings(iterations=2, batch_size=4)
    ran = run(page, monkeypatch, **names)
    assert set(ran) > set(names)
