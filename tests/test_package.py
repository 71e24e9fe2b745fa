"""The package's own names: the command, and modules that have moved."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ncsn_fast

MOVED = ncsn_fast._MOVED
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("old", MOVED)
def test_a_moved_module_is_found_by_its_old_name(old):
    new = importlib.import_module(f"ncsn_fast.{MOVED[old]}")
    assert importlib.import_module(f"ncsn_fast.{old}") is new
    assert new.__spec__.name == new.__name__ == f"ncsn_fast.{MOVED[old]}"


def test_other_names_are_not_found():
    with pytest.raises(ModuleNotFoundError, match="ncsn_fast.nothing"):
        importlib.import_module("ncsn_fast.nothing")


def test_the_package_is_a_command():
    command = [sys.executable, "-m", "ncsn_fast", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"ncsn_fast {ncsn_fast.__version__}\n")


def test_the_version_stands_in_one_place():
    """The package's; metadata are read from it, the changes begin with it, and a release's tag must be it."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project]")[1]
    assert 'dynamic = ["version"]' in project and 'attr = "ncsn_fast.__version__"' in project
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest[1] == ncsn_fast.__version__
