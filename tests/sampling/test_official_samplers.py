"""Samplers against runs of the authors' programs, whose noise was recorded.

Recorded noise gets into a chain through its score: to it is added what makes the step with the library's own noise one
with the recorded noise. So what runs is what a user runs, and where its noise comes from is proved as well.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.official_oracles import ORACLES, PER_SAMPLE, read, tiny, worst_sample

from ncsn_fast import ops
from ncsn_fast.models.convert import load_official
from ncsn_fast.sampling import ScoreError, annealed_langevin
from ncsn_fast.sampling.official import annealed_langevin_2019, inpaint_2019, interpolate
from ncsn_fast.schedules import make_sigmas
from ncsn_fast.streams import KNOWN_NOISE_STEPS, STREAM_LANGEVIN, STREAM_ROTATION

SEED = 5


def stream(shape, step, stream=STREAM_LANGEVIN):
    return ops.philox_normal(shape, seed=SEED, step=step, stream=stream)


class Run:
    """A recorded run, and the score that leads one of the library's samplers along it."""

    def __init__(self, name: str) -> None:
        self.oracle, metadata = read(f"sampler_{name}")
        net, _ = tiny(metadata["network"].removesuffix(".safetensors"))
        self.net = lambda x, level: net(x, torch.tensor([level]))
        self.sigmas = self.oracle["sigmas"].tolist()
        self.steps, self.step_lr = int(metadata["n_steps_each"]), float(metadata["step_lr"])
        self.options = {"n_steps_each": self.steps, "step_lr": self.step_lr, "seed": SEED}
        self.done = 0
        self.seen: list[torch.Tensor] = []

    def recorded(self, level: int, step: int) -> torch.Tensor:
        return self.oracle["noise"][level, step]

    def own(self, shape: tuple[int, ...], step: int) -> torch.Tensor:
        return stream(shape, step)

    def score(self, x: torch.Tensor, level: int) -> torch.Tensor:
        self.seen.append(x.clone())
        score = self.net(x, level)
        if self.done < self.steps * len(self.sigmas):  # there is no noise in a denoising step
            assert level == self.done // self.steps
            eta = self.step_lr * (self.sigmas[level] / self.sigmas[-1]) ** 2
            z = self.recorded(level, self.done % self.steps) - self.own(tuple(x.shape), self.done)
            score = score + math.sqrt(2 / eta) * z
        self.done += 1
        return score


