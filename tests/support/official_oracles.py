"""The oracles of the authors' networks (tests/oracles/official), and errors as their tolerances mean them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ncsn_fast.models.official import NCSNv2, NCSNv2Deeper, NCSNv2Deepest, OfficialNCSN

ORACLES = Path(__file__).parents[1] / "oracles" / "official"
PER_SAMPLE = 1e-5
GRADIENT = 2e-4
NETWORKS = {
    "ncsn_v1": OfficialNCSN,
    "ncsnv2": NCSNv2,
    "ncsnv2_deeper": NCSNv2Deeper,
    "ncsnv2_deepest": NCSNv2Deepest,
}


def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of an oracle file."""
    with safe_open(ORACLES / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def tiny(name: str, **options) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A tiny network with its weights, and its inputs and outputs."""
    tensors, metadata = read(name)
    config = json.loads(metadata["config"])
    model = NETWORKS[name](config["C"], config["ngf"], config["K"], **options)
    model.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("io.")})
    return model.eval(), {k[3:]: v for k, v in tensors.items() if k.startswith("io.")}


def worst_sample(got: Tensor, expected: Tensor) -> float:
    """The largest relative L2 error of a sample."""
    assert got.shape == expected.shape
    got, expected = (t.detach().double().flatten(1) for t in (got, expected))
    return float(((got - expected).norm(dim=1) / expected.norm(dim=1)).max())


def unit(n: int, t: int, salt: int) -> np.ndarray:
    """N reproducible float64 numbers in [-1, 1) of tensor t: a hash of integers."""
    mask = np.uint64(0xFFFFFFFF)
    start = np.uint64((0x9E3779B1 * (t + 1) + 0x85EBCA77 * salt) & 0xFFFFFFFF)
    h = (np.arange(n, dtype=np.uint64) + start) & mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h ^= h >> np.uint64(shift)
        h = (h * np.uint64(factor)) & mask
    h ^= h >> np.uint64(16)
    return h.astype(np.float64) / 2.0**31 - 1.0


def full_size(model: torch.nn.Module, shape: tuple[int, ...], salt: int = 1) -> Tensor:
    """Give a network the weights that the full-size oracles were made with; the input of that shape."""
    state_dict = model.state_dict()
    names = [name for name in state_dict if name != "sigmas"]
    for t, name in enumerate(names):
        like = state_dict[name]
        v = unit(like.numel(), t, salt).reshape(like.shape)
        if name.endswith("embed.weight"):
            gamma, alpha, beta = np.split(v, 3, axis=1)
            v = np.concatenate([1 + 0.5 * gamma, 0.7 + 0.8 * alpha, 0.7 * beta], axis=1)
        elif name.endswith(".gamma"):
            v = 1 + 0.5 * v
        elif name.endswith(".alpha"):
            v = 0.7 + 0.8 * v
        elif name.endswith(".beta"):
            v = 0.7 * v
        elif name.endswith("bias"):
            v = 0.5 * v
        else:
            v = v * np.sqrt((1.5 if ".crp." in name else 3) / np.prod(like.shape[1:]))
        like.copy_(torch.from_numpy(v.astype(np.float32)))
    values = (unit(int(np.prod(shape)), 999999, salt) + 1) / 2
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)
