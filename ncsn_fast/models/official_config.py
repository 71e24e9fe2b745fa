"""Configurations of the authors' programs, read and written.

Belongs here: their YAML files, what of them the networks here have and what not, the ladder that one describes. Does
not belong here: checkpoint files (``convert.py``), the networks (``official.py``), their published settings
(``presets/``).

A configuration is a mapping of sections: ``model``, ``data``, ``training``, ``optim``, and from the 2020 program
``sampling``. That of 2019 is dumped with tags of Python's ``argparse.Namespace``; nothing but plain values is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_atomically
from ..schedules import check_sigmas, make_sigmas
from .official import NCSNv2, NCSNv2Deeper, NCSNv2Deepest, OfficialNCSN, check_size

OfficialNetwork = OfficialNCSN | NCSNv2
PYTHON_TAG = "tag:yaml.org,2002:python/"
SAME_SIGMA = 1e-5  # relative; ladders computed with other rounding are the same ladder
# The 2020 program tells the network from the data set.
DATASETS = {
    OfficialNCSN: "CIFAR10",
    NCSNv2: "CIFAR10",
    NCSNv2Deeper: "LSUN",
    NCSNv2Deepest: "FFHQ",
}


def read_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as plain values: mappings of mappings."""
    name = "config"
    if isinstance(config, (str, Path)):
        name, config = str(config), _load_yaml(Path(config))
    if not isinstance(config, Mapping):
        raise TypeError(
            f"{name} must be a mapping or the path of a YAML file of one, got {type(config).__name__}"
        )
    for section in ("model", "data"):
        if not isinstance(config.get(section), Mapping):
            raise ValueError(
                f"{name} is not a configuration of the authors' programs: it has no section {section}"
            )
    return dict(config)


