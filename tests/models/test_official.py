"""The authors' networks against outputs, gradients and losses of the authors' code, and what a user can get wrong."""

from __future__ import annotations

import ast

import pytest
import torch
from support.official_oracles import (
    GRADIENT,
    NETWORKS,
    PER_SAMPLE,
    full_size,
    read,
    tiny,
    worst_sample,
)

from ncsn_fast import load_official, load_pretrained, ops, save_official
from ncsn_fast.benchmarks import plain_official
from ncsn_fast.losses import (
    annealed_score_matching_loss,
    denoising_score_matching_loss,
    perturb,
    sliced_score_matching_loss,
)
from ncsn_fast.models.official import (
    NCSNv2,
    NCSNv2Config,
    NCSNv2Deeper,
    NCSNv2DeeperConfig,
    NCSNv2Deepest,
    OfficialNCSN,
    OfficialNCSNConfig,
)
from ncsn_fast.schedules import make_sigmas
from ncsn_fast.training import TrainingSettings, train
from ncsn_fast.training.checkpoints import load_checkpoint

EACH = pytest.mark.parametrize("name", NETWORKS)
COUNTS = {
    "ncsn_v1": (173, 30_117_635),
    "ncsnv2": (154, 29_694_083),
    "ncsnv2_deeper": (192, 83_445_379),
    "ncsnv2_deepest": (230, 94_132_611),
}


def small(name, **options):
    """A small network of random weights, with a ladder."""
    return NETWORKS[name](3, 4, 5, sigmas=make_sigmas(5.0, 0.05, 5), **options).eval()


# --- against the authors' code ----------------------------------------------------------------------


@EACH
@torch.no_grad()
def test_outputs(name):
    model, io = tiny(name)
    for which, labels in (("", "labels"), ("2", "labels2"), ("_large", "labels")):
        score = model(io[f"input{which}"], io[labels])
        assert worst_sample(score, io[f"output{which}"]) < PER_SAMPLE


@EACH
@torch.no_grad()
def test_outputs_in_float64(name):
    """Closer than any rounding of float32: the formula, not something like it."""
    model, io = tiny(name)
    model.double()
    assert model.sigmas.dtype == torch.float32
    for which, labels in (("", "labels"), ("2", "labels2"), ("_large", "labels")):
        score = model(io[f"input{which}"].double(), io[labels])
        assert worst_sample(score, io[f"output{which}_float64"]) < 1e-12


@EACH
@torch.no_grad()
def test_outputs_of_the_stages(name):
    model, io = tiny(name)
    got = {}
    handles = [
        module.register_forward_hook(lambda m, args, out, key=key: got.update({key: out}))
        for key, module in model.named_children()
        if key.startswith(("res", "refine"))
    ]
    model(io["input"], io["labels"])
    for handle in handles:
        handle.remove()
    last = got["refine5" if "refine5" in got else "refine4"]
    got["begin_conv"] = model.begin_conv(2 * io["input"] - 1)
    got["normalizer"] = model.normalizer(last, io["labels"])
    got["end_conv"] = model.end_conv(torch.nn.functional.elu(got["normalizer"]))
    assert set(got) == {key.removeprefix("after.") for key in io if key.startswith("after.")}
    for key, value in got.items():
        assert worst_sample(value, io[f"after.{key}"]) < PER_SAMPLE, key


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, "logit_transform") for name in NETWORKS]
    + [(name, "rescaled") for name in NETWORKS if name != "ncsn_v1"],
)
@torch.no_grad()
def test_input_taken_as_it_is(name, option):
    model, io = tiny(name, **{option: True})
    expected = io["output_logit_transform"]
    assert worst_sample(model(io["input"], io["labels"]), expected) < PER_SAMPLE


