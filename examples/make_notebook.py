"""Makes ``tour.ipynb`` of the scripts here: their cells, and the pictures that they write.

A line ``# %%`` begins a cell of code, ``# %% [markdown]`` one of text. Run it after a change of a script; a test says
when it was forgotten.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
NOTEBOOK = HERE / "tour.ipynb"
SCRIPTS = ("two_gaussians", "checkerboard", "quick_start", "images_28x28", "own_network")
PICTURE = re.compile(r'OUT / (f?"[^"]+\.png")')


def cells_of(script: str) -> list[tuple[str, str]]:
    """Kind and text of each cell of a script; after one that writes a picture, a cell that shows it."""
    cells = []
    for kind, body in re.findall(r"# %%( \[markdown\])?\n(.*?)(?=# %%|\Z)", script, flags=re.S):
        if kind:
            cells.append(("markdown", "\n".join(line[2:] for line in body.strip().splitlines())))
            continue
        cells.append(("code", body.strip()))
        shown = [f"display(Image(str(OUT / {name})))" for name in PICTURE.findall(body)]
        if shown and "for " not in body:
            cells.append(("code", "\n".join(shown)))
    return cells


def notebook() -> str:
    """The notebook as JSON, always the same for the same scripts."""
    cells = [("code", "from IPython.display import Image, display")]
    cells += [cell for name in SCRIPTS for cell in cells_of((HERE / f"{name}.py").read_text())]
    code = {"execution_count": None, "outputs": []}
    contents = {
        "cells": [
            {
                "cell_type": kind,
                "id": f"cell-{i}",
                "metadata": {},
                "source": text.splitlines(keepends=True),
                **(code if kind == "code" else {}),
            }
            for i, (kind, text) in enumerate(cells)
        ],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(contents, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook())
