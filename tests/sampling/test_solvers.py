"""Solvers for few passes: order of convergence, distributions, noise, graphs, what can be watched, and which levels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ncsn_fast import NCSN, ScoreCNN, ScoreMLP, ops
from ncsn_fast.data.points import GaussianMixture
from ncsn_fast.sampling import (
    ScoreError,
    ancestral,
    dpmpp_2m,
    dpmpp_2m_sde,
    engine,
    euler,
    heun,
    initial_state,
    predictor_corrector,
    steps,
)
from ncsn_fast.sampling.engine import KNOWN_NOISE_STEPS
from ncsn_fast.sampling.levels import spaced_levels, spaced_sigmas
from ncsn_fast.sampling.run import callback_sigmas
from ncsn_fast.sampling.samplers import SAMPLERS

FEW = {name: known.function for name, known in SAMPLERS.items() if known.level_count is not None}
VARIANCE = 4.0  # of the Gaussian with the exact score
SIGMAS = [2.0, 1.2, 0.8, 0.5]
SEED = 2**40 + 5


def gaussian(x, sigma):
    """The score of N(0, VARIANCE) with noise sigma."""
    return -x / (VARIANCE + torch.as_tensor(sigma, dtype=x.dtype) ** 2)


def on_levels(x, level):
    return gaussian(x, torch.tensor(SIGMAS, dtype=x.dtype)[level])


def geometric(n, begin=30.0, end=0.1):
    return [begin * (end / begin) ** (i / (n - 1)) for i in range(n)]


def run(name, score=on_levels, init=None, sigmas=SIGMAS, **options):
    init = 2 * initial_state((3, 2, 4, 4), "normal", seed=3) if init is None else init
    return FEW[name](score, init, sigmas, **({"seed": SEED} | options))


# --- the order ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (dpmpp_2m, 2)])
def test_the_order_of_a_solver_of_the_ode(solver, order):
    """Of a Gaussian the solution is known: x grows as the standard deviation; then the expected clean sample."""
    init = torch.tensor([[3.0, -40.0]], dtype=torch.float64)

    def error(levels):
        sigmas = geometric(levels)
        end = VARIANCE + sigmas[-1] ** 2
        exact = init * math.sqrt(end / (VARIANCE + sigmas[0] ** 2)) * VARIANCE / end
        x = solver(gaussian, init, sigmas, conditions=sigmas)
        assert x.dtype == torch.float64
        return float((x - exact).norm())

    assert error(41) < 0.1
    assert error(161) == pytest.approx(error(81) / 2**order, rel=0.05)


@pytest.mark.parametrize(
    ("solver", "options", "order"),
    [
        (ancestral, {}, 1),
        (dpmpp_2m_sde, {}, 2),
        (heun, {"churn": 2.0}, 2),
    ],
)
def test_the_order_of_a_solver_with_noise(solver, options, order, monkeypatch):
    """Of a Gaussian all steps are linear: with the noise of one step in each sample, the variances add up exactly."""

    def one_step_each(chain, step):
        z = torch.zeros_like(chain.x)
        z[step] = 1
        return z

    monkeypatch.setattr(engine.Chain, "normal", one_step_each)

    def error(levels):
        sigmas = geometric(levels)
        init = torch.zeros(levels + 1, 1, dtype=torch.float64)
        init[-1] = math.sqrt(VARIANCE + sigmas[0] ** 2)  # of the start itself
        x = solver(gaussian, init, sigmas, conditions=sigmas, **options)
        # The expected clean sample of exact samples at the last level.
        return abs(float(x.square().sum()) - VARIANCE**2 / (VARIANCE + sigmas[-1] ** 2))

    assert error(41) < 0.6
    assert error(161) == pytest.approx(error(81) / 2**order, rel=0.1)


# --- the distribution -----------------------------------------------------------------------------

# Levels and options, and the bound on the bias of the variance that these leave, beside five standard errors.
RUNS = {
    "euler": ("euler", 200, {}, 0.05),
    "heun": ("heun", 60, {}, 0.03),
    "heun, churn": ("heun", 60, {"churn": 10.0}, 0.03),
    "dpmpp_2m": ("dpmpp_2m", 60, {}, 0.03),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", 60, {}, 0.03),
    "ancestral": ("ancestral", 200, {}, 0.05),
    "ancestral, corrector": ("ancestral", 100, {"corrector_steps": 2}, 0.05),
}


@pytest.mark.parametrize("which", RUNS)
def test_a_mixture(which):
    """With the exact score: the modes' weights, means and covariances. The first noise is much wider."""
    name, levels, options, bias = RUNS[which]
    n, variance = 4000, 0.25
    mixture = GaussianMixture(((-3.0, 0.0), (3.0, 0.0), (3.0, 4.0)), variance)
    sigmas = geometric(levels, 40.0, 0.05)
    init = sigmas[0] * initial_state((n, 2), "normal", seed=1)
    x = FEW[name](mixture.score, init, sigmas, conditions=sigmas, seed=2, **options)
    assert x.dtype == torch.float32
    weights = mixture.mode_weights(x)
    for mean, weight in zip(mixture.means, weights, strict=True):
        assert abs(weight - 1 / 3) <= 5 * math.sqrt(2 / 9 / n) + 0.02
        heap = x[(x - torch.tensor(mean)).norm(dim=1) < 2]
        spread = 5 * math.sqrt(variance / len(heap))
        assert ((heap.mean(0) - torch.tensor(mean)).abs() <= spread + 0.03).all()
        error = (torch.cov(heap.T) - variance * torch.eye(2)).abs() / variance
        assert (error <= 5 * math.sqrt(2 / len(heap)) + bias).all(), error


