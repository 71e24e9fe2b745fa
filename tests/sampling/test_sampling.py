"""Annealed Langevin dynamics: against a float64 loop, against theory, and as NCSN.sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ncsn_fast import NCSN, ops
from ncsn_fast.ops.algorithms import has_matrix_unit
from ncsn_fast.sampling import annealed_langevin, draw_seed, initial_state

SIGMAS = [1.0, 0.3, 0.1]


@pytest.fixture(scope="module")
def model() -> NCSN:
    torch.manual_seed(0)
    return NCSN(in_channels=2, nf=4, num_classes=3, sigmas=SIGMAS)


def draw(model, n=2, size=4, **settings):
    """``model.sample``, short and silent."""
    settings = {"n_steps_each": 2, "step_lr": 1e-3, "verbose": False, "seed": 5} | settings
    return model.sample(n, size, **settings)


def gaussian_score(x, level):
    """The score of N(0.25, 0.5^2) convolved with each level's noise."""
    return (0.25 - x) / (0.25 + SIGMAS[level] ** 2)


# --- the function ---------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.75])
@pytest.mark.parametrize("denoise", [False, True])
def test_against_a_float64_loop(clip, denoise):
    init = 2 * torch.rand(3, 2, 3, 5, generator=torch.Generator().manual_seed(0)) - 1
    step_lr, n_steps_each, seed, offset = 2e-3, 7, 2**40 + 5, 11

    x = init.double()
    step = clipped = 0
    for level in range(3):
        eta = step_lr * (SIGMAS[level] / SIGMAS[-1]) ** 2
        for _ in range(n_steps_each):
            z = ops.philox_normal(
                x.shape, seed=seed, step=step, sample_offset=offset, stream=1, dtype=torch.float64
            )
            x = x + eta * gaussian_score(x, level) + math.sqrt(2 * eta) * z
            if clip is not None:
                clipped += (x.abs() > clip).sum()
                x = x.clamp(-clip, clip)
            step += 1
    if denoise:
        x = x + SIGMAS[-1] ** 2 * gaussian_score(x, 2)
        x = x if clip is None else x.clamp(-clip, clip)

    y = annealed_langevin(
        gaussian_score,
        init,
        SIGMAS,
        n_steps_each=n_steps_each,
        step_lr=step_lr,
        clip=clip,
        denoise=denoise,
        seed=seed,
        sample_offset=offset,
    )
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), x, rtol=1e-5, atol=1e-5)
    assert clip is None or clipped > 100  # the clamp was put to the test


def test_exact_gaussian_score_gives_gaussian_samples():
    n, step_lr = 5000, 0.02
    init = initial_state((n, 4), "uniform", seed=1)
    x = annealed_langevin(gaussian_score, init, SIGMAS, n_steps_each=100, step_lr=step_lr, seed=2)
    variance = 0.25 + SIGMAS[-1] ** 2
    # With a linear score the chain is an AR(1) process, whose stationary variance is known exactly.
    stationary = math.sqrt(variance / (1 - step_lr / (2 * variance)))
    count = x.numel()
    assert abs(x.mean() - 0.25) < 5 * stationary / math.sqrt(count)
    assert abs(x.std() - stationary) < 5 * stationary / math.sqrt(2 * count)


def test_score_may_have_any_floating_dtype():
    init = initial_state((2, 3, 4, 4), seed=0)
    expected = annealed_langevin(gaussian_score, init, SIGMAS, n_steps_each=3, seed=1, denoise=True)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        x = annealed_langevin(
            lambda x, level, dtype=dtype: gaussian_score(x, level).to(dtype),
            init,
            SIGMAS,
            n_steps_each=3,
            seed=1,
            denoise=True,
        )
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["expanded", "channels_last", "transposed"])
def test_init_of_any_layout_is_left_alone(layout):
    init = initial_state((2, 3, 4, 4), seed=0)
    if layout == "expanded":
        init = init[:1].expand(2, 3, 4, 4)
    elif layout == "channels_last":
        init = init.to(memory_format=torch.channels_last)
    else:
        init = init.transpose(1, 3).contiguous().transpose(1, 3)[:, :, :, :].requires_grad_()
    before = init.detach().clone(memory_format=torch.contiguous_format)
    x = annealed_langevin(gaussian_score, init, SIGMAS, n_steps_each=2, seed=1)
    assert torch.equal(init.detach(), before)
    assert x.is_contiguous()
    assert not x.requires_grad
    assert torch.equal(x, annealed_langevin(gaussian_score, before, SIGMAS, n_steps_each=2, seed=1))


def test_callback_sees_each_level_and_cannot_disturb():
    init = initial_state((2, 4), seed=0)
    expected = annealed_langevin(gaussian_score, init, SIGMAS, n_steps_each=2, seed=1)
    seen = []

    def callback(level, x):
        seen.append((level, x.clone()))
        x.fill_(1e6)

    x = annealed_langevin(gaussian_score, init, SIGMAS, n_steps_each=2, seed=1, callback=callback)
    assert torch.equal(x, expected)
    assert [level for level, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[-1][1], x)
    assert not torch.equal(seen[0][1], seen[1][1])


