"""What all networks share: one interface, one registry, one way to files; and a network of a user's own."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import ncsn_fast
from ncsn_fast import NCSN, ScoreCNN, ScoreMLP, ScoreModel, load_pretrained
from ncsn_fast.data.ranges import DataRangeWarning
from ncsn_fast.files import CheckpointError
from ncsn_fast.models import registry
from ncsn_fast.models.base import LABEL
from ncsn_fast.models.official import NCSNv2, NCSNv2Deeper, NCSNv2Deepest, OfficialNCSN
from ncsn_fast.models.registry import new_network, register
from ncsn_fast.sampling.samplers import SAMPLERS
from ncsn_fast.schedules import make_sigmas
from ncsn_fast.training import TrainingSettings, train
from ncsn_fast.training.checkpoints import load_model

SIGMAS = make_sigmas(2.0, 0.5, 3)
SIZE = 16  # that all of them take
SETTINGS = TrainingSettings(iterations=2, batch_size=2, warmup=0)


# --- a network of a user's own, as docs/adding_a_network.md has it -----------------------------------


@dataclasses.dataclass(frozen=True)
class OneLayerConfig:
    channels: int = 1
    sigmas: tuple[float, ...] | None = None


@register
class OneLayer(ScoreModel):
    Config = OneLayerConfig
    data_range = (-1.0, 1.0)

    def __init__(self, config: OneLayerConfig) -> None:
        super().__init__(config)
        self.layer = nn.Conv2d(config.channels, config.channels, 3, padding=1)

    @property
    def sample_shape(self) -> tuple[int | None, ...]:
        return (self.config.channels, SIZE, SIZE)

    def forward(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        sigma = self.check_input(x, sigma).view(-1, 1, 1, 1)
        return (self.layer(x) - x) / (1 + sigma**2)


# --- all of them --------------------------------------------------------------------------------------


MAKE = {
    "NCSN": lambda: NCSN(1, 4, 3, sigmas=SIGMAS),
    "ScoreMLP": lambda: ScoreMLP(hidden=(8,), sigmas=SIGMAS),
    "ScoreCNN": lambda: ScoreCNN(nf=8, image_size=SIZE, sigmas=SIGMAS),
    "OfficialNCSN": lambda: OfficialNCSN(1, 2, 3, sigmas=SIGMAS),
    "NCSNv2": lambda: NCSNv2(1, 2, 3, sigmas=SIGMAS),
    "NCSNv2Deeper": lambda: NCSNv2Deeper(1, 2, 3, sigmas=SIGMAS),
    "NCSNv2Deepest": lambda: NCSNv2Deepest(1, 2, 3, sigmas=SIGMAS),
    "OneLayer": lambda: OneLayer(OneLayerConfig(sigmas=tuple(SIGMAS.tolist()))),
}
EACH = pytest.mark.parametrize("name", MAKE)
IMAGES = pytest.mark.parametrize("name", [name for name in MAKE if name != "ScoreMLP"])


def made(name):
    """Always the same, and without the zeros of a new network."""
    torch.manual_seed(0)
    model = MAKE[name]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def data_for(model, n=3):
    shape = [SIZE if side is None else side for side in model.sample_shape]
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))
    return x if model.data_range == (0.0, 1.0) else 2 * x - 1


def buffers_of(model):
    return {name for name, _ in model.named_buffers()}


def size_of(model):
    return SIZE if None in model.sample_shape else None


def assert_same(one, other):
    assert type(one) is type(other)
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
    assert torch.equal(one.sigmas, other.sigmas)


def test_these_are_all_that_there_are():
    assert set(registry.NETWORKS) == set(MAKE)
    assert {"OfficialNCSN", "NCSNv2", "NCSNv2Deeper", "NCSNv2Deepest"} <= set(ncsn_fast.__all__)


@EACH
def test_one_interface(name):
    model = made(name)
    assert isinstance(model, ScoreModel) and isinstance(model, registry.NETWORKS[name])
    x = data_for(model)
    labels = torch.tensor([0, 1, 2])
    loss, drawn = model.get_loss(x, labels=labels, seed=3)
    loss.backward()
    assert torch.equal(drawn, labels) and loss.isfinite()
    score = model.score(x, 1)
    by_hand = model(x, torch.tensor([1]) if model.conditioned_on == LABEL else SIGMAS[1])
    assert score.shape == x.shape and torch.equal(score, by_hand)
    one_level, _ = model.get_loss(x, labels=torch.tensor([1]), seed=3)
    assert torch.equal(one_level, model.get_loss(x, labels=torch.tensor([1, 1, 1]), seed=3)[0])


@EACH
@torch.no_grad()
def test_every_sampler(name):
    model = made(name)
    shape = data_for(model, 2).shape
    for sampler, record in SAMPLERS.items():
        if record.of not in model.scores():
            continue
        options = {"sampler": sampler, "n_steps_each": 1, "seed": 5}
        options |= {"verbose": False} if name == "NCSN" else {}
        x = model.sample(2, size_of(model), **options)
        assert x.shape == shape and x.dtype == torch.float32 and x.isfinite().all()
        one = model.sample(1, size_of(model), **options, sample_offset=1)
        torch.testing.assert_close(one[0], x[1], rtol=1e-4, atol=1e-4)


@EACH
def test_files(tmp_path, name):
    model = made(name)
    model.set_sigmas(SIGMAS * 2)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    # Without a name it stays readable by the versions that knew no other networks.
    assert fields.get("network") == (None if name == "NCSN" else name)
    for load in (load_pretrained, type(model).from_pretrained, ScoreModel.from_pretrained):
        loaded = load(tmp_path)
        assert_same(loaded, model)
        assert loaded.config == model.config and not loaded.training
        assert torch.equal(loaded.sigmas, SIGMAS * 2)


@EACH
def test_a_run_of_any_network_is_found_again(tmp_path, name):
    model = made(name)
    x = data_for(model, 4)
    average = train(model, x, SETTINGS, tmp_path, verbose=False)
    for path in (tmp_path, tmp_path / "checkpoint.pt", tmp_path / "model"):
        loaded, size = load_model(path)
        assert_same(loaded, average)
        assert size == tuple(x.shape[2:]) and not loaded.training
    assert_same(load_model(tmp_path, weights="last")[0], model)
    longer = dataclasses.replace(SETTINGS, iterations=3)
    train(made(name), x, longer, tmp_path, resume=True, verbose=False)


@EACH
def test_copies(name):
    model = made(name)
    x = data_for(model)
    with torch.device("meta"):
        empty = new_network(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AveragedModel(model).module]
    # What is not in the state dict, some have: the ladder, the frequencies of an embedding.
    for twin in [*twins, empty] if model.state_dict().keys() >= buffers_of(model) else twins:
        assert_same(twin, model)
        torch.testing.assert_close(twin.score(x, 2), model.score(x, 2), rtol=0, atol=0)
    half = copy.deepcopy(model).bfloat16()
    assert half.sigmas.dtype == torch.float32 and torch.equal(half.sigmas, model.sigmas)
    assert half.score(x.bfloat16(), 0).dtype == torch.bfloat16


# The others' graphs are like these, and take longer.
@pytest.mark.parametrize("name", ["OfficialNCSN", "NCSNv2", "OneLayer"])
def test_one_graph(name):
    model = made(name)
    x = data_for(model, 2)
    condition = torch.tensor([0, 2])
    condition = condition if model.conditioned_on == LABEL else SIGMAS[condition]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, condition), model(x, condition))


@EACH
def test_mistakes(name):
    model = made(name)
    x = data_for(model)
    for wrong, error, message in (
        (x.numpy(), TypeError, "x must be a tensor, got ndarray"),
        (x.long(), TypeError, "x must be floating point, got torch.int64"),
        (
            x.double(),
            TypeError,
            "dtype of the model's parameters, torch.float32, got torch.float64",
        ),
        (torch.cat([x, x], 1), ValueError, r"x must have shape \(N, "),
        (x[0], ValueError, r"x must have shape \(N, "),
    ):
        with pytest.raises(error, match=message):
            model.score(wrong, 0)
        with pytest.raises(error, match=message):
            model.get_loss(wrong)
    for labels, error in (
        (torch.tensor([0, 1]), ValueError),
        (torch.tensor([0, 1, 3]), IndexError),
    ):
        with pytest.raises(error, match="labels must"):
            model.get_loss(x, labels=labels)
    with pytest.raises(TypeError, match="takes a config or separate arguments|positional argument"):
        type(model)(model.config, 3)
    if model.conditioned_on == LABEL:
        with pytest.raises(ValueError, match=f"{name} is conditioned on labels, not on sigma"):
            model.get_loss(x, sigma=torch.ones(3))
        with pytest.raises(ValueError, match="each of the 3 noise levels"):
            model.set_sigmas([1.0])
    else:
        model.set_sigmas([1.0])


@IMAGES
def test_clamped_to_the_range_of_the_data(name):
    model = made(name)
    low, high = model.data_range
    options = {"n_steps_each": 1, "seed": 0} | ({"verbose": False} if name == "NCSN" else {})
    for sampler in ("ald", "cas"):
        free = model.sample(2, SIZE, sampler=sampler, clip=False, init_dist="prior", **options)
        assert free.min() < low and free.max() > high
        x = model.sample(2, SIZE, sampler=sampler, clip=True, **options)
        assert low <= x.min() < low + 0.2 and high - 0.2 < x.max() <= high
    started = []
    more = {"return_intermediates": 1, "step_lr": 1e-9}
    _, states = model.sample(2, SIZE, clip=False, init_dist="uniform", **more, **options)
    started = states[0]
    width = (high - low) / 100
    assert started.min() > low - width and started.max() < high + width
    assert started.max() - started.min() > 0.9 * (high - low)


def test_clamping_of_points_needs_a_number():
    with pytest.raises(ValueError, match="clip=True clamps to data_range"):
        made("ScoreMLP").sample(2, clip=True)
    x = made("ScoreMLP").sample(50, clip=0.5, n_steps_each=1)
    assert x.abs().max() == 0.5


def test_images_of_any_size_have_no_usual_one():
    with pytest.raises(ValueError, match="NCSNv2 takes images of any size: say image_size"):
        made("NCSNv2").sample(2)


# --- configurations and files -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ScoreMLP", "ScoreCNN", "NCSN"])
def test_folders_without_a_name(tmp_path, name):
    """As before the names: the network is told from the fields."""
    model = made(name)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    fields.pop("network", None)
    path.write_text(json.dumps(fields))
    for load in (load_pretrained, type(model).from_pretrained):
        assert_same(load(tmp_path), model)


def test_a_folder_of_another_network(tmp_path):
    made("ScoreMLP").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"config\.json is of a ScoreMLP, not of an NCSN: ScoreMLP\."
    ):
        NCSN.from_pretrained(tmp_path)
    made("NCSNv2Deeper").save_pretrained(tmp_path / "deeper")
    with pytest.raises(ValueError, match="is of an NCSNv2Deeper, not of an NCSNv2"):
        NCSNv2.from_pretrained(tmp_path / "deeper")


def test_a_network_that_nobody_registered(tmp_path, monkeypatch):
    model = made("OneLayer")
    train(model, data_for(model), SETTINGS, tmp_path, verbose=False)
    monkeypatch.delitem(registry.NETWORKS, "OneLayer")
    message = "there is no network 'OneLayer', only NCSN, NCSNv2, .*module that registers it"
    for path in (tmp_path, tmp_path / "model"):
        with pytest.raises(CheckpointError, match=message):
            load_model(path)
    for call in (
        lambda: model.save_pretrained(tmp_path / "again"),
        lambda: train(model, data_for(model), SETTINGS, tmp_path / "new", verbose=False),
    ):
        with pytest.raises(TypeError, match="OneLayerConfig is the configuration of no registered"):
            call()
    assert not (tmp_path / "new" / "checkpoint.pt").exists()


def test_registering(monkeypatch):
    monkeypatch.setattr(registry, "NETWORKS", dict(registry.NETWORKS))
    with pytest.raises(TypeError, match="NoConfig.Config must be a dataclass with a field sigmas"):
        register(type("NoConfig", (ScoreModel,), {}))
    with pytest.raises(TypeError, match="Sub needs a Config of its own, OneLayerConfig is"):
        register(type("Sub", (OneLayer,), {}))
    with pytest.raises(ValueError, match="there is a network NCSN already"):
        register(type("NCSN", (ScoreModel,), {"Config": OneLayerConfig}))
    again = type("OneLayer", (OneLayer,), {"__qualname__": "OneLayer", "__module__": __name__})
    assert register(again) is again and registry.NETWORKS["OneLayer"] is again


@pytest.mark.parametrize("name", ["OfficialNCSN", "NCSNv2"])
def test_data_of_the_authors_networks(name):
    """In [0, 1], as told by the first batch; logits may be anything."""
    model = made(name)
    with pytest.warns(
        DataRangeWarning, match=r"expects data in \[0, 1\].*convert them: x / 2 \+ 0.5"
    ):
        model.get_loss(2 * data_for(model) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = type(model)(1, 2, 3, logit_transform=True, sigmas=SIGMAS)
        logits.get_loss(2 * data_for(model) - 1)
    assert logits.data_range is None
    assert NCSNv2(1, 2, 3, rescaled=True).data_range == (-1.0, 1.0)


@torch.no_grad()
def test_any_sigma_of_a_network_that_divides_by_it():
    model = made("NCSNv2").eval()
    x, of_sigma = data_for(model), model.scores()["sigma"]
    for level, sigma in enumerate(SIGMAS.tolist()):
        torch.testing.assert_close(of_sigma(x, sigma), model.score(x, level))
    assert "sigma" not in made("OfficialNCSN").scores()