def test_ancestral_is_the_predictor_corrector_and_a_step_to_zero():
    init = 2 * initial_state((3, 2), "normal", seed=3)
    expected = predictor_corrector(
        on_levels,
        init,
        SIGMAS,
        n_steps_each=2,
        snr=0.3,
        predictor="ancestral",
        denoise=True,
        seed=7,
    )
    x = ancestral(on_levels, init, SIGMAS, corrector_steps=2, snr=0.3, seed=7)
    torch.testing.assert_close(x, expected)


def test_churn_against_a_float64_loop():
    sigmas, init = geometric(5, 4.0, 0.2), 4 * initial_state((3, 2), "normal", seed=3).double()
    x = init.clone()
    for step, sigma in enumerate(sigmas):
        target = [*sigmas, 0.0][step + 1]
        high = sigma * (1 + (0.3 if 0.5 <= sigma <= 3.0 else 0.0))
        z = ops.philox_normal(x.shape, seed=SEED, step=step, stream=1).double()
        x = x + 1.1 * math.sqrt(high**2 - sigma**2) * z
        slope = -high * gaussian(x, high)
        ahead = x + (target - high) * slope
        if target:
            slope = (slope - target * gaussian(ahead, target)) / 2
        x = x + (target - high) * slope
    options = {"churn": 1.5, "churn_min": 0.5, "churn_max": 3.0, "churn_noise": 1.1}
    got = heun(gaussian, init, sigmas, conditions=sigmas, seed=SEED, **options)
    torch.testing.assert_close(got, x)


# --- as the other samplers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_any_batch(name):
    """Sample i is the same bits in a batch and alone."""
    whole = run(name)
    for begin, size in ((0, 1), (1, 2), (2, 1)):
        init = 2 * initial_state((size, 2, 4, 4), "normal", seed=3, sample_offset=begin)
        part = run(name, init=init, sample_offset=begin)
        assert torch.equal(part, whole[begin : begin + size])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FEW)
def test_score_of_another_dtype(name, dtype):
    x = run(name, lambda x, level: on_levels(x, level).to(dtype))
    assert x.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(x, run(name), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FEW)
