"""The examples run, in a reduced form, and the notebook is made of them."""

from __future__ import annotations

import json
import runpy
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
WRITES = {
    "quick_start": ["digits.png", "checkpoint.pt", "my_ncsn/model.safetensors"],
    "checkerboard": ["samples.png", "fields.png"],
    "two_gaussians": ["ladder.png", "perturbed.png", "loss.png", "fields.png", "samples.png"],
    "images_28x28": ["ald.png", "pc.png", "ode.png", "data.png"],
    "own_network": [],
    "moving_from_lucid": ["lucid.safetensors"],
    "official_checkpoint": ["samples.png", "interpolation.png", "model/model.safetensors"],
}
maker = runpy.run_path(str(EXAMPLES / "make_notebook.py"))


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*WRITES, "make_notebook"}


@pytest.mark.parametrize("name", WRITES)
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    for file in WRITES[name]:
        (written,) = tmp_path.glob(f"example_*/{file}")
        if written.suffix == ".png":
            with Image.open(written) as picture:
                picture.verify()


def test_the_notebook_is_made_of_the_scripts():
    """Else: python examples/make_notebook.py."""
    text = maker["NOTEBOOK"].read_text()
    assert text == maker["notebook"]()
    code = ["".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    compile("\n".join(code), "tour.ipynb", "exec")
    for name in maker["SCRIPTS"]:
        script = (EXAMPLES / f"{name}.py").read_text()
        lines = [line for line in script.splitlines() if line and not line.startswith("#")]
        together = "\n".join(code)
        assert all(line in together for line in lines)
