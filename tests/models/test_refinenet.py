"""The blocks of the authors' networks, each alone, against their formulas in plain PyTorch and in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ncsn_fast import ops
from ncsn_fast.models import refinenet
from ncsn_fast.models.refinenet import (
    CondInstanceNormPlus,
    CRPBlock,
    InstanceNormPlus,
    MeanPoolConv,
    MSFBlock,
    RCUBlock,
    RefineBlock,
    ResidualBlock,
)

LEVELS = pytest.mark.parametrize("num_classes", [4, None], ids=["2019", "2020"])
Y = torch.tensor([3, 1])


def images(channels, height=8, width=12):
    generator = torch.Generator().manual_seed(channels + height)
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64) + 0.5


def perturbed(module):
    """float64, and no parameter at a value that hides a mistake."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return module


def norm(module, x, y):
    """InstanceNorm++ by its definition."""
    if isinstance(module, CondInstanceNormPlus):
        gamma, alpha, beta = module.embed(y).chunk(3, dim=1)
    else:
        gamma, alpha, beta = module.gamma[None], module.alpha[None], module.beta[None]
    mu, var = x.mean((2, 3)), x.var((2, 3), correction=0)
    xhat = (x - mu[:, :, None, None]) / (var + 1e-5).sqrt()[:, :, None, None]
    mhat = (mu - mu.mean(1, keepdim=True)) / (mu.var(1, keepdim=True) + 1e-5).sqrt()
    gamma, shift = gamma[:, :, None, None], (alpha * mhat)[:, :, None, None]
    return gamma * (xhat + shift) + beta[:, :, None, None]


def rcu(module, x, y):
    for unit in range(1, module.num_units + 1):
        h = x
        for layer in (1, 2):
            if module.has_norms:
                h = norm(getattr(module, f"{unit}_{layer}_norm"), h, y)
            h = getattr(module, f"{unit}_{layer}_conv")(F.elu(h))
        x = x + h
    return x


def msf(module, xs, y):
    total = 0
    for i, x in enumerate(xs):
        h = module.convs[i](x if module.norms is None else norm(module.norms[i], x, y))
        total = total + F.interpolate(h, xs[0].shape[2:], mode="bilinear", align_corners=True)
    return total


def crp(module, x, y):
    p = total = F.elu(x)
    for i, conv in enumerate(module.convs):
        if module.norms is None:
            p = F.max_pool2d(p, 5, 1, 2)
        else:
            p = F.avg_pool2d(F.pad(norm(module.norms[i], p, y), (2, 2, 2, 2)), 5, 1)
        p = conv(p)
        total = total + p
    return total


@pytest.mark.parametrize("module", [CondInstanceNormPlus(5, 4), InstanceNormPlus(5)])
def test_norm(module):
    module, x = perturbed(module), images(5)
    torch.testing.assert_close(module(x, Y), norm(module, x, Y))
    assert all(p.grad is None for p in module.parameters())
    module(x, Y).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())


def test_conditional_norm_needs_labels():
    with pytest.raises(TypeError, match="needs the noise levels"):
        CondInstanceNormPlus(5, 4)(torch.rand(2, 5, 4, 4), None)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_mean_pool_convolution(kernel_size):
    module, x = perturbed(MeanPoolConv(3, 5, kernel_size)), images(3)
    torch.testing.assert_close(module(x), F.avg_pool2d(module.conv(x), 2))
    for size in ((3, 3), (7, 8), (8, 7)):
        with pytest.raises(ValueError, match="must be even"):
            module(images(3, *size))


@LEVELS
@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("down", [False, True])
def test_residual_block(num_classes, down, dilation):
    out = 6 if down else 3
    block = perturbed(ResidualBlock(3, out, num_classes, down=down, dilation=dilation))
    x = images(3)
    h = block.conv1(F.elu(norm(block.normalize1, x, Y)))
    h = F.elu(norm(block.normalize2, h, Y))
    if down and dilation == 1:
        expected = F.avg_pool2d(block.shortcut.conv(x) + block.conv2.conv(h), 2)
    else:
        expected = (block.shortcut(x) if down else x) + block.conv2(h)
    torch.testing.assert_close(block(x, Y), expected)
    for layer in (block.conv1, block.conv2) if not (down and dilation == 1) else (block.conv1,):
        assert layer.dilation == layer.padding == (dilation, dilation)


def test_residual_block_of_other_widths_needs_down():
    with pytest.raises(ValueError, match="down=True"):
        ResidualBlock(3, 6, None)


