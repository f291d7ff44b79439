"""The losses of llm.c's CPU trainer (train_gpt2.c) on the same checkpoint and shards, step by step.

Its loop is written here once more, from its description, in PyTorch float32 and a few lines of NumPy: constant learning
rate 1e-4, AdamW with betas 0.9 and 0.999, no weight decay, no clipping, shuffled training shards, validation on the
first 5 batches every 10 steps. `llmc.train` gets the same settings by flags.
"""

import json
import math
import struct

import numpy as np
import pytest
import torch
from reference import GPT2_TENSORS, gpt2_loss, gpt2_shapes

from llmc import train

L, C, NH, V, VP, MAXT = 2, 64, 4, 97, 128, 40
B, T = 4, 32
STEPS, VAL_EVERY, VAL_BATCHES = 40, 10, 5
SHARDS = (14 * B * T + 5, 9 * B * T + 1)  # tokens: 14 and 9 batches, so that 40 steps see two epochs
LIMIT = 2e-5  # 2e-3 is asked for, with GPT-2 124M and llm.c's -Ofast; here both sides are float32, and the model small


def make_weights():
    rng = np.random.default_rng(11)
    params = {}
    for name, shape in gpt2_shapes(L, C, VP, MAXT).items():
        scale = 1 / math.sqrt(shape[-1]) if name in ("wte", "wpe") or name.endswith("w") and len(shape) == 3 else 0.1
        params[name] = (rng.standard_normal(shape) * scale + (name in ("ln1w", "ln2w", "lnfw"))).astype(np.float32)
    params["wte"][V:] = 0
    return params


def make_tokens(count, seed):
    """Text with something to learn: every token depends on the one before."""
    rng = np.random.default_rng(seed)
    tokens, steps = [0], rng.choice([1, 5, 17, 40], count, p=[0.5, 0.3, 0.15, 0.05])
    for step in steps[1:]:
        tokens.append((tokens[-1] * 3 + int(step)) % V)
    return np.array(tokens, np.uint16)


def write_files(folder):
    """The checkpoint and the shards, byte by byte as llm.c's formats are documented."""

    def header(*words):
        return struct.pack("<256i", *words, *[0] * (256 - len(words)))

    params = make_weights()
    model = b"".join(params[name].tobytes() for name in GPT2_TENSORS)
    (folder / "model.bin").write_bytes(header(20240326, 3, MAXT, V, L, NH, C, VP) + model)
    shards = [make_tokens(count, i) for i, count in enumerate((*SHARDS, 6 * B * T + 1))]
    for name, tokens in zip(("train_000", "train_001", "val"), shards, strict=True):
        (folder / f"{name}.bin").write_bytes(header(20240520, 1, len(tokens)) + tokens.tobytes())
    return params, shards[:2], shards[2]


def batch(tokens, sample):
    """Inputs and targets (B, T) of one sample of a shard."""
    piece = torch.from_numpy(tokens[sample * B * T : (sample + 1) * B * T + 1].astype(np.int64))
    return piece[:-1].view(B, T), piece[1:].view(B, T)


def shuffled_batches(shards):
    """The training batches for ever: shards, then samples in each, permuted by one MT19937 with seed 42."""
    mt = np.random.RandomState(42)  # the same seeding of the same generator

    def shuffle(order):
        for i in range(len(order) - 1, 0, -1):
            j = int(mt.randint(0, 2**32, dtype=np.uint32)) % (i + 1)
            order[i], order[j] = order[j], order[i]

    shard_order = list(range(len(shards)))
    while True:
        shuffle(shard_order)  # on top of the order of the last epoch
        for shard in shard_order:
            samples = list(range((len(shards[shard]) - 1) // (B * T)))
            shuffle(samples)
            for sample in samples:
                yield batch(shards[shard], sample)


def plain_batches(shards):
    while True:
        for tokens in shards:
            for sample in range((len(tokens) - 1) // (B * T)):
                yield batch(tokens, sample)


def cpu_trainer(params, shards, val, batches=shuffled_batches, beta2=0.999, grad_clip=0.0, lr=1e-4, weight_decay=0.0):
    """(training losses, {step: validation loss}) of train_gpt2.c; the other arguments make it another trainer."""
    p = {name: torch.tensor(values, requires_grad=True) for name, values in params.items()}
    m = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    v = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    losses, val_losses, data = [], {}, batches(shards)
    for step in range(STEPS + 1):
        if step % VAL_EVERY == 0:
            with torch.no_grad():
                found = [gpt2_loss(p, *batch(val, i), NH, V).item() for i in range(VAL_BATCHES)]
            val_losses[step] = sum(found) / VAL_BATCHES
        if step == STEPS:
            return losses, val_losses
        loss = gpt2_loss(p, *next(data), NH, V)
        losses.append(loss.item())
        grads = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        with torch.no_grad():
            for name, g in grads.items():
                if 0 < grad_clip < norm:
                    g = g * (grad_clip / norm)
                m[name] = 0.9 * m[name] + (1 - 0.9) * g
                v[name] = beta2 * v[name] + (1 - beta2) * g * g
                m_hat, v_hat = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - beta2 ** (step + 1))
                p[name] -= lr * (m_hat / (v_hat.sqrt() + 1e-8) + weight_decay * p[name])


def flags(folder, out):
    named = f"-e {folder}/model.bin -i {folder}/train_*.bin -j {folder}/val.bin -o {out}"
    sizes = f"--device cpu -b {B} -t {T} -x {STEPS} -v {VAL_EVERY} -m {VAL_BATCHES} -s 0 -n 0"
    return f"{named} {sizes} -k constant -l 1e-4 -c 0 --beta1 0.9 --beta2 0.999 --eps 1e-8 --grad-clip 0".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder with the files, (weights, training shards, validation shard), the CPU trainer's losses)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is tiny
    folder = tmp_path_factory.mktemp("cpu_trainer")
    files = write_files(folder)
    yield folder, files, cpu_trainer(*files)
    torch.set_num_threads(threads)


def worst(ours, theirs):
    return float(np.max(np.abs(np.array(ours) - np.array(theirs))))


def test_the_generator_is_llmcs():
    draws = np.random.RandomState(42).randint(0, 2**32, 5, dtype=np.uint32)
    assert draws.tolist() == [1608637542, 3421126067, 4083286876, 787846414, 3143890026]


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_losses_are_those_of_llmcs_cpu_trainer(made, tmp_path, capsys, recompute):
    folder, _, (losses, val_losses) = made
    assert train.main([*flags(folder, tmp_path / "run"), "-r", str(recompute)]) == 0
    assert capsys.readouterr().err == ""
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train_loss" in line]
    validated = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in trained] == list(range(STEPS))
    assert [line["step"] for line in validated] == list(val_losses)
    assert worst([line["train_loss"] for line in trained], losses) < LIMIT
    assert worst([line["val_loss"] for line in validated], list(val_losses.values())) < LIMIT
    assert val_losses[0] - val_losses[40] > 0.2  # there was something to follow


@pytest.mark.parametrize(
    "other",
    [dict(beta2=0.95), dict(grad_clip=1.0), dict(batches=plain_batches), dict(lr=1.1e-4), dict(weight_decay=0.1)],
    ids=lambda other: next(iter(other)),
)
def test_the_limit_tells_trainers_apart(made, other):
    _, files, (losses, _) = made
    assert worst(cpu_trainer(*files, **other)[0], losses) > 20 * LIMIT
