"""A language model of the GPT-2 kind, trained with IVON or AdamW on any text.

    python experiments/language.py --preset tiny --text FILES
    torchrun --nproc_per_node=8 experiments/language.py --preset gpt2-small --bins DIRECTORY

The presets `gpt2-…` have the settings of Shen et al. (2024), Variational learning is effective for
large deep networks: every micro-batch has a fresh sample of the posterior, and its gradient is
clipped to norm 1 by itself. AdamW has those of nanoGPT. The loss is a mean over tokens, so `ess`
counts tokens. Evaluated are the mean of the posterior, and the probability of the next token
averaged over samples.

With several processes every micro-batch is split between them, and all hold the same sample: the
result is that of one process, up to rounding.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import (
    Processes,
    processes,
    provenance,
    save_checkpoint,
    set_lr,
    warmup_cosine,
    write_json,
)
from _networks import GPT, SIZES
from _text import Corpus, austen, opened, prepared, random_starts, tokenized, windows
from _training import (
    Clock,
    about_model,
    common_options,
    fingerprint,
    finite,
    learn,
    looks,
    optimizer,
    parse,
    peak_memory,
    resumed,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

CHAPTERS = Path(__file__).resolve().parents[1] / "book"


def _paper(model: str, lr: float, micro_batches: int) -> dict[str, dict[str, Any]]:
    """100,000 steps of 491,520 tokens, in as many micro-batches as the paper has samples."""
    return {
        "all": dict(
            model=model, context=1024, batch=480, micro_batches=micro_batches, steps=100_000,
            warmup=2000, clip=1.0, samples=8, eval_every=2000, eval_windows=480, save_every=1000,
            precision="bfloat16", tokens="bytes", vocabulary=0,
        ),
        "ivon": dict(
            lr=lr, ess=1e10, hess_init=1e-3, betas=(0.9, 0.99999), weight_decay=1e-6,
            clip_radius=1e-3, final_lr=0.0,
        ),
        "adamw": dict(lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, final_lr=0.1),
        "sgd": dict(lr=0.1, weight_decay=0.0, final_lr=0.0),
    }  # fmt: skip


_PAPER = {size: _paper(f"gpt2-{size}", lr, count) for size, lr, count in (
    ("small", 300.0, 24), ("medium", 200.0, 40), ("large", 150.0, 120),
)}  # fmt: skip


def _ours(preset: dict[str, dict[str, Any]], ivon: dict[str, Any], **options: Any) -> dict:
    """A preset for a small text: other sizes, and `ess` that counts its tokens."""
    short = dict(ess=0, betas=(0.9, 0.9999)) | ivon
    return preset | {"all": preset["all"] | options, "ivon": preset["ivon"] | short}


PRESETS = {
    "tiny": _ours(
        _PAPER["small"] | {"adamw": _PAPER["small"]["adamw"] | {"lr": 3e-3}},
        dict(lr=5.0, hess_init=0.1),
        model="tiny", context=128, batch=16, micro_batches=1, steps=2000, warmup=100,
        eval_every=200, eval_windows=64, save_every=200, precision="float32",
    ),
    "austen-gpt2-small": _ours(
        _PAPER["small"], dict(lr=3.0, hess_init=0.1),
        context=512, batch=64, micro_batches=4, steps=2000, warmup=200, eval_every=200,
        eval_windows=256, save_every=200,
    ),
    **{f"gpt2-{size}": preset for size, preset in _PAPER.items()},
}  # fmt: skip
SMOKE = dict(
    model="tiny", context=32, batch=8, micro_batches=2, steps=20, warmup=2, eval_every=10,
    eval_windows=8, save_every=5, samples=2, precision="float32", ess=0,
)  # fmt: skip


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for, completed by the preset."""
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    add = parser.add_argument
    add("--text", nargs="+", type=Path, help="text files and folders; if missing, Austen")
    add("--tokens", choices=["bytes", "characters", "words"])
    add("--vocabulary", type=int, help="most characters or words with a number of their own")
    add("--bins", type=Path, help="folder with train.bin and val.bin as nanoGPT prepares them")
    add("--cache", type=Path, help="where tokens are written; beside --out if missing")
    add("--model", choices=list(SIZES))
    add("--context", type=int, help="tokens of a window")
    add("--steps", type=int)
    add("--batch", type=int, help="windows of a step, over all micro-batches and processes")
    add("--micro-batches", type=int, help="parts of a step; IVON: each with a sample of its own")
    add("--warmup", type=int, help="steps of the warm-up")
    add("--final-lr", type=float, help="learning rate at the end, as a share of --lr")
    add("--clip", type=float, help="largest norm of a gradient; 0 does not clip")
    add("--eval-every", type=int, help="steps between evaluations")
    add("--eval-windows", type=int, help="windows of the validation text, evenly spaced")
    add("--save-every", type=int, help="steps between checkpoints")
    common_options(parser, PRESETS)
    o = parse(parser, PRESETS, SMOKE, argv)
    o.vocabulary = o.vocabulary or 8192
    o.cache = o.cache or o.out.with_suffix(".tokens")
    return o


