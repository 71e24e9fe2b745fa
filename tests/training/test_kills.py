"""Runs that are killed at any moment, told to stop, or trained in two processes end as if nothing had happened.

The processes fork from one (``killed.py``), which imports torch once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not (hasattr(os, "fork") and torch.distributed.is_available()), reason="needs fork and gloo"
)
PARTS = ("one", "two", "terminated", "refused")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What ``killed.py`` has seen, by the names of its parts."""
    script = Path(__file__).with_name("killed.py")
    result = subprocess.run(
        [sys.executable, script, tmp_path_factory.mktemp("killed"), *PARTS],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    found = map(json.loads, result.stdout.splitlines())
    return {part.pop("part"): part for part in found}


def test_a_run_that_is_killed_a_dozen_times_ends_with_the_same_bits(seen):
    """Weights, averages, optimiser, losses and files; nothing is left of what was being written."""
    one = seen["one"]
    assert one["kills"].count(-9) >= 12 and set(one["kills"]) <= {-9, 0}
    assert one["reached"] == sorted(one["reached"]) and one["reached"][-1] > 0
    assert one["alike"] and not one["left"]


def test_two_processes_that_are_killed_end_with_the_same_bits(seen):
    """One is killed, the other says that it has lost it, and both go on."""
    two = seen["two"]
    assert two["whole"] == two["last"] == [0, 0]
    assert two["kills"] == [[-9, 1]] * 3 and two["told"] == 3
    assert two["alike"]


def test_processes_with_the_same_batch_train_the_same(seen):
    """One and two, from the start, and one that goes on with what two began; with and without parts."""
    two = seen["two"]
    assert two["half"] == [0, 0] and two["alone"] == [0, 0] and two["images"] == [0, 0, 0]
    losses = two["losses"]
    assert len(losses["whole"]) == 24 and len(losses["images"]) == 4
    assert losses["whole"] == pytest.approx(losses["alone"], rel=1e-4)
    assert losses["half"] == pytest.approx(losses["alone"], rel=1e-4)
    assert losses["images"] == pytest.approx(losses["image"], rel=1e-4)


def test_sigterm_writes_a_checkpoint_and_has_a_status_of_its_own(seen):
    """In one process; and in one of two, which tells the other."""
    told = seen["terminated"]
    assert told["one"] == [143] and told["two"] == [143, 143]
    assert told["one_whole"] and told["two_whole"]


def test_what_processes_cannot_do_together_is_refused(seen):
    status, text = seen["refused"]["port"]
    assert status == 1 and "could not join the others at 127.0.0.1" in text
    assert "on a port that is free" in text
    statuses, text = seen["refused"]["odd"]
    assert statuses == [1, 1]
    assert "batch_size must be a multiple of 2, for 2 processes with accumulate 1, got 5" in text