def inpainting(name: str, columns: int) -> tuple[Run, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A recorded inpainting: its start, known images and mask, a row a sample, as the programs flatten them."""
    run = Run(name)
    x0 = run.oracle["x0"]
    known = run.oracle["reference"].repeat_interleave(x0.shape[1], dim=0)
    mask = torch.zeros(known.shape[2:], dtype=torch.bool)
    mask[:, :columns] = True
    return run, x0.flatten(0, 1), known, mask


# --- annealed Langevin dynamics ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v1_ald", "v2_ald"])
@pytest.mark.parametrize("denoise", [False, True])
def test_annealed_langevin(name, denoise):
    """Step sizes, no clamp, the step to the clean image: all is the library's own sampler."""
    run = Run(name)
    oracle = run.oracle
    x, states = annealed_langevin(
        run.score,
        oracle["x0"],
        run.sigmas,
        denoise=denoise,
        return_intermediates=1,
        **run.options,
    )
    expected = oracle["final_state_denoised" if denoise else "final_state"]
    assert worst_sample(x, expected) < PER_SAMPLE
    if name == "v1_ald":
        got, states = torch.stack(run.seen[: len(states)]), oracle["states_before_update"]
    else:
        got, states = states, oracle["states_after_update"]
    for one, other in zip(got, states.flatten(0, 1), strict=True):
        assert worst_sample(one, other) < PER_SAMPLE


def test_the_2019_program_drops_its_last_update():
    run = Run("v1_ald")
    levels = []
    x = annealed_langevin_2019(
        run.score,
        run.oracle["x0"],
        run.sigmas,
        callback=lambda level, x: levels.append(level),
        **run.options,
    )
    assert worst_sample(x, run.oracle["returned_last"]) < PER_SAMPLE
    assert worst_sample(x, run.oracle["final_state"].clamp(0, 1)) > 1e-3
    assert levels == list(range(len(run.sigmas)))


@pytest.mark.parametrize(("levels", "steps"), [(1, 1), (1, 2), (2, 1), (1, 3)])
def test_few_updates(levels, steps):
    """Where less than two states come before the last update."""
    seen, sigmas = [], [1.0, 0.5][:levels]

    def score(x, level):
        seen.append(x.clone())
        return -x / sigmas[level] ** 2

    x = annealed_langevin_2019(
        score, torch.rand(2, 3), sigmas, n_steps_each=steps, step_lr=0.01, seed=0
    )
    assert len(seen) == levels * steps and torch.equal(x, seen[-1].clamp(0, 1))


@torch.no_grad()
def test_samples_of_a_checkpoint():
    """From the authors' file to the images that their program drew from it."""
    oracle, metadata = read("checkpoint_ncsnv2.expected")
    net = load_official(ORACLES / metadata["file"])
    sigmas = net.sigmas.tolist()
    steps, step_lr = int(metadata["n_steps_each"]), float(metadata["step_lr"])
    x, done = oracle["sample_init"], 0

    def score(x, level):
        nonlocal done
        score = net(x, torch.tensor([level]))
        if done < steps * len(sigmas):
            eta = step_lr * (sigmas[level] / sigmas[-1]) ** 2
            z = oracle["sample_noise"][level, done % steps] - stream(x.shape, done)
            score = score + math.sqrt(2 / eta) * z
        done += 1
        return score

    x = annealed_langevin(
        score, x, sigmas, n_steps_each=steps, step_lr=step_lr, denoise=True, seed=SEED
    )
    assert worst_sample(x.clamp(0, 1), oracle["sample_final_clamped"]) < PER_SAMPLE


# --- inpainting -------------------------------------------------------------------------------------


def test_inpainting_of_2019():
    run, x0, known, mask = inpainting("v1_inpainting", 16)
    oracle = run.oracle
    # The score sees the known half with the library's noise: that is checked, then the recorded noise put in its place.
    net = run.net

    def with_recorded_known(x, level):
        z = stream(x.shape, KNOWN_NOISE_STEPS + level * run.steps)
        torch.testing.assert_close(
            x[..., :16], (known + run.sigmas[level] * z)[..., :16], rtol=0, atol=1e-6
        )
        x = x.clone()
        x[..., :16] = known[..., :16] + run.sigmas[level] * oracle["noise_known_half"][level]
        return net(x, level)

    run.net = with_recorded_known
    x = inpaint_2019(run.score, x0, known, mask, run.sigmas, **run.options)
    assert x.shape == x0.shape
    free = (slice(None), slice(None), slice(None), slice(16, None))
    assert worst_sample(x[free], oracle["returned_last"][free]) < PER_SAMPLE
    z = stream(x.shape, KNOWN_NOISE_STEPS + (len(run.sigmas) - 1) * run.steps)
    expected = (known + run.sigmas[-1] * z).clamp(0, 1)[..., :16]
    torch.testing.assert_close(x[..., :16], expected, rtol=0, atol=1e-6)


def test_inpainting_of_2020():
    """The library's own, which at the end also writes the known values back."""
    run, x0, known, mask = inpainting("v2_inpainting", 8)
    oracle, net = run.oracle, run.net

    def with_recorded_known(x, level):
        z = stream(x.shape, KNOWN_NOISE_STEPS + run.done)
        torch.testing.assert_close(
            x[..., :8], (known + run.sigmas[level] * z)[..., :8], rtol=0, atol=1e-5
        )
        w = oracle["noise_known_half"][level, run.done % run.steps]
        x = x.clone()
        x[..., :8] = known[..., :8] + run.sigmas[level] * w
        last.append(x)
        return net(x, level)

    last: list[torch.Tensor] = []
    run.net = with_recorded_known
    x = annealed_langevin(run.score, x0, run.sigmas, known=known, mask=mask, **run.options)
    assert worst_sample(last[-1], oracle["state_at_last_score_call"]) < PER_SAMPLE
    assert worst_sample(x[..., 8:], oracle["final_state"][..., 8:]) < PER_SAMPLE
    assert torch.equal(x[..., :8], known[..., :8])


def test_inpainting_of_2019_with_any_mask():
    mask = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    known, seen = torch.rand(3, 4, 4), []

    def score(x, level):
        seen.append(x.clone())
        return 0.5 - x

    x0 = torch.rand(2, 3, 4, 4)
    x = inpaint_2019(score, x0, known, mask, (1.0, 0.5), n_steps_each=2, step_lr=0.01, seed=0)
    hidden = mask.expand(2, 3, 4, 4)
    first, second, third, _ = seen
    assert torch.equal(first[hidden], second[hidden])  # of one level
    assert not torch.equal(second[hidden], third[hidden])
    assert torch.equal(x, seen[-1].clamp(0, 1)) and torch.equal(first[~hidden], x0[~hidden])
    with pytest.raises(TypeError, match="mask must be bool"):
        inpaint_2019(score, x0, known, mask.float(), (1.0, 0.5))


# --- interpolation ----------------------------------------------------------------------------------


class Interpolation(Run):
    n = 3

    def rotated(self, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        rows = [
            math.cos(angle) * p[r] + math.sin(angle) * q[r]
            for r in range(len(p))
            for angle in (0.0, math.pi / 4, math.pi / 2)
        ]
        return torch.stack(rows)

    def recorded(self, level, step):
        return self.rotated(
            self.oracle["noise_p"][level, step], self.oracle["noise_q"][level, step]
        )

    def own(self, shape, step):
        shape = (shape[0] // self.n, *shape[1:])
        return self.rotated(stream(shape, step), stream(shape, step, STREAM_ROTATION))


def test_interpolation():
    run = Interpolation("v2_interpolation")
    x = interpolate(run.score, run.oracle["x0"], run.sigmas, n_interpolations=3, **run.options)
    assert worst_sample(x, run.oracle["final_state"]) < PER_SAMPLE


def test_interpolation_begins_at_the_sample_of_its_seed():
    sigmas = make_sigmas(1.0, 0.1, 3).tolist()

    def score(x, level):
        return (0.5 - x) / sigmas[level] ** 2

    start = torch.rand(2, 3, 4, 4)
    options = {"n_steps_each": 2, "step_lr": 0.002, "seed": 3, "sample_offset": 4}
    rows = interpolate(score, start, sigmas, n_interpolations=5, **options).view(2, 5, 3, 4, 4)
    torch.testing.assert_close(rows[:, 0], annealed_langevin(score, start, sigmas, **options))
    one = interpolate(score, start, sigmas, n_interpolations=1, **options)
    torch.testing.assert_close(one, rows[:, 0])
    later = interpolate(
        score, start[1:], sigmas, n_interpolations=5, **options | {"sample_offset": 5}
    )
    torch.testing.assert_close(later, rows[1])


def test_bad_interpolations():
    start, sigmas = torch.rand(1, 2), (1.0, 0.5)
    with pytest.raises(ScoreError, match="NaN"):
        interpolate(lambda x, _: x * math.nan, start, sigmas, n_interpolations=2, step_lr=1e-3)
    for wrong, what in (
        ({"n_interpolations": 0}, "n_interpolations"),
        ({"n_steps_each": 0}, "n_steps_each"),
        ({"step_lr": -1.0}, "step_lr"),
        ({"sigmas": (0.5, 1.0)}, "descending"),
    ):
        given = {"n_interpolations": 2, "step_lr": 1e-3, "sigmas": sigmas} | wrong
        with pytest.raises(ValueError, match=what):
            interpolate(lambda x, _: -x, start, **given)