def test_the_start_is_left_alone_and_its_layout_changes_nothing(name):
    init = 2 * initial_state((3, 2, 4, 4), "normal", seed=3)
    before = init.clone()
    expected = run(name, init=init)
    assert torch.equal(init, before)
    x = run(name, init=init.to(memory_format=torch.channels_last))
    assert torch.equal(x, expected) and x.is_contiguous() and not x.requires_grad


@pytest.mark.parametrize("name", FEW)
def test_inpainting(name):
    """Whatever state the score is asked at has the known values there, with the noise of the sigma it is asked for."""
    known, mask = torch.full((1, 2, 1, 1), 5.0), torch.zeros(4, 4, dtype=torch.bool)
    mask[1] = True
    asked = []

    def score(x, level):
        asked.append((level, x.clone()))
        return on_levels(x, level)

    x = run(name, score, known=known, mask=mask)
    assert (x[..., mask] == 5).all()
    assert (run(name)[..., ~mask] != 5).all()
    step = 0
    for i, (level, state) in enumerate(asked):
        z = ops.philox_normal(state.shape, seed=SEED, step=KNOWN_NOISE_STEPS + step, stream=1)
        torch.testing.assert_close(state[..., mask], (5 + SIGMAS[level] * z)[..., mask])
        step += name != "heun" or i % 2 == 1  # its two evaluations of a step see one noise


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_result_is_clamped_but_not_the_known_region(name):
    """Whether a sampler clamps its steps or its end: a known value outside the range stays as it is."""
    known, mask = torch.full((1, 1, 1, 1), 5.0), torch.zeros(4, 4, dtype=torch.bool)
    mask[1] = True
    if SAMPLERS[name].of == "sigma":
        model, size = ScoreCNN(1, 8, 4, sigmas=LADDER), None
        torch.nn.init.normal_(next(iter(model.parameters())), std=0.1)
    else:
        model, size = ncsn(), 4
    few = SAMPLERS[name].level_count is not None
    steps = {"passes": 5} if few else {"n_steps_each": 1}
    steps |= {"step_lr": 0.5} if name == "ald" else {}
    x = model.sample(2, size, sampler=name, clip=True, seed=0, known=known, mask=mask, **steps)
    assert (x[..., mask] == 5).all()
    rest = x[..., ~mask]
    assert rest.abs().max() <= 1 and (rest.abs() == 1).any()


@pytest.mark.parametrize("name", FEW)
def test_no_step_waits(name):
    """As many reads of a tensor's value, and copies between devices, for twelve levels as for four."""

    class Count(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            waiting = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten._to_copy.default)
            Count.waits += function in waiting
            return function(*args, **(kwargs or {}))

    def waits(levels):
        Count.waits = 0
        with Count():
            run(name, lambda x, level: -x, sigmas=geometric(levels), return_intermediates=2)
        return Count.waits

    assert waits(12) == waits(4)


