"""Gradients of single examples, gᵢ = ∇ℓᵢ(θ), and the sum of their squares.

A layer z = Wa + c that example i passes with activations aᵢ has, with bᵢ = ∂ℓᵢ/∂zᵢ,

    ∂ℓᵢ/∂W = Σ_t bᵢₜ aᵢₜᵀ                    t: positions of a sequence or an image
    Σᵢ (∂ℓᵢ/∂W)² = (B∘B)ᵀ(A∘A)              without positions: no gᵢ is ever formed

One forward and one backward pass give all aᵢ and bᵢ. Convolutions are such layers too: aᵢₜ is the
patch that the kernel sees at t. A network made of other layers goes the general way, vmap(grad).

References: Goodfellow (2015), Efficient per-example gradient computations; Rochette, Manoel &
Tramel (2019) for convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore
from torch.func import grad, jacrev, vmap

from blr.likelihoods import ModuleModel, TotalLoss

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS)
NUMBERS = 2**22
"""Numbers that are held at once beside the activations; examples are taken in chunks."""


def example_gradients(loss: TotalLoss, theta: Tensor) -> Tensor:
    """The gradients gᵢ = ∇ℓᵢ(θ) without weight and prior, shape (|B|, P)."""
    layers = _layers(loss, theta)
    if layers is None:
        return _by_vmap(loss, theta)
    return torch.cat([g.flatten(1) for layer in layers for g in layer.gradients(slice(None))], 1)


def sum_of_squares(loss: TotalLoss, theta: Tensor) -> Tensor:
    """Σᵢ gᵢ², without weight and prior, shape (P,).

    Where the model comes from `from_module` and every parameter belongs to a `Linear` or `Conv`
    layer that is used once, this is one forward and one backward pass. That way is checked against
    the gradient of one example at each call, and is not taken if examples do not go through
    the network one by one along the first axis.
    """
    layers = _layers(loss, theta)
    if layers is not None:
        return torch.cat([s.flatten() for layer in layers for s in layer.squares()])
    total = torch.zeros_like(theta)
    for B in torch.arange(len(loss.inputs)).split(max(1, NUMBERS // len(theta))):
        total += _by_vmap(loss, theta, B).square().sum(0)
    return total


def jacobian_and_curvature(loss: TotalLoss, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Jᵢ = ∂fᵢ/∂θ and ∂²ℓᵢ/∂f² of every example, shapes (|B|, K, P) and (|B|, K, K)."""
    outputs = loss.model(theta, loss.inputs)
    f, shape = outputs.reshape(len(outputs), -1), outputs.shape[1:]

    def f_i(t: Tensor, x_i: Tensor) -> Tensor:
        return loss.model(t, x_i.unsqueeze(0)).reshape(-1)

    def example(f_i: Tensor, y_i: Tensor) -> Tensor:
        return loss.compare(f_i.reshape(1, *shape), y_i.unsqueeze(0))[0]

    J = vmap(jacrev(f_i), in_dims=(None, 0))(theta, loss.inputs)
    return J, vmap(torch.func.hessian(example))(f, loss.targets)


