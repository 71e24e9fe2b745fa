"""Checkpoint files of the authors' programs, read and written.

Belongs here: the files of ``ncsn`` (2019) and ``ncsnv2`` (2020), which network a file is of. Does not belong here:
their configurations (``official_config.py``), the networks (``official.py``), this project's own checkpoints
(``training/checkpoints.py``).

A file is a list saved by ``torch.save``: state dict (keys begin with ``module.``) and Adam's state; from the 2020
program also epoch, step and, with ``model.ema``, the moving average of the parameters (keys without ``module.``).
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import ZIP_MAGIC, CheckpointError, check_archive, write_atomically
from ..schedules import check_sigmas
from .official import NCSNv2, NCSNv2Deeper, NCSNv2Deepest, OfficialNCSN
from .official_config import (
    SAME_SIGMA,
    OfficialNetwork,
    check_settings,
    input_options,
    ladder_of,
    read_config,
)

WEIGHTS = ("ema", "raw")
PREFIX = "module."  # of DataParallel, in which both programs wrap their networks
LEARNING_RATES = {OfficialNCSN: 1e-3, NCSNv2: 1e-4}  # of the published settings
NAMES_IN_MESSAGE = 4


def load_official(
    path: str | Path,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    weights: str = "ema",
    sigmas: Sequence[float] | Tensor | None = None,
) -> OfficialNetwork:
    """Load a checkpoint file of the authors' programs, onto the CPU. Only tensors and plain values are unpickled.

    Args:
        path: ``checkpoint.pth`` or ``checkpoint_N.pth``, of any version of torch, saved on any device.
        config: the program's configuration, a YAML file (the plain one of 2020, or the tagged ``config.yml`` that both
            programs leave beside their logs) or its contents. Of it are used ``data.logit_transform`` and
            ``data.rescaled``, which are false without it, and the ladder; the rest must agree with the file.
        weights: ``"ema"``, the moving average, or ``"raw"``, the last parameters. A file of the 2019 program has
            neither choice: it holds one set of weights, which both load.
        sigmas: the ladder, for files that hold none, as those of the 2019 network; or what the file's must be.

    Returns:
        The network, told from the names and shapes of the tensors, in evaluation mode. Without a ladder in the file,
        ``config`` and ``sigmas``, its sigmas are not set.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a truncated or damaged file, one of another program, of a network that is not supported, or
            without moving average; the message says which.
        ValueError: a ladder that is none or not the file's; a configuration of another network, with an option that is
            not supported, or with an image size that does not work; unknown ``weights``.
        TypeError: an argument of another type.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
    path = Path(path)
    states = _read(path)
    state_dict = _without_prefix(path, states[0])
    network = _identify(path, state_dict)
    if weights == "ema" and len(states) > 2:
        state_dict = state_dict | _moving_average(path, states, state_dict)

    fields: dict[str, Any] = {
        "in_channels": state_dict["begin_conv.weight"].shape[1],
        "nf": state_dict["begin_conv.weight"].shape[0],
        "num_classes": len(state_dict["normalizer.embed.weight"])
        if network is OfficialNCSN
        else len(state_dict["sigmas"]),
    }
    ladders = {"sigmas": sigmas, "the file": state_dict.get("sigmas")}
    if config is not None:
        settings = read_config(config)
        check_settings(settings, network, fields)
        fields |= input_options(settings, network)
        ladders["the configuration"] = ladder_of(settings)
    with torch.random.fork_rng(devices=[]):  # initial values are drawn and overwritten
        model = network(**fields)
    ladder = _agreed(ladders, model.config.num_classes)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} is not of the {network.__name__} that its tensors' names suggest: {str(error)[:1000]}"
        ) from error
    if ladder is not None:
        model.set_sigmas(ladder)
    return model.eval()


