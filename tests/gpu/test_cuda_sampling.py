"""Sampling on a real GPU: graphs against steps called one by one, waits counted, weights changed in place.

Graphs launch the same kernels in the same order, so they must give the same bits. What is computed otherwise, on
another backend or in another batch, is compared in the chains of a calm network (calm.py). What can be checked without
a GPU is in sampling/test_engine.py, and that the network is calm in benchmarks/test_gpu_check.py.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from support import calm

from ncsn_fast import ops, use_backend
from ncsn_fast.sampling import ScoreError, annealed_langevin, initial_state, steps
from ncsn_fast.sampling.samplers import SAMPLERS as RECORDS
from ncsn_fast.schedules import estimate_sigma_begin

pytestmark = pytest.mark.cuda

# The functions, of the samplers on a ladder.
SAMPLERS = {name: known.function for name, known in RECORDS.items() if known.of == "level"}
SIGMAS = calm.SIGMAS
COMMON = {"n_steps_each": 12, "step_lr": 0.5 * 0.8**2, "seed": 5, "verbose": False}


def common(sampler):
    """The settings that the sampler takes."""
    return {k: v for k, v in COMMON.items() if sampler != "pc" or k != "step_lr"}


@pytest.fixture
def model():
    return calm.calm_network().cuda()


@pytest.fixture
def captures(monkeypatch):
    """How many graphs were captured."""
    made = []

    class Counted(steps.Graph):
        def __init__(self, calls):
            made.append(1)
            super().__init__(calls)

    monkeypatch.setattr(steps, "Graph", Counted)
    return made


@pytest.fixture
def deterministic():
    """Convolutions that choose one algorithm, so that bits can be compared."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_graphs_and_single_steps_agree(model, captures, deterministic, sampler, layout):
    model.to(memory_format=layout)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:3] = True
    options = common(sampler) | {
        "sampler": sampler,
        "denoise": True,
        "known": torch.zeros(()),
        "mask": mask,
    }
    expected, states = model.sample(4, 8, cuda_graph=False, return_intermediates=5, **options)
    assert not captures
    x, kept = model.sample(4, 8, return_intermediates=5, **options)
    assert captures
    assert torch.equal(x, expected) and torch.equal(kept, states)


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_graphs_of_exact_scores_give_the_same_bits(captures, backend):
    variances = torch.tensor(SIGMAS, device="cuda") ** 2 + 1

    def run(cuda_graph):
        init = initial_state((5, 3, 8, 8), seed=1, device="cuda")
        return annealed_langevin(
            lambda x, level: -x / variances[level],
            init,
            SIGMAS,
            n_steps_each=30,
            seed=3,
            step_lr=0.1,
            clip=2.0,
            denoise=True,
            cuda_graph=cuda_graph,
        )

    with use_backend(backend, op="langevin_step_"):
        assert torch.equal(run(True), run(False))
    assert len(captures) == 1


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_no_step_waits(model, sampler, cuda_graph):
    def waits(n_steps_each):
        options = common(sampler) | {"sampler": sampler, "cuda_graph": cuda_graph}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                model.sample(2, 8, **options | {"n_steps_each": n_steps_each})
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in caught)

    waits(20)  # compiles and loads
    assert waits(30) == waits(20) < 20


def test_nothing_is_allocated_between_replays(model):
    """Sampling longer takes no more memory, and no more allocations."""

    def allocations(n_steps_each):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        model.sample(2, 8, **COMMON | {"n_steps_each": n_steps_each})
        return torch.cuda.memory_stats()["allocation.all.allocated"] - before

    allocations(20)
    assert allocations(30) == allocations(20)


def test_the_memory_of_graphs_is_given_back(model):
    model.sample(2, 8, **COMMON)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for n in (2, 3, 4):
        model.sample(n, 8, **COMMON)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def test_weights_changed_in_place_count_at_once(model, deterministic):
    """Even while a graph is being replayed: a callback changes them after the first level."""

    def halve(level, x):
        if level == 0:
            with torch.no_grad():
                model.end_conv.weight.mul_(0.5)

    options = COMMON | {"n_steps_each": 40}
    x = model.sample(3, 8, callback=halve, **options)
    with torch.no_grad():
        model.end_conv.weight.mul_(2)
    assert torch.equal(x, model.sample(3, 8, callback=halve, cuda_graph=False, **options))
    with torch.no_grad():
        model.end_conv.weight.mul_(2)
    assert not torch.equal(x, model.sample(3, 8, **options))


def test_calls_of_other_shapes_dtypes_and_backends_follow_each_other(model, deterministic):
    for n, size in ((2, 8), (5, 8), (2, 6)):
        expected = model.sample(n, size, cuda_graph=False, **COMMON)
        assert torch.equal(model.sample(n, size, **COMMON), expected)
    with use_backend("reference"):
        reference = model.sample(2, 8, **COMMON)
    torch.testing.assert_close(reference, model.sample(2, 8, **COMMON), **calm.TOLERANCE)
    half = model.bfloat16().sample(2, 8, **COMMON)
    assert half.dtype == torch.float32
    assert (half - reference).norm() / reference.norm() < 0.1


def test_autocast_casts_within_the_graph(model, deterministic):
    """After autocast has ended nothing may read what it had cast; weights changed in between count."""
    options = COMMON | {"n_steps_each": 40}
    with torch.autocast("cuda", torch.bfloat16):
        model.sample(3, 8, **options)
        with torch.no_grad():
            model.end_conv.weight.mul_(0.5)
        x = model.sample(3, 8, **options)
        expected = model.sample(3, 8, cuda_graph=False, **options)
    assert x.dtype == torch.float32
    assert torch.equal(x, expected)


def test_a_compiled_model_in_a_graph(model, captures):
    expected = model.sample(2, 8, **COMMON)
    model.compile()
    captures.clear()
    x = model.sample(2, 8, **COMMON)
    assert captures
    torch.testing.assert_close(x, expected, **calm.TOLERANCE)


def test_batches_agree_with_the_cpu(model):
    options = COMMON | {"n_steps_each": 3, "clip": True}
    whole = model.sample(7, 8, **options).cpu()
    parts = [model.sample(n, 8, sample_offset=i, **options).cpu() for i, n in ((0, 1), (1, 6))]
    torch.testing.assert_close(torch.cat(parts), whole, **calm.TOLERANCE)
    torch.testing.assert_close(model.cpu().sample(7, 8, **options), whole, **calm.TOLERANCE)


def test_a_broken_network_is_told(model):
    torch.nn.init.constant_(model.stage3.units[0].conv1.conv.bias, float("nan"))
    with pytest.raises(ScoreError, match="at level 0 .*step 0 in all"):
        model.sample(2, 8, **COMMON)


def test_a_score_that_waits_cannot_be_captured():
    init = initial_state((2, 4), seed=0, device="cuda")
    with pytest.raises(RuntimeError, match="cuda_graph=False"):
        annealed_langevin(
            lambda x, level: -x * x.abs().max().item(),
            init,
            SIGMAS,
            n_steps_each=30,
            cuda_graph=True,
        )
    # The device is well after that.
    assert ops.philox_normal((2, 4), seed=0, device="cuda").isfinite().all()


def test_distances_on_the_gpu():
    data = torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    on_gpu = estimate_sigma_begin(data.cuda(), block=16)
    assert on_gpu == pytest.approx(estimate_sigma_begin(data), rel=1e-4)