@EACH
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients(name, backend):
    model, io = tiny(name)
    oracle, _ = read(f"{name}.grads")
    x = io["input"].requires_grad_()
    sigma = oracle["io.sigmas"].index_select(0, io["labels"])
    with ops.use_backend(backend):
        score = model(perturb(x, sigma, oracle["io.noise"]), io["labels"])
        # The authors' objective has a factor 1/2.
        loss = denoising_score_matching_loss(score, sigma, oracle["io.noise"]) / 2
        loss.backward()
    assert abs(loss.item() / oracle["io.loss"].item() - 1) < 1e-5
    got = {key: p.grad for key, p in model.named_parameters()} | {"io.grad_of_input": x.grad}
    expected = {key: g for key, g in oracle.items() if key in got}
    assert set(got) == set(expected) and len(got) == COUNTS[name][0] + (name == "ncsn_v1")
    parameters = [g.norm() for key, g in expected.items() if not key.startswith("io.")]
    floor = 1e-3 * float(torch.stack(parameters).norm())
    for key, g in expected.items():
        error = float((got[key] - g).norm()) / max(float(g.norm()), floor)
        assert error < GRADIENT, key


FULL = {
    "full_ncsn_v1_cifar10": OfficialNCSN,
    "full_ncsn_v1_mnist": OfficialNCSN,
    "full_ncsnv2_cifar10": NCSNv2,
    "full_ncsnv2_celeba": NCSNv2,
    "full_ncsnv2_deeper_church": NCSNv2Deeper,
    "full_ncsnv2_deepest_small": NCSNv2Deepest,
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", FULL)
@torch.no_grad()
def test_published_sizes(name, backend):
    oracle, metadata = read(name)
    c = ast.literal_eval(metadata["config"])
    model = FULL[name](c["C"], c["ngf"], c["K"], sigmas=make_sigmas(c["sb"], c["se"], c["K"]))
    x = full_size(model, ast.literal_eval(metadata["input_shape"]))
    with ops.use_backend(backend):
        error = worst_sample(model.eval()(x, oracle["labels"]), oracle["output"])
    assert error < PER_SAMPLE


@pytest.mark.parametrize("particles", [1, 2])
def test_sliced_score_matching(particles):
    """Second derivatives of the whole network."""
    model, _ = tiny("ncsn_v1")
    oracle, _ = read("losses")
    labels, prefix = oracle["v1_labels"], f"v1_ssm_{particles}"
    sigma = oracle["v1_sigmas"].index_select(0, labels)
    noisy = perturb(oracle["samples"], sigma, oracle[f"{prefix}_noise"])
    vectors = oracle[f"{prefix}_vectors"].unflatten(0, (particles, len(noisy)))
    loss = sliced_score_matching_loss(lambda x: model(x, labels), noisy, sigma, vectors)
    assert abs(loss.item() / oracle[f"{prefix}_loss"].item() - 1) < 1e-4
    (g,) = torch.autograd.grad(loss, model.begin_conv.weight)
    expected = oracle[f"{prefix}_grad_begin_conv.weight"]
    assert float((g - expected).norm() / expected.norm()) < GRADIENT


@pytest.mark.parametrize("version", ["v1", "v2"])
@torch.no_grad()
def test_denoising_losses(version):
    model, _ = tiny({"v1": "ncsn_v1", "v2": "ncsnv2"}[version])
    oracle, _ = read("losses")
    labels, noise = oracle[f"{version}_labels"], oracle[f"{version}_noise"]
    sigma = oracle[f"{version}_sigmas"].index_select(0, labels)
    score = model(perturb(oracle["samples"], sigma, noise), labels)
    for power in (2, 1):
        loss = annealed_score_matching_loss(score, sigma, noise, power)
        assert abs(loss.item() / oracle[f"{version}_dsm_power{power}"].item() - 1) < 1e-5
    ours = denoising_score_matching_loss(score, sigma, noise)
    torch.testing.assert_close(ours / 2, annealed_score_matching_loss(score, sigma, noise))
    if version == "v2":
        each = annealed_score_matching_loss(score, sigma, noise, reduction="none")
        expected = oracle["v2_dsm_power2_per_sample"]
        assert float(((each - expected) / expected).abs().max()) < 1e-5


@torch.no_grad()
def test_loss_of_a_single_level():
    model, _ = tiny("ncsn_v1")
    oracle, _ = read("losses")
    sigma, noise = torch.tensor([0.01]), oracle["v1_single_dsm_noise"]
    score = model(perturb(oracle["samples"], sigma, noise), oracle["v1_labels"])
    loss = annealed_score_matching_loss(score, sigma, noise, anneal_power=0)
    assert abs(loss.item() / oracle["v1_single_dsm_sigma0.01"].item() - 1) < 1e-5
    ours = denoising_score_matching_loss(score, sigma, noise, "one")
    torch.testing.assert_close(ours / 2, loss)


def test_arguments_of_the_losses():
    x, sigma = torch.rand(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="reduction must be one of"):
        annealed_score_matching_loss(x, sigma, x, reduction="sum")
    for shape in ((2, 3), (2, 3, 3), (0, 2, 3)):
        with pytest.raises(ValueError, match=r"vectors must have shape \(P, 2, 3\)"):
            sliced_score_matching_loss(lambda x: -x, x, sigma, torch.ones(shape))


# --- the state dict ---------------------------------------------------------------------------------


def norm_names(name, conditional):
    leaves = ("embed.weight",) if conditional else ("alpha", "gamma", "beta")
    return [f"{name}.{leaf}" for leaf in leaves]


def expected_names(name):
    """The state dict's names in the authors' order, of a description of it."""
    conditional = name == "ncsn_v1"
    both = ("weight", "bias")
    names = [] if conditional else ["sigmas"]
    names += ["begin_conv.weight", "begin_conv.bias", *norm_names("normalizer", conditional)]
    names += ["end_conv.weight", "end_conv.bias"]
    stages = ["res1", "res2", "res3"] + ["res31"] * (name == "ncsnv2_deepest") + ["res4"]
    stages += ["res5"] * (name in ("ncsnv2_deeper", "ncsnv2_deepest"))
    refines = [s.replace("res", "refine") for s in stages if s != "res31"]
    if name == "ncsnv2_deepest":
        refines.insert(3, "refine31")
    pooled = {"ncsn_v1": 1, "ncsnv2": 1, "ncsnv2_deeper": 2, "ncsnv2_deepest": 3}[name]
    for i, stage in enumerate(stages):
        for block in (0, 1):
            at = f"{stage}.{block}"
            inner = ".conv" if block == 0 and 1 <= i <= pooled else ""
            names += [f"{at}.conv1.{leaf}" for leaf in both]
            names += norm_names(f"{at}.normalize2", conditional)
            names += [f"{at}.conv2{inner}.{leaf}" for leaf in both]
            if block == 0 and i > 0:
                names += [f"{at}.shortcut{inner}.{leaf}" for leaf in both]
            names += norm_names(f"{at}.normalize1", conditional)

    def units(at, count):
        for unit in range(1, count + 1):
            for layer in (1, 2):
                if conditional:
                    yield f"{at}.{unit}_{layer}_norm.embed.weight"
                yield f"{at}.{unit}_{layer}_conv.weight"

    for refine in refines:
        inputs = 1 if refine == "refine1" else 2
        for i in range(inputs):
            names += units(f"{refine}.adapt_convs.{i}", 2)
        names += units(f"{refine}.output_convs", 3 if refine == refines[-1] else 1)
        if inputs == 2:
            names += [f"{refine}.msf.convs.{i}.{leaf}" for i in (0, 1) for leaf in both]
            names += [f"{refine}.msf.norms.{i}.embed.weight" for i in (0, 1) if conditional]
        names += [f"{refine}.crp.convs.{i}.weight" for i in (0, 1)]
        names += [f"{refine}.crp.norms.{i}.embed.weight" for i in (0, 1) if conditional]
    return names


@EACH
def test_state_dict_order(name):
    assert list(small(name).state_dict()) == expected_names(name)


@EACH
def test_size_of_the_published_network(name):
    with torch.device("meta"):
        model = NETWORKS[name]()
    assert (len(model.state_dict()), sum(p.numel() for p in model.parameters())) == COUNTS[name]


def test_initial_values_of_a_seed():
    """The draws that follow a seed, one by one, for the parts whose order of creation is not that of their names."""
    torch.manual_seed(3)
    model = OfficialNCSN(3, 4, 5)
    torch.manual_seed(3)

    def table(channels):
        weight = torch.nn.Embedding(5, 3 * channels).weight.data
        weight[:, : 2 * channels].normal_(1, 0.02)
        weight[:, 2 * channels :].zero_()
        return weight

    begin = torch.nn.Conv2d(3, 4, 3)
    assert torch.equal(model.begin_conv.weight, begin.weight)
    assert torch.equal(model.begin_conv.bias, begin.bias)
    assert torch.equal(model.normalizer.embed.weight, table(4))
    assert torch.equal(model.end_conv.weight, torch.nn.Conv2d(4, 3, 3).weight)

    torch.manual_seed(3)
    v2 = NCSNv2(3, 4, 5)
    torch.manual_seed(3)
    torch.nn.Conv2d(3, 4, 3)
    assert torch.equal(v2.normalizer.alpha, torch.zeros(4).normal_(1, 0.02))
    assert torch.equal(v2.normalizer.gamma, torch.zeros(4).normal_(1, 0.02))
    assert torch.equal(v2.normalizer.beta, torch.zeros(4))


# --- what runs --------------------------------------------------------------------------------------


@EACH
@torch.no_grad()
def test_fused_operators_run(name, record_backends):
    from ncsn_fast.ops import extension

    reason = extension.status("cpu")
    if reason is not None:
        pytest.skip(reason)
    model, io = tiny(name)
    with record_backends() as ran:
        model(io["input"], io["labels"])
    assert {backend for _, backend in ran} == {"native"}
    names = {op for op, _ in ran}
    assert "norm_elu_conv3x3" in names and "conv3x3" in names
    assert ("max_pool5" in names) == (name != "ncsn_v1")


@EACH
@torch.no_grad()
def test_reference_and_layouts_agree(name):
    model, io = tiny(name)
    expected, x, y = io["output"], io["input"], io["labels"]
    with ops.use_backend("reference"):
        assert worst_sample(model(x, y), expected) < PER_SAMPLE
    nhwc = model(x.contiguous(memory_format=torch.channels_last), y)
    assert nhwc.is_contiguous(memory_format=torch.channels_last)
    assert worst_sample(nhwc, expected) < PER_SAMPLE
    assert model(x, y).is_contiguous()


def with_plain(name, nf, channels=3):
    """A network and the same in plain PyTorch, no parameter of theirs at a value that hides a mistake."""
    torch.manual_seed(nf)
    model = NETWORKS[name](channels, nf, 3, sigmas=(3.0, 1.0, 0.3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) * parameter.std(correction=0))
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model, plain_official.network_like(model).double()


@EACH
@pytest.mark.parametrize(
    ("nf", "channels", "size"),
    [(3, 1, (16, 24)), (5, 2, (40, 16)), (7, 4, (24, 48)), (12, 3, (16, 72)), (16, 3, (56, 64))],
    ids=str,
)
@torch.no_grad()
def test_odd_widths_and_sizes_against_plain_pytorch(name, nf, channels, size):
    model, plain = with_plain(name, nf, channels)
    x, labels = torch.rand(2, channels, *size), torch.tensor([0, 2])
    expected = plain(x.double(), labels)
    for layout in (torch.contiguous_format, torch.channels_last):
        score = model(x.contiguous(memory_format=layout), labels)
        assert worst_sample(score, expected) < PER_SAMPLE
    # Levels are not mixed up: each sample is that of its own.
    assert worst_sample(model(x[1:], labels[1:]), expected[1:]) < PER_SAMPLE


@pytest.mark.parametrize("nf", [8, 11])
@torch.no_grad()
def test_images_of_256x256(nf):
    model, plain = with_plain("ncsnv2_deepest", nf)
    x, labels = torch.rand(1, 3, 256, 256), torch.tensor([1])
    assert worst_sample(model(x, labels), plain(x.double(), labels)) < PER_SAMPLE


@EACH
@pytest.mark.parametrize(("nf", "size"), [(3, (16, 24)), (6, (24, 16))], ids=str)
def test_gradients_of_odd_widths_and_sizes(name, nf, size):
    """In float64: in float32 a maximum that rounding moves takes its gradient along."""
    model, plain = with_plain(name, nf)
    x, labels = torch.rand(2, 3, *size, dtype=torch.float64), torch.tensor([2, 0])
    weight, found = torch.randn_like(x), []
    for network in (model.double(), plain):
        image = x.clone().requires_grad_()
        network.zero_grad()
        (network(image, labels) * weight).sum().backward()
        found.append({k: p.grad for k, p in network.named_parameters()} | {"x": image.grad})
    got, expected = found
    assert set(got) == set(expected)
    floor = 1e-3 * float(torch.stack([g.norm() for g in expected.values()]).norm())
    for key, g in expected.items():
        assert float((got[key] - g).norm()) <= 1e-9 * max(float(g.norm()), floor), key


@EACH
@torch.no_grad()
def test_one_label_is_for_the_batch(name):
    model, x = small(name), torch.rand(3, 3, 16, 16)
    one = model(x, torch.tensor([2]))
    torch.testing.assert_close(one, model(x, torch.tensor([2, 2, 2])))


@EACH
@torch.no_grad()
def test_half_precision(name):
    model, x = small(name), torch.rand(2, 3, 16, 16)
    labels = torch.tensor([0, 4])
    expected = model(x, labels)
    with torch.autocast("cpu", torch.bfloat16):
        score = model(x, labels)
    assert score.dtype == torch.float32 and worst_sample(score, expected) < 0.1
    model.bfloat16()
    assert model.sigmas.dtype == torch.float32
    score = model(x.bfloat16(), labels)
    assert score.dtype == torch.bfloat16 and worst_sample(score, expected) < 0.1


# --- what a user can get wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("ncsn_v1", (15, 16)),
        ("ncsn_v1", (2, 2)),
        ("ncsnv2", (16, 3)),
        ("ncsnv2_deeper", (6, 6)),
        ("ncsnv2_deeper", (4, 4)),
        ("ncsnv2_deepest", (16, 12)),
        ("ncsnv2_deepest", (8, 8)),
    ],
)
def test_sizes_that_do_not_work(name, size):
    with pytest.raises(ValueError, match=f"multiples of .* got {size[0]}x{size[1]}"):
        small(name)(torch.rand(1, 3, *size), torch.tensor([0]))


