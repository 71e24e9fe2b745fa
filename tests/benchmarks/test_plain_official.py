"""The authors' networks in plain PyTorch, which ours are timed and compared with, and the cases that do so."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.official_oracles import NETWORKS, PER_SAMPLE, tiny, worst_sample

from ncsn_fast.benchmarks import plain_official, suite
from ncsn_fast.benchmarks.cases import official
from ncsn_fast.ops.record import record_backends

EACH = pytest.mark.parametrize("name", NETWORKS)
F32 = torch.float32


@EACH
@torch.no_grad()
def test_are_the_authors(name):
    model, io = tiny(name)
    plain = plain_official.network_like(model)
    for which, labels in (("", "labels"), ("2", "labels2"), ("_large", "labels")):
        with record_backends() as ran:
            score = plain(io[f"input{which}"], io[labels])
        assert not ran  # no operator of ours
        assert worst_sample(score, io[f"output{which}"]) < PER_SAMPLE
    assert not plain.training and set(plain.state_dict()) == set(model.state_dict())


def test_has_weights_of_its_own():
    model, io = tiny("ncsnv2")
    before = model(io["input"], io["labels"])
    with torch.no_grad():
        for parameter in plain_official.network_like(model).parameters():
            parameter.add_(1)
    assert torch.equal(model(io["input"], io["labels"]), before)


def test_nothing_of_the_package_is_in_it():
    assert "import ncsn_fast" not in inspect.getsource(plain_official)
    assert "from ncsn_fast" not in inspect.getsource(plain_official)


def settings(quick=False, device="cpu"):
    return suite.Settings(torch.device(device), (F32,), quick=quick)


def test_cases():
    cases = list(official.cases(settings()))
    assert [(c.group, c.shape) for c in cases if c.suite == "model"] == [
        ("ncsn-cifar10", (1, 3, 32, 32)),
        ("ncsn-cifar10", (16, 3, 32, 32)),
        ("ncsnv2-cifar10", (1, 3, 32, 32)),
        ("ncsnv2-cifar10", (16, 3, 32, 32)),
        ("ncsnv2-celeba", (1, 3, 64, 64)),
        ("ncsnv2-bedroom", (1, 3, 128, 128)),
        ("ncsnv2-ffhq", (1, 3, 256, 256)),
    ]
    for case in cases:
        peers = {peer.name for peer in case.peers}
        compiled = {"compile"} if case.group != "ncsnv2-ffhq" else set()
        assert peers == {"eager", "ncsn_fast"} | compiled
    quick = {case.group for case in official.cases(settings(quick=True))}
    assert quick == {"ncsn-cifar10", "ncsnv2-cifar10"}


@pytest.mark.parametrize(
    ("name", "giga"),
    [
        ("ncsn-cifar10", 9.893),
        ("ncsnv2-cifar10", 9.893),
        ("ncsnv2-celeba", 39.57),
        ("ncsnv2-bedroom", 151.0),
        ("ncsnv2-ffhq", 419.5),
    ],
)
def test_the_arithmetic_of_the_published_networks(name, giga):
    assert official.flops_of_an_image(name) == pytest.approx(2e9 * giga, rel=1e-3)


@pytest.mark.parametrize("name", ["ncsn-cifar10", "ncsnv2-cifar10"])
def test_uncompiled_peers_of_small_steps_are_right(name, monkeypatch):
    """The loops and the networks in them, at a width and with steps that a test has time for."""
    preset = official.read_preset(name) | {"nf": 6, "image_size": 8}
    monkeypatch.setattr(official, "read_preset", lambda _: preset)
    case = official.steps(settings(quick=True), name, 2, F32, False)
    expected = case.expected()
    assert len(case.peers) == 4
    for peer in case.peers:
        prepared = peer.prepare()
        assert suite.worst_error(prepared.outputs(), expected) < case.tolerance
        assert (prepared.backend == "pytorch") == (peer.name == "eager")
