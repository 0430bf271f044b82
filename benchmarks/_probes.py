"""Probes of the contract, first part: saving and copying, exceptions, who takes part.

A probe is a small program that knows nothing of how an optimizer works. It finds what an engineer
relies on, and the optimizer "holds", or it says what happened in its place.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HOLDS = "holds"
DEFAULTS: dict[str, Any] = {"lr": 0.2, "ess": 100.0, "hess_init": 0.5, "betas": (0.9, 0.99)}
X = torch.linspace(-2, 2, 24).reshape(12, 2)
Y = (X[:, :1] * X[:, 1:]).sin()


@dataclass(frozen=True)
class Make:
    """Builds optimizers of one kind.

    Args:
        build: From parameters and options, in the words of `blr.IVON`; `samples` says how many are
            entered between two steps, for those who want to know.
        precision: All precisions of the posterior, as a vector.
    """

    build: Callable[..., Any]
    precision: Callable[[Any], Tensor]

    def __call__(self, params: Any, **options: Any) -> Any:
        return self.build(params, **DEFAULTS | options)


# ---- what probes share --------------------------------------------------------------------------


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def loss_of(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    dtype = next(model.parameters()).dtype
    return (model(X[rows].to(dtype)) - Y[rows].to(dtype)).square().mean()


@contextmanager
def sample(optimizer: Any, seed: int = 0, train: bool = True) -> Iterator[None]:
    """A sample that is the same whenever the seed, and what was learned before, are the same."""
    torch.manual_seed(seed)
    with optimizer.sampled_params(train=train):
        yield


def learn(model: nn.Module, optimizer: Any, steps: int = 1, first: int = 0) -> None:
    for t in range(first, first + steps):
        with sample(optimizer, t):
            optimizer.zero_grad()
            loss_of(model).backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference."""
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True))


def equal(a: list[Tensor], b: list[Tensor], what: str, tolerance: float = 0.0) -> str:
    difference = apart(a, b)
    return HOLDS if difference <= tolerance else f"{what} by {difference:.1e}"


# ---- probes: saving and copying -----------------------------------------------------------------


