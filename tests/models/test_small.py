"""ScoreMLP and ScoreCNN: one interface with NCSN, every loss, sampler and the trainer; files; errors."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.tolerances import assert_forward

from ncsn_fast import NCSN, ScoreCNN, ScoreMLP
from ncsn_fast.embeddings import SigmaEmbedding
from ncsn_fast.files import CheckpointError
from ncsn_fast.losses import LearnedWeighting
from ncsn_fast.models.base import SIGMA, log_uniform_sigmas
from ncsn_fast.sampling.samplers import SAMPLERS as RECORDS
from ncsn_fast.training import TrainingSettings, train
from ncsn_fast.training.checkpoints import load_checkpoint

# The functions, of the samplers on a ladder.
SAMPLERS = {name: known.function for name, known in RECORDS.items() if known.of == "level"}
SIGMAS = (2.0, 1.0, 0.5)


def mlp(**options):
    return randomised(ScoreMLP, **{"hidden": (16, 8), "sigmas": SIGMAS} | options)


def concat(**options):
    return mlp(conditioning="concat", **options)


def cnn(**options):
    return randomised(ScoreCNN, **{"nf": 8, "image_size": 6, "sigmas": SIGMAS} | options)


def ncsn():
    return randomised(NCSN, in_channels=1, nf=4, num_classes=3, sigmas=SIGMAS)


def randomised(network, **options):
    """Always the same, and without the zeros of a new network, which would hide everything."""
    torch.manual_seed(0)
    model = network(**options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def data_for(model, n=5):
    shape = (6 if side is None else side for side in model.sample_shape)
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


CONDITIONED = [mlp, concat, cnn]
ALL = [*CONDITIONED, ncsn]


# --- the interface that all share -----------------------------------------------------------------


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("weighting", ["sigma2", "one", "learned"])
def test_every_loss_with_every_network(make, weighting):
    model = make()
    x, labels = data_for(model), torch.tensor([0, 1, 2, 1, 0])
    weighting = LearnedWeighting() if weighting == "learned" else weighting
    loss, drawn = model.get_loss(x, labels=labels, seed=3, weighting=weighting)
    loss.backward()
    assert torch.equal(drawn, labels) and loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.grad is not None and bool(p.grad.any()) for p in model.parameters()) > 3
    if isinstance(weighting, LearnedWeighting):
        assert weighting.linear.bias.grad.any()
    again, _ = model.get_loss(x, labels=labels, seed=3, weighting=weighting)
    assert torch.equal(loss, again)


@pytest.mark.parametrize("make", ALL)
def test_score_at_a_level_is_forward(make):
    model = make()
    x = data_for(model)
    for level, sigma in enumerate(SIGMAS):
        labels = torch.full((5,), level)
        condition = torch.full((5,), sigma) if make is not ncsn else labels
        torch.testing.assert_close(model.score(x, level), model(x, condition))


@pytest.mark.parametrize("make", CONDITIONED)
def test_levels_by_label_are_levels_by_sigma(make):
    """Where a ladder lets the network embed each level once, nothing else may change."""
    model = make()
    x, labels = data_for(model), torch.tensor([2, 0, 1, 1, 2])
    by_label, _ = model.get_loss(x, labels=labels, seed=1)
    by_sigma, drawn = model.get_loss(x, sigma=torch.tensor(SIGMAS)[labels], seed=1)
    torch.testing.assert_close(by_label, by_sigma)
    assert drawn.dtype == torch.float32


@pytest.mark.parametrize("make", CONDITIONED)
@torch.no_grad()
def test_the_score_at_one_sigma_is_forward(make):
    """What sampling uses, with sigma put into the weights, is the network."""
    for options in ({}, {"scale_by_sigma": True}, {"scale_by_sigma": False}):
        model = make(**options)
        x = data_for(model)
        for sigma in (0.01, 0.7, 30.0):
            assert_forward(model.at(torch.tensor(sigma))(x), model(x, sigma), torch.float32)


@pytest.mark.parametrize("make", CONDITIONED)
@pytest.mark.parametrize("sampler", [*SAMPLERS, "ode"])
def test_every_sampler_with_every_network(make, sampler):
    model = make()
    options = {"sampler": sampler, "n_steps_each": 2, "denoise": True, "seed": 5}
    x = model.sample(4, **options)
    assert x.shape == (4, *model.sample_shape) and x.dtype == torch.float32
    assert x.isfinite().all() and not x.requires_grad
    tail = model.sample(1, sample_offset=3, **options)
    torch.testing.assert_close(tail, x[3:])


@pytest.mark.parametrize("make", CONDITIONED)
def test_sampling_is_the_sampler_around_forward(make):
    model, start = make(), data_for(make())
    by_hand = SAMPLERS["ald"](
        lambda x, level: model(x, SIGMAS[level]),
        start,
        SIGMAS,
        n_steps_each=3,
        step_lr=0.05,
        seed=2,
    )
    drawn = model.sample(5, init=start, n_steps_each=3, step_lr=0.2 * 0.5**2, seed=2)
    torch.testing.assert_close(drawn, by_hand)
    torch.testing.assert_close(model.sample(5, init=start, n_steps_each=3, seed=2), drawn)


@pytest.mark.parametrize("make", CONDITIONED)
@torch.no_grad()
def test_levels_on_the_device_as_captured_graphs_have_them(make):
    model = make()
    x, score = data_for(model), model.scores()["level"]
    for level in range(len(SIGMAS)):
        assert_forward(score(x, torch.tensor([level])), score(x, level), torch.float32)


def test_images_of_any_size():
    model = cnn()
    assert model.sample(1, (5, 9), n_steps_each=1).shape == (1, 1, 5, 9)
    assert model(torch.zeros(2, 1, 1, 1), 0.5).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="samples are no images"):
        mlp().sample(1, 8)


# --- one rule for all networks --------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "pc", "step_lr": 123.0}, "sampler 'pc' takes no step_lr"),
        ({"sampler": "ald", "snr": 0.2}, "sampler 'ald' takes no snr"),
        ({"sampler": "cas", "predictor": "ancestral"}, "sampler 'cas' takes no predictor"),
        ({"sampler": "pc", "init_dist": "nonsense"}, "init_dist must be one of"),
        ({"sampler": "pc", "init_dist": "uniform"}, "sampler 'pc' starts from init_dist prior"),
        ({"sampler": "cas", "step_lr": 1e-9}, "step_lr must be from .* on this ladder"),
        ({"sampler": "nonsense"}, "sampler must be one of"),
    ],
)
def test_every_network_refuses_the_same(make, options, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        model.sample(2, 6 if make is not mlp and make is not concat else None, **options)


@pytest.mark.parametrize("make", ALL)
def test_every_sampler_has_defaults_that_the_ladder_allows(make):
    model = make()
    size = None if make in (mlp, concat) else 6
    for name, sampler in RECORDS.items():
        if make is ncsn and sampler.of == "sigma":
            with pytest.raises(ValueError, match="sampler must be one of"):
                model.sample(2, size, sampler=name)
            continue
        assert model.sample(2, size, sampler=name, n_steps_each=2, seed=0).isfinite().all()


def test_an_option_of_no_sampler():
    with pytest.raises(TypeError, match="no sampler takes an option 'stepps'"):
        mlp().sample(2, stepps=3)


@pytest.mark.parametrize("make", ALL)
def test_clip_at_the_end_where_states_are_wide(make):
    model = make()
    size = None if make in (mlp, concat) else 6
    bound = {"clip": True} if make is ncsn else {"clip": 1.0}
    for name in ("ald", "cas", "pc"):
        x = model.sample(4, size, sampler=name, n_steps_each=1, seed=0, **bound)
        assert x.abs().max() == 1, name


@pytest.mark.parametrize("make", ALL)
def test_evaluation_mode_while_sampling(make):
    model = make().train()
    inner = list(model.modules())[2].eval()
    seen = []
    before = {name: module.training for name, module in model.named_modules()}
    size = None if make in (mlp, concat) else 6
    model.sample(
        2,
        size,
        n_steps_each=1,
        callback=lambda *_: seen.append(any(module.training for module in model.modules())),
    )
    assert seen and not any(seen)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not inner.training


@pytest.mark.parametrize("make", ALL)
def test_threads_that_overlap_leave_the_mode_as_it_was(make):
    """The second begins while the first samples, and goes on after the first has ended."""
    model = make().train()
    size = None if make in (mlp, concat) else 6
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    modes = []

    def first(level, x):
        first_is_in.set()
        assert second_is_in.wait(30)

    def second(level, x):
        second_is_in.set()
        assert first_is_out.wait(30)
        modes.append(model.training)

    def run(callback):
        model.sample(1, size, n_steps_each=1, callback=callback)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(run, first)
        assert first_is_in.wait(30)
        two = pool.submit(run, second)
        one.result()
        first_is_out.set()
        two.result()
    assert modes and not any(modes)
    assert all(module.training for module in model.modules())


def test_a_thread_that_samples_takes_no_look_at_labels_from_another():
    model, told = ncsn(), []

    def other():
        try:
            model(torch.zeros(1, 1, 6, 6), torch.tensor([3]))
        except IndexError as error:
            told.append(str(error))

    def callback(level, x):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(other).result()

    model.sample(1, 6, n_steps_each=1, callback=callback)
    assert told == ["labels must be in 0..2, got 3..3"] * 3


# --- torch's defaults -----------------------------------------------------------------------------


@pytest.fixture(params=["float64", "bfloat16", "float16", "meta"])
def other_default(request):
    """Torch makes tensors of another dtype, or without memory, wherever a call does not say."""
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=ALL)
def with_values(request):
    """A network made before, and what it gives: samples of every sampler, and the loss."""
    model = request.param()
    x = data_for(model)
    size = None if request.param in (mlp, concat) else 6

    def values():
        options = {"n_steps_each": 2, "seed": 3, "denoise": True}
        names = [n for n in RECORDS if not (n == "ode" and request.param is ncsn)]
        drawn = [model.sample(2, size, sampler=name, **options) for name in names]
        loss, _ = model.get_loss(x, seed=1, labels=labels)
        return [*drawn, loss.detach(), model.score(x, 1).detach()]

    labels = torch.tensor([0, 1, 2, 1, 0])
    return model, x, values, values()


def test_torchs_defaults_change_no_value(with_values, other_default):
    model, x, values, expected = with_values
    for got, wanted in zip(values(), expected, strict=True):
        assert torch.equal(got, wanted)
    loss, labels = model.get_loss(x)
    assert labels.dtype == torch.int64 and loss.isfinite()
    ladder = [0.3333333, 0.1111111]
    if model.conditioned_on == SIGMA:
        model.set_sigmas(ladder)
        assert model.sigmas.dtype == torch.float32
        assert model.sigmas.tolist() == pytest.approx(ladder, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", ALL)
def test_a_network_made_in_another_default_dtype(make, dtype):
    torch.set_default_dtype(dtype)
    try:
        model = make()
        size = None if make in (mlp, concat) else 6
        x = model.sample(2, size, n_steps_each=1, seed=0)
        loss, _ = model.get_loss(data_for(make()).to(dtype))
        loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert x.dtype == model.sigmas.dtype == torch.float32
    assert next(model.parameters()).dtype == dtype


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize(
    "options", [{"weighting": "learned"}, {"levels": "continuous"}, {"weighting": "one"}]
)
def test_training_resumes_exactly(tmp_path, make, options):
    common = {"batch_size": 4, "lr_schedule": "constant", **options}
    x = data_for(make(), 10)
    whole = train(
        make(), x, TrainingSettings(iterations=4, **common), tmp_path / "a", verbose=False
    )
    train(make(), x, TrainingSettings(iterations=2, **common), tmp_path / "b", verbose=False)
    settings = TrainingSettings(iterations=4, **common)
    resumed = train(make(), x, settings, tmp_path / "b", resume=True, verbose=False)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(whole.parameters()), next(make().parameters()))
    one, other = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in "ab")
    assert bool(one.weighting) == (options.get("weighting") == "learned")
    for name, value in one.weighting.items():
        assert torch.equal(value, other.weighting[name])
    assert not one.weighting or one.weighting["linear.bias"].any()
    loaded = one.ema_model()
    assert type(loaded) is type(whole) and loaded.config == whole.config
    torch.testing.assert_close(loaded.score(x, 1), whole.score(x, 1))


def test_a_run_of_one_network_is_not_one_of_another(tmp_path):
    settings = TrainingSettings(iterations=1, batch_size=2)
    train(mlp(), data_for(mlp()), settings, tmp_path, verbose=False)
    with pytest.raises(CheckpointError, match="another configuration: conditioning"):
        train(concat(), data_for(mlp()), settings, tmp_path, resume=True, verbose=False)


def test_an_ncsn_knows_its_ladder_only(tmp_path):
    settings = TrainingSettings(levels="continuous")
    with pytest.raises(ValueError, match="an NCSN knows the levels of its ladder only"):
        train(ncsn(), torch.zeros(3, 1, 6, 6), settings, tmp_path)
    with pytest.raises(ValueError, match="weighting must be one of"):
        TrainingSettings(weighting="sigma")


def test_continuous_levels_are_even_in_log_sigma():
    sigmas = log_uniform_sigmas(torch.linspace(0, 1, 5), 0.01, 100.0)
    torch.testing.assert_close(sigmas, torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0]))


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", CONDITIONED)
def test_saved_and_loaded(tmp_path, make):
    model = make()
    model.set_sigmas([5.0, 4.0, 3.0, 2.0])  # another length than the configuration's
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    x = data_for(model)
    assert torch.equal(loaded.sigmas, model.sigmas) and not loaded.training
    assert loaded.config == model.config
    assert torch.equal(loaded.score(x, 3), model.score(x, 3))
    assert loaded.double().sigmas.dtype == torch.float32


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ScoreMLP(conditioning="none"), ValueError, "conditioning must be one of"),
        (lambda: ScoreMLP(hidden=()), ValueError, "at least one width"),
        (lambda: ScoreMLP(dim=0), ValueError, "dim must be an int >= 1, got 0"),
        (lambda: ScoreMLP(embedding=7), ValueError, "even number"),
        (lambda: ScoreCNN(nf=12), ValueError, "multiple of 8, got 12"),
        (lambda: mlp(sigmas=[]), ValueError, "at least one level"),
        (lambda: mlp(sigmas=[1.0, 2.0]), ValueError, "strictly descending"),
        (lambda: ScoreMLP().get_loss(torch.zeros(2, 2)), RuntimeError, "set_sigmas"),
        (lambda: ScoreMLP().sample(2), RuntimeError, "set_sigmas"),
        (lambda: mlp()(torch.zeros(2, 3), 1.0), ValueError, r"x must have shape \(N, 2\)"),
        (lambda: cnn()(torch.zeros(2, 3, 4, 4), 1.0), ValueError, r"\(N, 1, H, W\)"),
        (lambda: mlp()(torch.zeros(2, 2), torch.ones(3)), ValueError, r"\(2,\) or \(1,\)"),
        (lambda: mlp()(torch.zeros(2, 2), 0.0), ValueError, "sigma must be positive"),
        (lambda: mlp()(torch.zeros(2, 2).double(), 1.0), TypeError, "dtype"),
        (lambda: mlp()(torch.zeros(2, 2).long(), 1.0), TypeError, "floating point"),
        (lambda: mlp().sample(2, sampler="sde"), ValueError, "sampler must be one of"),
        (lambda: mlp().sample(2, init_dist="zero"), ValueError, "init_dist must be one of"),
        (lambda: mlp().sample(2, sampler="pc", step_lr=1.0), ValueError, "takes no step_lr"),
        (lambda: mlp().sample(2, sampler="ode", step_lr=1.0), ValueError, "takes no step_lr"),
        (lambda: mlp().sample(2, init=torch.zeros(3, 2)), ValueError, "init must have shape"),
        (
            lambda: mlp().get_loss(torch.zeros(2, 2), sigma=torch.ones(3)),
            ValueError,
            "one noise level for each",
        ),
        (lambda: mlp().get_loss(torch.zeros(2, 2), weighting="x"), ValueError, "weighting must be"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_labels_and_sigma_together():
    labels, sigma = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    with pytest.raises(ValueError, match="labels and sigma were given"):
        mlp().get_loss(torch.zeros(2, 2), labels=labels, sigma=sigma)


# --- parts ----------------------------------------------------------------------------------------


def test_the_embedding_tells_small_levels_apart():
    embedding = SigmaEmbedding(64)(torch.tensor([0.01, 0.02, 10.0, 20.0]))
    assert embedding.shape == (4, 64)
    near = torch.cdist(embedding, embedding)
    torch.testing.assert_close(near[0, 1], near[2, 3])  # a factor counts, not a difference
    assert near[0, 1] > 1


def test_the_first_learned_weighting_is_sigma2_per_dimension():
    model = mlp()
    x = data_for(model)
    options = {"labels": torch.tensor([0, 1, 2, 1, 0]), "seed": 0}
    learned, _ = model.get_loss(x, weighting=LearnedWeighting(), **options)
    plain, _ = model.get_loss(x, **options)
    torch.testing.assert_close(learned, plain / 2)