@LEVELS
def test_refine_parts(num_classes):
    xs = [images(3), images(4, 4, 6)]
    unit = perturbed(RCUBlock(3, 3, num_classes))
    torch.testing.assert_close(unit(xs[0], Y), rcu(unit, xs[0], Y))
    fusion = perturbed(MSFBlock([3, 4], 5, num_classes))
    torch.testing.assert_close(fusion(xs, Y), msf(fusion, xs, Y))
    same = [images(3), images(4)]
    torch.testing.assert_close(fusion(same, Y), msf(fusion, same, Y))
    pooling = perturbed(CRPBlock(3, num_classes))
    torch.testing.assert_close(pooling(xs[0], Y), crp(pooling, xs[0], Y))


@LEVELS
@pytest.mark.parametrize("inputs", [1, 2])
def test_refine_block(num_classes, inputs):
    widths = [3, 4][:inputs]
    block = perturbed(RefineBlock(widths, 3, num_classes, end=inputs == 2))
    xs = [images(3), images(4, 4, 6)][:inputs]
    hs = [rcu(module, x, Y) for module, x in zip(block.adapt_convs, xs, strict=True)]
    h = hs[0] if inputs == 1 else msf(block.msf, hs, Y)
    expected = rcu(block.output_convs, crp(block.crp, h, Y), Y)
    torch.testing.assert_close(block(xs, Y), expected)
    with pytest.raises(ValueError, match=f"built for {inputs} inputs, got 3"):
        block([xs[0]] * 3, Y)


@LEVELS
def test_initial_values_follow_the_order_of_creation(num_classes):
    """Norms are drawn between convolutions: before theirs in the pool, after it in the fusion."""
    torch.manual_seed(5)
    fusion, pooling = MSFBlock([3, 4], 5, num_classes), CRPBlock(5, num_classes)
    torch.manual_seed(5)
    for i, channels in enumerate((3, 4)):
        assert torch.equal(fusion.convs[i].weight, torch.nn.Conv2d(channels, 5, 3).weight)
        if num_classes:
            expected = CondInstanceNormPlus(channels, num_classes).embed.weight
            assert torch.equal(fusion.norms[i].embed.weight, expected)
    for i in range(2):
        if num_classes:
            expected = CondInstanceNormPlus(5, num_classes).embed.weight
            assert torch.equal(pooling.norms[i].embed.weight, expected)
        assert torch.equal(pooling.convs[i].weight, torch.nn.Conv2d(5, 5, 3, bias=False).weight)


@LEVELS
def test_second_derivatives(num_classes):
    block = perturbed(RefineBlock([2, 2], 2, num_classes))
    xs = [images(2, 4, 4).requires_grad_(), images(2, 2, 2).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *xs: block(xs, Y), xs)
    assert torch.autograd.gradgradcheck(lambda *xs: block(xs, Y).sum(), xs)


@torch.no_grad()
def test_units():
    x = images(3)
    conv = perturbed(refinenet.conv3x3(3, 5, dilation=2))
    other = images(5)
    got = refinenet.act_conv(conv, x, residual=other)
    torch.testing.assert_close(got, conv(F.elu(x)) + other)
    ramp = torch.arange(3.0).view(1, 1, 1, 3)
    enlarged = refinenet.upsample_add(ramp, torch.zeros(1, 1, 1, 5))
    torch.testing.assert_close(enlarged.flatten(), torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]))


@LEVELS
@torch.no_grad()
def test_backends_agree(num_classes):
    block = RefineBlock([16, 16], 16, num_classes)
    xs = [images(16).float(), images(16, 4, 6).float()]
    fast = block(xs, Y)
    with ops.use_backend("reference"):
        torch.testing.assert_close(fast, block(xs, Y), rtol=1e-4, atol=1e-4)


@LEVELS
@torch.no_grad()
def test_hooks_and_replaced_layers_act(num_classes):
    """Layers that are not what they were built as are called, in every unit."""
    block = perturbed(RefineBlock([4, 4], 4, num_classes)).double()
    xs = [images(4).double(), images(4, 4, 6).double()]
    before, seen = block(xs, Y), set()
    convolutions = [m for m in block.modules() if isinstance(m, torch.nn.Conv2d)]
    handles = [m.register_forward_hook(lambda m, i, o: seen.add(id(m))) for m in convolutions]
    torch.testing.assert_close(block(xs, Y), before)
    assert seen == {id(m) for m in convolutions}
    for handle in handles:
        handle.remove()
    for module in block.modules():
        if type(module).__name__.endswith("InstanceNormPlus"):
            module.register_forward_hook(lambda m, i, o: o * 2)
    changed = not torch.allclose(block(xs, Y), before)
    assert changed == (num_classes is not None)  # the 2020 form has no norms there


@torch.no_grad()
def test_a_hook_on_a_mean_pooled_convolution_acts():
    block = perturbed(refinenet.ResidualBlock(4, 6, None, down=True)).double()
    before = block(images(4).double())
    block.shortcut.conv.register_forward_hook(lambda m, i, o: o + 1)
    torch.testing.assert_close(block(images(4).double()), before + 1)