@dataclass(frozen=True, eq=False)
class Run:
    """What a run consists of."""

    o: argparse.Namespace
    here: Processes
    corpus: Corpus
    model: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, o: argparse.Namespace, here: Processes) -> Run:
        """Tokens, model and optimizer; the initial weights depend on the seed only."""
        corpus = tokens(o, here)
        o.ess = o.ess or float(len(corpus.train))
        torch.manual_seed(o.seed)
        model = GPT(o.model, corpus.vocabulary, o.context).to(here.device)
        if o.compile:
            model.compile()
        forward = here.parallel(model)
        return cls(o, here, corpus, model, forward, optimizer(model, o, decay_vectors=False))

    def log_p(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """log p of every target, shape (B, T)."""
        device = self.here.device
        low = self.o.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            f = model(x.to(device))
        return -cross_entropy(f.float().mT, y.to(device), reduction="none")


def tokens(o: argparse.Namespace, here: Processes) -> Corpus:
    """The tokens of the run, written by the first process and read by all."""
    if o.bins is not None:
        return prepared(o.bins)
    ours = sorted(CHAPTERS.glob("[0-9]*.md")) if o.smoke else []
    paths = o.text or ours or [austen()]
    corpus = tokenized(paths, o.tokens, o.vocabulary, o.cache) if here.first else None
    known = here.tell(corpus and (corpus.vocabulary, corpus.bytes_per_token))
    return corpus or opened(o.cache, *known)


# ---- training -----------------------------------------------------------------------------------


def step(run: Run, number: int) -> Tensor:
    """One step on windows that depend on the seed and the number of the step."""
    o, here = run.o, run.here
    warm = warmup_cosine(number, o.steps, o.warmup, o.final_lr)
    set_lr(run.optimizer, o.lr * warm)
    train = run.corpus.train
    starts = random_starts(train, o.batch, o.context, o.seed, number)
    losses = []
    for k in range(o.micro_batches):
        own = starts[k :: o.micro_batches][here.rank :: here.size]

        def loss(own: list[int] = own) -> Tensor:
            return -run.log_p(run.forward, *windows(train, own, o.context)).mean()

        losses.append(loss)
    return learn(run.optimizer, run.forward, losses, o.clip)


def train(o: argparse.Namespace, here: Processes) -> dict[str, Any]:
    """The whole run, from its checkpoint if it resumes; returns what is written as JSON."""
    if o.batch % o.micro_batches:
        raise ValueError(
            f"--batch must be a multiple of --micro-batches, got {o.batch} and {o.micro_batches}"
        )
    here.share("--batch / --micro-batches", o.batch // o.micro_batches)
    run = Run.of(o, here)
    about = provenance(o)
    saved = resumed(o, about["options"])
    start, history, total = 0, [], torch.zeros((), dtype=torch.float64, device=here.device)
    if saved is not None:
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        start, history = saved["step"], saved["history"]
        total += saved["total"].to(here.device)
    hidden = o.quiet or not here.first
    bar = tqdm(range(start, o.steps), "steps", o.steps, initial=start, disable=hidden)
    clock = Clock(here.device)
    for number in bar:
        total += step(run, number)
        clock.tick()
        last = number + 1 == o.steps
        if (number + 1) % o.eval_every == 0 or last:
            history.append(row(run, number + 1, total, clock, history))
            bar.set_postfix(train=f"{history[-1]['train_loss']:.3f}")
            total.zero_()
            if here.first:
                write_json(o.out, about | report(run, history))
            clock.start()
        if here.first and ((number + 1) % o.save_every == 0 or last):
            save(run, number + 1, history, total, about["options"])
    return about | report(run, history)


def save(
    run: Run, number: int, history: list[dict[str, Any]], total: Tensor, options: dict[str, Any]
) -> None:
    """Write the checkpoint."""
    state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    state |= {"step": number, "history": history, "total": total, "options": options}
    save_checkpoint(run.o.checkpoint, state)


def row(
    run: Run, number: int, total: Tensor, clock: Clock, history: list[dict[str, Any]]
) -> dict[str, Any]:
    """What is known after a step: losses in nats per token."""
    o, here = run.o, run.here
    times = clock.per_step()
    since = number - (history[-1]["step"] if history else 0)
    loss = here.total(total.clone()).item() / (here.size * since)
    finite(loss, f"the steps until {number}")
    found = {"step": number, "tokens": number * o.batch * o.context, "train_loss": loss}
    return found | times | evaluate(run)


def report(run: Run, history: list[dict[str, Any]]) -> dict[str, Any]:
    """What is known so far; `complete` says whether the run is at its end."""
    o, corpus = run.o, run.corpus
    complete = bool(history) and history[-1]["step"] == o.steps
    return {
        "experiment": "language",
        "complete": complete,
        "model": about_model(run.model),
        "data": {
            "tokens": "prepared" if o.bins else o.tokens,
            "train": len(corpus.train),
            "validation": len(corpus.validation),
            "vocabulary": corpus.vocabulary,
            "bytes_per_token": corpus.bytes_per_token,
        },
        "history": history,
        "final": {n: history[-1][n] for n in ("mean", "averaged") if n in history[-1]},
        "peak_memory_bytes": peak_memory(run.here.device),
        "sha256": fingerprint(run.model) if complete else None,
    }


# ---- evaluation ---------------------------------------------------------------------------------


def evaluate(run: Run) -> dict[str, dict[str, float]]:
    """Validation loss at the mean and, with a posterior, of probabilities averaged over samples."""
    found = {}
    for name, where in looks(run.optimizer, run.o.samples).items():
        nats = validation_loss(run, where)
        found[name] = {"nll": nats}
        if run.corpus.bytes_per_token:
            found[name]["bits_per_byte"] = nats / math.log(2) / run.corpus.bytes_per_token
    return found


@torch.no_grad()
def validation_loss(run: Run, where: list[Callable[[], AbstractContextManager[Any]]]) -> float:
    """−log of the probability of the next token, averaged over places, then over tokens."""
    o, here, text = run.o, run.here, run.corpus.validation
    room = len(text) - o.context - 1
    count = min(o.eval_windows, max(1, room // o.context))
    starts = torch.linspace(0, max(0, room), count).long().tolist()[here.rank :: here.size]
    size = max(1, o.batch // o.micro_batches // here.size)
    total: list[Tensor] = []
    for s, context in enumerate(where):
        with context():
            for k, first in enumerate(range(0, len(starts), size)):
                pair = windows(text, starts[first : first + size], o.context)
                log_p = run.log_p(run.model, *pair).double()
                if s:
                    torch.logaddexp(total[k], log_p, out=total[k])
                else:
                    total.append(log_p)
    sums = torch.zeros(2, dtype=torch.float64, device=here.device)
    for part in total:
        sums += torch.stack([part.sum(), sums.new_tensor(part.numel())])
    log_p, tokens = here.total(sums).tolist()
    return math.log(len(where)) - log_p / tokens


def main(argv: Sequence[str] | None = None) -> None:
    """Run, and write the results."""
    o = options(argv)
    with processes(o.device) as here:
        result = train(o, here)
        if here.first:
            write_json(o.out, result)


if __name__ == "__main__":
    main()
