"""The table of the noise stream: every use of the library takes its numbers from it, and no two share any word."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch

import ncsn_fast
from ncsn_fast import NCSN, NCSNConfig, ScoreMLP, ops, streams
from ncsn_fast.data import ImageDataset, points
from ncsn_fast.sampling.ode import log_likelihood
from ncsn_fast.training import TrainingSettings, train

SOURCES = Path(ncsn_fast.__file__).parent
DRAWS = ("philox_uniform", "philox_normal", "philox_bits")


def draws():
    """The calls in the library, but for the operators' own, that draw: where, and the expression of the stream."""
    for path in sorted(SOURCES.rglob("*.py")):
        if {"ops", "kernels"} & set(path.relative_to(SOURCES).parts):
            continue
        aliases = set(DRAWS)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and any(name in ast.dump(node.value) for name in DRAWS):
                if not isinstance(node.value, ast.Call):
                    aliases |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        for node in ast.walk(tree):
            called = getattr(node, "func", None)
            if getattr(called, "attr", getattr(called, "id", None)) in aliases:
                stream = [k.value for k in node.keywords if k.arg == "stream"]
                yield f"{path.name}:{node.lineno}", ast.unparse(stream[0]) if stream else None


def test_every_draw_names_its_stream():
    found = dict(draws())
    assert len(found) >= 8
    for place, stream in found.items():
        assert stream is not None, f"{place} draws from the stream that is the callers'"
        assert stream.rpartition(".")[2] in vars(streams), (place, stream)


def test_what_callers_draw_has_not_moved():
    assert (
        streams.STREAM_OTHER
        == inspect.signature(ops.philox_normal).parameters["stream"].default
        == 3
    )
    numbers = [value for name, value in vars(streams).items() if name.startswith("STREAM_")]
    assert sorted(set(numbers)) == list(range(12)) and len(numbers) == 13  # two names of 3


@pytest.fixture
def words(monkeypatch):
    """What was drawn, by the place that did: sets of (seed, stream, sample, step, element)."""
    drawn: dict[str, set[tuple[int, ...]]] = {}

    def note(shape, seed, step, sample_offset, stream):
        frame = inspect.currentframe().f_back.f_back
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        elements = range(torch.Size(shape[1:]).numel())
        samples = range(sample_offset, sample_offset + shape[0])
        new = {(seed, stream, sample, step, e) for sample in samples for e in elements}
        drawn.setdefault(place, set()).update(new)

    def watch(name):
        real = getattr(ops, name)

        def watched(shape, *, seed, stream, step=0, sample_offset=0, **other):
            note(tuple(shape), seed, step, sample_offset, stream)
            place = {"seed": seed, "stream": stream, "step": step, "sample_offset": sample_offset}
            return real(shape, **place, **other)

        monkeypatch.setattr(ops, name, watched)

    for name in DRAWS:
        watch(name)
    real_step = ops.langevin_step_

    def watched_step(x, *arguments, seed, step=0, sample_offset=0, **other):
        note(tuple(x.shape), seed, step, sample_offset, streams.STREAM_LANGEVIN)
        place = {"seed": seed, "step": step, "sample_offset": sample_offset}
        return real_step(x, *arguments, **place, **other)

    monkeypatch.setattr(ops, "langevin_step_", watched_step)
    return drawn


def test_no_two_uses_share_a_word(words, tmp_path):
    """All with one seed, whose words would be the same numbers."""
    seed, sigmas = 0, (1.0, 0.3, 0.1)
    points.two_gaussians().sample(40, seed=seed)
    points.spirals(40, seed=seed)
    mlp = ScoreMLP(2, sigmas=sigmas).eval()
    settings = TrainingSettings(iterations=3, batch_size=8, seed=seed)
    train(mlp, torch.rand(20, 2), settings, tmp_path, verbose=False)
    log_likelihood(mlp, torch.rand(4, 2), sigmas, n_probes=3, seed=seed)
    pixels = torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
    ImageDataset(pixels, flips=True, dequantise=True).batch(torch.arange(8), seed=seed, step=0)
    model = NCSN(NCSNConfig(in_channels=1, nf=4, num_classes=3, sigmas=sigmas))
    known, mask = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    for init in ("uniform", "normal"):
        model.sample(
            2,
            8,
            1,
            n_steps_each=2,
            seed=seed,
            init_dist=init,
            verbose=False,
            known=known,
            mask=mask,
        )
    assert len(words) >= 9
    places = list(words)
    for i, one in enumerate(places):
        for other in places[i + 1 :]:
            assert not words[one] & words[other], (one, other)
