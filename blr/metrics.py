"""How good are probabilities? Proper scores, calibration, and telling the known from the unknown.

    NLL = −(1/N) Σᵢ log pᵢ(yᵢ)               Brier = (1/N) Σᵢ Σₖ (pᵢₖ − 1[yᵢ = k])²
    ECE = Σ_b (n_b/N) ∣acc_b − conf_b∣       MCE = max_b ∣acc_b − conf_b∣
    AUROC = P(s_in > s_out) + ½ P(s_in = s_out)

NLL and Brier are proper: the truth has the least. The calibration errors compare confidence, the
largest probability, with accuracy in bins b of n_b examples; few examples make them too large, and
a model that says the base rates has none. So none of them is ever enough alone.

Probabilities have shape (N, K), or (N,) for the probability of class 1 of two; `logits=True` takes
logits in their place. Scores are Python floats, without gradient.

References: Brier (1950), Verification of forecasts expressed in terms of probability; Guo et al.
(2017), On calibration of modern neural networks; Nixon et al. (2019), Measuring calibration in deep
learning; Hendrycks & Gimpel (2017), A baseline for detecting misclassified and out-of-distribution
examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blr import _validate


def accuracy(probabilities: Any, targets: Any, *, top_k: int = 1, logits: bool = False) -> float:
    """The share of examples whose class is among the k most probable.

    Args:
        probabilities: p, shape (N, K) or (N,).
        targets: Classes y, integers, shape (N,).
        top_k: Number k of classes; of equal probabilities the lower class comes first.
        logits: Whether logits are passed.

    Raises:
        ValueError: If what is passed are no probabilities, or top_k is not between 1 and K.
    """
    f, y = _checked(probabilities, targets, logits)
    classes = torch.arange(f.shape[-1], device=f.device)
    if not 1 <= top_k <= len(classes):
        raise ValueError(
            f"top_k must be between 1 and {len(classes)}, got {top_k}; there are no more classes"
        )
    chosen = _at(f, y).unsqueeze(-1)
    ahead = (f > chosen) | ((f == chosen) & (classes < y.unsqueeze(-1)))
    return _mean(ahead.sum(-1) < top_k)


def nll(probabilities: Any, targets: Any, *, logits: bool = False) -> float:
    """The negative log-likelihood −(1/N) Σᵢ log pᵢ(yᵢ) in nats.

    Infinite if the class of an example has probability zero. For a posterior, pass averaged
    probabilities: their NLL is at most the average of the samples' NLLs, which is another score.

    Args:
        probabilities: p, shape (N, K) or (N,).
        targets: Classes y, integers, shape (N,).
        logits: Whether logits are passed; nothing is lost in their tails.
    """
    f, y = _checked(probabilities, targets, logits)
    return _mean(-_at(f.log_softmax(-1) if logits else f.log(), y))


def brier(probabilities: Any, targets: Any, *, half: bool = False, logits: bool = False) -> float:
    """The Brier score (1/N) Σᵢ Σₖ (pᵢₖ − 1[yᵢ = k])², between 0 and 2.

    The sum over classes is Brier's own convention, that of the IVON paper's tables, and
    scikit-learn's for three classes or more. Others take half of it, which for two classes is
    (p − y)² and scikit-learn's choice there, or its K-th part, the mean over classes.

    Args:
        probabilities: p, shape (N, K) or (N,).
        targets: Classes y, integers, shape (N,).
        half: Take half, between 0 and 1.
        logits: Whether logits are passed.
    """
    f, y = _checked(probabilities, targets, logits)
    error = f.softmax(-1) if logits else f.clone()
    # Not 1 − 2p(y) + Σp²: that loses the digits of predictions that are nearly certain.
    error[torch.arange(len(y), device=y.device), y] -= 1
    return _mean(error.square().sum(-1)) * (0.5 if half else 1.0)


# ---- calibration --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reliability:
    """What a reliability diagram shows: confidence and accuracy in M bins of confidence.

    Args:
        edges: Borders of the bins, shape (M + 1,). A bin holds its left border, the last both.
        count: n_b, examples in each bin, shape (M,).
        confidence: conf_b, mean confidence in each bin, shape (M,); NaN in an empty one.
        accuracy: acc_b, share of right predictions in each bin, shape (M,); NaN in an empty one.
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def gap(self) -> Tensor:
        """∣acc_b − conf_b∣, shape (M,); NaN in an empty bin."""
        return (self.accuracy - self.confidence).abs()

    @property
    def ece(self) -> float:
        """Σ_b (n_b/N) ∣acc_b − conf_b∣, the expected calibration error."""
        return ((self.count * self.gap).nansum() / self.count.sum()).item()

    @property
    def mce(self) -> float:
        """max_b ∣acc_b − conf_b∣, the maximum calibration error."""
        return self.gap.nan_to_num(nan=0.0).max().item()


