"""The whole model on the CUDA op set: on the CPU executor everywhere, and on a GPU where there is one.

tests/test_gpt2.py has the same checks for the CPU op set; its weights, batches and PyTorch references are used here.
"""

import functools
import hashlib

import numpy as np
import pytest
import torch
from conftest import to_host
from reference import (
    DTYPES,
    GPT2_TENSORS,
    TORCH_DTYPES,
    Expected,
    assert_bits,
    assert_close,
    cross_entropy,
    gpt2_logits,
    to_float64,
    to_torch,
)
from test_gpt2 import LLMC, batches, step, torch_training, weights

import llmc.model
from llmc import gpt2
from llmc.buffers import carve
from llmc.gpt2 import GPT2Config
from llmc.model import Model

CONFIG, B, T = GPT2Config(24, 61, 128, 2, 2, 32), 2, 17  # two layers and heads, an odd T below maxT, padded vocabulary
SETS = pytest.mark.parametrize("ops", ("executor", pytest.param("gpu", marks=pytest.mark.gpu)), indirect=True)


def build(ops, dtype="fp32", recompute=1, params=None):
    """A model on this op set: every buffer holds garbage except for the weights and the optimizer state."""
    model = Model(gpt2, ops, CONFIG, B, T, recompute=recompute, dtype=DTYPES[dtype])
    for flat in (model.grads_flat, model.acts_flat):
        ops.device.upload(flat.view(np.uint8), np.full(flat.nbytes, 0xFF, np.uint8))
    host = np.empty(model.params_flat.size, np.float32)
    views = carve(host.view(np.uint8), gpt2.parameter_specs(CONFIG), CONFIG.num_layers, np.float32)
    for name, values in (params or weights(CONFIG)).items():
        getattr(views, name)[...] = values
    model.load_parameters(host)
    return model


def torch_passes(params, x, y, dtype):
    """{"logits", "loss", "dwte", ...: Expected}: the truth is of the weights that `dtype` holds."""
    results = []
    for precision in (torch.float64, TORCH_DTYPES[dtype]):
        tensors = {n: to_torch(v.astype(dtype)).to(precision).requires_grad_() for n, v in params.items()}
        logits = gpt2_logits(tensors, to_torch(x), CONFIG.num_heads, CONFIG.vocab_size)
        loss = cross_entropy(logits.float() if precision != torch.float64 else logits, to_torch(y)).mean()
        loss.backward()
        results.append({"logits": logits, "loss": loss, **{f"d{n}": t.grad for n, t in tensors.items()}})
    truth, own = results
    return {name: Expected(to_float64(truth[name]), to_float64(own[name])) for name in truth}


def compiled_for_turing(tmp_path):
    """A module.kernel whose kernels are sm_75's PTX, which every newer GPU runs."""
    import cupy
    from cuda.pathfinder import find_nvidia_header_directory
    from cupy.cuda import nvrtc

    from llmc.cuda import module

    headers = f"-I{find_nvidia_header_directory('cudart')}"

    @functools.cache
    def load(file, dtype, defines):
        program = nvrtc.createProgram((module.kernels_dir() / file).read_text(), file, [], [])
        nvrtc.compileProgram(program, [*module.options(dtype, defines), headers, "-arch=compute_75"])
        key = hashlib.sha1(" ".join((file, dtype, *defines)).encode()).hexdigest()  # the defines are longer than a name
        path = tmp_path / f"{key}.ptx"
        path.write_bytes(nvrtc.getPTX(program))
        return cupy.RawModule(path=str(path))

    def kernel(file, name, dtype, defines=(), smem=0, arch=None, strict=False):
        function = load(file, getattr(dtype, "name", dtype), tuple(defines)).get_function(name)
        if smem and smem + function.shared_size_bytes > 48 * 1024:
            function.max_dynamic_shared_size_bytes = 64 * 1024
        return function

    return kernel


