"""The pages on adding something are walked through: their code runs, and does what they say."""

from __future__ import annotations

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

from ncsn_fast import ScoreMLP, cli
from ncsn_fast.models import registry
from ncsn_fast.sampling import samplers
from ncsn_fast.training.checkpoints import load_model

DOCS = Path(__file__).parents[1] / "docs"


def run(page, monkeypatch):
    """Run the page's blocks of Python one after the other, as a module; what they defined."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    assert blocks
    module = ModuleType(page.removesuffix(".md"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks:
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
