"""What an optimizer with a posterior writes: its state, its draw, its product and its update.

    θ = draw(m, ε)      product = f(ĝ, θ, m)      m, state ← learn(m, state, ĝ, product)

Each is a few lines on vectors. When they run, on which tensors and in which order, is the business
of `_base` and `_work`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from blr.optim import _noise, _state
from blr.optim._pieces import WINDOW, Piece, Windows


class Equations(Optimizer):
    """The equations of an optimizer with a posterior."""

    _linear: ClassVar[bool] = True  # whether products scale as gradients do
    _transient: ClassVar[tuple[str, ...]] = ("product",)  # entries of the state not worth saving
    _at: tuple[int, int] | None = None  # stream and number of the sample held; None: the mean
    _aside: tuple[int, int] | None = None  # the sample kept where the mean waited
    _taken: int | Tensor = 1  # steps that the gradients allow, 1 or 0 on the device if capturable

    def _check(self, group: dict[str, Any]) -> None:
        """Refuse options that make no sense."""

    def _initial(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter at the start, by name, each with the layout of `p`."""
        raise NotImplementedError

    def _draw(self, b: Piece, group: dict[str, Any], mean: Tensor, noise: Tensor) -> Tensor:
        """A sample θ from the mean m and noise ε."""
        raise NotImplementedError

    def _product(
        self, b: Piece, group: dict[str, Any], gradient: Tensor, theta: Tensor, mean: Tensor
    ) -> Tensor:
        """What a sample teaches beyond its gradient, such as ĝ(θ − m)."""
        raise NotImplementedError

    def _renew(self) -> None:
        """Forget what was noted about an earlier sample, if anything is."""

    def _learn(
        self, b: Piece, group: dict[str, Any], mean: Tensor, gradient: Tensor, product: Tensor
    ) -> None:
        """Update m and the state in place."""
        raise NotImplementedError

    def _apart(self, dtype: torch.dtype) -> bool:
        """Whether the mean has its own place also at rest, because 16 bits are too few for it."""
        return _state.short(dtype)

    def _shown(self, mean: Tensor) -> Tensor:
        """What a parameter shows of the mean at rest."""
        return mean

    def _visible(self, sample: Tensor, stream: int) -> Tensor:
        """What a parameter shows of a sample."""
        return sample

    def _unshown(self, shown: Tensor, group: dict[str, Any]) -> Tensor:
        """The mean of a parameter that others have written."""
        return shown

    def _windows(self, group: dict[str, Any]) -> Windows:
        """How large pieces are, by kind of device."""
        return WINDOW

    def _name(self, group: dict[str, Any], at: tuple[int, int], ahead: int = 0) -> tuple[int, ...]:
        """The integers that say which noise: of the sample `at`, so many steps ahead."""
        return group["seed"], group["step"] + ahead, *at

    def _noise(
        self, b: Piece, group: dict[str, Any], at: tuple[int, int], ahead: int = 0
    ) -> Tensor:
        """ε of a piece, float32."""
        name = self._name(group, at, ahead)
        return b.cut(_noise.normal(b.start, b.stop, name, b.device))