class CountReads(TorchDispatchMode):
    """Counts how often a tensor's value is read into Python; on a GPU each read waits for it."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_loop_reads_no_tensor():
    init = initial_state((2, 4), seed=0)
    with CountReads() as counter:
        annealed_langevin(
            gaussian_score, init, SIGMAS, n_steps_each=3, seed=1, clip=1.0, denoise=True
        )
    assert counter.reads == 0
    with CountReads() as counter:
        draw_seed()
    assert counter.reads == 1  # the counter does count


def test_initial_state():
    shape = (3, 1, 3, 3)
    uniform = initial_state(shape, "uniform", seed=9, sample_offset=2)
    bits = ops.philox_bits(shape, seed=9, sample_offset=2, stream=0).long() & 0xFFFFFFFF
    expected = 2 * (((bits >> 9).double() + 0.5) * 2.0**-23) - 1
    assert torch.equal(uniform.double(), expected)
    normal = initial_state(shape, "normal", seed=9, sample_offset=2)
    assert torch.equal(normal, ops.philox_normal(shape, seed=9, sample_offset=2, stream=0))


# --- NCSN.sample ----------------------------------------------------------------------------------


def test_sample_is_the_sampler_on_the_model(model):
    with torch.no_grad():
        expected = annealed_langevin(
            lambda x, level: model(x, torch.tensor([level])),
            initial_state((2, 2, 4, 3), seed=5),
            SIGMAS,
            n_steps_each=2,
            step_lr=1e-3,
            clip=1.0,
            seed=5,
        )
    x = draw(model, 2, (4, 3))
    assert x.shape == (2, 2, 4, 3)
    assert x.dtype == torch.float32
    assert x.device == model.sigmas.device
    assert not x.requires_grad
    torch.testing.assert_close(x, expected)


def test_sample_does_not_depend_on_the_batch(model):
    batch = draw(model, 7)
    for i in (0, 3, 6):
        alone = draw(model, 1, sample_offset=i)
        torch.testing.assert_close(alone[0], batch[i], rtol=1e-4, atol=1e-4)
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_seeds(model):
    assert torch.equal(draw(model, seed=5), draw(model, seed=5))
    assert not torch.equal(draw(model, seed=5), draw(model, seed=6))
    assert not torch.equal(draw(model, seed=5), draw(model, seed=5 + 2**32))


def test_manual_seed_governs_without_a_seed(model):
    torch.manual_seed(1)
    first, second = draw(model, seed=None), draw(model, seed=None)
    torch.manual_seed(1)
    again = draw(model, seed=None)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_a_seed_leaves_torchs_generator_alone(model):
    state = torch.get_rng_state()
    draw(model, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_clip(model):
    levels = []
    clipped = draw(model, step_lr=0.05, callback=lambda level, x: levels.append(x))
    assert all(x.abs().max() == 1 for x in [clipped, *levels])
    assert draw(model, step_lr=0.05, clip=False).abs().max() > 1
    assert draw(model, step_lr=0.05, denoise=True).abs().max() <= 1


def test_clip_comes_after_every_step(model):
    init = torch.full((1, 2, 4, 4), 50.0)
    seen = []

    def hook(module, args):
        seen.append(args[0].abs().max().item())

    handle = model.register_forward_pre_hook(hook)
    draw(model, 1, init=init, n_steps_each=3)
    handle.remove()
    assert len(seen) == 9
    assert seen[0] == 50
    assert max(seen[1:]) <= 1


def test_denoise_adds_one_step_without_noise(model):
    x = draw(model, clip=False)
    with torch.no_grad():
        expected = x + SIGMAS[-1] ** 2 * model(x, torch.tensor([2]))
    torch.testing.assert_close(draw(model, clip=False, denoise=True), expected)


def test_init(model):
    init = torch.rand(2, 2, 4, 4)
    before = init.clone()
    x = draw(model, init=init)
    assert torch.equal(init, before)
    torch.testing.assert_close(draw(model, init=init.double()), x)
    assert not torch.equal(x, draw(model))
    assert not torch.equal(draw(model, init_dist="normal"), draw(model))
    start = initial_state((2, 2, 4, 4), "normal", seed=5)
    assert torch.equal(draw(model, init_dist="normal"), draw(model, init=start))


def test_mode_is_restored(model):
    model.train()
    model.stage2.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []
    handle = model.register_forward_pre_hook(lambda m, args: seen.append(m.stage1.training))
    draw(model)
    assert seen and not any(seen)
    assert {name: module.training for name, module in model.named_modules()} == modes

    class StopError(Exception):
        pass

    for error in (StopError, KeyboardInterrupt):

        def stop(level, x, error=error):
            raise error

        with pytest.raises(error):
            draw(model, callback=stop)
        assert {name: module.training for name, module in model.named_modules()} == modes
    handle.remove()
    model.eval()
    draw(model)
    assert not model.training


def test_no_graph_and_no_gradients(model):
    grad_enabled = []
    handle = model.register_forward_pre_hook(
        lambda *_: grad_enabled.append(torch.is_grad_enabled())
    )
    draw(model)
    handle.remove()
    assert grad_enabled and not any(grad_enabled)
    assert torch.is_grad_enabled()


def test_progress_bar(model, capfd):
    draw(model, verbose=True)
    err = capfd.readouterr().err
    assert "6/6" in err
    assert "sigma=0.1" in err
    draw(model, verbose=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_model_of_another_dtype_keeps_a_float32_state(dtype):
    torch.manual_seed(0)
    model = NCSN(in_channels=1, nf=4, num_classes=3, sigmas=SIGMAS)
    expected = draw(model)
    x = draw(model.to(dtype))
    assert x.dtype == torch.float32
    error = (x - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float64 else 0.1), error


def test_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        x = draw(model)
    expected = draw(model)
    assert x.dtype == torch.float32
    error = float((x - expected).norm() / expected.norm())
    # All of it is convolutions, which a CPU without matrix units computes in float32.
    assert error < 0.1 and (error > 0) == has_matrix_unit(torch.bfloat16)