def _by_vmap(loss: TotalLoss, theta: Tensor, B: slice | Tensor = slice(None)) -> Tensor:
    def example(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return loss.compare(loss.model(t, x.unsqueeze(0)), y.unsqueeze(0))[0]

    return vmap(grad(example), in_dims=(None, 0, 0))(theta, loss.inputs[B], loss.targets[B])


# ---- activations and gradients of outputs -------------------------------------------------------


@dataclass
class _Layer:
    """A layer, what it got, A of shape (N, …), and the gradients B of what it gave."""

    module: nn.Module
    A: Tensor
    B: Tensor

    def gradients(self, examples: slice) -> tuple[Tensor, ...]:
        """∂ℓᵢ/∂W, and ∂ℓᵢ/∂c if there is a bias, for some examples; shapes (n, *parameter)."""
        patches, slopes = self._positions(examples)
        W = self.module.get_parameter("weight")
        found = ((slopes @ patches.mT).reshape(-1, *W.shape), slopes.sum(-1).flatten(1))
        return found[: len(list(self.module.parameters()))]

    def squares(self) -> tuple[Tensor, ...]:
        """The sums of their squares."""
        A, B = self.A, self.B
        if A.ndim == 2:
            found = ((B**2).mT @ A**2, (B**2).sum(0))
            return found[: len(list(self.module.parameters()))]
        W = self.module.get_parameter("weight")
        each = W.numel() + B[0].numel() + A[0].numel() * self._overlap()
        chunks = [
            [g.square().sum(0) for g in self.gradients(chunk)]
            for chunk in _slices(len(A), max(1, NUMBERS // each))
        ]
        return tuple(torch.stack(parts).sum(0) for parts in zip(*chunks, strict=True))

    def _overlap(self) -> int:
        """How often an activation may appear among the patches."""
        return self.module.get_parameter("weight")[0, 0].numel()

    def _positions(self, examples: slice) -> tuple[Tensor, Tensor]:
        """Patches (n, groups, inputs, positions) and slopes (n, groups, outputs, positions)."""
        layer, A, B = self.module, self.A[examples], self.B[examples]
        if isinstance(layer, CONVOLUTIONS):
            d = len(layer.kernel_size)
            patches = _patches(layer, A).flatten(-d).flatten(2, 2 + d)
            return patches, B.reshape(len(B), layer.groups, -1, B[0, 0].numel())
        A, B = (x.reshape(len(x), 1, -1, x.shape[-1]).mT for x in (A, B))
        return A, B


def _patches(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, A: Tensor) -> Tensor:
    """What the kernel sees: a view of shape (n, groups, channels, *kernel, *positions)."""
    k, s, r = conv.kernel_size, conv.stride, conv.dilation
    if conv.padding == "same":
        both = [x * (n - 1) for n, x in zip(k, r, strict=True)]
        pads = [(p // 2, p - p // 2) for p in both]
    else:
        given = [0] * len(k) if conv.padding == "valid" else conv.padding
        pads = [(int(p), int(p)) for p in given]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    flat = [p for pair in reversed(pads) for p in pair]
    A = nn.functional.pad(A, flat, mode=mode).contiguous()
    out = [
        (size - x * (n - 1) - 1) // step + 1
        for size, n, step, x in zip(A.shape[2:], k, s, r, strict=True)
    ]
    strides = A.stride()
    channels = A.shape[1] // conv.groups
    jumps = [stride * x for stride, x in zip(strides[2:], r, strict=True)]
    steps = [stride * step for stride, step in zip(strides[2:], s, strict=True)]
    return A.as_strided(
        (len(A), conv.groups, channels, *k, *out),
        (strides[0], strides[1] * channels, strides[1], *jumps, *steps),
    )


def _layers(loss: TotalLoss, theta: Tensor) -> list[_Layer] | None:
    """The layers in the order of their parameters, or None where this form does not apply."""
    # What follows is not differentiable, by autograd or by the transforms of torch.func.
    traced = theta.requires_grad or is_functorch_wrapped_tensor(theta)
    if traced or not isinstance(loss.model, ModuleModel):
        return None
    modules = _suitable(loss.model.module)
    layers = _record(loss, theta, modules) if modules else []
    one_by_one = all(len(x.A) == len(x.B) == len(loss.inputs) for x in layers)
    if not layers or not one_by_one or [x.module for x in layers] != modules:
        return None
    last = slice(len(loss.inputs) - 1, None)
    found = torch.cat([g.flatten() for layer in layers for g in layer.gradients(last)])
    expected = _by_vmap(loss, theta, last)[0]
    slack = torch.finfo(theta.dtype).eps ** 0.5 * expected.abs().max()
    return layers if bool(((found - expected).abs() <= slack).all()) else None


def _suitable(network: nn.Module) -> list[nn.Module]:
    """The layers with parameters, in order, if all are linear or convolutions; else none."""
    owners = {m: dict(m.named_parameters(recurse=False)) for m in network.modules()}
    mixing = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in owners)
    layers = [m for m, own in owners.items() if own]
    plain = all(type(m) in LAYERS and {*owners[m]} <= {"weight", "bias"} for m in layers)
    shared = sum(map(len, owners.values())) != len(list(network.parameters()))
    return layers if plain and not shared and not mixing else []


def _record(loss: TotalLoss, theta: Tensor, modules: list[nn.Module]) -> list[_Layer]:
    """What every layer got, and ∂Σᵢℓᵢ/∂(what it gave), in the order of the layers."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls.append((module, args[0].detach(), output))
        return output.clone()  # what follows may work in place

    handles = [m.register_forward_hook(remember) for m in modules]
    try:
        with torch.enable_grad():
            losses = loss.examples(theta.detach().requires_grad_())
            slopes = torch.autograd.grad(losses.sum(), [z for *_, z in calls], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    if any(b is None for b in slopes):
        return []
    layers = [_Layer(m, a, b) for (m, a, _), b in zip(calls, slopes, strict=True)]
    return sorted(layers, key=lambda layer: modules.index(layer.module))


def _slices(N: int, size: int) -> Iterator[slice]:
    return (slice(i, i + size) for i in range(0, N, size))
