"""What the tests of the operators share: the fixture ``backend``."""

from __future__ import annotations

import pytest
from support.backends import BACKENDS

from ncsn_fast.ops.extension import interpreting


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that has the operator on the CPU; see ``support/backends.py``."""
    return request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In Triton's interpreter only the tests of the fixture are run, on Triton."""
    if not interpreting():
        return
    here = str(config.rootpath / "tests" / "ops")
    ours = [item for item in items if str(item.path).startswith(here)]
    others = [item for item in ours if _backend_of(item) != "triton"]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


def _backend_of(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("backend")
