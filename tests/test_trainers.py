"""Claims about trainers: trained as by a plain loop, evaluated and saved at the mean, resumable.

The language model learns the bytes of a text, the network the digits, that come with scikit-learn.
"""

import copy
import os
import pickle
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from sklearn.datasets import load_digits, load_iris
from torch import nn

import blr

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

SETTINGS = {"lr": 0.1, "ess": 500.0, "hess_init": 0.2, "betas": (0.9, 0.99), "seed": 4}


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def close(model: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


# ---- imports ------------------------------------------------------------------------------------


def test_importing_blr_imports_no_trainer_and_a_missing_one_is_an_error_that_names_the_extra():
    code = """
import importlib, sys
import blr, blr.trainers

assert not {"transformers", "accelerate", "lightning"} & sys.modules.keys()
sys.modules.update({"transformers": None, "lightning.pytorch": None})
for name in ("huggingface", "lightning"):
    try:
        importlib.import_module(f"blr.trainers.{name}")
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, line in zip(("huggingface", "lightning"), done.stdout.splitlines(), strict=True):
        assert line.startswith(f"blr.trainers.{name} needs ")
        assert line.endswith(f"; pip install 'bayesian-learning-rule[{name}]'")


# ---- Hugging Face -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf():
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


LENGTH, BATCH = 16, 5


def text(first: int, last: int) -> list[dict[str, torch.Tensor]]:
    """Lines of a text as bytes, each of the same length; the first byte is not predicted."""
    data = torch.tensor(list(load_iris().DESCR.encode("ascii", "ignore")))
    lines = data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)[first:last]
    labels = lines.index_fill(1, torch.tensor(0), -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(lines, labels, strict=True)]


def stacked(lines: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([line[name] for line in lines]) for name in lines[0]}


def language_model(dropout: float = 0.0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=128, n_positions=LENGTH, n_embd=12, n_layer=1, n_head=2, bos_token_id=0,
            eos_token_id=0, **rates,
        )
    )  # fmt: skip


def trainer_of(folder, model=None, data=None, callbacks=None, **options):
    """A trainer with a callback, an optimizer and a schedule."""
    from transformers import Trainer, TrainingArguments

    from blr.trainers.huggingface import PosteriorCallback

    model = language_model() if model is None else model
    optimizer = blr.IVON(model.parameters(), **SETTINGS)
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    settings = {"max_steps": 6, "save_strategy": "no", "per_device_train_batch_size": BATCH}
    arguments = TrainingArguments(str(folder), **(quiet | settings | options))
    return Trainer(
        model,
        arguments,
        train_dataset=text(0, 40) if data is None else data,
        eval_dataset=text(40, 50),
        callbacks=[PosteriorCallback()] if callbacks is None else callbacks,
        optimizers=(optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)),
    )


def optimizer_of(trainer) -> blr.IVON:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def saved(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def is_the_mean(found: dict[str, torch.Tensor], trainer) -> bool:
    """Whether saved weights are, bit by bit, the mean of the trainer's optimizer."""
    with optimizer_of(trainer).mean_params():
        own = trainer.model.state_dict()
        return bool(found) and all(torch.equal(x, own[name]) for name, x in found.items())


@pytest.mark.parametrize(
    ("accumulation", "bf16", "norm"), [(1, False, 0.5), (3, False, 1e9), (2, True, 0.5)]
)
def test_hugging_face_trains_as_a_plain_loop_does(hf, tmp_path, accumulation, bf16, norm):
    trainer = trainer_of(
        tmp_path, gradient_accumulation_steps=accumulation, bf16=bf16, max_grad_norm=norm
    )
    trainer._get_train_sampler = lambda data: torch.utils.data.SequentialSampler(data)
    trainer.train()
    model = language_model()
    optimizer = blr.IVON(model.parameters(), **SETTINGS)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    lines = text(0, 40)
    ends = [min(i + BATCH * accumulation, 40) for i in range(0, 40, BATCH * accumulation)]
    epoch = [stacked(lines[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    for batch in (epoch * 6)[:6]:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**batch).loss
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
        schedule.step()
    # In bfloat16 the order in which micro-batches are added shows.
    close(trainer.model, model, 2e-3 if bf16 else 1e-6)
    assert not same(weights(model), weights(language_model()))
    assert [g["step"] for g in optimizer_of(trainer).param_groups] == [6]


def test_hugging_face_evaluates_at_the_mean_and_goes_on_with_samples(hf, tmp_path):
    trainer = trainer_of(tmp_path, eval_strategy="steps", eval_steps=2)
    seen: list[tuple[bool, bool]] = []
    losses: list[float] = []
    compute, start = trainer.compute_loss, weights(trainer.model)

    def watched(model, *arguments, **keywords):
        at_start = same(weights(model), start)
        seen.append((model.training, at_start))
        return compute(model, *arguments, **keywords)

    trainer.compute_loss = watched
    trainer.log = lambda logs, *_: losses.append(logs["eval_loss"]) if "eval_loss" in logs else None
    assert trainer.evaluate()["eval_loss"] > 0
    assert seen and all(at_start for _, at_start in seen)
    seen.clear()
    trainer.train()
    assert [training for training, _ in seen].count(True) == 6
    assert not any(at_start for _, at_start in seen)
    with torch.no_grad():
        expected = trainer.model.eval()(**stacked(text(40, 50))).loss.item()
    assert losses[-1] == pytest.approx(expected, rel=1e-5)
    assert not optimizer_of(trainer).training


@pytest.mark.parametrize("ours", [True, False])
def test_hugging_face_saves_the_mean_without_an_evaluation_thanks_to_the_callback(
    hf, tmp_path, ours
):
    trainer = trainer_of(
        tmp_path, save_strategy="steps", save_steps=6, callbacks=None if ours else []
    )
    trainer.train()
    assert is_the_mean(saved(tmp_path / "checkpoint-6"), trainer) == ours
    trainer.save_model(str(tmp_path / "final"))
    assert is_the_mean(saved(tmp_path / "final"), trainer) == ours
    if ours:
        optimizer = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)
        assert {*optimizer["state"][0]} == {"hess", "momentum"}
        assert not trainer.model._state_dict_pre_hooks
        # What is read back is a model for everyone.
        other = type(trainer.model).from_pretrained(tmp_path / "final")
        assert same(weights(other), weights(trainer.model))


def test_what_hugging_face_saves_after_an_interrupt_is_the_mean(hf, tmp_path):
    trainer = trainer_of(tmp_path)
    compute, calls = trainer.compute_loss, 0

    def interrupted(model, *arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return compute(model, *arguments, **keywords)

    trainer.compute_loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert optimizer_of(trainer).training
    twin = copy.deepcopy(trainer.model)
    twin.state_dict()
    assert optimizer_of(trainer).training  # copies of the model are not what it trains
    assert b"blr.optim" not in pickle.dumps(trainer.model)
    trainer.save_model(str(tmp_path))
    assert is_the_mean(saved(tmp_path), trainer)
    assert not same(weights(twin), weights(trainer.model))
    trainer.train()
    assert len(trainer.model._state_dict_pre_hooks) == 0


def in_order(folder, processes: int):
    """A trainer that has trained on four lines at a time, in their order."""
    trainer = trainer_of(
        folder, max_steps=4, save_strategy="steps", save_steps=4, max_grad_norm=1e9,
        per_device_train_batch_size=4 // processes, ddp_backend="gloo" if processes > 1 else None,
    )  # fmt: skip
    trainer._get_train_sampler = lambda data: torch.utils.data.SequentialSampler(data)
    trainer.train()
    return trainer


def test_hugging_face_on_two_processes_trains_and_saves_as_on_one(hf, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, __file__, str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one = in_order(tmp_path / "one", 1).model.state_dict()
    for name, x in saved(tmp_path / "two" / "checkpoint-4").items():
        torch.testing.assert_close(x, one[name], rtol=0, atol=1e-6)


def test_other_callbacks_of_hugging_face_find_the_mean_also_when_they_stop_amid_a_step(
    hf, tmp_path
):
    from blr.trainers.huggingface import PosteriorCallback

    class Watch(hf.TrainerCallback):
        found: ClassVar[list[bool]] = []

        def on_step_end(self, args, state, control, *, model, optimizer, **others):
            with optimizer.optimizer.mean_params():
                mean = weights(model)
            self.found.append(same(weights(model), mean))
            control.should_log = True

        on_log = on_epoch_end = on_train_end = on_step_end

        def on_substep_end(self, args, state, control, **others):
            control.should_training_stop = state.global_step == 3

    trainer = trainer_of(
        tmp_path, callbacks=[Watch(), PosteriorCallback(), Watch()], gradient_accumulation_steps=2
    )
    trainer.train()
    assert trainer.state.global_step == 3
    # What comes first when an epoch ends in the midst of a step finds the sample, and only that.
    assert len(Watch.found) > 10 and Watch.found.count(False) <= 1
    assert Watch.found[-1] and not optimizer_of(trainer).training


@pytest.mark.parametrize("accumulation", [1, 2])
def test_hugging_face_resumes_bit_by_bit_from_its_own_checkpoint(hf, tmp_path, accumulation):
    """With dropout and a random order of the data, whose random numbers the noise leaves alone."""
    options = {"max_steps": 8, "gradient_accumulation_steps": accumulation}
    whole = trainer_of(
        tmp_path, language_model(0.2), save_strategy="steps", save_steps=3, **options
    )
    whole.train()
    torch.manual_seed(99)
    resumed = trainer_of(tmp_path, language_model(0.2), **options)
    nn.init.zeros_(resumed.model.transformer.wte.weight)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 8
    assert same(weights(whole.model), weights(resumed.model))
    a, b = (optimizer_of(t).posterior() for t in (whole, resumed))
    assert torch.equal(a.precision, b.precision)


def test_the_best_model_that_hugging_face_loads_stays(hf, tmp_path):
    trainer = trainer_of(
        tmp_path, eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2,
        max_steps=5, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    optimizer_of(trainer).eval()
    best = saved(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    own = trainer.model.state_dict()
    assert all(torch.equal(x, own[name]) for name, x in best.items())


def test_hugging_face_may_build_the_optimizer_itself(hf, tmp_path):
    from transformers import Trainer, TrainingArguments

    from blr.trainers.huggingface import PosteriorCallback

    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", weight_decay=0.01, learning_rate=0.1,
    )  # fmt: skip
    model = language_model()
    before = weights(model)
    trainer = Trainer(
        model, arguments, train_dataset=text(0, 40), callbacks=[PosteriorCallback()],
        optimizer_cls_and_kwargs=(blr.IVON, SETTINGS),
    )  # fmt: skip
    trainer.train()
    optimizer = optimizer_of(trainer)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]
    assert not same(weights(model), before) and not optimizer.training


def test_hugging_face_with_an_optimizer_without_posterior_is_refused(hf, tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())
    with pytest.raises(TypeError, match=r"optimizer must have a posterior, got AdamW; pass one"):
        trainer.train()


# ---- Accelerate alone ---------------------------------------------------------------------------


def accelerated(dtype: torch.dtype = torch.float32, **options):
    """A plain loop's parts, prepared."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, **options)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 9), nn.Tanh(), nn.Linear(9, 10)).to(dtype)
    optimizer = blr.IVON(model.parameters(), **SETTINGS)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    loader = torch.utils.data.DataLoader(digits(0, 120), batch_size=10)
    return accelerator, *accelerator.prepare(model, optimizer, loader, schedule)


def digits(first: int, last: int) -> torch.utils.data.TensorDataset:
    data = load_digits()
    x = torch.tensor(data.data[first:last] / 16).float()
    return torch.utils.data.TensorDataset(x, torch.tensor(data.target[first:last]))


def accelerate(accelerator, model, optimizer, loader, schedule, steps=range(12)) -> None:
    """An epoch of a plain loop, or some of its steps."""
    for i, (x, y) in enumerate(loader):
        if i in steps:
            optimizer.train()
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_accelerate_trains_as_a_plain_loop_does(hf, accumulation):
    parts = accelerated(gradient_accumulation_steps=accumulation)
    accelerate(*parts)
    parts[2].eval()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 9), nn.Tanh(), nn.Linear(9, 10))
    optimizer = blr.IVON(model.parameters(), **SETTINGS)
    x, y = digits(0, 120).tensors
    for t in range(12 // accumulation):
        rows = slice(10 * accumulation * t, 10 * accumulation * (t + 1))
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9
    close(parts[1], model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accelerate_saves_the_mean_in_the_midst_of_training_and_resumes(hf, tmp_path, dtype):
    from blr.trainers.huggingface import save_mean

    parts = accelerated(dtype)
    accelerator, model, optimizer = parts[:3]
    assert optimizer.optimizer.state[model[0].weight]["hess"].dtype == torch.float32
    save_mean(model, optimizer)
    accelerate(*parts, steps=range(5))
    assert optimizer.optimizer.training
    accelerator.save_state(str(tmp_path / "state"))
    mean = weights(model)
    assert not optimizer.optimizer.training
    optimizer.train()
    assert not same(weights(model), mean)
    accelerator.save_model(model, str(tmp_path / "model"))
    for folder in ("state", "model"):
        names, read = [name for name, _ in model.named_parameters()], saved(tmp_path / folder)
        assert same([read[name] for name in names], mean)
    accelerate(*parts, steps=range(5, 12))
    again = accelerated(dtype)
    again[2].train()
    again[0].load_state(str(tmp_path / "state"))
    assert same(weights(again[1]), mean)
    accelerate(*again, steps=range(5, 12))
    for each in (parts, again):
        each[2].eval()
    assert same(weights(again[1]), weights(model))
    a, b = (each[2].optimizer.posterior() for each in (parts, again))
    assert torch.equal(a.precision, b.precision)


def test_a_step_after_saving_that_forgets_to_train_again_says_so(hf):
    from blr.trainers.huggingface import save_mean

    model = nn.Linear(2, 1)
    optimizer = blr.IVON(model.parameters(), **SETTINGS)
    handle = save_mean(model, optimizer)
    optimizer.train()
    model.state_dict()
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        optimizer.step()
    handle.remove()
    optimizer.train()
    model.state_dict()
    assert optimizer.training


# ---- Lightning ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pl():
    import logging

    import lightning.pytorch

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return lightning.pytorch


def lit(pl, manual: bool = False, dropout: float = 0.0):
    """A network in Lightning's form; it notes the weights at which it validates."""

    class Digits(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(64, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 10)
            )
            self.automatic_optimization = not manual
            self.seen: list[list[torch.Tensor]] = []

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def validation_step(self, batch, batch_idx):
            self.seen.append(weights(self.net))

        test_step = validation_step

        def configure_optimizers(self):
            optimizer = blr.IVON(self.net.parameters(), **SETTINGS)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    return Digits()


def lightning_of(pl, folder, callbacks=(), **options):
    from blr.trainers.lightning import PosteriorCallback

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "max_epochs": 2, "enable_checkpointing": bool(callbacks)}
    return pl.Trainer(
        default_root_dir=folder,
        callbacks=[PosteriorCallback(), *callbacks],
        **(quiet | settings | options),
    )


def loader(first: int = 0, last: int = 60, shuffle: bool = False):
    return torch.utils.data.DataLoader(digits(first, last), batch_size=10, shuffle=shuffle)


@pytest.mark.filterwarnings("ignore::Warning:lightning")
class TestLightning:
    """Lightning speaks of workers and of torch's insides, which is not the matter here."""

    @pytest.mark.parametrize(
        ("accumulation", "precision", "manual"),
        [(1, "32", False), (3, "32", False), (1, "32", True), (2, "16", False), (1, "bf16", False)],
    )
    def test_trains_as_a_plain_loop_does(self, pl, tmp_path, accumulation, precision, manual):
        from lightning.pytorch.plugins import MixedPrecision

        options = {}
        if precision == "16":
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
            options["plugins"] = MixedPrecision("16-mixed", "cpu", scaler)
        if precision == "bf16":
            options["precision"] = "bf16-mixed"
        if not manual:
            options |= {"accumulate_grad_batches": accumulation, "gradient_clip_val": 0.5}
        module = lit(pl, manual)
        lightning_of(pl, tmp_path, **options).fit(module, loader())
        reference = lit(pl)
        (optimizer,), (schedule,) = reference.configure_optimizers()
        kind = {"32": None, "16": torch.float16, "bf16": torch.bfloat16}[precision]
        x, y = digits(0, 60).tensors
        for t in range(12 // accumulation):
            rows = torch.arange(10 * accumulation * t, 10 * accumulation * (t + 1)) % 60
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                with torch.autocast("cpu", kind, enabled=kind is not None):
                    outputs = reference.net(x[rows])
                nn.functional.cross_entropy(outputs.float(), y[rows]).backward()
            if not manual:
                nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            optimizer.step()
            if not manual:  # which leaves schedules to the module
                schedule["scheduler"].step()
        close(module, reference, 1e-6 if kind is None else 2e-3)
        assert not same(weights(module), weights(lit(pl)))

    def test_validates_and_tests_at_the_mean(self, pl, tmp_path):
        module = lit(pl)
        trainer = lightning_of(
            pl, tmp_path, val_check_interval=2, max_epochs=1, accumulate_grad_batches=3
        )
        start = weights(module)
        trainer.fit(module, loader(), loader(60, 70))
        assert same(module.seen[0], start)  # before training, and after two of three batches
        assert same(module.seen[1], start) and not same(module.seen[2], start)
        trainer.test(module, loader(60, 70), verbose=False)
        assert same(module.seen[-1], weights(module)) and same(module.seen[-2], module.seen[-1])
        assert not trainer.optimizers or not trainer.optimizers[0].training

    def test_saves_the_mean_bit_by_bit_also_when_interrupted(self, pl, tmp_path):
        from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

        class Interrupt(pl.Callback):
            def on_before_zero_grad(self, trainer, pl_module, optimizer):
                if trainer.global_step == 4:
                    raise RuntimeError("out of memory")

        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        rescue = OnExceptionCheckpoint(tmp_path, "rescue")
        module = lit(pl)
        trainer = lightning_of(pl, tmp_path, [keep, rescue, Interrupt()], max_epochs=1)
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer.fit(module, loader())
        for name in ("step=4", "rescue"):
            checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
            assert same(list(checkpoint["state_dict"].values()), weights(module))
            (state,) = checkpoint["optimizer_states"]
            assert {*state["state"][0]} == {"hess", "momentum"}

    def test_resumes_bit_by_bit_from_its_own_checkpoint(self, pl, tmp_path):
        from lightning.pytorch.callbacks import ModelCheckpoint

        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        whole, resumed = lit(pl), lit(pl)
        trainer = lightning_of(pl, tmp_path, [keep], max_epochs=3, accumulate_grad_batches=2)
        trainer.fit(whole, loader())
        nn.init.zeros_(resumed.net[0].weight)
        again = lightning_of(pl, tmp_path, max_epochs=3, accumulate_grad_batches=2)
        again.fit(resumed, loader(), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
        assert again.global_step == trainer.global_step == 9
        assert same(weights(whole), weights(resumed))
        a, b = (t.optimizers[0].posterior() for t in (trainer, again))
        assert torch.equal(a.precision, b.precision)

    def test_an_optimizer_without_posterior_is_refused(self, pl, tmp_path):
        module = lit(pl)
        module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters())
        with pytest.raises(TypeError, match=r"must return an optimizer with a posterior, got Ada"):
            lightning_of(pl, tmp_path).fit(module, loader())


if __name__ == "__main__":
    two = in_order(sys.argv[1], 2)
    assert is_the_mean(two.model.state_dict(), two)
    torch.distributed.destroy_process_group()