def reliability(
    probabilities: Any,
    targets: Any,
    *,
    num_bins: int = 15,
    adaptive: bool = False,
    logits: bool = False,
) -> Reliability:
    """Confidence and accuracy in bins of confidence, the probability of the predicted class.

    Args:
        probabilities: p, shape (N, K) or (N,).
        targets: Classes y, integers, shape (N,).
        num_bins: Number M of bins. More hide less and are noisier; say it with every ECE.
        adaptive: Bins with borders at the quantiles of the confidences, so that each has N/M
            examples, and equal confidences are in one bin; else M bins of width 1/M on [0, 1].
        logits: Whether logits are passed.
    """
    f, y = _checked(probabilities, targets, logits)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}; 15 is usual")
    # N numbers are left: exact sums in one place, whatever the device of p.
    conf = (f.softmax(-1) if logits else f).amax(-1).cpu().double()
    right = (f.argmax(-1) == y).cpu().double()
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
    if adaptive:
        edges = torch.from_numpy(np.quantile(conf.numpy(), edges.numpy()))
    b = torch.bucketize(conf, edges[1:-1], right=True)
    count = torch.bincount(b, minlength=num_bins)
    conf_b, acc_b = (torch.bincount(b, v, minlength=num_bins) / count for v in (conf, right))
    return Reliability(edges, count, conf_b, acc_b)


def ece(
    probabilities: Any,
    targets: Any,
    *,
    num_bins: int = 15,
    adaptive: bool = False,
    logits: bool = False,
) -> float:
    """The expected calibration error Σ_b (n_b/N) ∣acc_b − conf_b∣ in the bins of `reliability`.

    Equal to torchmetrics' but for confidences of exactly 1, which it gives a bin of their own. The
    IVON paper's code has 20 bins.
    """
    options = {"num_bins": num_bins, "adaptive": adaptive, "logits": logits}
    return reliability(probabilities, targets, **options).ece


def mce(
    probabilities: Any,
    targets: Any,
    *,
    num_bins: int = 15,
    adaptive: bool = False,
    logits: bool = False,
) -> float:
    """The maximum calibration error max_b ∣acc_b − conf_b∣ in the bins of `reliability`.

    A bin of one example counts as much as any: with few examples, prefer adaptive bins.
    """
    options = {"num_bins": num_bins, "adaptive": adaptive, "logits": logits}
    return reliability(probabilities, targets, **options).mce


# ---- out of distribution ------------------------------------------------------------------------


def confidence(probabilities: Any, *, logits: bool = False) -> Tensor:
    """maxₖ pₖ of each example, shape (N,): high where the model knows, or thinks it does."""
    f = _predictions(probabilities, logits)
    return (f.softmax(-1) if logits else f).amax(-1)


def entropy(probabilities: Any, *, logits: bool = False) -> Tensor:
    """−Σₖ pₖ log pₖ of each example in nats, shape (N,): low where the model knows."""
    f = _predictions(probabilities, logits)
    return torch.special.entr(f.softmax(-1) if logits else f).sum(-1)


def auroc(inside: Any, outside: Any) -> float:
    """The area under the ROC curve, P(s_in > s_out) + ½ P(s_in = s_out).

    Half if the scores cannot tell examples like the training data from others; one if they always
    can. Exchanging the two gives one minus the area.

    Args:
        inside: Scores of examples in the distribution, shape (N,): high for familiar ones, such as
            `confidence(p)` or `-entropy(p)`.
        outside: Scores of examples out of it, shape (M,).

    Raises:
        ValueError: If one is empty or NaN.
    """
    s_in, s_out = _scores("inside", inside), _scores("outside", outside).sort().values
    below = (
        torch.searchsorted(s_out, s_in).sum() + torch.searchsorted(s_out, s_in, right=True).sum()
    )
    return below.item() / (2 * len(s_in) * len(s_out))


def false_positive_rate(inside: Any, outside: Any, *, recall: float = 0.95) -> float:
    """The share of outside examples that pass for inside where the share `recall` of inside does.

    Args:
        inside: Scores of examples in the distribution, shape (N,), high for familiar ones.
        outside: Scores of examples out of it, shape (M,).
        recall: Share of inside examples that must pass, at least.
    """
    s_in, s_out = _scores("inside", inside), _scores("outside", outside)
    if not 0 < recall <= 1:
        raise ValueError(f"recall must be above 0 and at most 1, got {recall}; 0.95 is usual")
    # A product such as 0.07·100 may exceed the whole number that is meant by rounding.
    needed = math.ceil(recall * len(s_in) * (1 - 1e-12))
    return _mean(s_out >= s_in.sort(descending=True).values[needed - 1])


