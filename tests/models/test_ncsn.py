"""The network: counts, values against an independent evaluation, dtypes, layouts, gradients."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ncsn_fast import NCSN, NCSNConfig, ops
from ncsn_fast.losses import denoising_score_matching_loss, perturb
from ncsn_fast.models.layers import (
    ChainedResPooling,
    CondAdapter,
    CondInstanceNorm,
    MultiResFusion,
    RCUBlock,
    RefineBlock,
    ResidualConvUnit,
)
from ncsn_fast.ops import extension
from ncsn_fast.ops.algorithms import has_matrix_unit

K = 3
SIGMAS = (1.0, 0.3, 0.1)


def make_model(**fields) -> NCSN:
    """A tiny network whose every parameter matters: no gamma is 1 and no bias is 0."""
    torch.manual_seed(0)
    fields = {"in_channels": 2, "nf": 4, "num_classes": K, "sigmas": SIGMAS} | fields
    model = NCSN(NCSNConfig(**fields))
    randomise(model)
    return model


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


# --- an evaluation of the network from its state dict alone, written from the paper's formulas ----


def plain_unit(p, norm, conv, h, y, dilation=1, pool=None):
    gamma, beta = p[f"{norm}.embed.weight"][y].chunk(2, dim=1)
    h = gamma[..., None, None] * F.instance_norm(h, eps=1e-5) + beta[..., None, None]
    h = F.elu(h)
    if pool == "zero":
        h = F.max_pool2d(F.pad(h, (2, 2, 2, 2)), 5, stride=1)
    elif pool == "neg_inf":
        h = F.max_pool2d(h, 5, stride=1, padding=2)
    return F.conv2d(h, p[f"{conv}.weight"], p[f"{conv}.bias"], padding=dilation, dilation=dilation)


def plain_rcu_block(p, name, x, y, dilation=1):
    for u in (0, 1):
        h = x
        for j in (1, 2):
            unit = f"{name}.units.{u}"
            h = plain_unit(p, f"{unit}.norm{j}", f"{unit}.conv{j}.conv", h, y, dilation)
        x = x + h
    return x


def plain_refine(p, name, xs, y, pool):
    hs = [plain_rcu_block(p, f"{name}.rcu_in.{i}", x, y) for i, x in enumerate(xs)]
    if len(hs) > 1:
        fused = [
            plain_unit(p, f"{name}.msf.norms.{i}", f"{name}.msf.convs.{i}", h, y)
            for i, h in enumerate(hs)
        ]
        hs = [fused[0] + fused[1]]
    h = out = hs[0]
    for i in range(4):
        h = plain_unit(p, f"{name}.crp.norms.{i}", f"{name}.crp.convs.{i}", h, y, pool=pool)
        out = out + h
    return plain_rcu_block(p, f"{name}.rcu_out", out, y)


def plain_ncsn(p, x, y, pool="neg_inf", dilations=(1, 2, 4, 8)):
    h = F.conv2d(x, p["begin_conv.weight"], p["begin_conv.bias"], padding=1)
    stages = []
    for i, dilation in enumerate(dilations, start=1):
        h = plain_rcu_block(p, f"stage{i}", h, y, dilation)
        stages.append(h)
    r = plain_refine(p, "refine4", [stages[3]], y, pool)
    for i in (3, 2, 1):
        r = plain_refine(p, f"refine{i}", [stages[i - 1], r], y, pool)
    return plain_unit(p, "end_norm", "end_conv", r, y) / p["sigmas"][y].view(-1, 1, 1, 1)


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 12_471_555),
        ({"in_channels": 1, "nf": 64}, 3_173_761),
        ({"in_channels": 3, "num_classes": 232}, 17_245_443),
        ({"in_channels": 1, "nf": 8, "num_classes": 4}, 54_001),
    ],
)
def test_parameter_count(fields, count):
    with torch.device("meta"):
        model = NCSN(**fields)
    assert sum(p.numel() for p in model.parameters()) == count


def test_parameter_count_of_the_parts():
    with torch.device("meta"):
        model = NCSN()

    def count(*names):
        return sum(p.numel() for name in names for p in getattr(model, name).parameters())

    assert count("begin_conv") == 3_584
    assert count("stage1", "stage2", "stage3", "stage4") == 2_402_304
    assert count("refine4") == 1_951_872
    assert count("refine3", "refine2", "refine1") == 8_107_776
    assert count("end_norm") == 2_560
    assert count("end_conv") == 3_459


@pytest.mark.parametrize("pool_padding", ["neg_inf", "zero"])
@pytest.mark.parametrize("dilations", [(1, 2, 4, 8), (3, 1, 2, 1)])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_forward_equals_the_formulas(pool_padding, dilations, size):
    model = make_model(pool_padding=pool_padding, dilations=dilations).double()
    # Far below zero, so that the zeros around the image are the maxima of its border.
    x = torch.randn(4, 2, *size, dtype=torch.float64) - 0.5
    y = torch.tensor([0, 2, 1, 2])
    expected = plain_ncsn(model.state_dict(), x, y, pool_padding, dilations)
    torch.testing.assert_close(model(x, y), expected)


def test_pool_paddings_differ():
    x, y = torch.randn(2, 2, 6, 6), torch.tensor([0, 1])
    one, other = make_model(pool_padding="neg_inf"), make_model(pool_padding="zero")
    assert (one(x, y) - other(x, y)).abs().max() > 1e-3


def test_scale_by_sigma():
    scaled, unscaled = make_model(), make_model(scale_by_sigma=False)
    x, y = torch.randn(3, 2, 6, 6), torch.tensor([0, 1, 2])
    sigma = torch.tensor(SIGMAS).view(-1, 1, 1, 1)
    torch.testing.assert_close(scaled(x, y) * sigma, unscaled(x, y))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (33, 31)])
def test_any_size(size):
    model = make_model()
    score = model(torch.randn(2, 2, *size), torch.tensor([0, 1]))
    assert score.shape == (2, 2, *size)
    assert score.isfinite().all()


def test_empty_batch():
    model = make_model()
    assert model(torch.randn(0, 2, 4, 4), torch.zeros(0, dtype=torch.int64)).shape == (0, 2, 4, 4)


def test_one_label_serves_the_batch_and_any_integer_dtype_will_do():
    model, x = make_model(), torch.randn(3, 2, 6, 6)
    expected = model(x, torch.tensor([1, 1, 1]))
    torch.testing.assert_close(model(x, torch.tensor([1])), expected)
    for dtype in (torch.int32, torch.uint8):
        torch.testing.assert_close(model(x, torch.tensor([1, 1, 1], dtype=dtype)), expected)


def test_statistics_are_the_samples_own_in_both_modes():
    # Dilations that suit the image: PyTorch's convolution with others may round differently in another batch.
    model, x = make_model(dilations=(1, 1, 2, 2)), torch.randn(3, 2, 6, 6)
    y = torch.tensor([0, 1, 2])
    in_training = model.train()(x, y)
    torch.testing.assert_close(model.eval()(x, y), in_training)
    torch.testing.assert_close(model(x[1:2], y[1:2]), in_training[1:2])


def test_channels_last_is_kept():
    model, y = make_model().double(), torch.tensor([0, 2])
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    expected = model(x, y)
    assert expected.is_contiguous()
    score = model(x.to(memory_format=torch.channels_last), y)
    assert score.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(score, expected)


def test_dtypes():
    model, y = make_model(), torch.tensor([0, 2])
    x = torch.randn(2, 2, 6, 6)
    expected = model.double()(x.double(), y)
    assert expected.dtype == torch.float64
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        score = model.to(dtype)(x.to(dtype), y)
        assert score.dtype == dtype
        error = (score.double() - expected).norm() / expected.norm()
        assert error < tolerance, (dtype, error)
        model = make_model()


def test_autocast_gives_the_dtype_of_x():
    model, x, y = make_model(), torch.randn(2, 2, 6, 6), torch.tensor([0, 2])
    with torch.autocast("cpu", torch.bfloat16):
        score = model(x, y)
        loss, _ = model.get_loss(x)
        with pytest.raises(TypeError, match=r"torch\.float32, got torch\.float64"):
            model(x.double(), y)
    assert score.dtype == loss.dtype == torch.float32
    expected = model(x, y)
    # On a CPU without matrix units for 16 bits our convolutions stay in float32.
    exact = extension.status("cpu") is None and not has_matrix_unit(torch.bfloat16)
    assert torch.equal(score, expected) == exact
    assert (score - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sigmas_stay_in_float32(dtype):
    model = make_model().to(dtype)
    assert model.begin_conv.weight.dtype == dtype
    torch.testing.assert_close(model.sigmas, torch.tensor(SIGMAS), rtol=0, atol=0)
    assert "sigmas" in dict(model.named_buffers())


def test_initialisation():
    torch.manual_seed(0)
    model = NCSN(in_channels=2, nf=32, num_classes=K)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            out_channels, in_channels = module.weight.shape[:2]
            bound = math.sqrt(6 / (9 * (in_channels + out_channels)))  # Glorot & Bengio 2010
            assert bound * 0.9 < module.weight.abs().max() <= bound, name
            torch.testing.assert_close(
                module.weight.std().item(), bound / math.sqrt(3), rtol=0.1, atol=0
            )
            assert not module.bias.any(), name
        if isinstance(module, CondInstanceNorm):
            gamma, beta = module.embed.weight.chunk(2, dim=1)
            assert (gamma == 1).all(), name
            assert (beta == 0).all(), name


def test_only_the_fusion_that_never_runs_is_frozen():
    model = make_model()
    loss, _ = model.get_loss(torch.randn(6, 2, 8, 8), labels=torch.arange(6) % K)
    loss.backward()
    for name, parameter in model.named_parameters():
        idle = name.startswith("refine4.msf.")
        assert parameter.requires_grad is not idle, name
        assert (parameter.grad is None) is idle, name
        assert idle or parameter.grad.isfinite().all(), name


DISTRIBUTED = """
import os, sys, torch
from ncsn_fast import NCSN
torch.distributed.init_process_group("gloo", f"file://{sys.argv[1]}", world_size=1, rank=0)
model = NCSN(in_channels=2, nf=4, num_classes=3, sigmas=(1.0, 0.3, 0.1))
parallel = torch.nn.parallel.DistributedDataParallel(model)
for _ in range(2):  # an unused parameter is an error in the second iteration
    parallel(torch.randn(1, 2, 4, 4), torch.tensor([0])).sum().backward()
