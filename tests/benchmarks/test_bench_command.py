"""Results files, what changed between two, ``ncsn-fast bench``, and the same cases under pytest."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ncsn_fast import cli
from ncsn_fast.benchmarks import measure, suite, test_benchmarks
from ncsn_fast.benchmarks.measure import Timed
from ncsn_fast.benchmarks.results import Result, Run, compare, load, save
from ncsn_fast.benchmarks.suite import Case, Peer, Prepared
from ncsn_fast.ops import dispatch

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
NO_NATIVE = dispatch.why_not("native", "langevin_step_", "cpu")
BLANK = {
    f.name: None if "None" in f.type else "" if f.type == "str" else 1
    for f in dataclasses.fields(Result)
}


def row(us: float | None = None, spread: float = 1.0, **fields: object) -> Result:
    """A result with a time, and quartiles so far from it; or one without."""
    fields = {"peer": "eager", "status": "failed" if us is None else "ok"} | fields
    times = {} if us is None else {"median_us": us, "q1_us": us - spread, "q3_us": us + spread}
    return Result(**BLANK | times | fields)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.json", "x.csv", "x.y.json"])
def test_what_is_saved_is_loaded(tmp_path, name):
    note = 'one, "two"\nthree; µs'
    results = [row(1.23456e-3, note=note, graphs=1), row(note=","), row(2.0, peer="native")]
    run = Run(results, {"python": "3", "devices": [{}]}, {"copy GB/s": 10.5}, ["it, was\nnoisy"])
    written = save(run, tmp_path / name)
    stem = name.rpartition(".")[0]
    assert [path.name for path in written] == [f"{stem}.json", f"{stem}.csv"]
    assert load(written[0]) == run
    assert load(written[1]) == Run(results)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", b"{}"),
        ("x.json", b"[1]"),
        ("x.json", b"not JSON"),
        ("x.json", b'{"results": [{"suite": "ops"}]}'),
        ("x.json", b'{"results": [], "accuracy": 1}'),
        ("x.csv", b"epoch,loss\n1,2\n"),
        ("x.csv", b"epoch,loss\n"),
        ("x.csv", b""),
        ("x.csv", b"\x89PNG\xff\xfe"),
        ("x.json", b"\x89PNG\xff\xfe"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} does not hold benchmark results: "):
        load(tmp_path / name)


# --- what changed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (row(100, 2), row(95, 2), "faster"),
        (row(100, 2), row(105, 2), "slower"),
        (row(100, 2), row(104, 2), "same"),
        (row(100, 2), row(96, 2), "same"),
        (row(100), row(100), "same"),
        (row(100), row(50, status="noisy"), "noisy"),
        (row(100, status="noisy"), row(100), "noisy"),
        (None, row(100), "new"),
        (row(100), None, "gone"),
        (row(100), row(status="wrong"), "ok -> wrong"),
        (row(status="failed"), row(100), "failed -> ok"),
        (row(status="failed"), row(status="failed"), "not timed"),
    ],
)
def test_verdicts(before, after, verdict):
    (change,) = compare([before] * (before is not None), [after] * (after is not None))
    assert (change.before, change.after, change.verdict) == (before, after, verdict)


def test_changes_are_of_rows_with_one_key():
    before = [row(1.0), row(1.0, peer="native"), row(1.0, dtype="float16")]
    after = [row(9.0, dtype="float16"), row(9.0, layout="channels_last"), row(9.0)]
    assert [change.verdict for change in compare(before, after)] == [
        "slower",
        "gone",
        "slower",
        "new",
    ]
    change = compare([row(100, 2)], [row(110, 3)])[0]
    assert (change.ratio, change.beyond_spread) == (1.1, 5.0)
    assert compare([row(110, 2)], [row(100, 3)])[0].beyond_spread == -5.0


# --- ncsn-fast bench ------------------------------------------------------------------------------


@pytest.fixture
def bench(capsys, monkeypatch):
    """``bench("--quick", ...)`` runs the command: its exit status, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return stop.value.code, out, err

    return run


@pytest.fixture
def cases(monkeypatch):
    """The command finds these cases, and a machine whose limits are known."""
    x = torch.ones(2)
    found = []

    def peer(name, factor):
        prepared = Prepared(Timed(lambda: x * factor), lambda: (x * factor,), "pytorch")
        return Peer(name, "contiguous", lambda: prepared)

    for name in ("first", "second", "third"):
        peers = peer("eager", 2), peer("native", 2), peer("compile", 3)
        expected = lambda: (x * 2,)  # noqa: E731
        found.append(
            Case("ops", "made up", name, (2,), torch.float32, peers, expected, 1e-6, bytes=8)
        )
    monkeypatch.setattr(suite, "find_cases", lambda settings, suites: found)
    limits = {"copy GB/s": 10.0, "matmul float32 GFLOP/s": 100.0}
    monkeypatch.setattr(suite, "measure_limits", lambda clock, dtypes: dict(limits))
    monkeypatch.setattr(suite, "QUICK_EFFORT", suite.Effort(0.0, 3))
    return found


