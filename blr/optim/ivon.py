"""IVON: the posterior of a network at the price of Adam.

    q = N(m, 1/(N(h + δ)))      θ ~ q,  ĝ = ∇ℓ(θ),  ĥ = ĝ(θ − m)N(h + δ),  m ← m − α ḡ′/(h + δ)

One gradient at a sample gives both the slope and the curvature: the product of a gradient with its
own noise is, on average, the second derivative. The running average h of that curvature scales the
steps, as in Adam, and it is the width of the posterior. Five lines, in `_functional.ivon_step_`.

References: Shen et al. (2024), Variational learning is effective for large deep networks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from blr.families.gaussian import DiagonalGaussian
from blr.optim import _functional, _options
from blr.optim._gaussian import GaussianOptimizer
from blr.optim._pieces import Piece


class IVON(GaussianOptimizer):
    """Improved variational online Newton.

    Put the forward and backward pass into `with optimizer.sampled_params(train=True):`, or call
    `optimizer.train()` before an unchanged loop and `optimizer.eval()` after it. The loss must be
    a mean over examples.

    Args:
        params: Parameters, named parameters, or groups of them with their own options.
        lr: Learning rate α; the first step is about that of SGD with this rate.
        ess: Effective number N of terms whose mean is the loss: examples, or tokens; divided by
            the temperature if there is one. The width of the posterior is 1/√(N(h + δ)).
        hess_init: h at the start. Too small is unstable, too large learns nothing but the mean.
        betas: Decays β₁ of the gradient and β₂ of the curvature.
        weight_decay: δ, the precision of the prior divided by `ess`.
        clip_radius: Largest step of a parameter in units of α.
        debias: Divide ḡ by the weight 1 − β₁ᵗ that it has gathered.
        rescale_lr: Multiply α by h₀ + δ, so that `lr` does not depend on them.
        seed: Says which noise, together with step, sample and place.
        fused: Reserved for a step in one kernel: True is refused, None and False are eager.
        capturable: Reserved for a step that a CUDA graph can record: True is refused.
        prior: A Gaussian over all parameters, in place of weight decay; such as the `posterior()`
            of an earlier task.

    Raises:
        ValueError: If an option is out of its range, naming it, its value and the remedy.
        TypeError: If a parameter is not real, or `prior` is not a Gaussian.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        ess: float,
        hess_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99999),
        weight_decay: float = 1e-4,
        clip_radius: float = float("inf"),
        debias: bool = True,
        rescale_lr: bool = True,
        seed: int = 0,
        fused: bool | None = None,
        capturable: bool = False,
        prior: DiagonalGaussian | None = None,
    ) -> None:
        options = dict(lr=lr, ess=ess, hess_init=hess_init, betas=betas, weight_decay=weight_decay)
        options |= dict(clip_radius=clip_radius, debias=debias, rescale_lr=rescale_lr, seed=seed)
        super().__init__(params, options | dict(fused=fused, capturable=capturable), prior)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        _options.check_clipping(group)
        _options.check_device(group)

    def _product(
        self, b: Piece, group: dict[str, Any], gradient: Tensor, theta: Tensor, mean: Tensor
    ) -> Tensor:
        return (theta - mean).mul_(gradient)

    def _learn(
        self, b: Piece, group: dict[str, Any], mean: Tensor, gradient: Tensor, product: Tensor
    ) -> None:
        momentum, hess, prior = b.read("momentum"), b.read("hess"), self._prior(b, group)
        scale = group["hess_init"] + prior.delta if group["rescale_lr"] else 1.0
        _functional.ivon_step_(
            mean, momentum, hess, gradient, product, prior,
            lr=group["lr"] * scale,
            betas=group["betas"],
            ess=group["ess"],
            gathered=self._gathered(group),
            clip_radius=group["clip_radius"],
        )  # fmt: skip
        b.write("momentum", momentum)
        b.write("hess", hess)
