"""torch.func, forward mode, torch.export and ONNX: right values through the reference, never a silent zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from ncsn_fast import NCSN, NCSNConfig, ScoreCNN, ScoreMLP, ops, use_backend
from ncsn_fast.ops.dispatch import BackendError
from ncsn_fast.schedules import make_sigmas

TABLE = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([0, 2])
WEIGHT = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(3)) / 4
X = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(4))
V = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(5))

OPERATORS = {
    "cond_instance_norm_elu": lambda x: ops.cond_instance_norm_elu(x, LABELS, TABLE.to(x.dtype)),
    "max_pool5": lambda x: ops.max_pool5(x, padding="zero"),
    "avg_pool5": lambda x: ops.avg_pool5(x),
    "elu_conv3x3": lambda x: ops.elu_conv3x3(x, WEIGHT.to(x.dtype), residual=x),
    "conv3x3": lambda x: ops.conv3x3(x, WEIGHT.to(x.dtype), None),
    "norm_elu_conv3x3": lambda x: ops.norm_elu_conv3x3(
        x, LABELS, TABLE.to(x.dtype), WEIGHT.to(x.dtype), None, residual=x, pool="neg_inf"
    ),
}
EVERY = pytest.mark.parametrize("name", OPERATORS)


def close(got, expected):
    torch.testing.assert_close(got.double(), expected.double(), rtol=2e-4, atol=2e-4)


def derivative(call, x, v):
    """Of a function along v, from the double-backward trick on the reference in float64."""
    with use_backend("reference"):
        x = x.double().requires_grad_()
        y = call(x)
        u = torch.zeros_like(y, requires_grad=True)
        (g,) = torch.autograd.grad(y, x, u, create_graph=True)
        return y.detach(), torch.autograd.grad(g, u, v.double())[0]


@EVERY
def test_forward_mode(name):
    call = OPERATORS[name]
    value, tangent = derivative(call, X, V)
    for got in (jvp(call, (X,), (V,)), torch.autograd.functional.jvp(call, X, V)):
        close(got[0], value)
        close(got[1], tangent)
    with forward_ad.dual_level():
        y = call(forward_ad.make_dual(X, V))
        close(forward_ad.unpack_dual(y).tangent, tangent)


@EVERY
def test_reverse_mode(name):
    call = OPERATORS[name]
    leaf = X.clone().requires_grad_()
    expected = torch.autograd.grad(call(leaf), leaf, V)[0]
    close(vjp(call, X)[1](V)[0], expected)
    close(grad(lambda x: (call(x) * V).sum())(X), expected)


@EVERY
def test_vmap(name):
    call = OPERATORS[name]
    batch = torch.stack([X, V, X + V])
    close(vmap(call)(batch), torch.stack([call(x) for x in batch]))
    # A batch of gradients at once, as a vectorised Jacobian asks for.
    leaf = X.clone().requires_grad_()
    y = call(leaf)
    vectors = torch.stack([V, X])
    got = torch.autograd.grad(y, leaf, vectors, is_grads_batched=True, retain_graph=True)[0]
    close(
        got, torch.stack([torch.autograd.grad(y, leaf, v, retain_graph=True)[0] for v in vectors])
    )


@EVERY
def test_jacobians_and_second_order(name):
    call = OPERATORS[name]
    small = X[:, :, :2, :2].contiguous()
    jacobian = jacrev(call)(small)
    close(jacfwd(call)(small), jacobian)
    close(torch.autograd.functional.jacobian(call, small, vectorize=True), jacobian)

    def energy(x):
        return call(x).square().sum()

    v = V[:, :, :2, :2].contiguous()
    _, hvp = torch.autograd.functional.hvp(energy, small.double(), v.double())
    close(jvp(grad(energy), (small.double(),), (v.double(),))[1], hvp)


def test_a_backend_that_was_asked_for_says_that_it_cannot():
    with pytest.raises(BackendError, match="forward-mode|torch.func"):
        jvp(lambda x: ops.max_pool5(x, backend="native"), (X,), (V,))
    with pytest.raises(BackendError, match="torch.func"):
        vmap(lambda x: ops.max_pool5(x, backend="native"))(torch.stack([X, V]))


# --- networks -------------------------------------------------------------------------------------

SIGMAS = make_sigmas(1.0, 0.1, 3)


def ncsn():
    torch.manual_seed(0)
    return NCSN(NCSNConfig(in_channels=1, nf=4, num_classes=3, sigmas=SIGMAS)).eval()


def mlp():
    torch.manual_seed(0)
    model = ScoreMLP(sigmas=SIGMAS, hidden=(8, 8)).eval()
    nn.init.normal_(model.last.weight)
    return model


def cnn():
    torch.manual_seed(0)
    model = ScoreCNN(nf=8, image_size=8, sigmas=SIGMAS).eval()
    nn.init.normal_(model.last.weight)
    return model


NETWORKS = {
    "NCSN": (ncsn, (3, 1, 6, 6), torch.tensor([0, 1, 2])),
    "ScoreMLP": (mlp, (3, 2), torch.tensor([1.0, 0.4, 0.1])),
    "ScoreCNN": (cnn, (3, 1, 8, 8), torch.tensor([1.0, 0.4, 0.1])),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_each_sample(name):
    make, shape, condition = NETWORKS[name]
    model = make().double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, x, condition):
        y = functional_call(model, parameters, (x.unsqueeze(0), condition.unsqueeze(0)))
        return y.square().sum()

    got = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, condition)
    for i in range(len(x)):
        model.zero_grad()
        model(x[i : i + 1], condition[i : i + 1]).square().sum().backward()
        for n, p in model.named_parameters():
            if n in got and p.grad is not None:
                torch.testing.assert_close(got[n][i], p.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_trace_of_the_jacobian(name):
    """Hutchinson's estimate by jvp, as sliced score matching takes it, beside the one by vjp."""
    make, shape, condition = NETWORKS[name]
    model = make().double()
    generator = torch.Generator().manual_seed(1)
    x, v = (torch.randn(shape, generator=generator).double() for _ in "xv")

    def score(x):
        return model(x, condition)

    _, along = jvp(score, (x,), (v,))
    assert along.abs().max() > 0
    forward = (v * along).flatten(1).sum(1)
    backward = (v * vjp(score, x)[1](v)[0]).flatten(1).sum(1)
    close(forward, backward)
    # And its gradient, which the loss of sliced score matching needs.
    gradient = grad(lambda x: (v * jvp(score, (x,), (v,))[1]).sum())(x)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad((score(leaf) * v).sum(), leaf, create_graph=True)
    close(gradient, torch.autograd.grad((g * v).sum(), leaf)[0])