@EACH
def test_bad_input(name):
    model, x = small(name), torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match="labels must have shape"):
        model(x, torch.tensor([0, 1, 2]))
    for label in (-1, 5):
        with pytest.raises(IndexError, match="0..4"):
            model(x, torch.tensor([0, label]))
    with pytest.raises(ValueError, match="x must have shape"):
        model(x[:, :2], torch.tensor([0]))
    with pytest.raises(TypeError, match="dtype"):
        model(x.double(), torch.tensor([0]))
    with pytest.raises(ValueError, match="each of the 5 noise levels"):
        model.set_sigmas((2.0, 1.0))


def test_ladder():
    with pytest.raises(RuntimeError, match="noise levels are not set"):
        NCSNv2(3, 4, 5)(torch.rand(1, 3, 8, 8), torch.tensor([0]))
    x, labels = torch.rand(1, 3, 8, 8), torch.tensor([0])
    model = OfficialNCSN(3, 4, 2)
    before = model(x, labels)  # which needs no ladder
    model.set_sigmas((1.0, 0.1))
    torch.testing.assert_close(model(x, labels), before)
    assert model.config.sigmas == (1.0, 0.1) and "sigmas" not in model.state_dict()
    torch.testing.assert_close(OfficialNCSN(model.config).sigmas, torch.tensor([1.0, 0.1]))


