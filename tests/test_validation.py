"""The validation loss: every pair of the set counts once, whatever the number of shards, rows, ranks, or -m."""

import json
import re
import sys

import numpy as np
import pytest
from test_distributed import start

from llmc import cpu, evaluate, gpt2, train
from llmc.data.loader import EveryPair
from llmc.data.shards import write_shard
from llmc.files import checkpoints, model_file
from llmc.model import Model
from llmc.training.validation import validate

V, T = 257, 32
LENGTHS = (5 * T + 7, 2, 4 * T + 1, 3 * T)  # tokens of the shards: a rest of every kind


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """(folder, tokens of the validation shards): the first is easy for a model that has seen the training data."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(3)
    tokens = [np.full(LENGTHS[0], 97), *(rng.integers(0, V - 1, n) for n in LENGTHS[1:])]
    for i, shard in enumerate(tokens):
        write_shard(str(folder / f"val_{i}.bin"), shard.astype(np.uint16), V)
    write_shard(str(folder / "train.bin"), np.full(4000, 97, np.uint16), V)
    return folder, tokens


def every_row(tokens):
    """Inputs and targets of each row of each shard, the last row of a shard as short as it is."""
    for shard in tokens:
        for at in range(0, len(shard) - 1, T):
            row = shard[at : at + T + 1].astype(np.int32)
            yield row[None, :-1], row[None, 1:]


def by_hand(model, tokens):
    """The loss of each token, in order."""
    return np.concatenate([model.token_losses(x, y).ravel().astype(np.float64) for x, y in every_row(tokens)])


@pytest.mark.parametrize("B", (1, 2, 3, 16))
def test_every_token_counts_once(shards, B):
    folder, tokens = shards
    model = Model(gpt2, cpu, gpt2.config_from_descriptor("tiny:d1", V, T), B, T)
    model.init_weights(3)
    model.params.wte *= 20
    losses, pattern = by_hand(model, tokens), str(folder / "val_*.bin")
    assert losses.size == sum(LENGTHS) - len(LENGTHS) and losses.std() > 1
    pairs = EveryPair(pattern, B, T)
    assert pairs.num_pairs == losses.size and validate(model, pairs) == pytest.approx(losses.mean(), rel=1e-5)
    first = EveryPair(pattern, B, T, limit=1)  # a part of the set: the mean over its tokens
    expected = losses[: min(B, 5) * T].mean()
    assert first.num_pairs == min(B, 5) * T and validate(model, first) == pytest.approx(expected, rel=1e-5)
    assert EveryPair(pattern, B, T, limit=1000).num_pairs == losses.size  # no batch twice


def saved_losses(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["val_loss"] for line in lines if "val_loss" in line]


@pytest.mark.parametrize("P", (1, 2, 4))
@pytest.mark.parametrize("limit", (-1, 3))
def test_ranks_share_the_set(shards, tmp_path, capsys, P, limit):
    """On any number of ranks the run and llmc.evaluate tell the loss of every token of the saved model."""
    folder, tokens = shards
    data = ["-i", folder / "train.bin", "-j", folder / "val_*.bin", "-m", limit, "--device", "cpu"]
    flags = [
        "-e",
        "tiny:d1",
        "-t",
        T,
        "-b",
        2,
        "-d",
        256,
        "-x",
        4,
        "-l",
        3e-3,
        "-v",
        4,
        "-s",
        0,
        "-n",
        4,
        "-o",
        tmp_path,
    ]
    argv = [str(flag) for flag in (*data, *flags, "-o", tmp_path)]
    if P == 1:
        assert train.main(argv) == 0
    else:
        done = start(P, sys.executable, "-m", "llmc.train", *argv)
        assert done.returncode == 0, done.stderr
    header = model_file.read_model_header(checkpoints.model_path(tmp_path, 4))
    model = Model(gpt2, cpu, gpt2.config_from_header(header), 2, T)
    model_file.read_model(checkpoints.model_path(tmp_path, 4), model.params_flat)
    losses = by_hand(model, tokens)
    if limit == 3:  # two batches of two rows, and the fifth row
        losses = losses[: 5 * T]
    assert saved_losses(tmp_path)[-1] == pytest.approx(losses.mean(), rel=1e-5)
    if P == 1:
        capsys.readouterr()
        assert evaluate.main([str(tmp_path), *map(str, data[2:]), "-t", str(T), "-b", "2"]) == 0
        printed = float(re.search(r"val loss ([\d.]+)", capsys.readouterr().out)[1])
        assert printed == pytest.approx(losses.mean(), abs=2e-6)