@pytest.mark.parametrize("name", FEW)
def test_callback_and_intermediates(name):
    seen = []
    x, kept = run(name, callback=lambda *what: seen.append(what), return_intermediates=1)
    assert torch.equal(x, run(name))
    assert [level for level, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(kept, torch.stack([state for _, state in seen]))
    assert torch.equal(kept[-1], x)


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


@pytest.mark.parametrize("which", RUNS)
def test_graphs_give_the_same_bits(which, monkeypatch):
    monkeypatch.setattr(steps, "Graph", FakeGraph)
    monkeypatch.setattr(FakeGraph, "captured", 0)
    name, _, options, _ = RUNS[which]
    sigmas = geometric(9, 2.0, 0.3)
    options = options | {"conditions": sigmas, "known": torch.ones(()), "mask": torch.eye(4).bool()}
    expected = run(name, gaussian, sigmas=sigmas, **options)
    conditions = []

    def score(x, sigma):
        conditions.append(sigma)
        return gaussian(x, sigma)

    assert torch.equal(run(name, score, sigmas=sigmas, cuda_graph=True, **options), expected)
    assert FakeGraph.captured == 1
    assert all(sigma.shape == (1,) and sigma.dtype == torch.float32 for sigma in conditions)


@pytest.mark.parametrize("name", FEW)
def test_mistakes(name):
    def refused(error, message, **options):
        with pytest.raises(error, match=message):
            run(name, **options)

    refused(ValueError, "strictly descending", sigmas=SIGMAS[::-1])
    refused(ValueError, "one condition for each of the 4 levels, got 2", conditions=[0, 1])
    refused(ValueError, "cuda_graph takes a CUDA device", cuda_graph=True)
    refused(ValueError, "return_intermediates must be at least 1", return_intermediates=0)
    refused(TypeError, "both be tensors, got mask NoneType", known=torch.zeros(()))
    refused(ValueError, "score must have shape", score=lambda x, level: x[:, :1])

    def broken(x, level):
        return on_levels(x, level) * (math.nan if level == 2 else 1)

    # Heun's step at level 1 asks at level 2 too.
    where = "level 1" if name == "heun" else "level 2"
    refused(ScoreError, f"first at {where}", score=broken)


def test_mistakes_of_one_solver():
    for options, message in (
        ({"churn": -1.0}, "churn must be at least 0, got -1"),
        ({"churn": 1.0}, "takes a network over a continuous sigma"),
        ({"churn": 1.0, "conditions": [0, 1, 2, 3]}, "takes a network over a continuous sigma"),
        ({"churn_noise": 0.0}, "churn_noise must be positive"),
        ({"churn_min": 2.0, "churn_max": 1.0}, "churn_min must be at most churn_max, 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run("heun", **options)
    with pytest.raises(ValueError, match="corrector_steps must be"):
        run("ancestral", corrector_steps=-1)
    with pytest.raises(ValueError, match="snr must be positive"):
        run("ancestral", snr=0.0)


# --- which levels ---------------------------------------------------------------------------------


def test_spacings():
    even = spaced_sigmas(50.0, 0.01, 5, "log")
    ratios = [low / high for high, low in itertools.pairwise(even)]
    assert ratios == pytest.approx([ratios[0]] * 4)
    karras = spaced_sigmas(80.0, 0.002, 3, "karras")
    assert karras[1] == pytest.approx(((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7)
    for sigmas in (even, karras):
        assert (sigmas[0], sigmas[-1]) in ((50.0, 0.01), (80.0, 0.002))
    assert spaced_sigmas(50.0, 0.01, 1) == [50.0]
    with pytest.raises(ValueError, match="levels must be one of"):
        spaced_sigmas(50.0, 0.01, 3, "linear")


def test_levels_of_a_ladder():
    ladder = geometric(40)
    assert spaced_levels(ladder, 14) == list(range(0, 40, 3))
    # Of these the nearest is often the same: they must differ all the same, whatever the spacing.
    uneven = [100.0, 1.0, 0.9, 0.8, 0.7, 0.01]
    for n in range(2, 7):
        for spacing in ("log", "karras"):
            levels = spaced_levels(uneven, n, spacing)
            assert levels == sorted(set(levels)) and len(levels) == n
            assert (levels[0], levels[-1]) == (0, 5)
    assert spaced_levels(uneven, 1) == [0]
    with pytest.raises(ValueError, match="the ladder has 6 levels, and 7 were asked for"):
        spaced_levels(uneven, 7)


# --- networks -------------------------------------------------------------------------------------

LADDER = geometric(20, 5.0, 0.1)


def ncsn():
    torch.manual_seed(0)
    return NCSN(in_channels=1, nf=4, num_classes=20, sigmas=LADDER).eval()


def mlp():
    torch.manual_seed(0)
    model = ScoreMLP(2, (8,), sigmas=LADDER).eval()
    torch.nn.init.normal_(model.last.weight, std=0.1)
    return model


# Passes, and how many times the network is called, at how many levels.
COSTS = {
    "euler": ({"passes": 10}, 10, 10),
    "heun": ({"passes": 10}, 9, 5),
    "dpmpp_2m": ({"passes": 7}, 7, 7),
    "dpmpp_2m_sde": ({"passes": 7}, 7, 7),
    "ancestral": ({"passes": 10, "corrector_steps": 1}, 10, 5),
}


@pytest.mark.parametrize("make", [ncsn, mlp])
@pytest.mark.parametrize("name", COSTS)
def test_passes_choose_levels(name, make):
    model, asked, seen = make(), [], []
    model.register_forward_pre_hook(lambda _, args: asked.append(float(args[1])))
    options, calls, levels = COSTS[name]
    size = (4,) if make is ncsn else ()
    draw = {"sampler": name, "seed": 0, **options}
    x = model.sample(2, *size, **draw, callback=lambda *what: seen.append(what))
    assert len(asked) == calls and len(seen) == levels
    of = ("level",) if make is ncsn else ("level", "sigma")
    *left, last = callback_sigmas(name, of, model.sigmas.tolist(), options)
    assert last == 0
    visited = [5.0, *left]
    at = [LADDER[int(level)] for level in asked] if make is ncsn else asked
    assert sorted(set(at), reverse=True) == pytest.approx(visited, rel=1e-5)
    if make is ncsn:
        assert x.abs().max() <= 1
    else:
        assert visited == pytest.approx(geometric(levels, 5.0, 0.1), rel=1e-5)
    tail = model.sample(1, *size, **draw, sample_offset=1)
    torch.testing.assert_close(tail, x[1:], rtol=1e-4, atol=1e-4)
    # Without passes it is the whole ladder.
    assert callback_sigmas(name, of, LADDER, {}) == [*LADDER[1:], 0.0]
    assert callback_sigmas("ald", of, LADDER, {}) == LADDER


def test_spacing_and_churn_reach_the_solver():
    model, asked = mlp(), []
    model.register_forward_pre_hook(lambda _, args: asked.append(float(args[1])))
    model.sample(2, sampler="heun", passes=9, levels="karras", seed=0)
    assert asked[::2] == pytest.approx(spaced_sigmas(5.0, 0.1, 5, "karras"), rel=1e-5)
    asked.clear()
    model.sample(2, sampler="heun", passes=9, churn=1.0, seed=0)
    levels = geometric(5, 5.0, 0.1)
    assert asked[::2] == pytest.approx([1.2 * sigma for sigma in levels], rel=1e-5)
    asked.clear()
    limits = {"churn": 1.0, "churn_min": 0.2, "churn_max": 2.0, "churn_noise": 1.01}
    model.sample(2, sampler="heun", passes=9, seed=0, **limits)
    raised = [1.2 * sigma if 0.2 <= sigma <= 2 else sigma for sigma in levels]
    assert asked[::2] == pytest.approx(raised, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 0}, "passes must be an int >= 1"),
        ({"passes": 21}, "the ladder has 20 levels, and 21 were asked for"),
        ({"passes": 5, "levels": "linear"}, "levels must be one of"),
        ({"n_steps_each": 3}, "takes passes, and no n_steps_each"),
        ({"denoise": False}, "takes no denoise=False"),
        ({"step_lr": 0.1}, "takes no step_lr"),
        ({"churn": 1.0}, "takes no churn"),
        ({"init_dist": "uniform"}, "starts from init_dist prior"),
        ({"sampler": "heun", "churn": 1.0}, "takes a network over a continuous sigma"),
        ({"sampler": "ald", "passes": 10}, "'ald' takes no passes"),
        ({"sampler": "ancestral", "passes": 2, "corrector_steps": 2}, "enough for one level"),
        ({"sampler": "ancestral", "passes": 2, "corrector_steps": -1}, "corrector_steps must be"),
    ],
)
def test_mistakes_with_a_network(options, message):
    with pytest.raises(ValueError, match=message):
        ncsn().sample(1, 4, verbose=False, **({"sampler": "euler"} | options))
