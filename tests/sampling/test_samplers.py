"""The samplers: each against its formula in a float64 loop, and with exact scores against the distribution itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ncsn_fast import NCSN, ScoreMLP, ops
from ncsn_fast.sampling import (
    ScoreError,
    annealed_langevin,
    consistent_annealed,
    initial_state,
    predictor_corrector,
)
from ncsn_fast.sampling.engine import KNOWN_NOISE_STEPS
from ncsn_fast.sampling.ode import log_likelihood, probability_flow
from ncsn_fast.sampling.samplers import SAMPLERS as RECORDS
from ncsn_fast.schedules import make_sigmas

# The functions, of the samplers on a ladder.
SAMPLERS = {name: known.function for name, known in RECORDS.items() if known.of == "level"}
N = 5000
# Correlated; both eigenvalues, 1.4 and 0.1, are well above the last sigma squared.
MEAN, COVARIANCE = torch.tensor([0.5, -0.3]), torch.tensor([[1.0, 0.6], [0.6, 0.5]])
CENTRES, VARIANCE = torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), 0.25


def gaussian(x, sigma):
    """The score of N(MEAN, COVARIANCE) with noise sigma."""
    precision = torch.linalg.inv(COVARIANCE + sigma**2 * torch.eye(2)).to(x.dtype)
    return -(x - MEAN.to(x.dtype)) @ precision


def mixture(x, sigma):
    """The score of 0.3 N(CENTRES[0], VARIANCE) + 0.7 N(CENTRES[1], VARIANCE) with noise sigma."""
    variance = VARIANCE + sigma**2
    # The logit of the right mode: both are equally wide, 6 apart.
    right = torch.sigmoid(6 * x[:, :1] / variance + math.log(0.7 / 0.3))
    return (CENTRES[0] + right * (CENTRES[1] - CENTRES[0]) - x) / variance


def on(sigmas, score):
    """As samplers on a ladder call it."""
    return lambda x, level: score(x, sigmas[level])


def start(n, sigma, seed=1):
    return sigma * initial_state((n, 2), "normal", seed=seed)


# --- the distribution -----------------------------------------------------------------------------

# What remains of the steps' size, as a part of the variance: the bound beside five standard errors. Annealed Langevin
# dynamics lags behind the ladder, consistent annealing and the ancestral predictor run ahead of it.
RUNS = {
    "ald": ("ald", 15, {"n_steps_each": 40, "step_lr": 0.2 * 0.2**2}, 0.05),
    "cas": ("cas", 200, {"step_lr": 0.05 * 0.2**2}, 0.05),
    "pc": ("pc", 100, {}, 0.05),
    "pc ancestral": ("pc", 200, {"predictor": "ancestral"}, 0.05),
    "ode": ("ode", 60, {}, 0.01),
}


def draw(run, score):
    """Samples of the data with noise 0.2, which the last level has; of 25 at first, to reach every mode."""
    sampler, levels, options, bias = RUNS[run]
    sigmas = make_sigmas(25.0, 0.2, levels).tolist()
    init = start(N, sigmas[0])
    if sampler == "ode":
        return probability_flow(score, init, sigmas), bias
    if (
        sampler == "cas"
    ):  # the last step of the paper's is without noise; the state before it has the ladder's
        kept = consistent_annealed(
            on(sigmas, score), init, sigmas, seed=2, return_intermediates=levels - 1, **options
        )[1]
        return kept[-1], bias
    return SAMPLERS[sampler](on(sigmas, score), init, sigmas, seed=2, **options), bias


@pytest.mark.parametrize("run", RUNS)
def test_a_gaussian(run):
    x, bias = draw(run, gaussian)
    expected = COVARIANCE + 0.2**2 * torch.eye(2)
    variances = expected.diagonal()
    # The start is N(0, 25^2): of the mean, MEAN * 0.2 / 25 at most is left.
    assert ((x.mean(0) - MEAN).abs() <= 5 * (variances / N).sqrt() + 0.01).all()
    error = (torch.cov(x.T) - expected).abs()
    scale = (variances[:, None] * variances).sqrt()
    assert (error <= (5 * math.sqrt(2 / N) + bias) * scale).all(), error / scale


@pytest.mark.parametrize("run", RUNS)
def test_a_mixture(run):
    x, bias = draw(run, mixture)
    right = x[:, 0] > 0
    assert abs(right.float().mean() - 0.7) <= 5 * math.sqrt(0.7 * 0.3 / N) + 0.015
    expected = VARIANCE + 0.2**2
    for mode, centre in ((x[~right], CENTRES[0]), (x[right], CENTRES[1])):
        count = len(mode)
        assert ((mode.mean(0) - centre).abs() <= 5 * math.sqrt(expected / count) + 0.03).all()
        error = (torch.cov(mode.T) - expected * torch.eye(2)).abs() / expected
        assert (error <= 5 * math.sqrt(2 / count) + bias).all(), error


# --- the formula ----------------------------------------------------------------------------------

SIGMAS = [2.0, 1.2, 0.8]
SEED, OFFSET = 2**40 + 5, 11
SETTINGS = {"seed": SEED, "sample_offset": OFFSET, "n_steps_each": 3}


def noise(x, step):
    return ops.philox_normal(
        x.shape, seed=SEED, step=step, sample_offset=OFFSET, stream=1, dtype=torch.float64
    )


@pytest.mark.parametrize("denoise", [False, True])
def test_consistent_annealing_against_a_float64_loop(denoise):
    step_lr = 0.5 * SIGMAS[-1] ** 2
    init = start(5, 2.0)
    x, step = init.double(), 0
    for level, sigma in enumerate(SIGMAS):
        for j in range(3):
            target = sigma if j < 2 else [*SIGMAS, 0.0][level + 1]
            target = sigma if denoise and level == 2 else target
            beta = 0.0 if target == 0 else math.sqrt(1 - (0.5 * sigma / target) ** 2)
            x = x + 0.5 * sigma**2 * mixture(x, sigma) + beta * target * noise(x, step)
            step += 1
    if denoise:
        x = x + SIGMAS[-1] ** 2 * mixture(x, SIGMAS[-1])
    y = consistent_annealed(
        on(SIGMAS, mixture), init, SIGMAS, step_lr=step_lr, denoise=denoise, **SETTINGS
    )
    torch.testing.assert_close(y.double(), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral"])
def test_predictor_corrector_against_a_float64_loop(predictor):
    init = start(5, 2.0)
    x, step = init.double(), 0
    for level, sigma in enumerate(SIGMAS):
        for _ in range(3):
            epsilon = 2 * (0.3 * sigma) ** 2
            x = x + epsilon * mixture(x, sigma) + math.sqrt(2 * epsilon) * noise(x, step)
            step += 1
        if level < 2:
            fall = sigma**2 - SIGMAS[level + 1] ** 2
            shrink = SIGMAS[level + 1] / sigma if predictor == "ancestral" else 1.0
            x = x + fall * mixture(x, sigma) + shrink * math.sqrt(fall) * noise(x, step)
            step += 1
    x = x + SIGMAS[-1] ** 2 * mixture(x, SIGMAS[-1])
    y = predictor_corrector(
        on(SIGMAS, mixture), init, SIGMAS, snr=0.3, predictor=predictor, denoise=True, **SETTINGS
    )
    torch.testing.assert_close(y.double(), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_score_of_another_dtype(sampler, dtype):
    def run(score):
        options = {} if sampler == "pc" else {"step_lr": 0.5 * SIGMAS[-1] ** 2}
        return SAMPLERS[sampler](score, start(5, 2.0), SIGMAS, denoise=True, **SETTINGS, **options)

    expected = run(on(SIGMAS, gaussian))
    x = run(lambda x, level: gaussian(x, SIGMAS[level]).to(dtype))
    assert x.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 3, 2), (4, 2, 3, 3), (4, 1, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_shape_and_any_batch(sampler, shape):
    """Sample i is the same bits in a batch and alone, wherever the score treats samples alike."""

    def run(n, offset):
        init = initial_state((n, *shape[1:]), "normal", seed=3, sample_offset=offset)
        options = {} if sampler == "pc" else {"step_lr": 0.5 * SIGMAS[-1] ** 2}
        options |= {"seed": 4, "sample_offset": offset, "n_steps_each": 2}
        return SAMPLERS[sampler](lambda x, i: -x / (1 + SIGMAS[i] ** 2), init, SIGMAS, **options)

    whole = run(4, 0)
    assert whole.shape == shape
    assert torch.equal(torch.cat([run(1, 0), run(3, 1)]), whole)


# --- the probability-flow ODE ---------------------------------------------------------------------


def test_heun_is_of_second_order():
    """Of a Gaussian with the exact score the solution is known: x grows as the standard deviation."""
    init = torch.tensor([[3.0, -40.0]], dtype=torch.float64)

    def error(steps):
        sigmas = make_sigmas(30.0, 0.1, steps).tolist()
        x = probability_flow(lambda x, sigma: -x / (4 + sigma**2), init, sigmas)
        exact = init * math.sqrt((4 + sigmas[-1] ** 2) / (4 + sigmas[0] ** 2))
        return float((x - exact).norm())

    assert error(21) < 0.05
    assert error(81) == pytest.approx(error(41) / 4, rel=0.1)
    sigmas = make_sigmas(30.0, 0.1, 81).tolist()
    x = probability_flow(lambda x, sigma: -x / (4 + sigma**2), init, sigmas, denoise=True)
    last = probability_flow(lambda x, sigma: -x / (4 + sigma**2), init, sigmas)
    torch.testing.assert_close(x, last * (1 - sigmas[-1] ** 2 / (4 + sigmas[-1] ** 2)))
    assert (init == torch.tensor([[3.0, -40.0]])).all()


def heun_loop(score, init, sigmas, denoise):
    """The same arithmetic in a plain loop, in the dtype of the start."""
    x = init.clone()
    for sigma, target in itertools.pairwise(sigmas):
        slope = -sigma * score(x, sigma)
        euler = x + (target - sigma) * slope
        x = x + (target - sigma) / 2 * (slope - target * score(euler, target))
    return x + sigmas[-1] ** 2 * score(x, sigmas[-1]) if denoise else x


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ode_against_a_plain_loop(dtype, denoise):
    init, sigmas = start(7, 30.0).to(dtype), make_sigmas(30.0, 0.1, 12).tolist()
    x = probability_flow(mixture, init, sigmas, denoise=denoise)
    assert x.dtype == dtype
    assert torch.equal(x, heun_loop(mixture, init, sigmas, denoise))


def test_the_ode_can_be_watched():
    """Callback, kept states, the known region and the place of a fault, as for the samplers on a ladder."""
    init, sigmas, seen = start(4, 5.0), make_sigmas(5.0, 0.2, 6).tolist(), []
    x, kept = probability_flow(
        mixture,
        init,
        sigmas,
        callback=lambda level, x: seen.append((level, x)),
        return_intermediates=2,
    )
    assert torch.equal(x, probability_flow(mixture, init, sigmas))
    assert [level for level, _ in seen] == list(range(6))
    assert torch.equal(kept, torch.stack([seen[1][1], seen[3][1]]))
    assert torch.equal(seen[5][1], x)
    assert torch.equal(seen[0][1], heun_loop(mixture, init, sigmas[:2], False))

    asked = []

    def score(x, sigma):
        asked.append((sigma, x.clone()))
        return mixture(x, sigma)

    mask = torch.tensor([True, False])
    x = probability_flow(score, init, sigmas, known=torch.ones(2), mask=mask, seed=SEED)
    assert (x[:, 0] == 1).all()
    assert [sigma for sigma, _ in asked] == [s for pair in itertools.pairwise(sigmas) for s in pair]
    for evaluation, (sigma, state) in enumerate(asked):
        step = KNOWN_NOISE_STEPS + evaluation // 2  # both evaluations of a step see one noise
        z = ops.philox_normal(x.shape, seed=SEED, step=step, stream=1)
        torch.testing.assert_close(state[:, 0], (1 + sigma * z)[:, 0])

    def broken(x, sigma):
        return mixture(x, sigma) * (math.nan if sigma == sigmas[3] else 1)

    with pytest.raises(ScoreError, match="at level 2 .*step 2 in all"):  # its second evaluation
        probability_flow(broken, init, sigmas)


def test_the_ode_of_a_network_can_be_watched():
    torch.manual_seed(0)
    model, seen = ScoreMLP(2, (8,), sigmas=SIGMAS), []
    torch.nn.init.normal_(model.last.weight)
    x = model.sample(
        3, sampler="ode", n_steps_each=4, seed=0, callback=lambda *what: seen.append(what)
    )
    assert [level for level, _ in seen] == [0, 1, 2]  # of the ladder, not of the finer grid
    assert torch.equal(seen[-1][1], x)
    with torch.no_grad():
        fine = [2.0 * 0.6 ** (i / 4) for i in range(4)]
        first = heun_loop(model, 2 * initial_state((3, 2), "normal", seed=0), [*fine, 1.2], False)
    torch.testing.assert_close(seen[0][1], first)


def test_log_likelihood():
    sigmas = make_sigmas(500.0, 0.1, 400).tolist()
    # Isotropic: the signs give the trace itself, nothing is left to chance.
    x = torch.tensor([[[0.5, -1.0, 3.0]], [[0.0, 0.0, 1.0]]], dtype=torch.float64)
    got = log_likelihood(lambda x, sigma: (0.5 - x) / (2 + sigma**2), x, sigmas)
    exact = torch.distributions.Normal(0.5, math.sqrt(2 + 0.1**2)).log_prob(x).sum((1, 2))
    torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-3)


def test_log_likelihood_is_unbiased():
    sigmas = make_sigmas(500.0, 0.1, 300).tolist()
    x = torch.tensor([[1.0, -0.5]], dtype=torch.float64).expand(200, 2)
    one = log_likelihood(gaussian, x, sigmas, seed=0)
    covariance = (COVARIANCE + 0.1**2 * torch.eye(2)).double()
    exact = torch.distributions.MultivariateNormal(MEAN.double(), covariance).log_prob(x[0])
    assert one.std() > 0.1  # the samples have signs of their own
    assert abs(one.mean() - exact) < 5 * one.std() / math.sqrt(200) + 2e-3
    assert torch.equal(log_likelihood(gaussian, x[:3], sigmas, seed=0, sample_offset=7), one[7:10])
    many = log_likelihood(gaussian, x[:20], sigmas[::4], seed=0, n_probes=50)
    assert many.std() < one.std() / 4


# --- a known region -------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ald", "pc"])
def test_inpainting_a_gaussian_gives_the_conditional(sampler):
    n, sigma_end = 2500, 0.2
    factor = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    covariance = factor @ factor.T / 4 + 0.3 * torch.eye(4)
    mean, values = torch.tensor([0.5, -1.0, 0.2, 0.0]), torch.tensor([1.0, 0.0, -0.7, 0.0])
    mask = torch.tensor([True, False, True, False])
    sigmas = make_sigmas(10.0, sigma_end, 20).tolist()
    precisions = [torch.linalg.inv(covariance + s**2 * torch.eye(4)) for s in sigmas]
    options = {"n_steps_each": 30}
    options |= {"snr": 0.2} if sampler == "pc" else {"step_lr": 0.1 * sigma_end**2}
    x = SAMPLERS[sampler](
        lambda x, level: (mean - x) @ precisions[level],
        sigmas[0] * initial_state((n, 4), "normal", seed=1),
        sigmas,
        seed=2,
        known=values.masked_fill(~mask, math.nan),  # what is not known is not looked at
        mask=mask,
        **options,
    )
    assert (x[:, mask] == values[mask]).all()
    # Of the last level: the data with its noise, given the known values, by the formula of the conditional.
    joint = covariance + sigma_end**2 * torch.eye(4)
    gain = joint[~mask][:, mask] @ torch.linalg.inv(joint[mask][:, mask])
    expected_mean = mean[~mask] + gain @ (values - mean)[mask]
    expected = joint[~mask][:, ~mask] - gain @ joint[mask][:, ~mask]
    unconditional = joint[~mask][:, ~mask]
    free = x[:, ~mask]
    scale = expected.diagonal().sqrt()
    # Bias: 0.05 for the size of the steps, as above; the known region's noise adds a little of its own.
    assert ((free.mean(0) - expected_mean).abs() <= (5 / math.sqrt(n) + 0.05) * scale).all()
    error = (torch.cov(free.T) - expected).abs() / (scale[:, None] * scale)
    assert (error <= 5 * math.sqrt(2 / n) + 0.1).all(), error
    # The test can tell: without the known values it would be another distribution.
    assert ((mean[~mask] - expected_mean).abs() > 0.3 * scale).any()
    assert (unconditional.diagonal() > 1.3 * expected.diagonal()).any()


def test_the_score_sees_the_known_region_with_the_noise_of_the_level():
    known, mask = torch.full((1, 2, 1), 5.0), torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 1] = mask[1, 3] = True
    init, seen = initial_state((3, 2, 4), seed=0), []

    def score(x, level):
        seen.append((level, x.clone()))
        return -x

    x = annealed_langevin(
        score, init, SIGMAS, known=known, mask=mask, denoise=True, clip=1.0, **SETTINGS
    )
    assert [level for level, _ in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    for step, (level, state) in enumerate(seen):
        z = ops.philox_normal(
            x.shape, seed=SEED, step=KNOWN_NOISE_STEPS + step, sample_offset=OFFSET, stream=1
        )
        expected = (5 + SIGMAS[level] * z)[:, mask]
        torch.testing.assert_close(state[:, mask], expected)
        assert step == 0 or state[:, ~mask].abs().max() <= 1
    assert (x[:, mask] == 5).all() and x[:, ~mask].abs().max() <= 1


# --- NCSN.sample ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["cas", "pc"])
def test_a_model_samples_by_each(sampler):
    torch.manual_seed(0)
    model = NCSN(in_channels=1, nf=4, num_classes=3, sigmas=SIGMAS).eval()
    options = {"step_lr": 0.5 * SIGMAS[-1] ** 2} if sampler == "cas" else {"snr": 0.1}
    common = {"n_steps_each": 2, "seed": 5, "verbose": False} | options
    x = model.sample(3, 4, sampler=sampler, clip=False, **common)
    with torch.no_grad():
        expected = SAMPLERS[sampler](
            lambda x, level: model(x, torch.tensor([level])),
            2.0 * initial_state((3, 1, 4, 4), "normal", seed=5),
            SIGMAS,
            n_steps_each=2,
            seed=5,
            **options,
        )
    torch.testing.assert_close(x, expected)
    assert x.abs().max() > 1
    assert torch.equal(model.sample(3, 4, sampler=sampler, **common), x.clamp(-1, 1))


def test_a_model_inpaints():
    torch.manual_seed(0)
    model = NCSN(in_channels=1, nf=4, num_classes=3, sigmas=SIGMAS).eval()
    known, mask = torch.rand(2, 1, 4, 4), torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True
    common = {"n_steps_each": 2, "step_lr": 0.1, "seed": 5, "verbose": False}
    x = model.sample(2, 4, known=known, mask=mask, **common)
    assert torch.equal(x[:, :, :2], known[:, :, :2])
    free = model.sample(2, 4, **common)
    assert (x[:, :, 2:] - free[:, :, 2:]).abs().max() > 1e-3  # it took notice


# --- mistakes -------------------------------------------------------------------------------------


def mistake(error, message, **changes):
    arguments = {"init": start(3, 2.0), "sigmas": SIGMAS, "n_steps_each": 2, "seed": 0}
    if changes.get("sampler") == "cas":
        arguments["step_lr"] = 0.5
    arguments |= changes
    sampler = SAMPLERS[arguments.pop("sampler", "ald")]
    score = arguments.pop("score", lambda x, level: -x)
    with pytest.raises(error, match=message):
        sampler(score, arguments.pop("init"), arguments.pop("sigmas"), **arguments)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_mistakes(sampler):
    def refused(error, message, **changes):
        mistake(error, message, sampler=sampler, **changes)

    known, mask = torch.zeros(2), torch.tensor([True, False])
    refused(ValueError, "strictly descending", sigmas=[0.8, 1.2, 2.0])
    refused(ValueError, "positive and finite", sigmas=[0.8, math.nan])
    refused(ValueError, "sample_offset must be in 0", sample_offset=-1)
    refused(ValueError, "n_steps_each must be an int >= 1", n_steps_each=0)
    refused(
        ValueError,
        r"mask must have the shape of the samples, \(3, 2\)",
        known=known,
        mask=mask[:1].expand(3),
    )
    refused(ValueError, "known must have the shape", known=torch.zeros(4, 3, 2), mask=mask)
    refused(TypeError, "both be tensors, got mask NoneType", known=known)
    refused(TypeError, "mask must be bool", known=known, mask=mask.float())
    refused(TypeError, "known must be floating", known=mask, mask=mask)
    refused(ValueError, "return_intermediates must be at least 1, got 0", return_intermediates=0)
    refused(ValueError, "cuda_graph takes a CUDA device", cuda_graph=True)
    refused(
        ValueError, r"score must have shape \(3, 2\), got \(3, 1\)", score=lambda x, i: x[:, :1]
    )


def test_mistakes_of_one_sampler():
    mistake(
        ValueError, "step_lr must be from 0.256 to 1.02 on this ladder", sampler="cas", step_lr=0.2
    )
    mistake(
        ValueError, "step_lr must be from 0.256 to 1.02 on this ladder", sampler="cas", step_lr=1.1
    )
    mistake(ValueError, "snr must be positive", sampler="pc", snr=0.0)
    mistake(ValueError, "predictor must be one of", sampler="pc", predictor="euler")
    model = NCSN(in_channels=1, nf=4, num_classes=3, sigmas=SIGMAS)
    with pytest.raises(ValueError, match="sampler must be one of"):
        model.sample(1, 4, sampler="ddim")
    with pytest.raises(ScoreError, match=r"NaN or infinite, first at level 0 \(sigma 2\)"):
        probability_flow(lambda x, sigma: x * math.nan, start(3, 2.0), SIGMAS)
    with pytest.raises(ValueError, match="strictly descending"):
        log_likelihood(gaussian, start(3, 2.0), SIGMAS[::-1])
    with pytest.raises(ValueError, match="n_probes"):
        log_likelihood(gaussian, start(3, 2.0), SIGMAS, n_probes=0)