def test_configurations():
    config = NCSNv2Config(1, 8, 3, rescaled=True, sigmas=torch.tensor([3.0, 2.0, 1.0]))
    assert NCSNv2(config).config == config and NCSNv2(config=config).config == config
    assert config.sigmas == (3.0, 2.0, 1.0)
    with pytest.raises(TypeError, match="NCSNv2Config, got NCSNv2DeeperConfig"):
        NCSNv2(NCSNv2DeeperConfig())
    with pytest.raises(TypeError, match="rescaled must be a bool"):
        NCSNv2Config(rescaled=1)
    with pytest.raises(ValueError, match="nf >= 2"):
        OfficialNCSNConfig(nf=1)
    with pytest.raises(ValueError, match="num_classes"):
        OfficialNCSNConfig(num_classes=0)
    assert OfficialNCSN.data_range == NCSNv2Deepest.data_range == (0.0, 1.0)


# --- as any network: trained, saved, and in the authors' form -----------------------------------------


@EACH
def test_loss_is_twice_the_authors(name):
    model = small(name)
    x, labels = torch.rand(3, 3, 16, 16), torch.tensor([0, 2, 4])
    loss, drawn = model.get_loss(x, labels=labels, seed=3)
    sigma = model.sigmas.index_select(0, labels).view(-1, 1, 1, 1)
    z = ops.philox_normal(x.shape, seed=3, stream=ops.STREAM_TRAINING)
    noisy = x + sigma * z
    target = -(noisy - x) / sigma**2
    theirs = ((model(noisy, labels) - target).square() * sigma**2).flatten(1).sum(1).mean() / 2
    torch.testing.assert_close(loss, 2 * theirs, rtol=1e-4, atol=0)
    assert torch.equal(drawn, labels)


