"""The page on adding an operator is true: what it says is done in a copy of the package, and the operator works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ncsn_fast.ops.algorithms import CONV_ALGORITHMS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_an_operator.md").read_text()
BLOCKS = re.findall(r"^```python\n# (\S+?)(?:, ([^\n]+))?\n(.*?)^```", PAGE, flags=re.M | re.S)


def copy_of_the_package(folder: Path) -> None:
    """With kernels/ and benchmarks/ where an installation has them, and what the operators' tests share."""
    ignore = shutil.ignore_patterns("__pycache__", "results")
    shutil.copytree(ROOT / "ncsn_fast", folder / "ncsn_fast", ignore=ignore)
    for name in ("kernels", "benchmarks"):
        shutil.copytree(ROOT / name, folder / "ncsn_fast" / name, ignore=ignore)
    shutil.copytree(ROOT / "tests" / "support", folder / "tests" / "support", ignore=ignore)
    for file in ("conftest.py", "ops/conftest.py"):
        target = folder / "tests" / file
        target.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "tests" / file, target)
    shutil.copy(ROOT / "pyproject.toml", folder)


def apply(folder: Path, path: str, place: str, text: str) -> None:
    """Does what the first line of a block says."""
    path = f"ncsn_fast/{path}" if path.startswith("kernels/") else path
    file = folder / path
    if not place:
        assert not file.exists(), f"{path} is there already"
        file.write_text(text)
        return
    old = file.read_text()
    if place == "at the end":
        file.write_text(f"{old}\n\n{text}")
        return
    if place == "among the imports":
        before = r"^from __future__ import annotations\n\n"
    else:
        name = re.fullmatch(r"in (\w+)", place)[1]
        before = rf"^{name}\b.* = [\[{{(]\n"
    new, times = re.subn(before, lambda found: found[0] + text, old, flags=re.M)
    assert times == 1, f"{path} has {times} places {place}"
    file.write_text(new)


def python(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code with the copy's package, whatever an editable installation would find."""
    start = (
        "import sys; own = '_frozen_importlib';"
        "sys.meta_path[:] = [f for f in sys.meta_path if f.__module__.startswith(own)];"
        f"import ncsn_fast; assert ncsn_fast.__file__.startswith({str(folder)!r}), ncsn_fast;"
    )
    return subprocess.run(
        [sys.executable, "-c", start + code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_its_tests(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    arguments = ["-q", "-p", "no:cacheprovider", "tests/ops/test_softsign_scale.py"]
    return python(folder, f"import pytest; sys.exit(pytest.main({arguments}))", **environment)


@pytest.mark.slow
def test_the_page_leads_to_an_operator_that_works(tmp_path):
    copy_of_the_package(tmp_path)
    for path, place, text in BLOCKS:
        apply(tmp_path, path, place, text)
    result = run_its_tests(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "15 passed, 10 skipped" in result.stdout  # there is no C++ kernel

    told = python(tmp_path, "from ncsn_fast import info; print(info.render(info.collect()))")
    assert re.search(r"softsign_scale +reference", told.stdout), told.stderr

    pytest.importorskip("triton", reason="triton is not installed")
    result = run_its_tests(tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "10 passed" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("left_out", "interpret"), [("in KERNELS", "0"), ("in OPERATORS", "0"), ("in LIMITS", "1")]
)
def test_without_a_step_it_does_not(tmp_path, left_out, interpret):
    """So the test above can fail."""
    if interpret == "1":
        pytest.importorskip("triton", reason="triton is not installed")
    copy_of_the_package(tmp_path)
    for path, place, text in BLOCKS:
        if place != left_out:
            apply(tmp_path, path, place, text)
    result = run_its_tests(tmp_path, TRITON_INTERPRET=interpret)
    assert result.returncode != 0 and "softsign_scale" in result.stdout + result.stderr


def test_the_table_of_algorithms_is_the_tables():
    rows = ["| " + " | ".join(a.facts().values()) + " |" for a in CONV_ALGORITHMS]
    header = "| " + " | ".join(CONV_ALGORITHMS[0].facts()) + " |"
    assert "\n".join([header, "| --- | --- | --- | --- | --- |", *rows]) in PAGE