@pytest.mark.full
@SETS
@pytest.mark.parametrize("dtype", ("fp32", "fp16"))
def test_passes_on_turing(ops, dtype, monkeypatch, tmp_path):
    """What a GPU of compute capability 7.5 runs: kernels for 64 KiB of shared memory, its own mma and copies."""
    monkeypatch.setattr(ops.module, "capability", lambda: 75)
    if not ops.module.kernel.__module__.startswith("llmc.simt"):
        monkeypatch.setattr(ops.module, "kernel", compiled_for_turing(tmp_path))
    check_passes(ops, dtype)


@SETS
@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_equal_pytorch(ops, dtype):
    check_passes(ops, dtype)


@SETS
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_logits_in_pieces(ops, dtype, monkeypatch):
    """34 positions, but room for the logits of 15: three pieces, the last a smaller one."""
    whole = build(ops, dtype).acts_flat.nbytes
    monkeypatch.setattr(llmc.model, "HEAD_ROWS", 15)
    model = check_passes(ops, dtype, all_logits=False)
    assert model.acts.output.shape == (1, 15, CONFIG.padded_vocab_size) and model.acts_flat.nbytes < whole


def check_passes(ops, dtype, all_logits=True):
    params, ((x, y),) = weights(CONFIG), batches(CONFIG, B, T, 1)
    model, expected = build(ops, dtype, params=params), torch_passes(params, x, y, DTYPES[dtype])
    logits = to_host(model.forward(x).output)
    V = CONFIG.vocab_size
    if all_logits:
        assert_close(dtype, "logits", logits[..., :V], expected["logits"])
        assert_bits(dtype, "padded logits", logits[..., V:], np.zeros_like(logits[..., V:]))
    assert_close(dtype, "validation loss", np.array(model.validate(x, y), np.float32), expected["loss"])
    model.forward(x)
    model.backward(x, y)
    assert_close(dtype, "loss", np.array(model.mean_loss(), np.float32), expected["loss"])
    for name in GPT2_TENSORS:
        assert_close(dtype, f"d{name}", to_host(getattr(model.grads, name)), expected[f"d{name}"])
    assert not to_host(model.grads.wpe)[T:].any() and not to_host(model.grads.wte)[V:].any()
    return model


@SETS
def test_ten_steps_equal_torch_adamw(ops):
    params, steps = weights(CONFIG), batches(CONFIG, B, T, 10)
    model = build(ops, params=params)
    losses = [step(model, [pair], t, LLMC)[0] for t, pair in enumerate(steps, 1)]
    truth, own = (torch_training(CONFIG, params, steps, d, LLMC)[0] for d in (torch.float64, torch.float32))
    assert_close("ten steps", "losses", np.array(losses, np.float32), Expected(np.array(truth), np.array(own)))


@SETS
@pytest.mark.parametrize("dtype, tolerance", (("bf16", 0.005), ("fp16", 0.002)))
def test_ten_steps_in_16_bits_follow_float64(ops, dtype, tolerance):
    params, steps = weights(CONFIG), batches(CONFIG, B, T, 10)
    params = {name: values.astype(DTYPES[dtype]).astype(np.float32) for name, values in params.items()}
    model = build(ops, dtype, params=params)
    losses = [step(model, [pair], t, LLMC)[0] for t, pair in enumerate(steps, 1)]
    truth = torch_training(CONFIG, params, steps, torch.float64, LLMC)[0]
    np.testing.assert_allclose(losses, truth, rtol=tolerance)


@SETS
@pytest.mark.parametrize("dtype", (pytest.param("fp32", marks=pytest.mark.full), "bf16"))
def test_recomputation_changes_no_bit(ops, dtype):
    pairs, results = batches(CONFIG, B, T, 4), []
    for recompute in (0, 1, 2):
        model = build(ops, dtype, recompute)
        losses = [step(model, pairs[i : i + 2], t, LLMC) for t, i in ((1, 0), (2, 2))]  # two micro-steps each
        results.append((losses, to_host(model.grads_flat).copy(), to_host(model.params_flat).copy()))
    for recompute, (losses, grads, params) in enumerate(results[1:], 1):
        assert losses == results[0][0]
        assert_bits(f"-r {recompute}", "gradients", grads, results[0][1])
        assert_bits(f"-r {recompute}", "parameters", params, results[0][2])