def _load_yaml(path: Path) -> Any:
    """Read YAML; Python objects in it, as the programs dump them, become the plain values they are made of."""
    import yaml  # comes with huggingface_hub

    class Loader(yaml.SafeLoader):
        pass

    def plain(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return loader.construct_sequence(node, deep=True)
        return loader.construct_scalar(node)

    Loader.add_multi_constructor(PYTHON_TAG, plain)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


def check_settings(
    settings: Mapping[str, Any], network: type[OfficialNetwork], fields: Mapping[str, Any]
) -> None:
    """Refuse a configuration of another network, and options that the networks here do not have."""
    model, data = settings["model"], settings["data"]
    for section, name, field in (
        ("data", "channels", "in_channels"),
        ("model", "ngf", "nf"),
        ("model", "num_classes", "num_classes"),
    ):
        value = settings[section].get(name, fields[field])
        if value != fields[field]:
            raise ValueError(
                f"the configuration is of another network: {section}.{name} is {value!r} there, "
                f"and the checkpoint has {fields[field]}"
            )
    supported = {"normalization": ("InstanceNorm++",), "nonlinearity": ("elu",)}
    supported["sigma_dist"] = ("geometric", "uniform")
    for name, values in supported.items():
        if name in model and model[name] not in values:
            raise ValueError(
                f"model.{name} {model[name]!r} is not supported, only {' and '.join(values)}"
            )
    size = data.get("image_size")
    if size is not None:
        check_size(network, size, size)


def input_options(settings: Mapping[str, Any], network: type[OfficialNetwork]) -> dict[str, bool]:
    """How the network takes its input."""
    names = ("logit_transform", "rescaled")
    options = {name: settings["data"].get(name, False) for name in names}
    if network is OfficialNCSN and options.pop("rescaled") is not False:
        raise ValueError("data.rescaled with a network of 2019 is not supported")
    return options


def ladder_of(settings: Mapping[str, Any]) -> Tensor | None:
    """The ladder that the configuration describes."""
    model = settings["model"]
    if not {"sigma_begin", "sigma_end", "num_classes"} <= set(model):
        return None
    begin, end, levels = model["sigma_begin"], model["sigma_end"], model["num_classes"]
    if levels == 1:
        return check_sigmas([begin], 1)
    geometric = make_sigmas(begin, end, levels)
    if model.get("sigma_dist", "geometric") == "geometric":
        return geometric
    return _uniform(begin, end, levels)


def _uniform(begin: float, end: float, levels: int) -> Tensor:
    return torch.linspace(begin, end, levels, dtype=torch.float64).float()


def image_size_of(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the images, if the configuration says them."""
    size = settings["data"].get("image_size")
    return None if size is None else (size, size)


def sampling_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How the program of 2020 samples by the configuration, as options of ``sample``; empty without that section.

    Networks whose data are rescaled or logits begin from other numbers than U(0, 1), and their samples become images
    by :func:`~ncsn_fast.data.official.to_images`: no start and no clamp is said for them.
    """
    sampling, data = settings.get("sampling"), settings["data"]
    if not isinstance(sampling, Mapping) or not {"n_steps_each", "step_lr"} <= set(sampling):
        return {}
    options = {
        "n_steps_each": int(sampling["n_steps_each"]),
        "step_lr": float(sampling["step_lr"]),
        "denoise": bool(sampling.get("denoise", True)),
    }
    if not (data.get("rescaled") or data.get("logit_transform")):
        options |= {"init_dist": "uniform", "clip": True}
    return options


def config_of(
    model: OfficialNetwork,
    image_size: tuple[int, int] | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """What a configuration says of a network: the sections ``model`` and ``data``, and ``sampling`` if it is known.

    Args:
        model: one of the four networks, its sigmas set.
        image_size: height and width of its images, equal.
        sampling: options of ``sample``, of which the steps, their size and the denoising are kept.

    Raises:
        ValueError: a ladder that is neither geometric nor uniform, or images that are not square: the authors'
            configurations cannot say so.
    """
    sigmas = model.sigmas.detach().cpu()
    # Rounded: these numbers were written by people, and float32 has seven digits.
    begin, end = (float(f"{float(sigmas[i]):.6g}") for i in (0, -1))
    ladders = {"geometric": make_sigmas, "uniform": _uniform}
    dist = next(
        (
            name
            for name, make in ladders.items()
            if len(sigmas) == 1
            or torch.allclose(make(begin, end, len(sigmas)), sigmas, rtol=SAME_SIGMA, atol=0)
        ),
        None,
    )
    if dist is None:
        raise ValueError(
            "a configuration of the authors' programs has a geometric or uniform ladder, and the network's is neither"
        )
    size = {}
    if image_size is not None:
        if image_size[0] != image_size[1]:
            raise ValueError(
                f"the authors' programs have square images, got {image_size[0]}x{image_size[1]}"
            )
        size = {"image_size": image_size[0]}
    config = model.config
    rescaled = {} if isinstance(model, OfficialNCSN) else {"rescaled": config.rescaled}
    names = ("n_steps_each", "step_lr", "denoise")
    kept = {name: sampling[name] for name in names if name in (sampling or {})}
    return {
        **({"sampling": kept} if kept else {}),
        "data": {
            "dataset": DATASETS[type(model)],
            **size,
            "channels": config.in_channels,
            "logit_transform": config.logit_transform,
            **rescaled,
        },
        "model": {
            "sigma_begin": begin,
            "sigma_end": end,
            "sigma_dist": dist,
            "num_classes": config.num_classes,
            "ngf": config.nf,
            "ema": isinstance(model, NCSNv2),
            "normalization": "InstanceNorm++",
            "nonlinearity": "elu",
            "spec_norm": False,
        },
    }


def save_config(settings: Mapping[str, Any], path: str | Path, *, tagged: bool = False) -> None:
    """Write a configuration as YAML.

    Args:
        settings: mappings of mappings of plain values.
        path: of the file; replaced whole.
        tagged: with Python's tags, as the ``config.yml`` that the program of 2019 samples from; else plain.

    Raises:
        OSError: it could not be written; what was at ``path`` is still there.
    """
    import yaml  # comes with huggingface_hub

    class Dumper(yaml.SafeDumper):
        pass

    def namespace(dumper: yaml.SafeDumper, values: dict[str, Any]) -> yaml.Node:
        return dumper.represent_mapping(f"{PYTHON_TAG}object:argparse.Namespace", values)

    if tagged:
        Dumper.add_representer(dict, namespace)
    plain = {key: dict(v) if isinstance(v, Mapping) else v for key, v in settings.items()}
    text = yaml.dump(plain, Dumper=Dumper, sort_keys=False, default_flow_style=False)
    write_atomically(Path(path), text.encode())