def save_official(
    model: OfficialNetwork,
    path: str | Path,
    *,
    ema: Mapping[str, Tensor] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    epoch: int = 0,
    step: int = 0,
) -> None:
    """Write a network as the checkpoint file that the authors' program of its year reads; the same bits.

    Args:
        model: one of the four networks, float32.
        path: of the file; replaced whole.
        ema: the moving average of the parameters, by name; ``None``: the parameters themselves, so that the file
            gives the same network whichever of the two is read from it. The 2019 network's file has none.
        optimizer: state dict of an Adam over ``model.parameters()``; ``None``: one that has not made a step.
        epoch, step: of training, for a file of the 2020 program.

    Raises:
        TypeError: another network, or one that is not in float32.
        RuntimeError: the sigmas are not set, in a network that divides by them.
        ValueError: a moving average of other names or shapes than the parameters, or for the 2019 network.
        OSError: it could not be written; what was at ``path`` is still there.
    """
    if type(model) not in (OfficialNCSN, NCSNv2, NCSNv2Deeper, NCSNv2Deepest):
        raise TypeError(
            "only OfficialNCSN, NCSNv2, NCSNv2Deeper and NCSNv2Deepest have an official form, "
            f"got {type(model).__name__}"
        )
    parameters = {name: _plain(name, tensor) for name, tensor in model.named_parameters()}
    if optimizer is None:
        rate = LEARNING_RATES[NCSNv2 if isinstance(model, NCSNv2) else OfficialNCSN]
        optimizer = torch.optim.Adam(model.parameters(), lr=rate).state_dict()
    net = OrderedDict((PREFIX + k, _plain(k, v)) for k, v in model.state_dict().items())
    states: list[Any] = [net, optimizer]
    if isinstance(model, NCSNv2):
        model._require_sigmas()
        average = parameters if ema is None else {k: _plain(k, v) for k, v in ema.items()}
        wrong = _other_tensors(average, parameters)
        if wrong:
            raise ValueError(f"ema must hold the parameters of the {type(model).__name__}: {wrong}")
        states += [epoch, step, average]
    elif ema is not None:
        raise ValueError("a file of the 2019 program has no moving average, but ema was given")
    buffer = io.BytesIO()
    torch.save(states, buffer)
    write_atomically(Path(path), buffer.getbuffer())


# --- the file ---------------------------------------------------------------------------------------


def _read(path: Path) -> list[Any]:
    """The list that the file holds."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    with open(path, "rb") as file:
        start = file.read(len(ZIP_MAGIC))
    if not start:
        raise CheckpointError(f"{path} is empty, not a checkpoint")
    if start == ZIP_MAGIC:  # else the form of torch before 1.6, which has no checksums
        check_archive(path)
    try:
        states = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, KeyError, IndexError, EOFError, pickle.UnpicklingError) as e:
        what = str(e).split("\n")[0] or type(e).__name__
        raise CheckpointError(
            f"{path} is truncated ({path.stat().st_size} bytes), damaged, or not a file of tensors and plain values: "
            f"{what}"
        ) from e
    parts = len(states) if isinstance(states, list) else 0
    if parts not in (2, 4, 5) or not isinstance(states[0], dict):
        what = (
            f"a list of {len(states)}" if isinstance(states, list) else f"a {type(states).__name__}"
        )
        raise CheckpointError(
            f"{path} is not a checkpoint of the authors' programs: they write a list of 2 (2019) or of 4 or 5 (2020) "
            f"that begins with a state dict, and this is {what}"
        )
    return states


def _without_prefix(path: Path, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict as of the bare network; all tensors float32."""
    with_prefix = [str(key).startswith(PREFIX) for key in state_dict]
    if any(with_prefix) and not all(with_prefix):
        raise CheckpointError(
            f"{path}: some names of the state dict begin with {PREFIX}, some do not"
        )
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{path}: {name} must be a float32 tensor, got {what}")
    return {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items()}


