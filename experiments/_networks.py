"""The networks of the experiments: residual networks for small images, and GPT-2.

References: He et al. (2016), Deep residual learning for image recognition; Singh & Krishnan (2020),
Filter response normalization layer; Radford et al. (2019), Language models are unsupervised
multitask learners.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, scaled_dot_product_attention

# ---- residual networks --------------------------------------------------------------------------


class FilterResponse(nn.Module):
    """x/√(mean of x² over the pixels + ε), scaled and shifted by channel; no batch, no statistics.

    Followed by ReLU here, where the paper that introduced it learns the threshold.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Images of shape (B, C, H, W)."""
        size = x.float().square().mean((2, 3), keepdim=True)
        x = x * torch.rsqrt(size + self.eps).to(x.dtype)
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "filter": FilterResponse}
DEPTHS = {  # blocks of each stage, and width of the first
    "resnet8": ((1, 1, 1), 8),
    "resnet20": ((3, 3, 3), 16),
    "resnet18": ((2, 2, 2, 2), 64),
}


class Block(nn.Module):
    """Two 3×3 convolutions, and a shortcut that is a 1×1 convolution where shapes change."""

    def __init__(self, inputs: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.first_norm = NORMS[norm](width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.second_norm = NORMS[norm](width)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != width:
            convolution = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, NORMS[norm](width))

    def forward(self, x: Tensor) -> Tensor:
        """Images of shape (B, C, H, W)."""
        f = relu(self.first_norm(self.first(x)))
        return relu(self.second_norm(self.second(f)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for images of 8 to 64 pixels.

    Args:
        name: One of `DEPTHS`.
        norm: One of `NORMS`.
        channels: Channels of the images.
        classes: Number K of classes.
    """

    def __init__(self, name: str, norm: str, channels: int, classes: int) -> None:
        super().__init__()
        blocks, width = DEPTHS[name]
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.stem_norm = NORMS[norm](width)
        stages: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            for i in range(count):
                stride = 2 if stage and not i else 1
                outputs = width * 2**stage
                stages.append(Block(inputs, outputs, stride, norm))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (B, K) of images of shape (B, C, H, W)."""
        f = self.blocks(relu(self.stem_norm(self.stem(x))))
        return self.head(f.mean((2, 3)))


# ---- GPT-2 --------------------------------------------------------------------------------------

SIZES = {  # layers, heads, width
    "tiny": (4, 4, 128),
    "gpt2-small": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
}


class Layer(nn.Module):
    """Attention and a network of two layers, each after a normalisation and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.before_network = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Activations of shape (B, T, D)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.queries_keys_values(self.before_attention(x)).chunk(3, -1)
        )
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(seen.transpose(1, 2).flatten(-2))
        f = gelu(self.expand(self.before_network(x)), approximate="tanh")
        return x + self.contract(f)


class GPT(nn.Module):
    """A causal transformer with learned positions and one matrix for tokens in and out.

    Args:
        size: One of `SIZES`.
        vocabulary: Number of tokens, rounded up to a multiple of 64.
        context: Most tokens T of a window.
    """

    def __init__(self, size: str, vocabulary: int, context: int) -> None:
        super().__init__()
        layers, heads, width = SIZES[size]
        self.tokens = nn.Embedding(-(-vocabulary // 64) * 64, width)
        self.positions = nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.last_norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if name.endswith("weight") and p.ndim > 1:
                # What is added to the residual stream 2·layers times is smaller from the start.
                residual = "attention_out" in name or "contract" in name
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (B, T, K) of tokens of shape (B, T)."""
        position = torch.arange(x.shape[1], device=x.device)
        f = self.layers(self.tokens(x) + self.positions(position))
        return nn.functional.linear(self.last_norm(f), self.tokens.weight)
