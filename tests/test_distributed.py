"""Networks in what others wrap them in: torch.compile, DataParallel, DDP, averages, and several processes."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel

from ncsn_fast import NCSN, NCSNConfig, ScoreCNN, ScoreMLP
from ncsn_fast.training import TrainingSettings, read_losses, train
from ncsn_fast.training.checkpoints import load_checkpoint, load_model

CONFIG = NCSNConfig(in_channels=1, nf=4, num_classes=3, sigmas=(1.0, 0.3, 0.1))
SETTINGS = TrainingSettings(iterations=3, batch_size=4, warmup=0)
IMAGES = torch.rand(10, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1


def new_model():
    torch.manual_seed(0)
    return NCSN(CONFIG)


def run(out, model):
    return train(model, IMAGES, SETTINGS, out, verbose=False)


@pytest.mark.parametrize("how", ["torch.compile(model)", "model.compile()"])
def test_a_compiled_network_is_trained_compiled_and_saved_plainly(tmp_path, how):
    calls = []

    def backend(graph, inputs):
        def counted(*arguments):
            calls.append(1)
            return graph(*arguments)

        return counted

    def small_model():  # an NCSN takes the compiler half a minute
        torch.manual_seed(0)
        return ScoreCNN(1, 8, image_size=8, sigmas=(1.0, 0.3, 0.1))

    images = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def run(out, model):
        return train(model, images, SETTINGS, out, verbose=False)

    run(tmp_path / "plain", small_model())
    model = small_model()
    if how == "model.compile()":
        model.compile(backend=backend)
        run(tmp_path / "compiled", model)
    else:
        run(tmp_path / "compiled", torch.compile(model, backend=backend))
        assert model._compiled_call_impl is None
    assert len(calls) >= SETTINGS.iterations
    plain, compiled = (
        load_checkpoint(tmp_path / n / "checkpoint.pt") for n in ("plain", "compiled")
    )
    assert compiled.model.keys() == compiled.ema.keys() == plain.model.keys()
    for name, value in plain.model.items():
        torch.testing.assert_close(compiled.model[name], value)
    for path in (tmp_path / "compiled", tmp_path / "compiled" / "model"):
        load_model(path)


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (nn.DataParallel, "model.module"),
        (AveragedModel, "model.module"),
        (lambda model: nn.DataParallel(AveragedModel(model)), "model.module.module"),
        (lambda model: nn.DataParallel(torch.compile(model)), "model.module._orig_mod"),
    ],
)
def test_other_wrappers_are_told_where_the_network_is(tmp_path, wrap, path):
    with pytest.raises(TypeError, match=f"must be the network itself.*pass {path}$"):
        run(tmp_path, wrap(new_model()))


def test_what_is_no_network(tmp_path):
    for thing in (nn.Linear(2, 2), nn.Sequential(new_model()), "model"):
        with pytest.raises(TypeError, match="model must be a ScoreModel, such as an NCSN, got"):
            run(tmp_path, thing)


def test_layers_that_a_new_network_lacks_are_told_before_training(tmp_path):
    model = new_model()
    spectral_norm(model.begin_conv)
    with pytest.warns(UserWarning, match="begin_conv.*will load only into a model changed in the"):
        run(tmp_path, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path / "plain", new_model())


@pytest.mark.parametrize("make", [new_model, lambda: ScoreMLP(2, sigmas=(1.0, 0.1))])
@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        AveragedModel,
        lambda model: nn.DataParallel(torch.compile(model)),
        lambda model: torch.compile(AveragedModel(model)),
    ],
)
def test_weights_of_a_wrapped_network_load(make, wrap):
    model = make()
    saved = wrap(model).state_dict()
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    with pytest.warns(UserWarning, match="out of the names of the state dict"):
        assert str(other.load_state_dict(saved)) == "<All keys matched successfully>"
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_names_are_not_taken_apart_where_they_belong():
    """A wrapper that loads its own weights, a layer of the network that is compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped = nn.DataParallel(new_model())
        wrapped.load_state_dict(wrapped.state_dict())
        model = new_model()
        model.end_conv = torch.compile(model.end_conv)
        model.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="'_orig_mod'"):
        new_model().load_state_dict(model.state_dict())
    with (
        pytest.warns(UserWarning, match="'module'"),
        pytest.raises(RuntimeError, match="nonsense"),
    ):
        new_model().load_state_dict({**new_model().state_dict(), "module.nonsense": IMAGES})


SEVERAL = """
import os, sys, warnings, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from test_distributed import IMAGES, new_model, run
torch.set_num_threads(1)
out = sys.argv[2]
dist.init_process_group("gloo")
rank = dist.get_rank()

class Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.get_loss(x, seed=rank)[0]

def alike(model):
    own = model.end_conv.weight.grad
    both = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(both, own)
    return torch.equal(*both)

x = IMAGES[4 * rank : 4 * rank + 4]
with warnings.catch_warnings():
    warnings.simplefilter("error")
    model = new_model()
    ddp = DistributedDataParallel(Loss(model))
    ddp(x).backward()
    assert alike(model)
    with torch.no_grad():
        model.get_loss(x)
model = new_model()
ddp = DistributedDataParallel(model)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ddp.module.get_loss(x, seed=rank)[0].backward()
    ddp.module.get_loss(x, seed=rank)
told = [w for w in caught if "outside the forward of a DistributedDataParallel" in str(w.message)]
assert len(told) == 1 and told[0].filename == __file__, caught
assert not alike(model)
network = run(out + "/run", new_model())
weights = [torch.empty_like(network.end_conv.weight) for _ in range(2)]
dist.all_gather(weights, network.end_conv.weight.detach())
assert torch.equal(*weights)
dist.barrier()
dist.destroy_process_group()
open(f"{out}/passed{rank}", "w").close()
os._exit(0)  # gloo's threads, which may outlive the group, end some processes by an abort on the usual way out
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_two_processes(tmp_path):
    """Under torchrun: train shares out its batches, and a loss whose gradients DDP would not average is told."""
    (tmp_path / "several.py").write_text(SEVERAL)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [tmp_path / "several.py", __file__.rpartition("/")[0], tmp_path]
    result = subprocess.run([*launch, *script], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    assert {p.name for p in tmp_path.glob("passed*")} == {"passed0", "passed1"}
    run(tmp_path / "alone", new_model())
    for name, one in load_model(tmp_path / "alone")[0].state_dict().items():
        # Adam divides by the size of a gradient, which rounding decides where it is none.
        torch.testing.assert_close(
            load_model(tmp_path / "run")[0].state_dict()[name], one, rtol=0, atol=5e-3
        )
    several, alone = (read_losses(tmp_path / name / "losses.csv")[1] for name in ("run", "alone"))
    assert several == pytest.approx(alone, rel=1e-4)
