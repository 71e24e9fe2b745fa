"""Makes the trained networks that come with the package: ``python -m ncsn_fast.demos.ship NAME --from RUN``.

Belongs here: from the folder of a run to a small folder of package data, with its options of sampling and a card. Does
not belong here: training it (``ncsn-fast train``, ``digits.py``), loading it (``models/shipped.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..checks import one_of
from ..files import write_atomically
from ..models.base import ScoreModel
from ..models.pretrained import WEIGHTS_FILE
from ..models.sampling_settings import SAMPLING_NAME, save_sampling, save_tuned
from ..models.shipped import SHIPPED
from ..training.checkpoints import CHECKPOINT_NAME, Checkpoint, load_checkpoint, save_model
from . import digits

CARD_NAME = "README.md"
MOST_BYTES = 2_000_000  # of a folder


@dataclasses.dataclass(frozen=True)
class Shipped:
    """What is said of a network that comes with the package, and how its samples are drawn.

    Attributes:
        data: what it was trained on, with its licence.
        training: the command.
        sampling: the options of ``sample`` from the network's smallest noise level.
        tuned: what ``sampler="auto"`` takes for it, and with it the command line; none: the general choice.
    """

    data: str
    training: str
    sampling: Callable[[float], Mapping[str, Any]] = lambda sigma: {}
    tuned: Mapping[str, Any] | None = None


NETWORKS: Mapping[str, Shipped] = {
    "digits": Shipped(
        "the 1,540 training images of `ncsn_fast.data.load_digits()`, 8x8 pixels: the Optical Recognition of "
        "Handwritten Digits by E. Alpaydin and C. Kaynak, UCI repository, 1998, CC BY 4.0",
        "ncsn-fast demo digits --out RUN",
        lambda sigma: {
            "sampler": "ald",
            "n_steps_each": digits.STEPS_EACH_LEVEL,
            "step_lr": digits.STEP_LR * sigma**2,
            "denoise": True,
            "init_dist": "normal",
            "clip": False,  # the states of the wide levels lie far outside [-1, 1]
        },
    ),
    "fashion-mnist": Shipped(
        "the 60,000 training images of [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist), 28x28 "
        "pixels, by Zalando SE, MIT licence",
        "ncsn-fast train --preset fashion-mnist --out RUN",
        tuned={"sampler": "dpmpp_2m_sde", "passes": 20, "levels": "log"},
    ),
}


def ship(name: str, run: str | Path, out: str | Path | None = None) -> Path:
    """Write the averaged network of a run as float16, with what belongs to it.

    Args:
        name: a key of :data:`NETWORKS`.
        run: folder of the run.
        out: folder of all such networks; ``None``: that of the package.

    Returns:
        The network's folder: ``config.json``, ``model.safetensors``, ``image_size.json``, ``sampling.json`` and a card.

    Raises:
        ValueError: an unknown name, weights that float16 cannot hold, or more than 2 MB.
        FileNotFoundError, CheckpointError: no run, or a damaged one.
    """
    one_of("name", name, tuple(NETWORKS))
    checkpoint = load_checkpoint(Path(run) / CHECKPOINT_NAME)
    model = checkpoint.ema_model()
    weights = safetensors.torch.save(halved(model.state_dict()), {"format": "pt"})
    if len(weights) >= MOST_BYTES:
        raise ValueError(
            f"a network of the package must be below {MOST_BYTES:,} bytes, got {len(weights):,} for {name}"
        )
    folder = (SHIPPED if out is None else Path(out)) / name
    save_model(model, folder, checkpoint.image_size)
    write_atomically(folder / WEIGHTS_FILE, weights)
    (folder / SAMPLING_NAME).unlink(missing_ok=True)
    save_sampling(folder, NETWORKS[name].sampling(float(model.sigmas[-1])))
    if NETWORKS[name].tuned is not None:
        save_tuned(folder, NETWORKS[name].tuned)
    write_atomically(folder / CARD_NAME, card(name, model, checkpoint).encode())
    return folder


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float16; the ladder stays as it is, since everything goes by it.

    Raises:
        ValueError: a weight beyond float16.
    """
    result = {}
    for name, value in state.items():
        result[name] = value if name == "sigmas" else value.to(torch.float16).contiguous()
        if not bool(result[name].isfinite().all()):
            raise ValueError(f"the weights must lie within float16's range, got {name} beyond it")
    return result


def card(name: str, model: ScoreModel, checkpoint: Checkpoint) -> str:
    """The card of a network, in Markdown."""
    about = NETWORKS[name]
    parameters = sum(p.numel() for p in model.parameters())
    how = 'sampler="auto"' if about.tuned else f'**load_sampling("{name}")'
    imports = (
        "" if about.tuned else "from ncsn_fast.models.sampling_settings import load_sampling\n"
    )
    return f"""# {name}

`{type(model).__name__}`, {parameters:,} parameters, the moving average of {checkpoint.step:,} steps of
{checkpoint.settings["batch_size"]} images; {len(model.sigmas)} noise levels from {float(model.sigmas[0]):g} to \
{float(model.sigmas[-1]):g}. The weights are kept in float16, and are float32
once loaded.

Trained on {about.data}.

```bash
{about.training}
python -m ncsn_fast.demos.ship {name} --from RUN
```

It loads without a download:

```python
from ncsn_fast import load_pretrained
{imports}
model = load_pretrained("{name}")
images = model.sample(64, {checkpoint.image_size[0]}, {how}, seed=0)  # in [-1, 1]
```

It is small and was trained briefly: an example, no more.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m ncsn_fast.demos.ship NAME --from RUN``."""
    parser = argparse.ArgumentParser(prog="ncsn_fast.demos.ship", description=__doc__.split(":")[0])
    parser.add_argument("name", choices=tuple(NETWORKS))
    parser.add_argument("--from", dest="run", required=True, type=Path, help="folder of the run")
    parser.add_argument("--out", type=Path, help="folder of the networks (the package's)")
    options = parser.parse_args(arguments)
    folder = ship(options.name, options.run, options.out)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size:,} bytes")


if __name__ == "__main__":
    main()