def resume(make: Make) -> str:
    model = network()
    optimizer = make(model.parameters())
    learn(model, optimizer, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    learn(model, optimizer, 1, first=3)
    file.seek(0)
    other = network()
    resumed = make(other.parameters())
    for part, state in zip((other, resumed), torch.load(file), strict=True):
        part.load_state_dict(state)
    learn(other, resumed, 1, first=3)
    return equal(weights(model), weights(other), "weights differ after one step")


def copies(clone: Callable[[Any], Any]) -> Callable[[Make], str]:
    def probe(make: Make) -> str:
        model = network()
        optimizer = make(model.parameters())
        learn(model, optimizer, 2)
        other, twin = clone((model, optimizer))
        learn(model, optimizer, 2, first=2)
        apart_now = apart(weights(model), weights(other))
        learn(other, twin, 2, first=2)
        if apart_now == 0:
            return "the copy moves with the original"
        return equal(weights(model), weights(other), "weights differ after two steps")

    return probe


def storage(make: Make) -> str:
    model = network()
    before = [p.data_ptr() for p in model.parameters()]
    learn(model, make(model.parameters()))
    after = [p.untyped_storage().data_ptr() for p in model.parameters()]
    moved = sum(p.data_ptr() != b for p, b in zip(model.parameters(), before, strict=True))
    return HOLDS if not moved else f"{moved} of 4 tensors moved, into {len({*after})} storage"


def saving_a_layer(make: Make) -> str:
    model = network()
    learn(model, make(model.parameters()))
    own, held = model[0].bias.nbytes, model[0].bias.untyped_storage().nbytes()
    return HOLDS if held == own else f"{held} bytes are saved of which {own} are the layer's"


def safetensors(make: Make) -> str:
    from safetensors.torch import load, save

    model = network()
    learn(model, make(model.parameters()))
    read = load(save(model.state_dict()))
    return equal([read[name] for name in model.state_dict()], weights(model), "weights differ")


def aliases(make: Make) -> str:
    model = network()
    alias = [p.detach() for p in model.parameters()]
    learn(model, make(model.parameters()))
    return equal(alias, weights(model), "an alias made before is stale")


def channels_last(make: Make) -> str:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    optimizer = make(model.parameters())
    with sample(optimizer):
        model(torch.ones(2, 3, 4, 4)).square().mean().backward()
    optimizer.step()
    kept = model.weight.is_contiguous(memory_format=torch.channels_last)
    return HOLDS if kept else "the memory format is lost"


def loaded_later(make: Make) -> str:
    model, other = network(), network()
    optimizer = make(model.parameters())
    nn.init.ones_(other[0].weight)
    model.load_state_dict(other.state_dict())
    with sample(optimizer, train=False):
        pass
    return equal(weights(model), weights(other), "loaded weights are overwritten")


# ---- probes: exceptions and parameters that do not take part ------------------------------------


def exception(make: Make) -> str:
    model = network()
    optimizer = make(model.parameters())
    before = weights(model)
    try:
        with optimizer.sampled_params(train=True):
            raise KeyError
    except KeyError:
        return equal(weights(model), before, "parameters stay perturbed")


def unused(make: Make) -> str:
    model = nn.ModuleDict({"used": network(), "unused": nn.Linear(3, 3)})
    optimizer = make(model.parameters())
    before = weights(model["unused"])
    learn(model["used"], optimizer, 2)
    return equal(weights(model["unused"]), before, "it moved")


def frozen(make: Make) -> str:
    model = network()
    model[0].requires_grad_(False)
    optimizer = make(model.parameters())
    before = weights(model[0])
    with sample(optimizer):
        perturbed = apart(weights(model[0]), before)
        loss_of(model).backward()
    if perturbed:
        return f"it is perturbed by {perturbed:.1e}"
    optimizer.step()
    return equal(weights(model[0]), before, "it moved")


def tied(make: Make) -> str:
    torch.manual_seed(0)
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.weight = a.weight
    model = nn.Sequential(a, nn.Tanh(), b)
    optimizer = make(model.parameters())
    before = a.weight.detach().clone()
    with sample(optimizer):
        model(X).square().mean().backward()
    optimizer.step()
    if a.weight is not b.weight or not torch.equal(a.weight, b.weight):
        return "they are no longer tied"
    return HOLDS if not torch.equal(a.weight, before) else "they do not learn"


def no_sample(make: Make) -> str:
    model = network()
    optimizer = make(model.parameters())
    before = weights(model)
    optimizer.step()
    return equal(weights(model), before, "parameters moved")


def gradients_without_sample(make: Make) -> str:
    model = network()
    optimizer = make(model.parameters())
    loss_of(model).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        if "sampled_params" in str(error):
            return HOLDS
        raise
    return "parameters move without a word"


def closure(make: Make) -> str:
    model = network()
    optimizer = make(model.parameters())
    before = weights(model)

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = loss_of(model)
        value.backward()
        return value

    if optimizer.step(evaluate) is None:
        return "the loss is not returned"
    return HOLDS if apart(weights(model), before) else "nothing is learned"


def added_group(make: Make) -> str:
    model = network()
    optimizer = make(model[0].parameters())
    learn(model, optimizer, 2)
    before = weights(model[2])
    optimizer.add_param_group({"params": list(model[2].parameters())})
    learn(model, optimizer, 2)
    return HOLDS if apart(weights(model[2]), before) else "it does not learn"


def group_options(make: Make) -> str:
    layer = nn.Linear(2, 1)
    groups = [{"params": [layer.weight]}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = make(groups, weight_decay=0.5)
    before = weights(layer)
    with sample(optimizer):
        (0.0 * layer(X)).sum().backward()
    optimizer.step()
    if apart(weights(layer)[:1], before[:1]) == 0:
        return "the weight does not decay"
    return equal(weights(layer)[1:], before[1:], "the group without decay moved")


def train_and_eval(make: Make) -> str:
    model = network()
    optimizer = make(model.parameters())
    before = weights(model)
    optimizer.train()
    if apart(weights(model), before) == 0:
        return "train() holds no sample"
    loss_of(model).backward()
    optimizer.step()
    optimizer.eval()
    return HOLDS if apart(weights(model), before) else "nothing is learned"


def nested(make: Make) -> str:
    model = network()
    optimizer = make(model.parameters())
    before = weights(model)
    with sample(optimizer, 0, train=False):
        outer = weights(model)
        with sample(optimizer, 1, train=False):
            pass
        inside = apart(weights(model), outer)
    return equal(weights(model), before, "mean lost") if not inside else "the sample is lost"
