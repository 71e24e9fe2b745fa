"""The README says what is so: its Python runs, its figures are those of the committed results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ncsn_fast.benchmarks.documents import update
from ncsn_fast.ops import dispatch, schema

ROOT = Path(__file__).parent.parent
# Of a checkout; a source distribution has no pictures.
README = (ROOT / "README.md").read_text()
DOCUMENTS = tuple(
    ROOT / name
    for name in (
        "README.md",
        "docs/getting_started.md",
        "docs/performance.md",
        "docs/examples.md",
        "docs/operators.md",
        "docs/official.md",
    )
)
ALL = "\n".join(
    path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
)


@pytest.mark.slow
def test_python_blocks_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert blocks
    for block in blocks:
        result = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "my_ncsn" / "model.safetensors").is_file()


def test_the_pages_show_every_command_and_options_that_are_there():
    typer = pytest.importorskip("typer")
    from ncsn_fast import cli
    from ncsn_fast.benchmarks.command import bench_command

    bench = typer.Typer()
    bench.command()(bench_command)
    commands = {**typer.main.get_command(cli._build_app()).commands}
    commands["bench"] = typer.main.get_command(bench)
    shown = re.findall(r"(?:^|`|-m )ncsn[-_]fast ([a-z]+)([^#`\n]*)", ALL, flags=re.M)
    assert {name for name, _ in shown} == set(commands)
    for name, rest in shown:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= options, (name, rest)


def test_links_lead_to_files():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in link:
                assert (document.parent / link).exists(), (document.name, link)


def test_it_links_to_every_page():
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r"\]\((docs/[^)#]+\.md)", README)) == pages


def test_it_is_one_screen():
    assert len(README.splitlines()) <= 55


def test_figures_come_from_the_results():
    """Tables and pictures of the documents are those that the committed results give; else: make report."""
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert not update(DOCUMENTS, results, images=ROOT / "docs" / "images", check=True)


def test_pictures_and_make_targets_exist():
    for document in DOCUMENTS:
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", document.read_text()):
            assert (document.parent / picture).is_file()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)(?:PYTHON=\S+ )?make ([a-z-]+)", ALL, flags=re.M))
    assert {"demo", "test", "bench", "docs", "gpu-check", "wheels"} <= targets
    for target in targets:
        assert f"\n{target}:" in makefile


def test_the_backends_table_names_every_backend():
    page = (ROOT / "docs" / "installing.md").read_text()
    table = page.split("## Backends")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.M)) == set(dispatch.BACKENDS)


def test_the_page_on_adding_an_operator_names_what_is_there():
    page = (ROOT / "docs" / "adding_an_operator.md").read_text()
    for path in re.findall(r"`((?:ncsn_fast|csrc|kernels|tests|benchmarks)/[\w./]*)`", page):
        path = path.replace("name.", "langevin_step.")
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`([A-Z_]{4,})`", page):
        assert hasattr(dispatch, name) or hasattr(schema, name), name