# ---- at the door --------------------------------------------------------------------------------


def _checked(probabilities: Any, targets: Any, logits: bool) -> tuple[Tensor, Tensor]:
    """Predictions of shape (N, K) and classes of shape (N,), checked, on one device."""
    f = _predictions(probabilities, logits)
    try:
        y = targets if isinstance(targets, Tensor) else torch.as_tensor(np.asarray(targets))
    except TypeError as error:
        raise TypeError("targets must be integers; number the classes from 0") from error
    if y.ndim != 1:
        raise ValueError(
            f"targets must have shape (N,), got {tuple(y.shape)}; "
            "pass classes: argmax(-1) of one-hot rows"
        )
    if y.numel() and (y.is_floating_point() or y.is_complex()):
        raise TypeError(f"targets must be integers, got {y.dtype}; pass classes, such as y.long()")
    if len(y) != len(f):
        raise ValueError(
            f"there must be as many targets as probabilities, got {len(y)} and {len(f)}; "
            "pass one class for each example"
        )
    y = y.to(f.device, torch.long)
    what = f"between 0 and {f.shape[-1] - 1}"
    remedy = "number the classes from 0 and leave out examples without one"
    _validate.require((y >= 0) & (y < f.shape[-1]), "targets", what, y, remedy)
    return f, y


def _predictions(probabilities: Any, logits: bool) -> Tensor:
    """Probabilities or logits, shape (N, K), checked, at least float32, without gradient."""
    name = "logits" if logits else "probabilities"
    f = _validate.as_float(name, probabilities).detach()
    if f.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape (N, K) or (N,), got {tuple(f.shape)}; reshape")
    if not len(f):
        raise ValueError(f"{name} must be of at least one example, got {tuple(f.shape)}")
    if f.ndim == 2 and f.shape[-1] < 2:
        raise ValueError(
            f"{name} must not have one column only, got {tuple(f.shape)}; "
            "of two classes pass that of class 1: squeeze(-1)"
        )
    wide = f.to(torch.promote_types(f.dtype, torch.float32))
    return _logits(wide) if logits else _probabilities(wide, torch.finfo(f.dtype).eps)


def _logits(f: Tensor) -> Tensor:
    """Logits, shape (N, K); those of two classes are 0 and f."""
    f = torch.stack([torch.zeros_like(f), f], -1) if f.ndim == 1 else f
    # A class may be ruled out by −∞, but not all of them.
    known = (f < math.inf) & (f.amax(-1, keepdim=True) > -math.inf)
    remedy = "look for NaN or inf in what the model returned"
    _validate.require(known, "logits", "no NaN, not +∞, and not all −∞", f, remedy)
    return f


def _probabilities(p: Tensor, eps: float) -> Tensor:
    """Probabilities, shape (N, K); those of two classes are 1 − p and p."""
    _validate.finite("probabilities", p)
    remedy = "if these are logits, pass logits=True"
    _validate.require(p >= 0, "probabilities", "not negative", p, remedy)
    rounding = max(1e-4, 8 * eps)
    if p.ndim == 1:
        _validate.require(p <= 1 + rounding, "probabilities", "at most one", p, remedy)
        p = p.clamp(max=1)
        return torch.stack([1 - p, p], -1)
    total = p.sum(-1)
    ok = (total - 1).abs() <= rounding
    _validate.require(ok, "the sum of each row of probabilities", "one", total, remedy)
    return p


def _at(f: Tensor, y: Tensor) -> Tensor:
    """f(y) of each example, shape (N,)."""
    return f.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def _mean(x: Tensor) -> float:
    """The mean over examples, added in float64."""
    return x.cpu().double().mean().item()


def _scores(name: str, value: Any) -> Tensor:
    """Scores as a vector of float64 without NaN; infinite ones have a rank, so they may stay."""
    s = _validate.as_float(name, value).detach().cpu().double()
    if s.ndim != 1:
        raise ValueError(
            f"{name} must have shape (N,), got {tuple(s.shape)}; "
            "pass one score for each example, such as confidence(p)"
        )
    if not len(s):
        raise ValueError(f"{name} must be at least one number, got none")
    _validate.require(~s.isnan(), name, "numbers", s, "look for NaN in what was passed")
    return s
