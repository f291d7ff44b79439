"""fp16 training with dynamic loss scaling: the trainer on the CPU executor against the fp32 CPU op set.

A run that starts with a wrong loss scale must go on like one with the right scale: their files are compared by bytes.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import op_set
from reference import FP16, FP32
from test_gpt2 import LLMC, batches, weights

from llmc import cpu, devices, gpt2, simt, train
from llmc.data.shards import write_shard
from llmc.files import checkpoints, model_file
from llmc.gpt2 import GPT2Config
from llmc.model import Model
from llmc.training import loss_scaler, mfu
from llmc.training.loss_scaler import LossScaler

FLAGS = "-i train.bin -j val.bin -e tiny:d1 -b 2 -t 32 -d 128 -v 0 -s 0 -l 1e-3 -c 0.1".split()  # two micro-steps


@pytest.fixture
def executor(monkeypatch, tmp_path):
    """The trainer takes the CUDA op set on the executor for a GPU, in a folder with shards of letters."""
    ops = op_set("executor", monkeypatch)
    for name in ("host_view", "capture"):
        monkeypatch.setattr(ops.device, name, getattr(cpu.device, name))
    pick = devices.pick_device
    there = (ops, "cuda", "the CPU executor")
    monkeypatch.setattr(devices, "pick_device", lambda wanted, *_: there if wanted == "cuda" else pick(wanted))
    monkeypatch.setattr(devices, "prepare_kernels", lambda *_: "kernels compile when they are used")
    monkeypatch.setattr(mfu, "current_gpu", lambda: ("the CPU executor", 1, None))
    monkeypatch.chdir(tmp_path)
    for name, seed in (("train.bin", 1), ("val.bin", 2)):
        steps = np.random.default_rng(seed).integers(-2, 4, 2000)
        write_shard(name, (97 + np.cumsum(steps) % 26).astype(np.uint16), 257)
    with simt.mode(orders=("forward",), fast=True):
        yield ops


def run(folder, *argv, device="cuda", dtype="fp16"):
    """Losses by step. The run's exit code is 0."""
    assert train.main([*FLAGS, "--device", device, "--dtype", dtype, "-o", folder, *map(str, argv)]) == 0
    lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [line["train_loss"] for line in lines if "train_loss" in line]


def files_of(folder, step):
    return [Path(path(folder, step, *rank)).read_bytes() for path, rank in FILES]


FILES = (checkpoints.model_path, ()), (checkpoints.state_path, (0,))


def test_losses_follow_fp32_on_the_cpu(executor):
    fp32 = run("fp32", "-x", 10, device="cpu", dtype="fp32")
    fp16 = run("fp16", "-x", 10)
    assert fp32[0] - fp32[-1] > 0.5  # there is something to follow
    np.testing.assert_allclose(fp16, fp32, rtol=1e-3)  # the distance of fp16 numbers: PyTorch's own would be as far off


def test_an_overflow_halves_the_scale_and_leaves_no_other_trace(executor, monkeypatch, capsys):
    """From 2^40 the first step overflows until the scale fits; files are those of a run that began with that scale."""
    monkeypatch.setattr(LossScaler.__init__, "__defaults__", (2.0**40,))
    losses = run("far", "-x", 4, "-n", 2)
    notices = [line for line in capsys.readouterr().out.splitlines() if "overflowed in fp16" in line]
    right = float(notices[-1].rpartition(" ")[2])
    assert notices == [f"step 1: the gradients overflowed in fp16, again with loss scale {right:g}"]
    assert 2.0**10 < right < 2.0**36, right

    monkeypatch.setattr(LossScaler.__init__, "__defaults__", (right,))
    assert run("right", "-x", 4, "-n", 2) == losses
    assert files_of("far", 2) == files_of("right", 2) and files_of("far", 4) == files_of("right", 4)
    header = model_file.read_model_header(checkpoints.model_path("far", 4))
    assert header["version"] == 3  # llm.c has no fp16 file: fp32, which holds the same numbers
    params = np.empty(model_file.num_parameters(header), np.float32)
    model_file.read_model(checkpoints.model_path("far", 4), params)
    np.testing.assert_array_equal(params.astype(np.float16).astype(np.float32), params)

    monkeypatch.setattr(LossScaler.__init__, "__defaults__", (2.0**41,))  # what a resumed run does not begin with
    Path(checkpoints.done_path("far", 4)).unlink()
    capsys.readouterr()
    run("far", "-x", 4, "-n", 2, "-y", 1)
    assert "overflowed" not in capsys.readouterr().out
    assert files_of("far", 4) == files_of("right", 4)


def test_gradients_too_small_for_fp16_are_there_with_a_scale(executor):
    config, B, T, micro_steps = GPT2Config(24, 61, 128, 2, 2, 32), 2, 17, 15421  # 0.5M tokens, as for GPT-2
    params, ((x, y),) = weights(config), batches(config, B, T, 1)
    moments, norms = [], []
    for ops, dtype, scale in ((cpu, FP32, 1.0), (executor, FP16, 1.0), (executor, FP16, loss_scaler.INITIAL_SCALE)):
        model = Model(gpt2, ops, config, B, T, dtype=dtype)
        for name, values in params.items():
            getattr(model.params, name)[...] = values.astype(dtype)
        model.loss_scale = scale
        model.forward(x)
        model.backward(x, y, micro_steps)
        model.update(replace(LLMC, grad_clip=0.0), 1)  # Adam's first moment is 0.1 * the gradient
        moments.append(model.m.astype(np.float64))
        norms.append(model.grad_norm())
    truth, plain, scaled = moments
    error = [np.linalg.norm(m - truth) / np.linalg.norm(truth) for m in (plain, scaled)]
    assert error[0] > 0.1 and error[1] < 0.005, error
    assert norms[2] == pytest.approx(norms[0], rel=0.005), norms


def test_the_scale_grows_after_enough_good_steps(monkeypatch):
    monkeypatch.setattr(loss_scaler, "GROWTH_INTERVAL", 3)
    scaler, scales = LossScaler(8.0), []
    for good in (1, 1, 0, 1, 1, 1, 1, 1):  # the overflow restarts the count
        assert scaler.good_step() is None if good else scaler.overflow()
        other = LossScaler()
        other.load_state(json.loads(json.dumps(scaler.state())))
        scaler = other  # through a checkpoint after each step
        scales.append(scaler.scale)
    assert scales == [8, 8, 4, 4, 4, 8, 8, 8]
    scaler.load_state(None)  # of a checkpoint in another precision
    assert scaler.scale == 8
    assert not LossScaler(1.0).overflow()
