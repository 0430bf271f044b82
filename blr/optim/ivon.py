"""IVON: the posterior of a network at the price of Adam.

    q = N(m, 1/(N(h + δ)))      θ ~ q,  ĝ = ∇ℓ(θ),  ĥ = ĝ(θ − m)N(h + δ),  m ← m − α ḡ′/(h + δ)

One gradient at a sample gives both the slope and the curvature: the product of a gradient with its
own noise is, on average, the second derivative. The running average h of that curvature scales the
steps, as in Adam, and it is the width of the posterior. Five lines, in `_functional.ivon_step_`.

Departures from the published algorithm and package: The noise is a function of seed, step, sample
and element, and not drawn from a generator. Loss scaling, and clipping by the norm, before the step
reach the curvature as well. A parameter without a gradient stays as it is: it does not decay, and
its averages do not age. A step with a NaN or an infinite gradient is skipped, and a sample whose
context raised teaches nothing. For parameters of 16 bits, mean and averages are kept in float32.
Weight decay may be a Gaussian prior. Squared gradients in the place of the product are not offered.

References: Shen et al. (2024), Variational learning is effective for large deep networks.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from blr.families.gaussian import DiagonalGaussian
from blr.optim import _compiled, _functional, _launch, _options, _state
from blr.optim._gaussian import GaussianOptimizer, gathered
from blr.optim._pieces import Job, Piece, Windows
from blr.optim._work import Work


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
        debias: Divide ḡ by the weight 1 − β₁ᵗ that it has gathered. The steps t are those of the
            group, also for a parameter that joins later, which therefore starts slowly.
        rescale_lr: Multiply α by h₀ + δ, so that `lr` does not depend on them.
        seed: Says which noise, together with step, sample and place. Two optimizers on parts of one
            model need different seeds: equal noise on two parameters would count their joint
            curvature for that of each.
        fused: On a GPU, None and True are one Triton kernel for sample and step. On the CPU, True
            compiles them, which takes some seconds at first and needs a C++ compiler. False is
            plain torch, and so are parameters of float64 on a GPU, and None on the CPU.
        capturable: Whether a CUDA graph can record the step: the number of the step, the check of
            gradients and everything that follows from them stay on the GPU, and so may `lr`, a
            tensor there. One sample per step can be recorded; skipped steps are told of later, by
            `eval` and `state_dict`.
        prior: A Gaussian over the parameters, in place of weight decay; such as the `posterior()`
            of an earlier task. What it does not have, such as layers that were frozen, has weight
            decay; give names to both optimizers, so that it is known which these are.

    Raises:
        ValueError: If an option is out of its range, naming it, its value and the remedy.
        RuntimeError: If there is nothing to compile with what `fused` or `capturable` asks for.
        TypeError: If a parameter is not frozen and not real, or `prior` is not a Gaussian.
    """

    _skipped: Tensor | None = None  # recorded steps whose gradients were not finite

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
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
        _launch.check(group)

    def eval(self) -> None:
        """Hold the mean from now on."""
        super().eval()
        self._report()

    def state_dict(self) -> dict[str, Any]:
        """State and options, in which the number of steps is an integer, wherever it is counted."""
        self._report()
        whole = super().state_dict()
        for group in whole["param_groups"]:
            group["step"] = int(group["step"])
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, by the means of this optimizer: `fused`, `capturable`.

        A CUDA graph that was recorded before must be recorded again.
        """
        own = {name: self.defaults[name] for name in ("fused", "capturable")}
        groups = [group | own for group in state_dict["param_groups"]]
        super().load_state_dict(state_dict | {"param_groups": groups})

    def _finite(self, learning: set[Tensor]) -> bool:
        if not self.defaults["capturable"]:
            return super()._finite(learning)
        self._taken = _launch.taken(self._works(learning))
        if self._skipped is None:
            self._skipped = torch.zeros_like(self._taken)
        self._skipped += 1 - self._taken
        return True

    def _report(self) -> None:
        """Say once that a recorded step was skipped, when it is asked for what it has done."""
        if self._skipped is not None and not self._warned and int(self._skipped):
            self._warned = True
            warnings.warn(_state.NOT_FINITE, RuntimeWarning, stacklevel=3)

    def _windows(self, group: dict[str, Any]) -> Windows:
        return _compiled.WINDOW if group["fused"] else super()._windows(group)

    def _divide(self, jobs: list[Job]) -> list[Work]:
        works, left = _launch.divide(jobs)
        return works + _compiled.divide(left)

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
            gathered=gathered(group),
            clip_radius=group["clip_radius"],
        )  # fmt: skip
        b.write("momentum", momentum)
        b.write("hess", hess)
