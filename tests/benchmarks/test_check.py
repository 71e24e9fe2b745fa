"""``ncsn-fast check``: what is right is ok, what is wrong is named with what to do about it."""

from __future__ import annotations

import json

import pytest
import torch

import ncsn_fast
from ncsn_fast import cli, ops
from ncsn_fast.benchmarks import check
from ncsn_fast.ops import dispatch, extension

NO_NATIVE = extension.status("cpu")
native = pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))


@pytest.fixture
def few(monkeypatch):
    """One dtype, and the cases of two operators."""
    monkeypatch.setattr(check, "DTYPES", (torch.float32,))
    every = check.find_cases

    def some(settings, suites):
        kept = ("max_pool5", "langevin_step_")
        return [case for case in every(settings, suites) if case.group in kept]

    monkeypatch.setattr(check, "find_cases", some)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", *arguments])
    return stop.value.code, capsys.readouterr().out


@native
@pytest.mark.slow
def test_every_operator_of_this_machine():
    rows = check.check(["cpu"])
    assert {row.status for row in rows if row.what != "sampling"} == {"ok"}
    checked = {row.what for row in rows if row.backend == "native"}
    parts = {"philox_": "noise", "conv3x3": "elu_conv3x3"}  # as what they are checked
    parts["add_norm_elu"] = "cond_instance_norm_elu"  # which it is made of on a CPU
    assert {parts.get(op, op) for op in dispatch.OPERATORS} <= checked
    assert all(row.error is not None and row.error < 0.05 for row in rows if row.status == "ok")


def test_the_public_name(few):
    rows = ncsn_fast.check(["cpu"])
    assert [row.status for row in rows if row.what == "noise"][-1] == "ok"
    with pytest.raises(ValueError, match="devices must be of cpu"):
        ncsn_fast.check(["tpu"])


@native
def test_a_wrong_kernel_is_told(few, capsys, monkeypatch):
    right = ops.max_pool5

    def wrong(x, *args, backend=None, **more):
        y = right(x, *args, backend=backend, **more)
        return y * 1.01 if backend == "native" else y

    from ncsn_fast.benchmarks.cases import max_pool5

    monkeypatch.setattr(max_pool5.ops, "max_pool5", wrong)
    status, out = run(capsys)
    assert status == 1
    line = next(line for line in out.splitlines() if "max_pool5" in line)
    assert "native" in line and "wrong" in line and "relative error 1.0e-02" in line
    assert 'to do without it: ncsn_fast.set_backend("reference", "max_pool5")' in out


@native
def test_wrong_noise_is_told(few, capsys, monkeypatch):
    right = ops.philox_normal
    monkeypatch.setattr(ops, "philox_normal", lambda *a, **o: right(*a, **o) + 1e-3)
    status, out = run(capsys, "--json")
    rows = {(row["what"], row["backend"]): row for row in json.loads(out)["check"]}
    assert status == 1
    assert rows["noise", "native"]["status"] == rows["noise", "reference"]["status"] == "wrong"
    assert rows["max_pool5", "native"]["status"] == "ok"
    assert json.loads(out)["info"]["ncsn_fast"] == ncsn_fast.__version__


def test_what_is_not_there_says_why(few, capsys, monkeypatch):
    monkeypatch.setattr(
        dispatch, "why_not", lambda b, *rest: None if b == "reference" else "not built"
    )
    status, out = run(capsys)
    assert status == 0
    line = next(line for line in out.splitlines() if "max_pool5" in line and "native" in line)
    assert "unavailable" in line and "not built" in line