def _identify(path: Path, state_dict: Mapping[str, Tensor]) -> type[OfficialNetwork]:
    """Which network the weights are of, by the names of the tensors."""
    first, table = state_dict.get("begin_conv.weight"), state_dict.get("normalizer.embed.weight")
    five_stages = any(name.startswith("res5.") for name in state_dict)
    if first is None or first.dim() != 4 or "end_conv.weight" not in state_dict:
        raise CheckpointError(f"{path} holds another network than the authors' published ones")
    if table is not None:
        if table.dim() != 2:
            raise CheckpointError(
                f"{path}: normalizer.embed.weight must be 2-d, got {table.dim()}-d"
            )
        if five_stages:
            names = {2: "CondRefineNetDeeperDilated", 3: "NCSNdeeper"}
            name = names.get(table.shape[1] // first.shape[0], "a conditional network")
            raise CheckpointError(
                f"{path} is of {name}, with five conditional stages: not supported"
            )
        return OfficialNCSN
    if "sigmas" not in state_dict:
        if "normalizer.alpha" in state_dict:
            raise CheckpointError(
                f"{path} is of RefineNetDilated, the baseline for a single noise level (no sigmas): not supported"
            )
        raise CheckpointError(
            f"{path} holds neither sigmas nor a normalizer of the authors' published networks: a network with another "
            "normalization is not supported"
        )
    if state_dict["sigmas"].dim() != 1:
        raise CheckpointError(f"{path}: sigmas must be 1-d, got {state_dict['sigmas'].dim()}-d")
    if "normalizer.alpha" not in state_dict:
        raise CheckpointError(
            f"{path} is of a network with another normalization than InstanceNorm++: not supported"
        )
    if any(name.startswith("res31.") for name in state_dict):
        return NCSNv2Deepest
    return NCSNv2Deeper if five_stages else NCSNv2


def _moving_average(
    path: Path, states: list[Any], state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The moving average of a file of the 2020 program, whole."""
    if len(states) != 5 or not isinstance(states[-1], dict):
        raise CheckpointError(
            f"{path} holds no moving average of the weights (model.ema was false): load it with weights='raw'"
        )
    average = _without_prefix(path, states[-1])
    wrong = _other_tensors(average, {k: v for k, v in state_dict.items() if k != "sigmas"})
    if wrong:
        raise CheckpointError(f"{path}: the moving average is not of the file's network: {wrong}")
    return average


def _other_tensors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """How two sets of tensors differ in names and shapes, for an error message; empty if they do not."""
    lists = {
        "lacks": [name for name in expected if name not in got],
        "has also": [name for name in got if name not in expected],
        "has in another shape": [
            name for name in got if name in expected and got[name].shape != expected[name].shape
        ],
    }
    return "; ".join(
        f"it {what} {', '.join(names[:NAMES_IN_MESSAGE])}"
        + (f" and {len(names) - NAMES_IN_MESSAGE} more" if len(names) > NAMES_IN_MESSAGE else "")
        for what, names in lists.items()
        if names
    )


def _plain(name: str, tensor: Tensor) -> Tensor:
    """A tensor as the file holds it: float32, contiguous, on the CPU."""
    if tensor.dtype != torch.float32:
        raise TypeError(
            f"{name} must be float32 as in official files, got {tensor.dtype}: model.float()"
        )
    return tensor.detach().cpu().contiguous()


def _agreed(ladders: Mapping[str, Any], num_classes: int) -> Any:
    """The one ladder of all that were given, as the first of them gives it unless the file has one."""
    given = {
        where: check_sigmas(sigmas, num_classes)
        for where, sigmas in ladders.items()
        if sigmas is not None
    }
    (first, ladder), *others = given.items() or [(None, None)]
    for where, other in others:
        if not torch.allclose(ladder, other, rtol=SAME_SIGMA, atol=0):
            i = int((ladder / other).log().abs().argmax())
            raise ValueError(
                f"the ladders of {first} and of {where} differ: level {i} is {ladder[i]:.6g} and {other[i]:.6g}"
            )
    return given.get("the file", ladder)
