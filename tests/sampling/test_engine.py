"""The loop under the samplers: no wait from step to step, one memory, graphs, what is kept, what is told."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ncsn_fast import NCSN, use_backend
from ncsn_fast.sampling import ScoreError, annealed_langevin, engine, initial_state, steps
from ncsn_fast.sampling.ode import probability_flow
from ncsn_fast.sampling.samplers import SAMPLERS as RECORDS
from ncsn_fast.schedules import make_sigmas

# The functions, of the samplers on a ladder.
SAMPLERS = {name: known.function for name, known in RECORDS.items() if known.of == "level"}
SIGMAS = [2.0, 1.2, 0.8]


def gaussian(x, level):
    """The score of N(0, I), of a level that is a number or a tensor."""
    variance = torch.tensor(SIGMAS)[level] ** 2 + 1
    return -x / variance


def run(sampler="ald", score=gaussian, n_steps_each=4, init=None, sigmas=SIGMAS, **options):
    init = initial_state((3, 2, 4, 4), "normal", seed=3) if init is None else init
    options = {"seed": 5, "denoise": True} | options
    if sampler != "pc":
        options = {"step_lr": 0.5 * 0.8**2} | options
    return SAMPLERS[sampler](score, init, sigmas, n_steps_each=n_steps_each, **options)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return NCSN(in_channels=2, nf=4, num_classes=3, sigmas=SIGMAS).eval()


# --- no wait, one memory --------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts reads of a tensor's value into Python and copies between devices: on a GPU each waits."""

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waiting = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten._to_copy.default)
        self.waits += function in waiting
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_step_waits(small, sampler):
    """With the network in it and all that can be watched: as many waits for 24 steps as for 6."""

    def waits(n_steps_each):
        mask = torch.zeros(4, 4, dtype=torch.bool)
        with Count() as count:
            small.sample(
                1,
                4,
                n_steps_each=n_steps_each,
                step_lr=None if sampler == "pc" else 0.5 * 0.8**2,
                sampler=sampler,
                verbose=False,
                seed=1,
                known=torch.zeros(()),
                mask=mask,
                return_intermediates=2,
            )
        return count.waits

    assert waits(8) == waits(2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_memory_for_state_and_noise(sampler):
    """The state stays where it is; beside the score's, a step makes nothing of the size of the state."""
    scores, states, made = torch.zeros(3, 2, 4, 4), set(), []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            given = {
                a.data_ptr()
                for a in (*args, *(kwargs or {}).values())
                if isinstance(a, torch.Tensor)
            }
            if isinstance(out, torch.Tensor) and out.numel() >= scores.numel():
                made.append(out.data_ptr() not in given)
            return out

    def score(x, level):
        states.add(x.data_ptr())
        return scores

    def count(n_steps_each):
        made.clear()
        with Made():
            run(sampler, score, n_steps_each, clip=1.0) if sampler == "ald" else run(
                sampler, score, n_steps_each
            )
        return sum(made)

    assert count(9) == count(1) > 0
    assert len(states) <= 2  # one a run


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_layout_of_the_state(sampler):
    init = initial_state((3, 2, 4, 4), "normal", seed=3)
    layouts = []

    def score(x, level):
        layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        return gaussian(x, level)

    expected = run(sampler, score, init=init)
    x = run(sampler, score, init=init.to(memory_format=torch.channels_last))
    assert not any(layouts[: len(layouts) // 2]) and all(layouts[len(layouts) // 2 :])
    assert torch.equal(x, expected) and x.is_contiguous()


def test_a_models_state_has_the_layout_of_its_weights(small):
    seen = []
    small.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    options = {"n_steps_each": 1, "step_lr": 0.1, "seed": 0, "verbose": False}
    first = small.sample(2, 4, **options)
    small.to(memory_format=torch.channels_last)
    second = small.sample(2, 4, **options)
    assert seen == [False] * 3 + [True] * 3
    assert second.is_contiguous()
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_the_same_bits_for_any_batch_on_the_reference_path(small):
    options = {"n_steps_each": 5, "step_lr": 0.1, "seed": 0, "verbose": False, "clip": False}
    with use_backend("reference"), torch.backends.mkldnn.flags(enabled=False):
        whole = small.sample(7, 8, **options)
        for begin, size in ((0, 1), (3, 1), (2, 4), (0, 6)):
            part = small.sample(size, 8, sample_offset=begin, **options)
            assert torch.equal(part, whole[begin : begin + size])


# --- graphs ---------------------------------------------------------------------------------------


class FakeGraph:
    """As steps.Graph, without a GPU: a replay calls what was captured, with the tensors of the capture."""

    device_type = "cpu"
    captured = 0

    def __init__(self, calls):
        FakeGraph.captured += 1
        self._calls = calls

    def replay(self):
        self._calls()

    @staticmethod
    def warm_up(calls):
        calls()


@pytest.fixture
def fake_graph(monkeypatch):
    monkeypatch.setattr(steps, "Graph", FakeGraph)
    FakeGraph.captured = 0


@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("n_steps_each", [1, 4, 25])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_graphs_give_the_same_bits(fake_graph, sampler, n_steps_each, every):
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1] = True
    levels = []

    def score(x, level):
        levels.append(level)
        return gaussian(x, level)

    options = {"known": torch.ones(()), "mask": mask, "return_intermediates": every}
    expected = run(sampler, score, n_steps_each, **options)
    assert all(isinstance(level, int) for level in levels)
    levels.clear()
    got = run(sampler, score, n_steps_each, cuda_graph=True, **options)
    assert all(level.shape == (1,) and level.dtype == torch.int64 for level in levels)
    assert len({level.data_ptr() for level in levels}) == 1
    for a, b in zip(*((expected, got) if every else ((expected,), (got,))), strict=True):
        assert torch.equal(a, b)
    assert FakeGraph.captured > 0 or (n_steps_each == 1 and sampler != "ald")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_graphs_of_the_ode_give_the_same_bits(fake_graph, dtype):
    """Two evaluations a step, the second at another state and level, asked by sigma."""
    sigmas, asked = make_sigmas(2.0, 0.1, 9).tolist(), []

    def score(x, sigma):
        asked.append(sigma)
        return -x / (torch.as_tensor(sigma, dtype=x.dtype) ** 2 + 1)

    init = initial_state((3, 2, 4, 4), "normal", seed=3).to(dtype)
    options = {"known": torch.ones(()), "mask": torch.eye(4).bool(), "denoise": True, "seed": 1}
    expected = probability_flow(score, init, sigmas, **options)
    floats = list(asked)
    asked.clear()
    assert torch.equal(probability_flow(score, init, sigmas, cuda_graph=True, **options), expected)
    assert FakeGraph.captured == 1
    assert all(sigma.shape == (1,) and sigma.dtype == dtype for sigma in asked)
    assert floats == [sigmas[i // 2 + i % 2] for i in range(16)] + [sigmas[-1]]


# --- conditions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_part_of_a_ladder(fake_graph, cuda_graph):
    """A network of five levels, asked at three of them, by their own numbers."""
    whole = [2.0, 1.6, 1.2, 1.0, 0.8]

    def score(x, level):
        asked.append(int(level))
        return -x / (torch.tensor(whole)[level] ** 2 + 1)

    asked = []
    x = run("pc", score, conditions=[0, 2, 4], cuda_graph=cuda_graph)
    assert torch.equal(x, run("pc"))
    assert asked == [0] * 5 + [2] * 5 + [4] * 5
    with pytest.raises(ValueError, match="one condition for each of the 3 levels, got 2"):
        run("pc", score, conditions=[0, 2])


def test_few_captures(fake_graph):
    run(n_steps_each=100, cuda_graph=True)
    assert FakeGraph.captured == 1  # ten steps, replayed
    run(n_steps_each=25, cuda_graph=True)
    assert FakeGraph.captured == 3  # and ten and five


def test_a_model_under_graphs(fake_graph, small):
    options = {"n_steps_each": 4, "step_lr": 0.1, "seed": 0, "verbose": False}
    expected = small.sample(2, 4, **options)
    assert torch.equal(small.sample(2, 4, cuda_graph=True, **options), expected)
    assert FakeGraph.captured == 1


# --- compiled and in half precision ---------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_model(small):
    options = {"n_steps_each": 2, "step_lr": 0.1, "seed": 0, "verbose": False}
    expected = small.sample(2, 4, **options)
    graphs, calls = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *inputs: calls.append(1) or graph(*inputs)

    small.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(small.sample(2, 4, **options), expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1  # for every level
    assert len(calls) == 2 * len(small.sigmas)


# --- what is kept, what is told -------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_intermediates(sampler):
    states = []
    x, kept = run(
        sampler,
        lambda x, level: states.append(x.clone()) or gaussian(x, level),
        return_intermediates=1,
    )
    # What the score saw next; the last one is that before the denoising step.
    assert torch.equal(kept, torch.stack(states[1:]))
    assert torch.equal(run(sampler), x)
    _, thirds = run(sampler, return_intermediates=3)
    assert torch.equal(thirds, kept[2::3])
    _, none = run(sampler, return_intermediates=1000)
    assert none.shape == (0, 3, 2, 4, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_broken_score_is_told_with_its_level_and_step(value, dtype):
    calls = []

    def score(x, level):
        s = gaussian(x, level).to(dtype)
        if len(calls) == 6:
            s[2, 1, 3, 3] = value
        calls.append(level)
        return s

    with pytest.raises(
        ScoreError, match=r"at level 1 \(sigma 1.2\), step 2 of that level, step 6 in all"
    ):
        run(score=score, clip=1.0)  # where clamping would hide infinity


def test_a_broken_denoising_step_is_told():
    calls = []

    def score(x, level):
        calls.append(level)
        return gaussian(x, level) * (math.nan if len(calls) == 13 else 1)

    with pytest.raises(ScoreError, match="in the denoising step"):
        run(score=score)


def test_a_broken_network_stops_soon_and_the_mode_comes_back(small):
    torch.nn.init.constant_(small.stage3.units[0].conv1.conv.bias, math.nan)
    small.train()
    calls = []
    small.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ScoreError, match="at level 0 .*step 0 in all, counted from 0"):
        small.sample(1, 4, n_steps_each=engine.CHECK_EVERY, step_lr=0.1, verbose=False)
    assert len(calls) == engine.CHECK_EVERY  # one level of three
    assert small.training
    with pytest.raises(IndexError):  # which sampling does not look for
        small(torch.zeros(1, 2, 4, 4), torch.tensor([3]))


def test_a_large_score_is_no_broken_one():
    assert (
        annealed_langevin(
            lambda x, level: torch.full_like(x, 60_000.0).half(),
            torch.zeros(64, 3, 16, 16),
            SIGMAS,
            n_steps_each=1,
        )
        .isfinite()
        .all()
    )