def test_a_hessian():
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = ncsn().double()
    h = hessian(lambda x: model(x, torch.tensor([1])).square().sum())(x).reshape(4, 4)
    assert h.abs().max() > 0
    close(h, h.T)


def test_labels_out_of_range_are_seen_outside_of_transforms():
    with pytest.raises(IndexError, match=r"0\.\.2"):
        ncsn()(torch.zeros(1, 1, 4, 4), torch.tensor([3]))


# --- graphs for elsewhere -------------------------------------------------------------------------


def operators_of(graph):
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_export(name):
    make, shape, condition = NETWORKS[name]
    model, x = make(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        model, (x, condition), dynamic_shapes=({0: batch}, {0: batch}), strict=False
    )
    assert not any("ncsn_fast" in name for name in operators_of(program.graph))
    more, levels = torch.cat([x, x]), torch.cat([condition, condition])
    torch.testing.assert_close(
        program.module()(more, levels), model(more, levels), rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    model, x = ncsn(), torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    program = torch.onnx.export(model, (x, LABELS), dynamo=True, verbose=False)
    names = {node.domain for node in program.model.graph}
    assert "ncsn_fast" not in names
    onnxruntime = pytest.importorskip("onnxruntime")
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    inputs = [value.name for value in session.get_inputs()]
    got = session.run(None, dict(zip(inputs, (x.numpy(), LABELS.numpy()), strict=True)))[0]
    torch.testing.assert_close(torch.from_numpy(got), model(x, LABELS), rtol=1e-2, atol=1e-2)


def test_a_trace():
    model, x = ncsn(), torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    traced = torch.jit.trace(model, (x, LABELS), check_trace=False)
    assert "ncsn_fast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x, LABELS), model(x, LABELS), rtol=1e-3, atol=1e-3)
