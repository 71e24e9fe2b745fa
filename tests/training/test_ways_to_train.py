"""What the settings of a training do: optimiser, parts of a batch, bfloat16, several averages, kept checkpoints."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from ncsn_fast import NCSN, NCSNConfig, ScoreMLP, use_backend
from ncsn_fast.files import CheckpointError
from ncsn_fast.losses import perturb, sliced_score_matching_loss
from ncsn_fast.training import Observer, TrainingSettings, read_losses, train
from ncsn_fast.training.checkpoints import load_checkpoint, load_model
from ncsn_fast.training.objective import Objective
from ncsn_fast.training.trainer import Trainer

CONFIG = NCSNConfig(in_channels=1, nf=4, num_classes=3, sigmas=(1.0, 0.3, 0.1))
SETTINGS = TrainingSettings(
    iterations=4, batch_size=4, checkpoint_every=2, warmup=0, lr_schedule="constant"
)
IMAGES = torch.rand(10, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
POINTS = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))


def images_model():
    torch.manual_seed(0)
    return NCSN(CONFIG)


def points_model():
    torch.manual_seed(0)
    model = ScoreMLP(2, hidden=(8,), embedding=4, sigmas=CONFIG.sigmas)
    torch.nn.init.normal_(model.last.weight, std=0.1)
    return model


def run(out, model=None, data=POINTS, observers=(), resume=False, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    model = model or points_model()
    train(model, data, settings, out, verbose=False, observers=observers, resume=resume)
    return load_checkpoint(out / "checkpoint.pt")


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize("objective", ["dsm", "ssm_vr"])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(tmp_path, objective):
    found = []
    for parts in (1, 2, 4):
        settings = dataclasses.replace(SETTINGS, accumulate=parts, objective=objective, lr=0.01)
        trainer = Trainer(images_model(), IMAGES, settings, tmp_path)
        trainer.optimizer = torch.optim.SGD(trainer.parameters, lr=0.01)
        loss, _ = trainer.train_step()
        found.append((loss, [p.detach() for p in trainer.parameters]))
    (whole, weights), *others = found
    for loss, parts in others:
        torch.testing.assert_close(loss, whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(parts, weights, rtol=1e-3, atol=1e-5)


def test_bfloat16_is_of_the_network_alone(tmp_path):
    seen = set()

    class Looking(Observer):
        def on_start(self, trainer):
            trainer.model.end_conv.register_forward_hook(lambda m, i, y: seen.add(y.dtype))

        def on_step(self, trainer, loss, rate):
            assert loss.dtype == torch.float32 and loss.isfinite()
            assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.parameters)

    how = {"weighting": "learned", "iterations": 6}
    half = run(tmp_path / "half", images_model(), IMAGES, [Looking()], bf16=True, **how)
    run(tmp_path / "full", images_model(), IMAGES, **how)
    assert torch.bfloat16 in seen or not seen  # a fused layer may be called without its module
    losses, expected = (read_losses(tmp_path / n / "losses.csv")[1] for n in ("half", "full"))
    assert losses == pytest.approx(expected, rel=0.05) and losses != expected
    state = [v for one in half.optimizer["state"].values() for v in one.values()]
    for value in (*half.model.values(), *half.ema.values(), *half.weighting.values(), *state):
        assert value.dtype == torch.float32


def test_weight_decay_is_adamws(tmp_path):
    plain = run(tmp_path / "adam")
    none = run(tmp_path / "none", optimizer="adamw")
    decayed = run(tmp_path / "decayed", optimizer="adamw", weight_decay=10.0, lr=1e-3)
    assert same(plain.model, none.model)
    size = {k: c.model["layers.0.weight"].norm() for k, c in {0: plain, 1: decayed}.items()}
    assert size[1] < 0.99 * size[0]


def test_several_averages_are_kept_and_chosen_afterwards(tmp_path):
    several = run(tmp_path / "several", ema_decay=0.5, ema_decays=(0.9, 0.0), ema_warmup=False)
    alone = run(tmp_path / "alone", ema_decay=0.9, ema_warmup=False)
    assert set(several.averages) == {"0", "0.9"}
    assert same(several.averages["0.9"], alone.ema) and same(several.averages["0"], several.model)
    out = tmp_path / "several"
    for name, weights in (
        ("ema", several.ema),
        ("ema:0.5", several.ema),
        ("ema:0.90", alone.ema),
        ("last", several.model),
    ):
        assert same(load_model(out, weights=name)[0].state_dict(), weights)
    for name in ("ema:0.99", "ema:much"):
        with pytest.raises(
            ValueError, match=f"holds the averages ema:0.5, ema:0, ema:0.9, got '{name}"
        ):
            load_model(out, weights=name)
    with pytest.raises(ValueError, match="holds one set of weights"):
        load_model(out / "model", weights="ema:0.9")
    whole = run(tmp_path / "whole", ema_decays=(0.9,), iterations=6)
    run(tmp_path / "parts", ema_decays=(0.9,))
    parts = run(tmp_path / "parts", ema_decays=(0.9,), iterations=6, resume=True)
    assert same(whole.averages["0.9"], parts.averages["0.9"])


class Judge(Observer):
    """Gives held-out losses."""

    def __init__(self, *losses):
        self.losses = list(losses)

    def on_checkpoint(self, trainer):
        return self.losses.pop(0)


def steps_of(out):
    return {p.name: load_checkpoint(p).step for p in out.glob("*.pt")}


def test_the_last_checkpoints_and_the_best_stay(tmp_path):
    judge = Judge(3.0, 1.0, None, float("nan"), 2.0)
    run(tmp_path, observers=[judge], iterations=10, keep_last=2)
    expected = {"checkpoint.pt": 10, "checkpoint_00000008.pt": 8, "checkpoint_00000010.pt": 10}
    assert steps_of(tmp_path) == {**expected, "best.pt": 4}
    newest = [tmp_path / name for name in ("checkpoint.pt", "checkpoint_00000010.pt")]
    assert os.path.samefile(*newest)  # which takes no room of its own
    # It goes on knowing its best, and may keep another number.
    run(tmp_path, observers=[Judge(1.5)], iterations=12, keep_last=3, resume=True)
    assert steps_of(tmp_path) == {
        **expected,
        "checkpoint.pt": 12,
        "checkpoint_00000012.pt": 12,
        "best.pt": 4,
    }
    run(tmp_path, observers=[Judge(0.5)], iterations=14, resume=True)
    assert steps_of(tmp_path) == {"checkpoint.pt": 14, "best.pt": 14}
    load_model(tmp_path / "best.pt")
    settings = dataclasses.replace(SETTINGS, iterations=2)
    train(points_model(), POINTS, settings, tmp_path, overwrite=True, verbose=False)
    assert steps_of(tmp_path) == {"checkpoint.pt": 2}


@pytest.mark.parametrize(
    "changes",
    [
        *({"optimizer": "adamw"}, {"accumulate": 2}, {"bf16": True}, {"compile": True}),
        *({"ema_decays": (0.9,)}, {"objective": "ssm"}, {"directions": 2}),
    ],
)
def test_a_changed_way_to_train_is_refused_with_the_difference(tmp_path, changes):
    run(tmp_path)
    ((name, value),) = changes.items()
    there = getattr(SETTINGS, name)
    with pytest.raises(CheckpointError) as error:
        run(tmp_path, iterations=6, resume=True, **changes)
    assert f"other settings: {name} is {there!r} there and {value!r} here" in str(error.value)


def test_a_compiled_training_runs_what_was_compiled_and_is_saved_plainly(tmp_path, monkeypatch):
    calls = []

    def backend(graph, inputs):
        return lambda *arguments: (calls.append(1), graph(*arguments))[1]

    monkeypatch.setattr(
        ScoreMLP, "compile", lambda self: torch.nn.Module.compile(self, backend=backend)
    )
    compiled = run(tmp_path / "compiled", compile=True)
    assert len(calls) >= SETTINGS.iterations
    plain = run(tmp_path / "plain")
    assert compiled.model.keys() == plain.model.keys()
    for name, value in plain.model.items():
        torch.testing.assert_close(compiled.model[name], value, rtol=0, atol=3e-3)


# --- sliced score matching ------------------------------------------------------------------------


@pytest.mark.parametrize("reduced", [True, False])
def test_sliced_score_matching_of_a_gaussian_has_its_closed_form(reduced):
    """Data of variance t, noise of variance s: the score is -x / (t + s), and of -a x the loss is known."""
    n, dim, t, sigma = 40_000, 3, 0.7, 0.5
    generator = torch.Generator().manual_seed(0)
    x = t**0.5 * torch.randn(n, dim, dtype=torch.float64, generator=generator)
    noise, v = (torch.randn(n, dim, dtype=torch.float64, generator=generator) for _ in range(2))
    levels = torch.full((n,), sigma, dtype=torch.float64)
    noisy, variance = perturb(x, levels, noise), t + sigma**2
    best = 1 / variance

    def loss(a, weighting="one"):
        how = {"variance_reduced": reduced, "weighting": weighting}
        return sliced_score_matching_loss(lambda z: -a * z, noisy, levels, v[None], **how)

    for factor in (0.5, 1.0, 2.0):
        a = torch.tensor(factor * best, dtype=torch.float64, requires_grad=True)
        value = loss(a)
        expected = dim * (-a + 0.5 * a**2 * variance)
        torch.testing.assert_close(value, expected, rtol=0, atol=0.12 * factor**2)
        (slope,) = torch.autograd.grad(value, a)
        torch.testing.assert_close(slope.item(), dim * (factor - 1.0), rtol=0, atol=0.12 * factor)
        torch.testing.assert_close(loss(a, "sigma2"), value * sigma**2)


def test_the_reduced_form_varies_less():
    generator = torch.Generator().manual_seed(0)
    x, levels = torch.randn(500, 8, 3, generator=generator), torch.ones(8)
    spread = []
    for reduced in (True, False):
        losses = [
            sliced_score_matching_loss(
                lambda z: -2 * z,
                some,
                levels,
                torch.randn(1, 8, 3, generator=generator),
                variance_reduced=reduced,
            )
            for some in x
        ]
        spread.append(torch.stack(losses).std())
    assert spread[0] < 0.8 * spread[1]


@pytest.mark.parametrize("kind", ["ssm", "ssm_vr"])
def test_sliced_objectives_have_the_gradients_of_the_reference(kind):
    """Through second derivatives of the fused operators; and no state of a generator is in them."""
    labels, found = torch.tensor([0, 2, 1, 1]), []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            objective = Objective(images_model(), kind=kind, directions=2)
            loss = objective(IMAGES[:4], labels=labels, seed=5)
            loss.backward()
            found.append(
                (
                    loss.detach(),
                    {n: p.grad for n, p in objective.named_parameters() if p.grad is not None},
                )
            )
    (ours, gradients), (theirs, expected) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert gradients.keys() == expected.keys() and len(gradients) > 50
    for name, gradient in gradients.items():
        size = max(float(expected[name].abs().max()), 1.0)
        torch.testing.assert_close(gradient / size, expected[name] / size, rtol=0, atol=2e-2)
    halves = [
        objective(IMAGES[i : i + 2], labels=labels[i : i + 2], seed=5, sample_offset=i)
        for i in (0, 2)
    ]
    torch.testing.assert_close(sum(halves).detach() / 2, theirs, rtol=1e-3, atol=1e-3)


def test_sliced_score_matching_learns_a_gaussian(tmp_path):
    data = 0.5 * torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    settings = TrainingSettings(
        iterations=250, batch_size=128, lr=5e-3, objective="ssm_vr", levels="continuous", warmup=0
    )
    torch.manual_seed(0)
    model = ScoreMLP(2, hidden=(32,), sigmas=(1.0, 0.3))
    network = train(model, data, settings, tmp_path, verbose=False)
    x = torch.tensor([[0.5, 0.0], [0.0, -0.5], [-0.4, 0.4]])
    sigma = 0.6
    expected = -x / (0.25 + sigma**2)
    assert (network(x, sigma) - expected).norm() < 0.25 * expected.norm()