SHORT = ("--quick", "--device", "cpu")


def test_the_table_has_a_legend_and_says_what_is_wrong(bench, cases, tmp_path):
    out = tmp_path / "new" / "x.csv"
    status, text, _ = bench(*SHORT, "--out", out)
    assert status == 0
    for line in ("limits: copy 10 GB/s", "vs eager  times as fast", "~         noisy"):
        assert line in text
    assert text.index("ops: made up first 2 float32") < text.index("ops: made up second 2 float32")
    wrong = "compile contiguous wrong: relative error 5.0e-01, tolerance 1e-06"
    assert text.count(wrong) == 3 and "wrong: 3 of 9 rows" in text
    assert f"results: {out.with_suffix('.json')}" in text and f"results: {out}" in text
    held = load(out.with_suffix(".json"))
    assert held.results == load(out).results
    assert [r.status for r in held.results if r.peer == "compile"] == ["wrong"] * 3
    assert held.limits["copy GB/s"] == 10.0 and held.machine["ncsn_fast"]
    assert not {"imported_from", "shadows"} & held.machine.keys()  # paths of a disk


def test_match_takes_cases_by_their_label(bench, cases):
    _, text, _ = bench(*SHORT, "--match", "up second")
    assert "; 1 cases" in text and "second" in text and "third" not in text


def test_a_machine_that_changes_its_speed_is_told(bench, cases, monkeypatch, tmp_path):
    rates = iter([10.0, 7.0])
    monkeypatch.setattr(suite, "measure_limits", lambda clock, dtypes: {"copy GB/s": next(rates)})
    _, text, _ = bench(*SHORT, "--out", tmp_path / "x.json")
    warning = "the machine changed its speed: copy GB/s was 10 at the start, 7 at the end"
    assert f"warning: {warning}" in text
    assert load(tmp_path / "x.json").warnings == [warning]


def test_no_time_left_is_told(bench, cases, tmp_path):
    status, text, _ = bench(*SHORT, "--minutes", "-1", "--out", tmp_path / "x.json")
    assert status == 0 and "not run: 9 of 9 rows" in text
    assert {r.status for r in load(tmp_path / "x.csv").results} == {"not run"}


def test_an_interruption_keeps_what_was_measured(bench, cases, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    cases[1] = dataclasses.replace(cases[1], expected=interrupt)
    status, text, err = bench(*SHORT, "--out", tmp_path / "x.json")
    assert (status, err.splitlines()[-1]) == (130, "ncsn-fast: interrupted")
    assert "made up first" in text and "made up third" not in text
    for name in ("x.json", "x.csv"):
        assert [r.name for r in load(tmp_path / name).results] == ["first"] * 3


def test_compare_prints_verdicts(bench, tmp_path):
    before = [row(100, name="a"), row(100, name="b"), row(100, name="c"), row(9, name="d")]
    after = [row(50, name="a"), row(150, name="b"), row(100, name="c"), row(name="e")]
    paths = tmp_path / "before.json", tmp_path / "after.csv"
    for path, results in zip(paths, (before, after), strict=True):
        save(Run(results), path)
    status, text, _ = bench("--compare", *paths)
    lines = [line.split() for line in text.splitlines()]
    assert status == 0
    assert {(line[0], line[-1]) for line in lines if line[0] in tuple("abcde")} == {
        ("a", "faster"),
        ("b", "slower"),
        ("d", "gone"),
        ("e", "new"),
    }
    assert next(line for line in lines if line[0] == "b")[-4] == "1.50"
    assert lines[-1] == "1 faster, 1 slower, 1 same, 1 gone, 1 new".split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "speed"], "suite must be one of ops, model, train, sample, got 'speed'"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--device", "gpu"], 'device must be "auto", "cpu", "cuda" or "cuda:N", got \'gpu\''),
        (["--device", "cuda:99"], "device 'cuda:99' is not there"),
        (["--batch", "1,b"], "batch must be integers with commas, got '1,b'"),
        (["--batch", "4,0"], "batch sizes must be at least 1, got '4,0'"),
        (["--out", "x.txt"], "--out must end in .json or .csv, got x.txt"),
        (["--out", "{tmp}/text/x.json"], "{tmp}/text"),
        (["--suite", "ops", "--match", "nowhere"], "no case of ops holds 'nowhere' in its label"),
        (["--minutes", "few"], "Invalid value for '--minutes'"),
        (["--compare", "{tmp}/text"], "--compare takes two results files, got 1"),
        (["--compare"], "--compare takes two results files, got 0"),
        (["--compare", "{tmp}/no", "{tmp}/no"], "{tmp}/no: No such file or directory"),
        (["--compare", "{tmp}/text", "{tmp}/text"], "{tmp}/text does not hold benchmark results"),
        (["--report"], "--report takes results files, got none"),
        (["{tmp}/text"], "files go with --report or --compare, got {tmp}/text"),
    ],
)
def test_mistakes(bench, cases, tmp_path, arguments, message):
    (tmp_path / "text").write_text("text")
    if "--match" not in arguments:
        cases[:] = [None] * 3  # which cannot be measured
    status, out, err = bench(*(a.format(tmp=tmp_path) for a in arguments))
    assert status == 2 and out == ""
    (line,) = err.splitlines()
    assert line.startswith("ncsn-fast: ") and message.format(tmp=tmp_path) in line