print("both iterations", flush=True)
os._exit(0)  # gloo's threads may wait for the interpreter's lock, and it for them
"""


def test_distributed_data_parallel_finds_no_unused_parameter(tmp_path):
    command = [sys.executable, "-c", DISTRIBUTED, tmp_path / "rendezvous"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "both iterations", result.stderr


def test_gradcheck():
    model = make_model(nf=2, in_channels=1).double()
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1])
    assert torch.autograd.gradcheck(lambda x: model(x, y), x)


def test_one_graph_under_compile():
    model, x, y = make_model(), torch.randn(2, 2, 6, 6), torch.tensor([0, 2])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y), model(x, y))
    # Nothing looks at the labels while the graph is traced; the operators in it still refuse these.
    for label in (-1, K):
        with pytest.raises((IndexError, RuntimeError)):
            compiled(x, torch.tensor([0, label]))


def test_copies_and_pickles_keep_working():
    model, x, y = make_model(), torch.randn(2, 2, 6, 6), torch.tensor([0, 2])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.config == model.config
        torch.testing.assert_close(twin(x, y), model(x, y))
        twin.load_state_dict(model.state_dict())


def test_sigmas_filled_from_outside_are_noticed():
    source, target = make_model(), make_model(sigmas=None)
    with torch.no_grad():
        for mine, theirs in zip(target.buffers(), source.buffers(), strict=True):
            mine.copy_(theirs)  # as torch.optim.swa_utils.AveragedModel does
    x, y = torch.randn(1, 2, 4, 4), torch.tensor([0])
    torch.testing.assert_close(target(x, y), source(x, y))


def test_model_prints_its_configuration():
    assert "nf=4" in repr(make_model())


# --- the loss -------------------------------------------------------------------------------------


def test_loss_equals_the_formula():
    model = make_model().double()
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 2, 0])
    loss, returned = model.get_loss(x, labels=labels, seed=7)
    assert torch.equal(returned, labels)

    z = ops.philox_normal(x.shape, seed=7, stream=2).double()
    sigma = torch.tensor(SIGMAS).double()[labels].view(-1, 1, 1, 1)
    score = model(x + sigma * z, labels)
    expected = sum(((sigma[n] * score[n] + z[n]) ** 2).sum() for n in range(5)) / 5
    torch.testing.assert_close(loss, expected)


def test_loss_labels_are_uniform_and_governed_by_manual_seed():
    model, x = make_model(num_classes=2, sigmas=(1.0, 0.5)), torch.zeros(400, 2, 1, 1)
    torch.manual_seed(3)
    loss, labels = model.get_loss(x)
    assert labels.shape == (400,)
    assert labels.dtype == torch.int64
    assert 150 < labels.sum() < 250  # 200 +- 5 standard deviations of 10
    torch.manual_seed(3)
    again, labels_again = model.get_loss(x)
    assert torch.equal(labels, labels_again)
    assert torch.equal(loss, again)
    assert not torch.equal(loss, model.get_loss(x)[0])


def test_loss_takes_one_label_for_the_batch():
    model, x = make_model(), torch.randn(3, 2, 4, 4)
    loss, labels = model.get_loss(x, labels=torch.tensor([2], dtype=torch.int32), seed=0)
    assert labels.tolist() == [2, 2, 2]
    assert labels.dtype == torch.int64
    expected, _ = model.get_loss(x, labels=torch.tensor([2, 2, 2]), seed=0)
    torch.testing.assert_close(loss, expected)


def test_loss_is_summed_in_float32():
    score = torch.zeros(1, 4097, dtype=torch.bfloat16)
    loss = denoising_score_matching_loss(score, torch.ones(1).bfloat16(), torch.ones_like(score))
    assert loss.dtype == torch.float32
    assert loss == 4097  # 4096 in bfloat16
    assert make_model().bfloat16().get_loss(torch.randn(2, 2, 4, 4).bfloat16())[0].dtype == (
        torch.float32
    )


def test_perturb_works_in_the_widest_dtype_and_keeps_that_of_x():
    x = torch.full((1, 1), 1.0, dtype=torch.bfloat16)
    y = perturb(x, torch.tensor([1e-3]), torch.full((1, 1), 4.0))
    assert y.dtype == torch.bfloat16
    assert y.item() == torch.tensor(1.004).bfloat16().item()


# --- the blocks, alone ----------------------------------------------------------------------------


def params(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    randomise(module)
    return {f"m.{name}": value for name, value in module.double().state_dict().items()}


X = torch.randn(3, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([2, 0, 1])


def test_cond_instance_norm():
    norm = CondInstanceNorm(4, K)
    p = params(norm)
    gamma, beta = p["m.embed.weight"][Y].chunk(2, dim=1)
    expected = gamma[..., None, None] * F.instance_norm(X) + beta[..., None, None]
    torch.testing.assert_close(norm(X, Y), expected)


def test_cond_instance_norm_with_alpha():
    torch.manual_seed(0)
    norm = CondInstanceNorm(4, 200, alpha=True)
    gamma, alpha, beta = norm.embed.weight.chunk(3, dim=1)
    assert (gamma == 1).all()
    assert (beta == 0).all()
    assert abs(alpha.mean() - 1) < 0.005
    assert abs(alpha.std() - 0.02) < 0.005

    gamma, alpha, beta = (t[..., None, None] for t in params(norm)["m.embed.weight"][Y].chunk(3, 1))
    mu = X.mean((2, 3), keepdim=True)
    m = (mu - mu.mean(1, keepdim=True)) / torch.sqrt(mu.var(1, keepdim=True) + 1e-5)
    expected = gamma * (F.instance_norm(X) + alpha * m) + beta
    torch.testing.assert_close(norm(X, Y), expected)


def test_eps_reaches_the_operator():
    loose = CondInstanceNorm(4, K, eps=10.0).double()
    torch.testing.assert_close(loose(X, Y), F.instance_norm(X, eps=10.0))


def test_residual_conv_unit():
    unit = ResidualConvUnit(4, K, dilation=2)
    p = params(unit)
    h = plain_unit(p, "m.norm1", "m.conv1.conv", X, Y, dilation=2)
    h = plain_unit(p, "m.norm2", "m.conv2.conv", h, Y, dilation=2)
    torch.testing.assert_close(unit(X, Y), X + h)


def test_rcu_block_counts_its_units():
    block = RCUBlock(4, K, num_units=3, dilation=2).double()
    assert len(block.units) == 3
    expected = block.units[2](block.units[1](block.units[0](X, Y), Y), Y)
    torch.testing.assert_close(block(X, Y), expected)


def test_cond_adapter():
    same = CondAdapter(4, 4, K)
    assert not list(same.parameters())
    assert same(X, Y) is X

    wider = CondAdapter(4, 6, K)
    p = params(wider)
    gamma, beta = p["m.norm.embed.weight"][Y].chunk(2, dim=1)
    h = F.elu(gamma[..., None, None] * F.instance_norm(X) + beta[..., None, None])
    expected = F.conv2d(h, p["m.conv.weight"], p["m.conv.bias"])
    assert p["m.conv.weight"].shape == (6, 4, 1, 1)
    torch.testing.assert_close(wider(X, Y), expected)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_multi_res_fusion_enlarges_to_the_largest(order):
    fusion = MultiResFusion([4, 4, 4], 5, K)
    p = params(fusion)
    sizes = (X, X[:, :, ::2, ::2].contiguous(), X[:, :, :3].contiguous())
    xs = [sizes[i] for i in order]
    expected = sum(
        F.interpolate(plain_unit(p, f"m.norms.{i}", f"m.convs.{i}", x, Y), size=(6, 5))
        for i, x in enumerate(xs)
    )
    torch.testing.assert_close(fusion(xs, Y), expected)


def test_multi_res_fusion_largest_in_each_direction():
    fusion = MultiResFusion([4, 4], 5, K).double()
    wide, tall = X[:, :, :2].contiguous(), X[:, :, :, :2].contiguous()
    assert fusion([wide, tall], Y).shape == (3, 5, 6, 5)


@pytest.mark.parametrize("module", [MultiResFusion([4, 4], 4, K), RefineBlock([4, 4], 4, K)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_inputs(module, count):
    with pytest.raises(ValueError, match=f"built for 2 inputs, got {count}"):
        module([torch.randn(3, 4, 6, 5)] * count, Y)


@pytest.mark.parametrize("padding", ["neg_inf", "zero"])
def test_chained_res_pooling(padding):
    pooling = ChainedResPooling(4, K, num_stages=2, pool_padding=padding)
    p = params(pooling)
    h1 = plain_unit(p, "m.norms.0", "m.convs.0", X, Y, pool=padding)
    h2 = plain_unit(p, "m.norms.1", "m.convs.1", h1, Y, pool=padding)
    torch.testing.assert_close(pooling(X, Y), X + h1 + h2)


def test_refine_block_adapts_its_inputs():
    block = RefineBlock([4, 2], 6, K).double()
    assert block([X, X[:, :2].contiguous()], Y).shape == (3, 6, 6, 5)


def test_instance_norm_plus_plus(tmp_path):
    """A third column in every norm's table; without it, an image's brightness is lost at the norms."""
    config = NCSNConfig(in_channels=1, nf=8, num_classes=4, norm="instance++")
    model = NCSN(config).double()
    model.set_sigmas(NCSN.make_sigmas(1.0, 0.1, 4))
    plain = NCSN(in_channels=1, nf=8, num_classes=4)
    norms = sum(isinstance(m, CondInstanceNorm) for m in plain.modules())
    count = sum(p.numel() for p in plain.parameters())
    assert sum(p.numel() for p in model.parameters()) == count + norms * 4 * 8
    assert not model.refine4.msf.norms[0].embed.weight.requires_grad
    assert model.end_norm.embed.weight.requires_grad
    gamma, alpha, beta = model.end_norm.embed.weight.chunk(3, dim=1)
    assert (gamma == 1).all() and (beta == 0).all() and 0.9 < alpha.mean() < 1.1

    x, y = torch.randn(2, 8, 5, 7, dtype=torch.float64), torch.tensor([0, 3])
    expected = ops.cond_instance_norm_elu(x, y, model.end_norm.embed.weight, elu=False)
    torch.testing.assert_close(model.end_norm(x, y), expected)
    model.float().save_pretrained(tmp_path)
    again = NCSN.from_pretrained(tmp_path)
    assert again.config == config
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(again(x, y), model.eval()(x, y))
