"""Threads that draw samples at once get what each gets alone: the same bits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ncsn_fast import NCSN, ScoreCNN
from ncsn_fast.schedules import make_sigmas

THREADS = 3
SIGMAS = make_sigmas(1.0, 0.1, 3)


def ncsn(seed: int) -> NCSN:
    torch.manual_seed(seed)
    return NCSN(in_channels=1, nf=8, num_classes=3, sigmas=SIGMAS)


def cnn(seed: int) -> ScoreCNN:
    torch.manual_seed(seed)
    return ScoreCNN(in_channels=1, nf=8, sigmas=SIGMAS, image_size=8)


def at_once(works: list[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
    """The results of the works, which all begin together, each in a thread of its own."""
    start = threading.Barrier(len(works))

    def run(work: Callable[[], torch.Tensor]) -> torch.Tensor:
        start.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, works))


@pytest.mark.parametrize("shared", [True, False], ids=["one network", "networks"])
def test_samples_are_those_of_one_thread(shared):
    networks = [ncsn(0)] * THREADS if shared else [ncsn(0), cnn(1), ncsn(2)]
    options = dict(n_steps_each=1, step_lr=1e-3, verbose=False)

    def works():
        return [
            lambda network=network, seed=seed: network.sample(2, 8, seed=seed, **options)
            for seed, network in enumerate(networks)
        ]

    alone = [work() for work in works()]
    assert len({tuple(samples.flatten().tolist()) for samples in alone}) == THREADS
    for _ in range(2):
        for samples, expected in zip(at_once(works()), alone, strict=True):
            assert torch.equal(samples, expected)
    assert all(network.training for network in networks)


def test_gradients_are_those_of_one_thread():
    network = ncsn(0)
    images = torch.rand(THREADS, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    parameters = [p for p in network.parameters() if p.requires_grad]

    def gradient(batch: torch.Tensor) -> torch.Tensor:
        loss = network.get_loss(batch, labels=torch.tensor([0, 2]), seed=1)[0]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    works = [lambda batch=batch: gradient(batch) for batch in images]
    for got, expected in zip(at_once(works), [work() for work in works], strict=True):
        assert torch.equal(got, expected)