@pytest.mark.slow
def test_a_real_case(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "LIMIT_SECONDS", 0.0)
    chosen = ["--suite", "ops", "--match", "langevin_step_ step 1x3x32x32", "--batch", 1]
    out = tmp_path / "x.json"
    status, text, _ = bench(*SHORT, *chosen, "--out", out)
    results = load(out).results
    assert status == 0 and results == load(tmp_path / "x.csv").results
    peers = {"eager": "pytorch", "compile": "inductor", "reference": "reference"}
    if NO_NATIVE is None:
        peers["native"] = "native"
    assert {(r.peer, r.layout): r.backend for r in results} == {
        (peer, layout): ran
        for peer, ran in peers.items()
        for layout in ("contiguous", "channels_last")
    }
    for r in results:
        assert r.status in ("ok", "noisy") and r.median_us > 0 and r.memory_mib is not None
        assert r.shape == "1x3x32x32" and r.limit_share > 0
        assert (r.graphs, r.out_layout) == (1 if r.peer == "compile" else None, r.layout)
        assert f" {r.peer} " in text
    assert min(r.speedup for r in results if r.peer == "eager") <= 1.0


# --- pytest benchmarks ----------------------------------------------------------------------------


def test_under_pytest_a_peer_without_a_time_fails_with_the_reason(monkeypatch, cases):
    handed = []
    benchmark = SimpleNamespace(
        extra_info={}, _make_stats=lambda calls: SimpleNamespace(update=handed.append)
    )
    monkeypatch.setattr(test_benchmarks, "_measured", {})
    monkeypatch.setattr(test_benchmarks, "_benches", {})
    settings = suite.Settings(torch.device("cpu"), (torch.float32,), quick=True)
    eager, _, wrong = cases[0].peers
    test_benchmarks.test_benchmark(benchmark, settings, cases[0], eager)
    assert len(handed) == benchmark.extra_info["rounds"] == 3
    with pytest.raises(pytest.fail.Exception, match="wrong: relative error 5.0e-01"):
        test_benchmarks.test_benchmark(benchmark, settings, cases[0], wrong)
    assert len(handed) == 3


@pytest.mark.slow
@pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))
def test_pytest_runs_the_cases(tmp_path):
    pytest.importorskip("pytest_benchmark")
    held = tmp_path / "x.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider"]
    command += ["--benchmark-only", f"--benchmark-json={held}", "--quick", "--device", "cpu"]
    command += ["--suite", "ops", "--batch", "1", "-k", "langevin_step_ and native"]
    # The peers of a case are measured together; without torch.compile, whose row is not asked for, that is fast.
    env = os.environ | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    # pytest-benchmark measures nothing in a worker of pytest-xdist, for which it would take this process.
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(held.read_text())
    assert found["machine_info"]["ncsn_fast"]["operators"]
    layouts = {}
    for benchmark in found["benchmarks"]:
        info = benchmark["extra_info"]
        layouts[info["layout"]] = info
        assert benchmark["group"] == "ops: langevin_step_ step 1x3x32x32 float32"
        assert (info["backend"], info["peer"], info["shape"]) == ("native", "native", "1x3x32x32")
        assert benchmark["stats"]["rounds"] == info["rounds"]
        assert benchmark["stats"]["median"] * 1e6 == pytest.approx(info["median_us"], rel=1e-3)
    assert set(layouts) == {"contiguous", "channels_last"}
