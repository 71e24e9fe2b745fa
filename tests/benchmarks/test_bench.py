"""The benchmarks' promises: right before fast, peers in turns, noise told, every peer in the mode that its name says.

Where times decide, a clock takes them from the peers, so that nothing hangs on the speed of a machine.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import subprocess
import sys
import threading
import time
from collections import namedtuple
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from ncsn_fast import NCSN, ops
from ncsn_fast.benchmarks import measure, peers, plain_torch, suite
from ncsn_fast.benchmarks.cases import (
    avg_pool5,
    cond_instance_norm_elu,
    conv3x3_mean_pool,
    elu_conv3x3,
    forward,
    langevin_step,
    layers,
    max_pool5,
    norm_elu_conv3x3,
    sampling,
    training,
)
from ncsn_fast.benchmarks.measure import Clock, Load, Timed, Times, interleaved, noise_of
from ncsn_fast.benchmarks.suite import Bench, Case, Effort, Peer, Prepared, Settings, WrongMode
from ncsn_fast.ops import dispatch
from ncsn_fast.ops.tolerances import NORMAL, TOLERANCES, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, F32 = torch.device("cpu"), torch.float32
X = torch.tensor([3.0, 4.0])
LIMITS = {"copy GB/s": 10.0, "matmul float32 GFLOP/s": 100.0}
FACTS = dict.fromkeys(("device_name", "torch", "triton", "ncsn_fast", "commit", "date"), "?")
NO_NATIVE = dispatch.why_not("native", "langevin_step_", "cpu")
needs_native = pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))


class ToldClock(Clock):
    """On it a call takes as many seconds as it returns."""

    def turn(self, timed, calls):
        return timed.call()

    def calls_a_turn(self, timed):
        return 1


def make_bench(clock=ToldClock, rounds=4):
    return Bench(clock(CPU), LIMITS, FACTS | {"threads": 1}, Effort(0.0, rounds))


def make_peer(name, *seconds, layout="contiguous", outputs=(X,), **facts):
    """A peer whose calls take these seconds, over and over."""
    ticks = itertools.cycle(seconds)
    prepared = Prepared(Timed(lambda: next(ticks)), lambda: outputs, "pytorch", **facts)
    return Peer(name, layout, lambda: prepared)


def make_case(*peers, name="forward", **fields):
    fields = {"expected": lambda: (X.double(),), "tolerance": 1e-6, "bytes": 8} | fields
    return Case("ops", "made up", name, (2,), F32, peers, **fields)


def fail(message="no\n  memory"):
    raise RuntimeError(message)


@pytest.fixture(autouse=True)
def load(monkeypatch):
    """Other processes use this share of the CPUs; none, if a test says nothing else."""
    share = SimpleNamespace(others=0.0)
    monkeypatch.setattr(suite, "Load", lambda: nullcontext(share))
    return share


# --- right before fast ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "note"),
    [
        ((X * 1.01,), "relative error 1.0e-02, tolerance 1e-06"),
        ((X * torch.nan,), "relative error nan, tolerance 1e-06"),
        ((X / 0,), "relative error inf, tolerance 1e-06"),
    ],
)
def test_a_wrong_peer_is_not_timed_and_says_how_wrong_it_is(outputs, note):
    called = []
    timed = Timed(lambda: called.append("timed"))
    wrong = Peer("native", "contiguous", lambda: Prepared(timed, lambda: outputs, "native"))
    row, other = make_bench().run(make_case(wrong, make_peer("eager", 1.0)))
    assert (row.status, row.note, called) == ("wrong", note, [])
    assert (row.median_us, row.q1_us, row.rounds, row.speedup, row.gb_per_s) == (None,) * 5
    assert (other.status, other.median_us) == ("ok", 1e6)


@pytest.mark.parametrize("bad", [X * 1.01, X * torch.nan])
@pytest.mark.parametrize("first", [True, False])
def test_one_wrong_output_is_enough(bad, first):
    outputs = (bad, X) if first else (X, bad)
    case = make_case(make_peer("eager", 1.0, outputs=outputs), expected=lambda: (X, X))
    assert make_bench().run(case)[0].status == "wrong"


@pytest.mark.parametrize("outputs", [(), (X, X), (X[:1],)])
def test_outputs_of_another_number_or_shape_fail(outputs):
    (row,) = make_bench().run(make_case(make_peer("eager", 1.0, outputs=outputs)))
    assert (row.status, row.median_us) == ("failed", None)
    assert row.note.startswith("ValueError: ")


@pytest.mark.parametrize(
    "prepare",
    [
        fail,
        lambda: Prepared(Timed(lambda: 1.0), fail, "native"),
        lambda: Prepared(Timed(fail), lambda: (X,), "native"),
        lambda: Prepared(Timed(lambda: 1.0, fail), lambda: (X,), "native"),
    ],
    ids=["preparing", "outputs", "call", "before"],
)
def test_a_peer_that_raises_is_failed_and_the_others_are_measured(prepare):
    raising = Peer("native", "contiguous", prepare)
    rows = make_bench().run(make_case(make_peer("eager", 2.0), raising, make_peer("compile", 1.0)))
    assert [r.status for r in rows] == ["ok", "failed", "ok"]
    assert rows[1].note == "RuntimeError: no memory" and rows[1].median_us is None
    assert [rows[0].median_us, rows[2].median_us] == [2e6, 1e6]


def test_a_peer_that_raises_while_it_is_timed_is_failed_and_the_others_are_measured():
    calls = itertools.count()
    timed = Timed(lambda: 1.0 if next(calls) < 3 else fail())
    raising = Peer("native", "contiguous", lambda: Prepared(timed, lambda: (X,), "native"))
    rows = make_bench().run(make_case(make_peer("eager", 2.0), raising, make_peer("compile", 1.0)))
    assert [r.status for r in rows] == ["ok", "failed", "ok"]
    assert rows[1].note == "RuntimeError: no memory" and rows[1].median_us is None
    assert [rows[0].rounds, rows[2].rounds] == [4, 4]


def test_speedups_are_over_the_fastest_eager_peer_that_is_right():
    rows = make_bench().run(
        make_case(
            make_peer("eager", 4.0),
            make_peer("eager", 2.0, layout="channels_last"),
            make_peer("eager", 0.5, layout="other", outputs=(X + 1,)),
            make_peer("compile", 1.0),
            make_peer("native", 8.0),
        )
    )
    assert [r.speedup for r in rows] == [0.5, 1.0, None, 2.0, 0.25]
    (alone,) = make_bench().run(make_case(make_peer("native", 1.0)))
    assert alone.status == "ok" and alone.speedup is None


def test_rates_are_shares_of_the_limits():
    (row,) = make_bench().run(make_case(make_peer("eager", 4.0), bytes=10**10))
    assert (row.gb_per_s, row.gflop_per_s, row.limit_share) == (2.5, None, 0.25)
    (row,) = make_bench().run(make_case(make_peer("eager", 4.0), bytes=0, flops=2 * 10**11))
    assert (row.gb_per_s, row.gflop_per_s, row.limit_share) == (None, 50.0, 0.5)


def test_the_time_limit_leaves_cases_out_and_says_so(monkeypatch):
    minutes = [0.0]
    monkeypatch.setattr(suite, "time", SimpleNamespace(monotonic=lambda: 60 * minutes[0]))
    peer = make_peer("eager", 1.0)
    cases = [make_case(peer, name=name) for name in "abc"]
    runs = suite.run_all(make_bench(), cases, 2.5, lambda case, what: None)
    first = next(runs)
    minutes[0] = 3.0
    found = [first, *runs]
    assert [case.name for case, _ in found] == ["a", "b", "c"]
    assert [rows[0].status for _, rows in found] == ["ok", "not run", "not run"]
    assert found[2][1][0].note == "the 2.5 minutes were over"
    assert found[2][1][0].median_us is None


# --- the clock ------------------------------------------------------------------------------------


def test_every_round_holds_every_peer_in_a_new_order():
    order = []
    timed_calls = [Timed(lambda i=i: order.append(i) or float(i)) for i in range(3)]
    *_, times = interleaved(timed_calls, ToldClock(CPU), seconds=0.0, min_rounds=4)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert rounds == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]
    assert [t.rounds for t in times] == [[0.0] * 4, [1.0] * 4, [2.0] * 4]


def test_rounds_end_when_the_time_is_over_but_not_before_the_least():
    def rounds(seconds, least):
        timed = [Timed(lambda: 1.0)] * 2
        return len([*interleaved(timed, ToldClock(CPU), seconds=seconds, min_rounds=least)])

    assert rounds(0.0, 3) == 3
    assert rounds(1e9, 3) == measure.MAX_ROUNDS


def test_short_calls_are_repeated_within_a_turn_and_a_round_is_their_mean():
    calls = []
    timed = Timed(lambda: calls.append(1))
    assert Clock(CPU).calls_a_turn(timed) > 1
    assert Clock(CPU).calls_a_turn(Timed(lambda: time.sleep(0.02))) == 1
    calls.clear()
    Clock(CPU).turn(timed, 7)
    assert len(calls) == 7
    assert Clock(CPU).turn(Timed(lambda: time.sleep(0.01)), 4) < 4 * 0.01 * 0.9


def test_what_comes_before_a_call_is_not_timed():
    order = []
    before = lambda: (time.sleep(0.05), order.append("before"))  # noqa: E731
    untimed = Clock(CPU).turn(Timed(lambda: order.append("call"), before), 3)
    assert order == ["before", "call"] * 3
    timed = Clock(CPU).turn(Timed(lambda: time.sleep(0.05)), 1)
    assert untimed < 0.05 <= timed


def test_median_quartiles_and_spread():
    times = Times([1.0, 5.0, 2.0, 4.0, 3.0])
    assert (times.median, times.quartiles) == (3.0, (2.0, 4.0))
    assert times.spread == pytest.approx(2 / 3)
    assert (Times([2.0]).quartiles, Times([2.0]).spread) == ((2.0, 2.0), 0.0)
    (row,) = make_bench(rounds=5).run(make_case(make_peer("eager", 1.0, 5.0, 2.0, 4.0, 3.0)))
    assert (row.q1_us, row.median_us, row.q3_us, row.rounds) == (2e6, 3e6, 4e6, 5)


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.zeros(1 << 20)  # 4 MiB
    assert measure.peak_memory(lambda: (x + 1) * (x + 2) * 3, CPU) == 12 << 20
    assert measure.peak_memory(lambda: x.add_(x), CPU) == 0


# --- noise ----------------------------------------------------------------------------------------


def test_noise_is_told_in_words():
    quiet, wide = Times([1.0] * 4), Times([1.0, 1.0, 1.5, 1.5])
    load = measure.NOISY_LOAD
    assert noise_of(quiet, load) == ""
    assert noise_of(quiet, 2 * load) == "other processes used 20% of the CPUs"
    assert noise_of(wide, 0.0) == "the quartiles lie 40% of the median apart"
    assert noise_of(wide, 2 * load) == "; ".join((noise_of(quiet, 2 * load), noise_of(wide, 0.0)))
    assert noise_of(Times([1.0, 1.0, 1.1, 1.1]), 0.0) == ""


def test_noisy_rows_keep_their_time_but_not_their_status(load):
    case = make_case(make_peer("eager", 1.0), make_peer("native", 1.0, 1.0, 3.0, 3.0))
    quiet, uneven = make_bench().run(case)
    assert (quiet.status, quiet.note) == ("ok", "")
    assert (uneven.status, uneven.median_us) == ("noisy", 2e6)
    assert "quartiles" in uneven.note and "processes" not in uneven.note
    load.others = 0.5
    assert [r.note.split(";")[0] for r in make_bench().run(case)] == [
        "other processes used 50% of the CPUs"
    ] * 2


def test_load_sees_another_process():
    script = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as burner:
        try:
            burner.stdout.readline()
            with Load() as load:
                time.sleep(0.5)
        finally:
            burner.kill()
    assert 0.5 / os.cpu_count() <= load.others <= 1.1


def test_load_does_not_see_its_own_process():
    block, end = bytes(1 << 20), time.perf_counter() + 0.5

    def burn():
        while time.perf_counter() < end:
            hashlib.sha256(block)  # without the interpreter's lock

    threads = [threading.Thread(target=burn) for _ in range(os.cpu_count())]
    own, start = time.process_time(), time.perf_counter()
    with Load() as load:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    own, wall = time.process_time() - own, time.perf_counter() - start
    assert load.others <= 1.1 - own / wall / os.cpu_count()


def test_load_is_what_was_busy_less_ones_own_and_counts_no_guest_twice(monkeypatch):
    cpu = namedtuple("cpu", "user system idle iowait guest")
    readings = [(cpu(5, 1, 50, 2, 3), 1.0), (cpu(12, 2, 60, 5, 5), 3.0)] * 2
    whole, own = (iter(column) for column in zip(*readings, strict=True))
    clock = iter([0.0, 2.0, 10.0, 10.1])
    process = SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=next(own), system=0.5))
    monkeypatch.setattr("psutil.cpu_times", lambda: next(whole))
    monkeypatch.setattr("psutil.Process", lambda: process)
    monkeypatch.setattr("psutil.cpu_count", lambda: 4)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with Load() as load:
        pass
    assert load.others == (7 + 1 - 2) / (2 * 4)  # user and system, less one's own
    with Load() as too_short_to_tell:
        pass
    assert too_short_to_tell.others == 0.0


# --- modes ----------------------------------------------------------------------------------------


def step(backend):
    x = torch.zeros(1, 3, 4, 4)
    return functools.partial(ops.langevin_step_, x, x.clone(), 1e-3, seed=1, backend=backend)


@needs_native
def test_an_eager_peer_may_not_run_an_operator_of_ours():
    assert peers.check_eager(lambda: torch.zeros(1).exp()) == "pytorch"
    with pytest.raises(WrongMode, match="langevin_step_"):
        peers.check_eager(step("native"))


@needs_native
@pytest.mark.parametrize(("asked", "ran"), [("native", "reference"), ("reference", "native")])
def test_a_peer_named_after_a_backend_must_run_it(asked, ran):
    names = ("langevin_step_",)
    assert peers.check_backend(step(asked), asked, names) == asked
    with pytest.raises(WrongMode, match="langevin_step_"):
        peers.check_backend(step(ran), asked, names)


def test_a_backend_that_ran_nothing_did_not_run():
    with pytest.raises(WrongMode, match=r"expected \[\('max_pool5', 'native'\)\] to run"):
        peers.check_backend(lambda: None, "native", ("max_pool5",))


@needs_native
def test_ours_says_what_ran():
    ran = peers.seen_backends(lambda: (step("native")(), step("native")()))
    assert "langevin_step_ native" in ran and "reference" not in ran
    assert peers.seen_backends(step("reference")) == "reference"


def test_an_input_must_lie_as_its_row_says():
    tensors = (torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.arange(2), torch.randn(3, 2))
    for layout, other in itertools.permutations(peers.LAYOUTS):
        images, labels, weights = placed = peers.placed(tensors, CPU, F32, layout)
        peers.check_layout(placed, layout)
        with pytest.raises(WrongMode, match=f"not {other}"):
            peers.check_layout(placed, other)
        assert images.dtype == weights.dtype == F32 and labels.dtype == torch.int64
        assert torch.equal(images, tensors[0].float())


def compiled(function, mode="default"):
    """Warmed up."""
    made = peers.Compiled(function, mode)
    made.warm_up(lambda: made.call(X))
    return made


def double_plus_one(x):
    return 2 * x + 1


@pytest.mark.slow
def test_a_compiled_peer_is_one_graph_in_the_configuration_of_its_mode():
    config = compiled(double_plus_one).call.get_compiler_config()
    assert not config["max_autotune"] and not config["triton.cudagraphs"]
    tuned = compiled(double_plus_one, "max-autotune")
    config = tuned.call.get_compiler_config()
    assert config["max_autotune"] and config["triton.cudagraphs"]
    assert tuned.graphs == 1 and torch.equal(tuned.call(X), 2 * X + 1)


@pytest.mark.slow
def test_peers_with_one_function_do_not_share_graphs():
    first, second = compiled(double_plus_one), compiled(double_plus_one)
    assert (first.graphs, second.graphs) == (1, 1)
    with pytest.raises(WrongMode, match="expected 1 graph and no break, got 0 and 0"):
        second.warm_up(lambda: second.call(X))  # nothing was left to compile


def test_another_configuration_is_refused():
    made = peers.Compiled(double_plus_one, "default")
    made.mode = "max-autotune"
    with pytest.raises(WrongMode, match="mode max-autotune compiles with"):
        made.warm_up(lambda: made.call(X))


@pytest.mark.slow
def test_a_graph_break_is_refused():
    def broken(x):
        y = 2 * x
        torch._dynamo.graph_break()
        return y + 1

    with pytest.raises(WrongMode, match="expected 1 graph and no break, got 2 and"):
        compiled(broken)


@pytest.mark.slow
def test_compiling_again_while_timed_fails_the_compiled_peer_alone():
    shapes = itertools.chain([2], itertools.repeat(3))  # the first call is that for memory

    def prepare():
        made = compiled(double_plus_one)
        timed = Timed(lambda: made.call(torch.ones(next(shapes))).numel() / 3)
        return Prepared(timed, lambda: (made.call(X) - X - 1,), "inductor", graphs=made.graphs)

    eager, row = make_bench().run(
        make_case(make_peer("eager", 1.0), Peer("compile", "contiguous", prepare))
    )
    assert (eager.status, eager.median_us) == ("ok", 1e6)
    assert (row.status, row.median_us, row.backend) == ("failed", None, "inductor")
    assert row.note == "torch.compile compiled again while the case was timed"


# --- the cases ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def find_cases():
    """:func:`suite.find_cases` with options; the arithmetic of a network is counted once for each size."""
    one_image = functools.cache(functools.partial(forward.forward_flops, 1))
    with pytest.MonkeyPatch.context() as patch:
        for module in (forward, sampling, training):
            patch.setattr(module, "forward_flops", lambda n, *size: n * one_image(*size))

        def find(device="cpu", dtypes=(F32,), suites=suite.SUITES, **options):
            return suite.find_cases(Settings(torch.device(device), dtypes, **options), suites)

        yield find


def keys(cases):
    fields = ("suite", "group", "name", "shape", "precision", "setting")
    own = [tuple(getattr(case, field) for field in fields) for case in cases]
    return [
        (*key, p.name, p.layout) for key, case in zip(own, cases, strict=True) for p in case.peers
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_row_has_its_own_key_and_every_case_something_to_do(find_cases, device):
    dtypes = (F32,) if device == "cpu" else (torch.bfloat16, F32)
    full, quick = (find_cases(device, dtypes, quick=q) for q in (False, True))
    for cases in (full, quick):
        assert len(set(keys(cases))) == len(keys(cases))
        assert list(dict.fromkeys(case.suite for case in cases)) == list(suite.SUITES)
        assert all((case.bytes > 0) != (case.flops > 0) for case in cases)
        for case in cases:
            layouts = set(peers.LAYOUTS) if len(case.shape) == 4 else {"contiguous"}
            if case.name == "loop":  # a whole loop takes the faster one
                layouts = {"channels_last"}
            assert {p.layout for p in case.peers if p.name == "eager"} == layouts
    assert len(quick) < len(full)
    slow = {"RefineBlock", "points", "style transfer"}
    slow |= {"ncsnv2-celeba", "ncsnv2-bedroom", "ncsnv2-ffhq"}
    assert {case.group for case in quick} | slow == {case.group for case in full}


def test_options_choose_suites_batches_and_dtypes(find_cases):
    cases = find_cases(quick=True, batches=(3, 5), dtypes=(torch.float16,))
    for group in {case.group for case in cases}:
        assert {case.shape[0] for case in cases if case.group == group} == {3, 5}
    assert {c.group for c in cases if c.dtype != torch.float16} == {
        "langevin_step_",
        "solver_step_",
    }
    cases = find_cases(suites=("ops", "train"), batches=(3,))
    assert {case.suite for case in cases} == {"ops", "train"}
    assert {case.shape[0] for case in cases} == {3}


def of_function(work, name, backward):
    return Case(
        suite="ops",
        group=name,
        name="backward" if backward else "forward",
        shape=(2,),
        dtype=F32,
        peers=work.peers(TINY, F32, backward=backward),
        expected=work.expected(F32, backward=backward),
        tolerance=10 * suite.tolerance_of(F32, backward=backward, network=name == "layer"),
        bytes=1,
    )


def of_layer(layer):
    image = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    inputs = (image, torch.tensor([1, 7]))
    return peers.Module(lambda: inputs, lambda: layers.pair(layer, 4))


def of_loop(suite_, parts, expected, backward):
    tolerance = suite.tolerance_of(F32, backward=backward, network=True)
    return Case(suite_, "loop", "run", (2,), F32, tuple(parts), expected, tolerance, bytes=1)


TINY = Settings(CPU, (F32,), quick=True)
LOOP = sampling.Loop(2, 4, 6, 2, 2)
SMALL = {
    "norm": lambda b: of_function(cond_instance_norm_elu.function(2, 4, 6), "norm", b),
    "pool": lambda b: of_function(max_pool5.function(2, 4, 6), "pool", b),
    "conv": lambda b: of_function(norm_elu_conv3x3.function(2, 4, 6, 2), "conv", b),
    "mean_pool5": lambda b: of_function(avg_pool5.function(2, 4, 6), "pool", b),
    "elu_conv": lambda b: of_function(elu_conv3x3.function(2, 4, 6, 2), "conv", b),
    "conv_mean": lambda b: of_function(conv3x3_mean_pool.function(2, 4, 3, 6), "conv", b),
    "units": lambda b: of_function(of_layer("RCUBlock"), "layer", b),
    "refine": lambda b: of_function(of_layer("RefineBlock"), "layer", b),
    "langevin": lambda b: make_case(
        *langevin_step.peers((2, 3, 4, 4), TINY),
        expected=lambda: langevin_step.expected((2, 3, 4, 4)),
        tolerance=NORMAL,
    ),
    "network": lambda b: forward.case(TINY, F32, 2, 4, 8, compiled_layouts=()),
    "sampling": lambda b: of_loop(
        "sample", LOOP.peers(TINY, F32, compiled=False), lambda: LOOP.expected(F32), b
    ),
    "training": lambda b: of_loop(
        "train", training.peers(2, 4, 8, F32, TINY), lambda: training.expected(2, 4, 8, F32), b
    ),
}
BACKWARD = {"norm", "pool", "conv", "mean_pool5", "elu_conv", "conv_mean", "units", "refine"}


@pytest.mark.parametrize(
    ("name", "backward"),
    [(name, b) for name in SMALL for b in (False, True) if not b or name in BACKWARD],
)
def test_uncompiled_peers_of_every_case_are_right_and_say_what_ran(name, backward):
    case = SMALL[name](backward)
    chosen = tuple(p for p in case.peers if "compile" not in p.name)
    rows = make_bench(Clock, 1).run(dataclasses.replace(case, peers=chosen))
    assert {(r.peer, r.status) for r in rows if r.status not in ("ok", "noisy")} == set()
    assert {r.layout for r in rows} == {"contiguous", "channels_last"}
    assert len({r.peer for r in rows}) > 1
    for row in rows:
        assert row.median_us > 0 and row.error <= case.tolerance and row.graphs is None
        ran = {part.split()[-1] for part in row.backend.split(", ")}
        if row.peer == "eager":
            assert ran == {"pytorch"}
        elif row.peer == "ncsn_fast":
            assert ran <= set(dispatch.AUTO["cpu"])
        else:
            assert ran == {row.peer}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["norm", "langevin"])
def test_compiled_peers_are_right_and_one_graph(name):
    case = SMALL[name](False)
    chosen = [p for p in case.peers if "compile" in p.name]
    rows = make_bench(Clock, 1).run(dataclasses.replace(case, peers=tuple(chosen)))
    assert [r.layout for r in rows] == ["contiguous", "channels_last"]
    assert {(r.backend, r.graphs, r.note * (r.status == "failed")) for r in rows} == {
        ("inductor", 1, "")
    }


def test_the_arithmetic_of_the_documented_network():
    assert forward.forward_flops(1, 128, 32) == pytest.approx(2 * 12.39e9, rel=1e-3)
    assert forward.forward_flops(3, 8, 16) == 3 * forward.forward_flops(1, 8, 16)


# --- the network in plain PyTorch -----------------------------------------------------------------


def pair(nf=4, dilations=(1, 2, 4, 8), channels=2):
    """NCSN and the plain network with its weights, in float64."""
    torch.manual_seed(nf)
    model = NCSN(channels, nf, 3, dilations, sigmas=[1.0, 0.3, 0.1]).double()
    return model, plain_torch.network_like(model)


def images(n=3, channels=2, size=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, channels, size, size, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % 3


@pytest.mark.parametrize(
    ("nf", "dilations"), [(4, (1, 2, 4, 8)), (6, (1, 1, 1, 1)), (8, (2, 3, 1, 16))]
)
def test_the_plain_network_is_the_documented_one(nf, dilations):
    model, network = pair(nf, dilations)
    x, labels = images()
    assert set(network.state_dict()) == set(model.state_dict())
    assert relative_error(network(x, labels), model(x, labels)) < TOLERANCES[torch.float64].forward
    assert relative_error(network(x, labels.flip(0)), model(x, labels)) > 1e-2


def test_the_plain_network_is_trained_without_the_other():
    model, network = pair()
    x, labels = images()
    before = model(x, labels)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert torch.equal(model(x, labels), before)


def test_the_plain_loss_is_that_of_get_loss():
    model, network = pair()
    x, labels = images()
    expected, _ = model.get_loss(x, labels=labels, seed=training.SEED)
    sigmas, noise = model.sigmas, training.noise_like(x)
    loss = plain_torch.loss(network, x, labels, sigmas, noise)
    assert relative_error(loss, expected) < TOLERANCES[torch.float64].forward
    other = plain_torch.loss(network, x, labels, sigmas, noise.flip(0))
    assert relative_error(other, expected) > 1e-6


def test_the_plain_loop_is_that_of_sample():
    model, start = LOOP.model(), LOOP.start()
    expected = model.sample(
        LOOP.n,
        LOOP.size,
        n_steps_each=LOOP.steps,
        step_lr=sampling.STEP_LR,
        init=start,
        seed=sampling.SEED,
        verbose=False,
    )
    network = plain_torch.network_like(model)
    loop = functools.partial(
        plain_torch.sample, network, start, model.sigmas, LOOP.steps, sampling.STEP_LR
    )
    tolerance = suite.tolerance_of(F32, network=True)
    assert relative_error(loop(sampling.Noise()), expected) <= tolerance
    assert relative_error(loop(), expected) > tolerance
