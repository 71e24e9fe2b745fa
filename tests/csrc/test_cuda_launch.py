"""How kernels are launched, on a CUDA runtime that stands in for the real one: threads, errors, shared memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cuda_host import compile_for_host

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    return compile_for_host(
        TESTS / "cuda_launch.cpp", tmp_path_factory.mktemp("launch"), TESTS / "fake_cuda"
    )


def test_two_threads_do_not_take_shared_memory_from_each_other(launch):
    assert launch.two_threads() == 0


def test_shared_memory_is_asked_for_at_most_once(launch):
    assert launch.times_set() <= 1


def test_a_failed_launch_leaves_no_error_for_the_next(launch):
    assert launch.after_a_failure() == 0


def test_the_error_of_another_call_is_not_this_launchs(launch):
    assert launch.of_somebody_else() == 0