@EACH
def test_a_trained_network_in_the_authors_form_and_back(name, tmp_path):
    model, x = NETWORKS[name](1, 2, 3, sigmas=make_sigmas(2.0, 0.5, 3)), torch.rand(4, 1, 16, 16)
    settings = TrainingSettings(iterations=3, batch_size=2, warmup=0, lr=1e-2)
    train(model, x, settings, tmp_path / "run", verbose=False)
    run = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    average, last = run.ema_model(), run.last_model()
    moving = {key: value for key, value in run.ema.items() if key != "sigmas"}
    more = {} if name == "ncsn_v1" else {"ema": moving, "step": run.step}
    save_official(average if name == "ncsn_v1" else last, tmp_path / "official.pth", **more)
    ladder = model.sigmas if name == "ncsn_v1" else None
    back = load_official(tmp_path / "official.pth", sigmas=ladder)
    torch.testing.assert_close(back.state_dict(), average.state_dict(), rtol=0, atol=0)
    assert torch.equal(back.sigmas, model.sigmas)
    if name != "ncsn_v1":
        raw = load_official(tmp_path / "official.pth", weights="raw")
        torch.testing.assert_close(raw.state_dict(), last.state_dict(), rtol=0, atol=0)
        assert not torch.equal(raw.end_conv.weight, back.end_conv.weight)
    back.save_pretrained(tmp_path / "folder")
    again = load_pretrained(tmp_path / "folder")
    assert type(again) is NETWORKS[name] and torch.equal(again.sigmas, model.sigmas)
    labels = torch.tensor([0, 2])
    assert torch.equal(again(x[:2], labels), average(x[:2], labels))
    drawn = [m.sample(2, 16, n_steps_each=1, seed=1) for m in (again, average)]
    assert torch.equal(*drawn)
