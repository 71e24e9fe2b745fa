"""The package's own names: the command, and modules that have moved."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import ncsn_fast

MOVED = ncsn_fast._MOVED


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
