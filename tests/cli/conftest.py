"""Commands run in this process, and a small run that they start from."""

from __future__ import annotations

import pytest
from support.command_line import SMALL

from ncsn_fast import cli


@pytest.fixture
def ncsn_fast(capsys):
    """``ncsn_fast("train", ...)`` runs a command in this process: its exit status, stdout and stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


@pytest.fixture
def refused(ncsn_fast):
    """Runs a command that must fail as a mistake of the user: one line on stderr, which is returned."""

    def run(*arguments):
        status, out, err = ncsn_fast(*arguments)
        last = err.splitlines()[-1]
        assert status == 2
        assert last.startswith("ncsn-fast: ")
        assert "Traceback" not in err + out
        return last

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *SMALL, "--iterations", "4", "--out", str(out)])
    assert stop.value.code == 0
    return out
