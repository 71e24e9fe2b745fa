"""From a network's own rules to the samplers': what :meth:`~ncsn_fast.models.base.ScoreModel.sample` does.

Belongs here: the shape, the layout, the start and the clamping of samples, as a network's config and range of data say.
Does not belong here: the samplers, and the rules that do not depend on a network (``sampling``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..checks import height_and_width, positive_int, positive_number
from ..data.ranges import IMAGE_RANGE, Range
from ..sampling.run import draw
from ..sampling.start import draw_seed, initial_state
from .inputs import weight_of

if TYPE_CHECKING:
    from .base import ScoreModel


def draw_samples(
    model: ScoreModel,
    sampler: str,
    n_samples: int,
    image_size: int | tuple[int, int] | None,
    *,
    clip: float | bool | None,
    init: Tensor | None,
    init_dist: str | None,
    seed: int | None,
    sample_offset: int,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Samples of a network; arguments as of its ``sample``."""
    shape = (positive_int("n_samples", n_samples), *_size(model, image_size))
    ends, weight = _clip_ends(model, clip), weight_of(model)
    if init is None and init_dist == "uniform" and model.data_range not in (None, IMAGE_RANGE):
        seed, (low, high) = draw_seed() if seed is None else seed, model.data_range
        start = {"seed": seed, "sample_offset": sample_offset, "device": weight.device}
        init = low + (high - low) * (initial_state(shape, init_dist, **start) + 1) / 2
    last = model.samples_as_weights and weight.is_contiguous(memory_format=torch.channels_last)
    if (callback := options.get("callback")) is not None:

        def then_forget(*arguments: Any) -> None:
            callback(*arguments)
            ops.forget_packed()  # whatever it did to the weights

        options["callback"] = then_forget
    with ops.prepack(model):
        return draw(
            model,
            sampler,
            model.scores(),
            shape,
            model.sigmas.tolist(),
            device=weight.device,
            layout=torch.channels_last if last else torch.contiguous_format,
            clip=ends,
            init=init,
            init_dist=init_dist,
            seed=seed,
            sample_offset=sample_offset,
            tuned=model.tuned,
            **options,
        )


def scores_of_labels(model: ScoreModel) -> Mapping[str, Callable[[Tensor, Any], Tensor]]:
    """The score as samplers take it; x is float32, and the level a tensor in captured graphs."""
    weight = weight_of(model)
    levels = torch.arange(len(model.sigmas), dtype=torch.int64, device=weight.device)

    def score(x: Tensor, level: int | Tensor) -> Tensor:
        labels = level if isinstance(level, Tensor) else levels[level : level + 1]
        return model(x.to(weight.dtype), labels)

    return {"level": score}


def scores_of_sigma(model: ScoreModel) -> Mapping[str, Callable[[Tensor, Any], Tensor]]:
    """Likewise, of a network that takes any sigma; what depends on sigma alone is computed once for each level."""
    dtype, prepared = weight_of(model).dtype, {}

    def score(x: Tensor, level: int | Tensor) -> Tensor:
        if isinstance(level, Tensor):
            return model(x.to(dtype), model.sigmas.index_select(0, level))
        if level not in prepared:
            prepared.clear()
            prepared[level] = model.at(model.sigmas[level])
        return prepared[level](x.to(dtype))

    return {"level": score, "sigma": lambda x, sigma: model(x.to(dtype), sigma)}


def _size(model: ScoreModel, image_size: int | tuple[int, int] | None) -> tuple[int, ...]:
    """The shape of the samples to draw."""
    shape = model.sample_shape
    if image_size is None:
        if None in shape:
            raise ValueError(f"{type(model).__name__} takes images of any size: say image_size")
        return shape
    if len(shape) != 3:
        raise ValueError("image_size was given, and samples are no images")
    return (shape[0], *height_and_width(image_size))


def _clip_ends(model: ScoreModel, clip: float | bool | None) -> Range | None:
    if clip is None or clip is False:
        return None
    if clip is not True:
        clip = positive_number("clip", clip)
        return -clip, clip
    if model.data_range is None:
        raise ValueError(
            "clip=True clamps to data_range, which this network has not: give a number"
        )
    return model.data_range
