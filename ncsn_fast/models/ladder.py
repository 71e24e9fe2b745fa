"""The ladder of noise levels that every network holds.

Belongs here: the buffer ``sigmas`` and its rules: it is float32 whatever the dtype of the parameters, since step sizes
are made of it; it comes and goes with the state dict; and the host knows whether it is set. Does not belong here: how a
ladder is made (``schedules.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..schedules import check_sigmas
from .pretrained import strip_wrapper_names


class WithLadder(nn.Module):
    """A module with a ladder, of ``config.num_classes`` levels or, without such a field, of any number.

    Args:
        config: of the network, with a field ``sigmas``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self._levels = getattr(config, "num_classes", None)  # None: a ladder of any length
        self.register_buffer("sigmas", torch.zeros(self._levels or 0, dtype=torch.float32))
        self._sigmas_are_set = False  # known on the host, so that no forward has to ask the device
        self.register_load_state_dict_pre_hook(strip_wrapper_names)
        self.register_load_state_dict_pre_hook(_make_room_for_sigmas)
        self.register_load_state_dict_post_hook(_notice_loaded_sigmas)
        if config.sigmas is not None:
            self.set_sigmas(config.sigmas)

    def set_sigmas(self, sigmas: Sequence[float] | Tensor) -> None:
        """Set the ladder of noise levels; it is saved with the weights.

        Args:
            sigmas: standard deviations in the units of the data, positive, finite and strictly descending: a tensor,
                an array or a sequence; K of them if the network is conditioned on labels. Copied.

        Raises:
            ValueError: another shape or length, none, a value not positive and finite, or not strictly descending.
            TypeError: not made of real numbers.
        """
        checked = check_sigmas(sigmas, len(sigmas) if self._levels is None else self._levels)
        if not len(checked):
            raise ValueError("sigmas must hold at least one level, got none")
        if self._levels is None:
            self.sigmas = checked.to(self.sigmas.device)
        else:
            with torch.no_grad():
                self.sigmas.copy_(checked)
        self._sigmas_are_set = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WithLadder:
        """Convert all but the sigmas, which set step sizes, to another dtype."""
        sigmas = self.sigmas
        super()._apply(fn, recurse)
        if self.sigmas.dtype != torch.float32:
            self.sigmas = sigmas.to(self.sigmas.device)
        return self

    def _require_sigmas(self) -> None:
        if not self._sigmas_are_set and not torch.compiler.is_compiling():
            self._notice_sigmas()  # the buffer may have been filled from outside, as averaging does
        if not self._sigmas_are_set:
            raise RuntimeError(
                "the noise levels are not set: call model.set_sigmas(make_sigmas(...)) first"
            )

    def _notice_sigmas(self) -> None:
        sigmas = self.sigmas
        self._sigmas_are_set = len(sigmas) > 0 and not sigmas.is_meta and bool((sigmas > 0).all())


def _make_room_for_sigmas(
    model: WithLadder, state_dict: dict[str, Any], prefix: str, *unused: Any
) -> None:
    """A ladder of any length in a state dict may be longer or shorter than the one that is set."""
    saved = state_dict.get(f"{prefix}sigmas")
    if model._levels is None and saved is not None and saved.shape != model.sigmas.shape:
        model.sigmas = torch.zeros_like(saved, device=model.sigmas.device)


def _notice_loaded_sigmas(model: WithLadder, incompatible_keys: Any) -> None:
    model._notice_sigmas()
