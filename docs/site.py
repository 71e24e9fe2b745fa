"""Puts the pages of the site together, in build/site/pages: README.md, docs/, pages of examples/, results, the API.

Belongs here: where a page of the site comes from. Does not belong here: how it looks (``mkdocs.yml``). Run by
``make docs``.
"""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "site" / "pages"
# Modules whose ``__all__`` is what users import.
PUBLIC = (
    "ncsn_fast",
    "ncsn_fast.ops",
    "ncsn_fast.nn",
    "ncsn_fast.data",
    "ncsn_fast.sampling",
    "ncsn_fast.training",
    "ncsn_fast.evaluation",
    "ncsn_fast.plots",
)


def public_names(module: str) -> list[str]:
    """The names of a module that have a page entry: classes and functions of its ``__all__``."""
    found = importlib.import_module(module)
    return [name for name in found.__all__ if callable(getattr(found, name))]


def api_page(module: str) -> str:
    """The page of a module, from its docstrings."""
    entries = [f"::: {module}.{name}\n" for name in public_names(module)]
    head = f"# {module}\n\n{(importlib.import_module(module).__doc__ or '').splitlines()[0]}\n"
    return "\n".join([head, *entries])


def relinked(text: str) -> str:
    """Links of README.md and docs/, which are those of the repository, as links of the site."""
    text = re.sub(r"\]\((?:\.\./)?docs/", "](", text)
    text = re.sub(r"\]\(\.\./examples/(\w+\.md)", r"](\1", text)
    text = re.sub(r"\]\(\.\./benchmarks/results/", "](results/", text)
    text = re.sub(r"\]\((?:\.\./)?benchmarks/results/", "](results/", text)
    return re.sub(r"\]\((?:\.\./)?(CHANGELOG|CONTRIBUTING|SECURITY)\.md", r"](\1.md", text)


def written(names: list[str]) -> list[str]:
    """The pages among the files of a folder, which become pages of the site; the others are copied."""
    return [name for name in names if name.endswith(".md")]


def main() -> None:
    shutil.rmtree(PAGES, ignore_errors=True)
    (PAGES / "results").mkdir(parents=True)
    (PAGES / "api").mkdir()
    shutil.copytree(ROOT / "docs" / "images", PAGES / "images")
    shutil.copytree(ROOT / "examples", PAGES / "examples", ignore=lambda _, names: written(names))
    shutil.copy(ROOT / "CITATION.cff", PAGES)
    pages = {"index.md": ROOT / "README.md"}
    pages |= {path.name: path for path in (ROOT / "docs").glob("*.md")}
    pages |= {path.name: path for path in (ROOT / "examples").glob("*.md")}
    pages |= {f"{n}.md": ROOT / f"{n}.md" for n in ("CHANGELOG", "CONTRIBUTING", "SECURITY")}
    for name, path in pages.items():
        (PAGES / name).write_text(relinked(path.read_text(encoding="utf-8")), encoding="utf-8")
    for table in (ROOT / "benchmarks" / "results").glob("*.md"):
        shutil.copy(table, PAGES / "results")
    for module in PUBLIC:
        (PAGES / "api" / f"{module}.md").write_text(api_page(module), encoding="utf-8")


if __name__ == "__main__":
    main()
