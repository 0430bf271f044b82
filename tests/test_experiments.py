"""Claims about the experiments: formats, networks and steps against oracles, and whole runs."""

import gzip
import json
import math
import os
import pickle
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import blr

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import _common  # noqa: E402
import _image_data  # noqa: E402
import _networks  # noqa: E402
import _text  # noqa: E402
import _training  # noqa: E402
import compare  # noqa: E402
import images  # noqa: E402
import language  # noqa: E402

QUIET = ["--quiet", "--device", "cpu"]
SCRIPTS = {"images": images, "language": language}
RUNS = {
    "images": "--smoke --epochs 4 --samples 2 --lr 1 --ess 12570",
    "language": "--smoke --lr 1 --hess-init 0.01 --clip-radius inf --ess 1e7 --text prose.txt",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, where a small text lies."""
    monkeypatch.chdir(tmp_path)
    book = EXPERIMENTS.parent / "book"
    prose = "\n".join(p.read_text(encoding="utf-8") for p in sorted(book.glob("0[12]*.md")))
    Path("prose.txt").write_text(prose, encoding="utf-8")
    return tmp_path


def run(name: str, out: str, *more: str) -> dict:
    SCRIPTS[name].main([*RUNS[name].split(), *QUIET, "--out", out, *more])
    return json.loads(Path(out).read_text(encoding="utf-8"))


def child(command: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def without_times(history: list[dict]) -> list[dict]:
    return [{n: x for n, x in row.items() if n not in _training.TIMES} for row in history]


# ---- whole runs ---------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import {name} as script
learn, calls = script.learn, []
def until_killed(*args):
    calls.append(args)
    if len(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return learn(*args)
script.learn = until_killed
script.main(sys.argv[2:])
"""


@pytest.mark.parametrize("name, at", [("images", 46), ("language", 13)])
def test_a_killed_run_that_resumes_gives_the_bits_of_one_that_was_not_killed(name, at):
    whole = run(name, "whole.json")
    learned(whole, math.log(10 if name == "images" else 256))
    code = KILLED.format(name=name, at=at)  # in the third epoch; between two checkpoints
    command = [sys.executable, "-c", code, str(EXPERIMENTS), *RUNS[name].split(), *QUIET]
    dead = child([*command, "--out", "killed.json"])
    assert dead.returncode == -signal.SIGKILL, dead.stderr[-2000:]
    assert Path("killed.pt").is_file()
    assert not json.loads(Path("killed.json").read_text())["complete"]
    resumed = run(name, "killed.json", "--resume")
    assert resumed["complete"] and whole["complete"]
    assert resumed["sha256"] == whole["sha256"]
    assert without_times(resumed["history"]) == without_times(whole["history"])


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_give_the_result_of_one_and_say_whence_it_comes(name):
    few = {"images": "--epochs 2 --batch 240 --lr 0.1", "language": "--steps 12"}[name].split()
    script = [str(EXPERIMENTS / f"{name}.py"), *RUNS[name].split(), *QUIET, *few]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = child([*launch, *script, "--out", "two.json"])
    assert done.returncode == 0, done.stderr[-4000:]
    two, one = json.loads(Path("two.json").read_text()), run(name, "one.json", *few)
    complete(two, name)
    states = [torch.load(f"{number}.pt", weights_only=True)["model"] for number in ("one", "two")]
    # Sums in another order: roundings of 1e-7, which grow from step to step, here ten or twelve.
    for key, p in states[0].items():
        torch.testing.assert_close(states[1][key], p, rtol=0, atol=1e-5)
    for ours, theirs in zip(two["history"], one["history"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        for place in ("mean", "averaged"):
            assert ours[place]["nll"] == pytest.approx(theirs[place]["nll"], rel=1e-5)


def learned(result: dict, guess: float) -> None:
    losses = [row["train_loss"] for row in result["history"]]
    assert losses[-1] < 0.9 * losses[0]
    for scores in result["final"].values():
        assert scores["nll"] < 0.9 * guess


def complete(result: dict, name: str) -> None:
    assert result["experiment"] == name and result["complete"]
    assert result["command"].startswith("torchrun --nproc_per_node=2 experiments/")
    assert result["commit"] and result["date"] and result["seed"] == 0
    assert result["versions"]["torch"] == torch.__version__
    assert result["hardware"]["processes"] == 2 and result["hardware"]["cpu"]
    assert set(vars(SCRIPTS[name].options(["--data", "x"] if name == "images" else []))) == set(
        result["options"]
    )
    for place in ("mean", "averaged"):
        assert result["final"][place] == result["history"][-1][place]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_other_optimizers_take_the_same_road_and_have_no_average(optimizer):
    lr = {"adamw": "0.01", "sgd": "0.1"}[optimizer]
    for name in RUNS:
        result = run(name, f"{name}.json", "--optimizer", optimizer, "--lr", lr)
        assert set(result["final"]) == {"mean"}
        learned(result, math.log(10 if name == "images" else 256))


def test_a_checkpoint_of_another_run_is_refused():
    run("images", "a.json", "--epochs", "1")
    with pytest.raises(ValueError, match=r"other options .*seed: 0 is now 1"):
        run("images", "a.json", "--epochs", "1", "--resume", "--seed", "1")


def test_what_is_given_overrides_smoke_and_smoke_the_preset_and_that_the_default():
    large = language.options(["--preset", "gpt2-large", "--bins", "x"])
    assert (large.lr, large.ess, large.micro_batches, large.clip_radius) == (150, 1e10, 120, 1e-3)
    assert large.batch * large.context == 491_520
    nanogpt = language.options(["--preset", "gpt2-small", "--optimizer", "adamw"])
    assert (nanogpt.lr, nanogpt.weight_decay, nanogpt.hess_init) == (6e-4, 0.1, None)
    small = language.options(["--preset", "gpt2-large", "--smoke", "--steps", "7"])
    assert (small.steps, small.context, small.lr) == (7, 32, 150)
    cifar = images.options(["--data", "x", "--seed", "3"])
    assert (cifar.lr, cifar.hess_init, cifar.ess, cifar.batch) == (0.2, 0.5, 50_000, 50)
    assert (cifar.epochs, cifar.warmup_epochs, cifar.seed) == (200, 5, 3)


def test_images_without_a_place_are_asked_for(capsys):
    with pytest.raises(SystemExit):
        images.options(["--preset", "cifar10-resnet20"])
    assert "--data" in capsys.readouterr().err


# ---- images -------------------------------------------------------------------------------------


def digits() -> tuple[np.ndarray, np.ndarray]:
    found = load_digits()
    return (found.images * 15).astype(np.uint8), found.target.astype(np.uint8)


def write_idx(folder: Path, zipped: bool) -> None:
    x, y = digits()
    folder.mkdir(parents=True)
    for split, part in (("train", slice(60)), ("t10k", slice(60, 95))):
        for name, array in (("images-idx3", x[part]), ("labels-idx1", y[part])):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
            raw = head + array.tobytes()
            path = folder / f"{split}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(raw) if zipped else raw)


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_give_the_digits_that_were_written(zipped):
    write_idx(Path("mnist/MNIST/raw"), zipped)
    found, (x, y) = _image_data.read("mnist"), digits()
    np.testing.assert_array_equal(found.x[:, 0], x[:60])
    np.testing.assert_array_equal(found.test_x[:, 0], x[60:95])
    np.testing.assert_array_equal(found.y, y[:60])
    np.testing.assert_array_equal(found.test_y, y[60:95])


def colours(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(seed)
    return g.integers(256, size=(count, 3, 32, 32), dtype=np.uint8), g.integers(classes, size=count)


@pytest.mark.parametrize("kind", ["pickles", "binary"])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_gives_the_images_that_were_written(kind, classes):
    names = [f"data_batch_{i}" for i in range(1, 6)] if classes == 10 else ["train"]
    test = "test_batch" if classes == 10 else "test"
    Path("cifar").mkdir()
    parts = {name: colours(7, classes, seed) for seed, name in enumerate([*names, test])}
    for name, (x, y) in parts.items():
        rows = x.reshape(len(x), -1)
        if kind == "pickles":
            label = b"labels" if classes == 10 else b"fine_labels"
            data = {b"data": rows, label: y.tolist(), b"filenames": [b"a.png"] * 7}
            Path("cifar", name).write_bytes(pickle.dumps(data, protocol=2))
        else:
            columns = [y] if classes == 10 else [y // 5, y]
            head = np.stack(columns, 1).astype(np.uint8)
            Path("cifar", f"{name}.bin").write_bytes(np.hstack([head, rows]).tobytes())
    found = _image_data.read("cifar")
    np.testing.assert_array_equal(found.x, np.concatenate([parts[n][0] for n in names]))
    np.testing.assert_array_equal(found.y, np.concatenate([parts[n][1] for n in names]))
    np.testing.assert_array_equal(found.test_x, parts[test][0])
    np.testing.assert_array_equal(found.test_y, parts[test][1])


def test_a_pickle_that_would_run_a_program_is_refused():
    Path("cifar").mkdir()
    Path("cifar/data_batch_1").write_bytes(pickle.dumps(os.getcwd, protocol=2))
    with pytest.raises(pickle.UnpicklingError, match="no place in a file of images"):
        _image_data.read("cifar")


def test_tiny_imagenet_gives_pictures_and_classes_by_folder():
    from PIL import Image

    listed = []
    for k, name in enumerate(["n01", "n02"]):
        for split in (Path("tiny/train", name, "images"), Path("tiny/val/images")):
            split.mkdir(parents=True, exist_ok=True)
            grey = Image.new("L", (64, 64), 60 + 100 * k)  # some of its pictures have no colours
            grey.save(split / f"{name}_0.JPEG")
        listed.append(f"{name}_0.JPEG\t{name}\t0\t0\t63\t63\n")
    Path("tiny/val/val_annotations.txt").write_text("".join(reversed(listed)))
    found = _image_data.read("tiny")
    assert found.x.shape == (2, 3, 64, 64) and found.y.tolist() == [0, 1]
    assert found.test_y.tolist() == [1, 0]
    assert (found.test_x.float().mean((1, 2, 3)) - torch.tensor([160.0, 60.0])).abs().max() < 2


def test_svhn_gives_pictures_and_its_ten_is_zero():
    import scipy.io

    x, _ = colours(4, 10, 0)
    for split in ("train", "test"):
        matrix = {"X": x.transpose(2, 3, 1, 0), "y": np.array([[10], [1], [9], [2]])}
        scipy.io.savemat(f"{split}_32x32.mat", matrix)
    found = _image_data.read(".")
    np.testing.assert_array_equal(found.x, x)
    assert found.test_y.tolist() == [0, 1, 9, 2]


def test_a_directory_without_images_is_told_what_was_looked_for():
    Path("empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"(?s)CIFAR-10: data_batch_1.*fashion_mnist"):
        _image_data.read("empty")
    with pytest.raises(FileNotFoundError, match="no directory nowhere"):
        _image_data.read("nowhere")


def test_crops_and_mirrors_are_those_of_a_loop():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (9, 3, 5, 6), generator=g, dtype=torch.uint8)
    shift = torch.randint(5, (9, 2), generator=g)
    flip = torch.rand(9, generator=g) < 0.5
    found = _image_data.augment(x, shift, flip, 2)
    for i in range(9):
        padded = torch.zeros(3, 9, 10, dtype=torch.uint8)
        padded[:, 2:7, 2:8] = x[i]
        (a, b), crop = shift[i].tolist(), padded
        crop = crop[:, a : a + 5, b : b + 6]
        assert torch.equal(found[i], crop.flip(-1) if flip[i] else crop)


def test_an_epoch_shows_every_image_once_and_depends_on_its_place_only():
    one, again, other = (
        [part.clone() for part, *_ in _image_data.epoch_batches(50, 8, 2, True, *place)]
        for place in ((0, 1), (0, 1), (0, 2))
    )
    seen = torch.cat(one)
    assert len(one) == 6 and len(seen.unique()) == 48
    assert torch.equal(seen, torch.cat(again)) and not torch.equal(seen, torch.cat(other))


def test_scaling_gives_pixels_mean_zero_and_variance_one():
    x, y = (torch.from_numpy(part) for part in colours(20, 10, 0))
    data = _image_data.Images(x, y, x[:0], y[:0], "noise")
    mean, deviation = data.scaling()
    z = ((x - mean) / deviation).double()
    assert z.mean((0, 2, 3)).abs().max() < 1e-5
    assert (z.square().mean((0, 2, 3)) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("name, parameters", [("resnet20", 272_474), ("resnet18", 11_173_962)])
def test_residual_networks_have_the_published_sizes(name, parameters):
    with torch.device("meta"):
        model = _networks.ResNet(name, "batch", 3, 10)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    assert _training.about_model(model) == {"parameters": parameters}


def test_filter_response_normalisation_looks_at_one_image_only():
    x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    norm = _networks.FilterResponse(3)
    torch.testing.assert_close(norm(x)[1:2], norm(x[1:2]))
    torch.testing.assert_close(norm(7 * x), norm(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(norm(x).square().mean((2, 3)), torch.ones(4, 3), rtol=0, atol=1e-4)


def test_statistics_are_those_at_the_parameters_held_and_then_the_stored_ones():
    o = images.options(["--smoke", "--norm", "batch", "--statistics", "3", "--device", "cpu"])
    here = _common.Processes(0, 1, torch.device("cpu"))
    it = images.Run.of(o, here)
    mean, deviation = it.images.scaling()
    stem = it.model.stem_norm
    stem.running_mean.fill_(5.0)
    with torch.no_grad(), images.refreshed(it, mean, deviation):
        batches = _image_data.epoch_batches(len(it.images.x), o.batch, o.padding, False, 0, 0)
        expected = torch.zeros_like(stem.running_mean)
        for _, (chosen, shift, flip) in zip(range(3), batches, strict=False):
            x = (_image_data.augment(it.images.x[chosen], shift, flip, 1) - mean) / deviation
            expected += it.model.stem(x).mean((0, 2, 3)) / 3
        assert not stem.training and not it.model.training
        torch.testing.assert_close(stem.running_mean, expected)
    assert (stem.running_mean == 5).all() and stem.momentum == 0.1


def test_averaged_probabilities_are_those_of_predict_within_their_noise():
    o = images.options(["--smoke", "--device", "cpu", "--examples", "40"])
    o.samples, o.ess = 400, 3e4
    it = images.Run.of(o, _common.Processes(0, 1, torch.device("cpu")))
    looks = _training.looks(it.optimizer, o.samples)
    at_mean, averaged = (
        images.probabilities(it, [it.images.test_x], looks[place])[0]
        for place in ("mean", "averaged")
    )
    mean, deviation = it.images.scaling()
    x = (it.images.test_x - mean) / deviation
    torch.testing.assert_close(at_mean.float(), it.model(x).softmax(-1).detach())
    g = torch.Generator().manual_seed(0)
    each = blr.sample_outputs(it.model, it.optimizer.posterior(), x, 400, generator=g).softmax(-1)
    error = each.std(0) * math.sqrt(2 / 400)
    # 400 numbers, two averages of 400 samples each: five standard errors of their difference.
    assert ((averaged - each.mean(0)).abs() < 5 * error + 1e-6).all()
    assert (at_mean - each.mean(0)).abs().max() > (averaged - each.mean(0)).abs().max()


def test_unfamiliar_images_are_scored_and_must_have_the_same_shape():
    write_idx(Path("mnist"), True)
    result = run("images", "a.json", "--epochs", "1", "--ood", "mnist")
    for place in ("mean", "averaged"):
        assert 0 <= result["final"][place]["auroc_confidence"] <= 1
    Path("svhn").mkdir()
    x, y = colours(3, 10, 0)
    for split in ("train", "t10k"):
        for name, array in (("images-idx3", x[:, 0]), ("labels-idx1", y.astype(np.uint8))):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
            Path("svhn", f"{split}-{name}-ubyte").write_bytes(head + array.tobytes())
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\), got \(1, 32, 32\)"):
        run("images", "b.json", "--ood", "svhn")


# ---- language -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "characters", "words"])
def test_tokens_spell_the_text_that_they_are_of(kind):
    text = "A cat — no, ten cats — sat.\n\n" * 20 + "Ω, at the end: naïve œuvre.\n"
    Path("a.txt").write_text(text, encoding="utf-8")
    corpus = _text.tokenized([Path("a.txt")], kind, 9, Path("cache"), share=0.2)
    train, validation = _text._split(text, 0.2)
    assert train.decode() + validation.decode() == text
    assert 0.1 * len(text) < len(validation.decode()) < 0.3 * len(text)
    known = _text._most_frequent(Counter(_text.CUTS[kind](train.decode())), 9)
    spelled = {i: bytes([i]) for i in range(256)} | {i: p.encode() for p, i in known.items()}
    assert corpus.vocabulary == len(spelled) == (256 if kind == "bytes" else 265)
    for part, original in ((corpus.train, train), (corpus.validation, validation)):
        assert b"".join(spelled[int(i)] for i in part) == original
    assert corpus.bytes_per_token == len(validation) / len(corpus.validation)
    again = _text.opened(Path("cache"), corpus.vocabulary, corpus.bytes_per_token)
    np.testing.assert_array_equal(again.train, corpus.train)


def test_lazy_load_files_of_r_are_read_without_r():
    def packed(kind: int, body: bytes, count: int) -> bytes:
        head = b"X\n" + struct.pack(">iiii", 3, 0x040201, 0x030500, 5) + b"UTF-8"
        raw = head + struct.pack(">ii", kind, count) + body
        return struct.pack(">i", len(raw)) + zlib.compress(raw)

    def lines(*text: str) -> bytes:
        return b"".join(struct.pack(">ii", 0x40009, len(t.encode())) + t.encode() for t in text)

    first, second = ("EMMA", "", "Miss Woodhouse—née"), ("Persuasion",)
    parts = [packed(16, lines(*first), 3), packed(13, b"\0" * 8, 2), packed(16, lines(*second), 1)]
    Path("Rdata.rdb").write_bytes(b"".join(parts))
    found = list(_text.texts([Path("Rdata.rdb")]))
    assert found == ["EMMA\n\nMiss Woodhouse—née\n", "Persuasion\n"]


def test_texts_that_are_missing_are_told_where_to_find(monkeypatch):
    monkeypatch.setenv("BLR_DATA", "elsewhere")
    monkeypatch.setattr(_text, "R_LIBRARY", Path("library"))
    with pytest.raises(FileNotFoundError, match=r"(?s)elsewhere.*library.*--text"):
        _text.austen()
    with pytest.raises(FileNotFoundError, match=r"no train\.bin"):
        _text.prepared(Path("nowhere"))
    with pytest.raises(ValueError, match="3 tokens, and a window needs 6"):
        _text.random_starts(np.zeros(3), 1, 5, 0)


def test_prepared_tokens_are_read_as_they_are():
    for name in ("train", "val"):
        np.arange(40_000, 40_100, dtype=np.uint16).tofile(f"{name}.bin")
    corpus = _text.prepared(Path("."))
    x, y = _text.windows(corpus.train, [3, 50], 4)
    assert x.tolist() == [[40_003, 40_004, 40_005, 40_006], [40_050, 40_051, 40_052, 40_053]]
    assert torch.equal(y, x + 1)
    assert corpus.vocabulary == 50_257


def test_the_language_model_is_gpt2():
    transformers = pytest.importorskip("transformers")
    heads, width = 4, 128
    settings = transformers.GPT2Config(
        vocab_size=128, n_positions=24, n_embd=width, n_layer=4, n_head=heads,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    peer, model = transformers.GPT2LMHeadModel(settings).eval(), _networks.GPT("tiny", 100, 24)
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(0.1 * torch.randn_like(p))
        theirs = peer.transformer
        model.tokens.weight.copy_(theirs.wte.weight)
        model.positions.weight.copy_(theirs.wpe.weight)
        pairs = [(model.last_norm, theirs.ln_f)]
        for ours, block in zip(model.layers, theirs.h, strict=True):
            pairs += [
                (ours.before_attention, block.ln_1), (ours.before_network, block.ln_2),
                (ours.queries_keys_values, block.attn.c_attn),
                (ours.attention_out, block.attn.c_proj), (ours.expand, block.mlp.c_fc),
                (ours.contract, block.mlp.c_proj),
            ]  # fmt: skip
        for mine, other in pairs:
            mine.weight.copy_(other.weight.T if other.weight.ndim > 1 else other.weight)
            mine.bias.copy_(other.bias)
    x = torch.randint(100, (3, 17), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), peer(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size, parameters", [("small", 124), ("medium", 355), ("large", 774)])
def test_the_presets_have_the_published_sizes(size, parameters):
    with torch.device("meta"):
        model = _networks.GPT(f"gpt2-{size}", 50_257, 1024)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == parameters


def test_the_validation_loss_averages_probabilities_and_not_their_logarithms():
    o = language.options(["--smoke", "--device", "cpu", "--text", "prose.txt", "--ess", "2000"])
    here = _common.Processes(0, 1, torch.device("cpu"))
    it = language.Run.of(o, here)
    looks = _training.looks(it.optimizer, 3)
    losses = {place: language.validation_loss(it, where) for place, where in looks.items()}
    it = language.Run.of(o, here)  # the same weights, and the same samples again
    text, T = it.corpus.validation, o.context
    starts = np.linspace(0, len(text) - T - 1, o.eval_windows).astype(int)
    x, y = _text.windows(text, starts, T)

    def p() -> torch.Tensor:
        return it.model(x).softmax(-1).gather(-1, y.unsqueeze(-1)).double()

    with torch.no_grad():
        assert losses["mean"] == pytest.approx(-p().log().mean().item(), rel=1e-6)
        total = torch.zeros((), dtype=torch.float64)
        for _ in range(3):
            with it.optimizer.sampled_params():
                total = total + p() / 3
    assert losses["averaged"] == pytest.approx(-total.log().mean().item(), rel=1e-6)


# ---- steps --------------------------------------------------------------------------------------


def regression() -> tuple[nn.Module, list]:
    g = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype))
    pairs = [torch.randn(2, 5, 3, generator=g, dtype=torch.float64) for _ in range(4)]
    return model, [lambda x=x: (model(x[0]) - x[1][:, :2]).square().mean() for x in pairs]


def test_a_step_of_adamw_is_one_on_the_clipped_average():
    model, losses = regression()
    other, theirs = regression()
    ours, peer = (torch.optim.AdamW(m.parameters(), 0.1) for m in (model, other))
    for _ in range(3):
        value = _training.learn(ours, model, losses, 0.3)
        peer.zero_grad()
        total = sum(loss() for loss in theirs) / 4
        total.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.3)
        peer.step()
        assert value == pytest.approx(total.item(), rel=1e-12)
        torch.testing.assert_close(model.weight, other.weight, rtol=1e-12, atol=1e-12)


def test_a_step_of_ivon_clips_the_gradient_of_every_sample_by_itself():
    model, losses = regression()
    other, theirs = regression()
    ours, peer = (
        blr.IVON(m.parameters(), lr=0.2, ess=50.0, betas=(0.9, 0.9)) for m in (model, other)
    )
    for _ in range(3):
        value = _training.learn(ours, model, losses, 0.3)
        total = 0.0
        for loss in theirs:
            with peer.sampled_params(train=True):
                peer.zero_grad()
                here = loss()
                here.backward()
                norm = torch.cat([p.grad.reshape(-1) for p in other.parameters()]).norm()
                for p in other.parameters():
                    p.grad *= min(1.0, 0.3 / (norm + 1e-6))
            assert norm > 0.3
            total += here.item() / 4
        peer.step()
        assert value == pytest.approx(total, rel=1e-12)
        torch.testing.assert_close(model.weight, other.weight, rtol=1e-12, atol=1e-12)


def test_a_loss_that_is_no_number_stops_the_run():
    with pytest.raises(RuntimeError, match="the loss is nan in epoch 3; lower --lr"):
        _training.finite(math.nan, "epoch 3")


# ---- what is shared -----------------------------------------------------------------------------


def test_the_schedule_is_linear_then_torch_s_cosine():
    p = nn.Parameter(torch.zeros(1))
    peer = torch.optim.SGD([p], 2.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(peer, 30, eta_min=0.2)
    for step in range(40):
        factor = _common.warmup_cosine(step, 40, 10, 0.1)
        if step < 10:
            assert factor == pytest.approx((step + 1) / 10)
        else:
            assert 2.0 * factor == pytest.approx(cosine.get_last_lr()[0], rel=1e-9)
            peer.step()
            cosine.step()
    assert _common.warmup_cosine(40, 40, 10, 0.1) == pytest.approx(0.1)


def test_a_file_is_written_whole_or_not_at_all(monkeypatch):
    _common.write_json("a.json", {"x": math.nan, "y": math.inf, "z": torch.ones(2), 3: Path("p")})
    expected = {"x": None, "y": "inf", "z": [1.0, 1.0], "3": "p"}
    assert json.loads(Path("a.json").read_text()) == expected

    def broken(*args, **kwargs):
        raise OSError("no space is left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(OSError, match="no space"):
            _common.write_json("a.json", {"x": 1})
    assert json.loads(Path("a.json").read_text()) == expected
    assert sorted(p.name for p in Path(".").iterdir()) == ["a.json", "prose.txt"]


def test_places_in_a_run_have_random_numbers_of_their_own():
    places = [(0,), (1,), (0, 1), (1, 0), (0, 1, 0)]
    drawn = [torch.rand(1, generator=_common.generator(*place)).item() for place in places]
    assert len(set(drawn)) == len(places)
    assert drawn[2] == torch.rand(1, generator=_common.generator(0, 1)).item()


def test_batches_that_cannot_be_shared_evenly_are_refused():
    here = _common.Processes(0, 4, torch.device("cpu"))
    assert here.share("--batch", 12) == 3
    with pytest.raises(ValueError, match=r"--batch must be a multiple .* got 10 for 4"):
        here.share("--batch", 10)


# ---- the table ----------------------------------------------------------------------------------


def fake(optimizer: str, seed: int, nll: float, seconds: float, **more) -> dict:
    times = {"seconds_per_step": 7 * seconds, "cpu_seconds_per_step": seconds}
    row = {"step": 1, "mean": {"nll": nll}} | times
    options = {"optimizer": optimizer, "seed": seed, "lr": seconds, "steps": 9, "out": str(seed)}
    slow = row | dict.fromkeys(times, 100.0)
    known = {"options": options, "complete": True, "history": [slow, row]}
    return known | {"final": {"mean": {"nll": nll}}} | more


def test_the_table_has_means_standard_errors_and_ratios_of_times():
    runs = [fake("ivon", 0, 1.0, 3.0), fake("ivon", 1, 2.0, 4.0), fake("ivon", 2, 6.0, 5.0)]
    runs += [fake("adamw", 0, 5.0, 2.0)]
    for i, result in enumerate(runs):
        _common.write_json(f"{i}.json", result)
    compare.main([*(f"{i}.json" for i in range(4)), "--out", "table.json", "--note", "quiet"])
    found = json.loads(Path("table.json").read_text())
    # Of 1, 2, 6: the mean 3, the variance (4 + 1 + 9)/2, and its third part under the root.
    error = pytest.approx(math.sqrt(7 / 3))
    assert found["rows"]["ivon, mean"]["nll"] == {"mean": 3.0, "standard_error": error}
    assert found["rows"]["adamw, mean"]["nll"] == {"mean": 5.0, "standard_error": None}
    assert found["times"]["ivon"] == {"seconds_per_step": 28.0, "cpu_seconds_per_step": 4.0}
    assert set(found["times_relative_to_adamw"]["adamw"].values()) == {1.0}
    assert set(found["times_relative_to_adamw"]["ivon"].values()) == {2.0}
    assert found["seed"] == [0, 1, 2] and found["note"] == "quiet" and len(found["runs"]) == 4


def test_runs_that_are_not_alike_are_not_compared():
    first, other = fake("adamw", 0, 1.0, 1.0), fake("ivon", 0, 1.0, 1.0)
    other["options"]["steps"] = 8
    with pytest.raises(ValueError, match="ivon with seed 0 differs in steps"):
        compare.table([first, other], "adamw")
    with pytest.raises(ValueError, match="is there twice"):
        compare.table([first, first], "adamw")
    with pytest.raises(ValueError, match="not complete"):
        compare.table([fake("ivon", 0, 1.0, 1.0, complete=False)], "ivon")
