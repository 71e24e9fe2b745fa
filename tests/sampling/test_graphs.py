"""Captures without a GPU: what PyTorch leaves behind when one fails is undone, and what must fail is told before it."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ncsn_fast import ScoreMLP, ops
from ncsn_fast.sampling import annealed_langevin, initial_state, steps
from ncsn_fast.sampling import run as samplers

SIGMAS = [2.0, 1.2, 0.8]


class FakeCuda:
    """What a capture touches of torch.cuda. A wait that must raise, raises as PyTorch's do."""

    def __init__(self, monkeypatch):
        self.mode, self.log = 0, []
        self.capturing, self.broken = None, False
        fake = self

        class Generator:
            captured = False

            def clone_state(self):
                return Generator()

            def graphsafe_set_state(self, state):
                self.captured = state.captured

        class CUDAGraph:
            def reset(self):
                fake.log.append("reset")

        class Stream:
            device_index = 0

            def wait_stream(self, other):
                fake.log.append("wait")

        self.stream, shared = Stream(), Stream()

        @contextmanager
        def on_stream(stream):
            before, self.stream = self.stream, stream
            try:
                yield
            finally:
                self.stream = before

        class graph:
            """As PyTorch's: one stream for all that name none; where a capture is lost, the stream's end is skipped."""

            def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
                fake.capture_error_mode = capture_error_mode
                self.context = on_stream(stream or shared)

            def __enter__(self):
                self.context.__enter__()
                fake.capturing, fake.broken, generator.captured = self, False, True

            def __exit__(self, *error):
                fake.capturing = None
                if fake.broken:
                    raise RuntimeError("operation failed due to a previous error during capture")
                generator.captured = False
                self.context.__exit__(*error)

        self.generator = generator = Generator()
        for name, value in {
            "CUDAGraph": CUDAGraph,
            "Stream": Stream,
            "current_stream": lambda: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "stream": on_stream,
            "graph": graph,
            "graph_pool_handle": lambda: (0, 1),
            "default_generators": (generator,),
            "is_initialized": lambda: True,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *_, name=name: self.log.append(name))

    def wait(self):
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capturing:
            self.broken = True
            raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(steps, "_failed", [], raising=False)
    # Threads that other tests, or the test runner, have left are not the user's.
    enumerate_all, others = threading.enumerate, set(threading.enumerate())
    others.discard(threading.current_thread())
    monkeypatch.setattr(
        threading, "enumerate", lambda: [t for t in enumerate_all() if t not in others]
    )
    return FakeCuda(monkeypatch)


def sample(score, n_steps_each=20, sigmas=SIGMAS):
    return annealed_langevin(
        score,
        initial_state((2, 4), seed=0),
        sigmas,
        n_steps_each=n_steps_each,
        seed=1,
        cuda_graph=True,
    )


@pytest.fixture
def on_cpu(monkeypatch):
    """The engine takes the CPU for the device of graphs; a replay does nothing."""
    monkeypatch.setattr(steps.Graph, "device_type", "cpu")
    monkeypatch.setattr(steps.Graph, "replay", lambda self: None)


def test_a_failed_capture_leaves_the_caller_as_before(cuda):
    stream = cuda.stream
    with pytest.raises(RuntimeError, match="cuda_graph=False.*previous error"):
        steps.Graph(cuda.wait)
    assert cuda.stream is stream
    assert not cuda.generator.captured
    assert cuda.log == ["reset", "_cuda_endAllocateToPool", "_cuda_releasePool"]
    steps.Graph(lambda: None)  # the next one goes well
    assert cuda.stream is stream and not cuda.generator.captured


def test_an_error_of_the_score_in_a_capture_is_its_own(cuda):
    stream = cuda.stream

    def score():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        steps.Graph(score)
    assert cuda.stream is stream and not cuda.generator.captured


def test_other_threads_cannot_end_a_capture(cuda):
    steps.Graph(lambda: None)
    assert cuda.capture_error_mode == "thread_local"


def test_a_captures_stream_is_its_own(cuda):
    """PyTorch's default one belongs to the device, and the thread, of its first use."""
    streams = []
    for _ in range(2):
        steps.Graph(lambda: streams.append(cuda.stream))
    assert streams[0] is not streams[1]


def test_a_score_that_waits_is_told_before_any_capture(cuda, on_cpu, monkeypatch):
    captures = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: captures.append(1))
    before = cuda.stream, cuda.mode

    def score(x, level):
        cuda.wait()
        return -x

    with pytest.raises(RuntimeError, match="cuda_graph=False.*synchronizing"):
        sample(score)
    assert not captures
    assert (cuda.stream, cuda.mode) == before
    assert cuda.log == [
        "wait",
        "wait",
    ]  # the side stream for the current one, and that for the side stream


def test_the_first_call_may_wait(cuda, on_cpu):
    """It compiles and loads what it needs."""
    calls = []

    def score(x, level):
        calls.append(cuda.mode)
        if len(calls) == 1:
            cuda.wait()
        return -x

    sample(score)
    assert calls[0] == 0 and set(calls[1:10]) == {"error"}
    assert cuda.mode == 0


def test_waits_of_other_threads_are_let_be(cuda, on_cpu):
    """The switch that makes a wait an error holds for the whole process."""
    end, modes = threading.Event(), []
    other = threading.Thread(target=end.wait)
    other.start()
    try:
        sample(lambda x, level: modes.append(cuda.mode) or -x)
    finally:
        end.set()
        other.join()
    assert set(modes) == {0}


# --- who takes graphs -----------------------------------------------------------------------------


def test_graphs_are_the_default_on_a_gpu_alone():
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert [steps.use_graphs(gpu, wanted) for wanted in (None, True, False)] == [True, True, False]
    assert [steps.use_graphs(cpu, wanted) for wanted in (None, False)] == [False, False]


@pytest.mark.parametrize("wanted", [None, False])
def test_networks_on_sigma_take_them_too(monkeypatch, wanted):
    asked = []
    monkeypatch.setattr(
        samplers, "use_graphs", lambda *what: asked.append(what) or False, raising=False
    )
    options = {} if wanted is None else {"cuda_graph": wanted}
    ScoreMLP(sigmas=SIGMAS, hidden=(4,)).sample(2, n_steps_each=1, seed=0, **options)
    assert asked == [(torch.device("cpu"), wanted)]


# --- layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.float16, True),
        (torch.bfloat16, True),
        (torch.float32, False),
        (torch.float64, False),
    ],
    ids=str,
)
def test_half_precision_on_a_gpu_is_channels_last(dtype, wanted):
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, 8, dtype=dtype, device="cuda")
        assert ops.wants_channels_last(x) is wanted
        assert not ops.wants_channels_last(x.to(memory_format=torch.channels_last))


def test_autocast_decides(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    with FakeTensorMode():
        for dtype, wanted in ((torch.float32, True), (torch.float64, False)):
            x = torch.empty(2, 3, 8, 8, dtype=dtype, device="cuda")
            assert ops.wants_channels_last(x) is wanted
