"""What the ops must compute: plain PyTorch math, an independent GPT-2, and the comparison used by every op test.

Every reference is run twice: in float64 on the (already rounded) inputs, which is the truth, and in the dtype under
test, which is PyTorch's own result. A result passes when

    max|got - truth| <= 2 * max|torch - truth| + ulps * eps(dtype) * max|truth| + 4 * eps(float32) * scale

The second term is the rounding of the stored result (`ulps`, 1 unless a test states another number), the third the
error of float32 accumulation: `scale` is the size of the summed terms, max|truth| unless a test gives the sum of their
absolute values. Nothing is tuned per tensor. Tests compare bits instead where there is no
arithmetic, or one IEEE addition.
"""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F

FP32, FP16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
DTYPES = {"fp32": FP32, "fp16": FP16, "bf16": BF16}
EPS = {FP32: 2.0**-23, FP16: 2.0**-10, BF16: 2.0**-7}  # distance from 1 to the next number
TORCH_DTYPES = {FP32: torch.float32, FP16: torch.float16, BF16: torch.bfloat16}

# The op sets: file -> op -> {array argument that the op writes: "=" overwritten | "+=" read and written}.
# Arguments not listed are inputs and must come back unchanged, bit for bit; `scratch` may hold anything.
OPS = {
    "encoder": {
        "encoder_forward": {"out": "="},
        "encoder_backward": {"dwte": "+=", "dwpe": "+="},
    },
    "layernorm": {
        "layernorm_forward": {"out": "=", "mean": "=", "rstd": "="},
        "residual_forward": {"out": "="},
        "fused_residual_forward": {"residual": "=", "normed": "=", "mean": "=", "rstd": "="},
        "layernorm_backward": {"dinp": "+=", "dweight": "+=", "dbias": "+="},
    },
    "matmul": {
        "matmul_forward": {"out": "=", "pre_gelu": "="},
        "matmul_backward": {"dinp": "=", "dweight": "+=", "dbias": "+="},  # dweight, dbias "=" with accumulate=False
    },
    "attention": {
        "attention_forward": {"out": "=", "att": "="},
        "attention_backward": {"dqkvr": "="},
    },
    "gelu": {
        "gelu_forward": {"out": "="},
        "gelu_backward_inplace": {"d_in_out": "+="},
    },
    "fused_classifier": {
        "fused_classifier": {"logits": "+=", "losses": "+="},
    },
    "adamw": {
        "adamw_update": {"params": "+=", "master": "+=", "m": "+=", "v": "+="},
        "init_from_master": {"params": "="},
    },
    "global_norm": {
        "global_norm_squared": {"out": "="},
    },
}


def file_of(name):
    """The op's file: layernorm_forward -> layernorm."""
    return next(file for file, names in OPS.items() if name in names)


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


def normal(rng, shape, dtype=FP32, scale=1.0, mean=0.0):
    """Gaussian numbers, rounded to dtype."""
    return (rng.standard_normal(shape) * scale + mean).astype(np.float32).astype(dtype)


def to_torch(array, dtype=None):
    """A torch tensor with the same values; bf16 is passed as 16 bits, as NumPy and torch share no bf16."""
    array = np.ascontiguousarray(array)
    if array.dtype == BF16:
        tensor = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array.copy())
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def to_float64(tensor):
    return tensor.detach().to(torch.float64).numpy()


def largest(array):
    """max|array| as a Python float."""
    return float(np.max(np.abs(array.astype(np.float64))))


def bits(array):
    """The array's raw bytes, one row per element."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.itemsize)


# ---------------------------------------------------------------------------------------------------------------------
# Expected results


class Expected(NamedTuple):
    """One tensor twice, both as float64 arrays: the truth, and what PyTorch makes of it in the dtype under test."""

    truth: np.ndarray
    torch: np.ndarray


def forward(function, *inputs, dtype=None):
    """Expected results of function(*inputs). PyTorch computes in dtype (default: that of the first input)."""
    low = TORCH_DTYPES[dtype or inputs[0].dtype]
    with torch.no_grad():
        truth = function(*(to_torch(x, torch.float64) for x in inputs))
        own = function(*(to_torch(x, low) for x in inputs))
    if isinstance(truth, torch.Tensor):
        return Expected(to_float64(truth), to_float64(own))
    return [Expected(to_float64(t), to_float64(o)) for t, o in zip(truth, own, strict=True)]


def backward(function, dout, *inputs, dtype=None):
    """Expected gradients of sum(function(*inputs) * dout) for every floating-point input, through autograd."""
    results = []
    for where in (torch.float64, TORCH_DTYPES[dtype or inputs[0].dtype]):
        tensors = [to_torch(x, where) for x in inputs]
        wanted = [t.requires_grad_() for t in tensors if t.is_floating_point()]
        grads = torch.autograd.grad(function(*tensors), wanted, to_torch(dout, where))
        results.append([to_float64(g) for g in grads])
    return [Expected(truth, own) for truth, own in zip(*results, strict=True)]


def added(before, expected, times=1):
    """The result of `before += gradient`, `times` over: PyTorch rounds the gradient and each sum to before's dtype."""
    own, gradient = to_torch(before), torch.from_numpy(expected.torch).to(TORCH_DTYPES[before.dtype])
    for _ in range(times):
        own = own + gradient
    return Expected(before.astype(np.float64) + times * expected.truth, to_float64(own))


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons. `op` is the fixture of conftest.py; only its text is used, so a string will do.


def assert_close(op, tensor, got, expected, ulps=1.0, scale=None):
    """Fails, naming the worst element, unless `got` obeys the rule at the top of this file."""
    truth, own = expected
    assert got.shape == truth.shape, f"{op}: {tensor} has shape {got.shape}, expected {truth.shape}"
    if got.size == 0:
        return
    tolerance = 2 * largest(own - truth) + ulps * EPS[got.dtype] * largest(truth)
    tolerance += 4 * EPS[FP32] * (largest(truth) if scale is None else scale)
    error = np.abs(got.astype(np.float64) - truth)
    error = np.where(np.isfinite(error), error, np.inf)
    worst = np.unravel_index(np.argmax(error), error.shape)
    assert error[worst] <= tolerance, (
        f"{op}: {tensor} is off by {error[worst]:.4g} (allowed {tolerance:.4g}) at {tuple(map(int, worst))}: "
        f"got {float(got[worst])!r}, expected {float(truth[worst])!r}; shape {got.shape}, dtype {got.dtype}"
    )


def assert_bits(op, tensor, got, expected):
    """Fails, naming the first element, unless both arrays hold the same bits (NaNs included)."""
    assert got.shape == expected.shape and got.dtype == expected.dtype, (
        f"{op}: {tensor} is {got.shape} {got.dtype}, expected {expected.shape} {expected.dtype}"
    )
    wrong = np.nonzero((bits(got) != bits(expected)).any(axis=1))[0]
    if wrong.size:
        first = np.unravel_index(wrong[0], got.shape)
        raise AssertionError(
            f"{op}: {tensor} differs in {wrong.size} of {got.size} elements, first at {tuple(map(int, first))}: "
            f"got {got[first]!r}, expected {expected[first]!r}; shape {got.shape}, dtype {got.dtype}"
        )


def neighbours(value):
    """The two bf16 numbers around each float64 value, as float64: what stochastic rounding may choose from."""
    magnitude = np.abs(value).astype(np.float32)  # this may round up to a bf16 number: step back below
    low = (magnitude.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    above = low.astype(np.float64) > np.abs(value)
    low = np.where(above, (low.view(np.uint32) - np.uint32(0x10000)).view(np.float32), low)
    high = (low.view(np.uint32) + np.uint32(0x10000)).view(np.float32).astype(np.float64)
    low = low.astype(np.float64)
    high = np.where(low == np.abs(value), low, high)  # a bf16 number stays what it is
    sign = np.where(value < 0, -1.0, 1.0)
    return np.minimum(sign * low, sign * high), np.maximum(sign * low, sign * high)


def assert_stochastically_rounded(op, tensor, got, value, slack):
    """bf16 `got` is one of the two neighbours of float64 `value`, itself known within `slack` (scalar or array)."""
    lowest, highest = neighbours(value - slack)[0], neighbours(value + slack)[1]
    got64 = got.astype(np.float64)
    wrong = ~((lowest <= got64) & (got64 <= highest))
    if wrong.any():
        first = np.unravel_index(np.argmax(wrong), got.shape)
        raise AssertionError(
            f"{op}: {tensor} at {tuple(map(int, first))}: got {got64[first]!r}, which is no bf16 neighbour of "
            f"{value[first]!r}; {wrong.sum()} such elements, shape {got.shape}, dtype {got.dtype}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The ops as PyTorch has them. Attention is written out, so that the truth does not come from a fused kernel.


def encoder(wte, wpe, inp):
    return wte[inp.long()] + wpe[: inp.shape[1]]


def layernorm(inp, weight, bias):
    return F.layer_norm(inp, inp.shape[-1:], weight, bias, 1e-5)


def layernorm_statistics(inp):
    variance, mean = torch.var_mean(inp, dim=-1, correction=0)
    return mean, torch.rsqrt(variance + 1e-5)


def linear(inp, weight, bias=None):
    return F.linear(inp, weight, bias)


def gelu(inp):
    return F.gelu(inp, approximate="tanh")


def split_heads(qkvr, NH):
    """(B,T,3C) -> q, k, v, each (B,NH,T,HS)."""
    B, T, C3 = qkvr.shape
    return qkvr.view(B, T, 3, NH, C3 // 3 // NH).permute(2, 0, 3, 1, 4)


def causal_scores(qkvr, NH):
    """(B,NH,T,T) scaled scores, -inf above the diagonal."""
    q, k, _ = split_heads(qkvr, NH)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)


def attention(qkvr, NH):
    B, T, C3 = qkvr.shape
    q, k, v = split_heads(qkvr, NH)
    if qkvr.dtype == torch.float64:
        out = torch.softmax(causal_scores(qkvr, NH), dim=-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).reshape(B, T, C3 // 3)


def attention_lse(qkvr, NH):
    return torch.logsumexp(causal_scores(qkvr, NH), dim=-1)


def cross_entropy(logits, targets):
    """Loss of every position: logits (B,T,V), targets (B,T) -> (B,T)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), reduction="none").view(targets.shape)


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2 as functions over llm.c's 16 parameter tensors, in whatever dtype they have

GPT2_TENSORS = ("wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb",
                "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb", "lnfw", "lnfb")  # fmt: skip


def gpt2_shapes(L, C, Vp, maxT):
    """Shapes of the 16 tensors: one leading dimension L for those that every layer has."""
    return {
        "wte": (Vp, C), "wpe": (maxT, C), "ln1w": (L, C), "ln1b": (L, C), "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C),
        "attprojw": (L, C, C), "attprojb": (L, C), "ln2w": (L, C), "ln2b": (L, C), "fcw": (L, 4 * C, C),
        "fcb": (L, 4 * C), "fcprojw": (L, C, 4 * C), "fcprojb": (L, C), "lnfw": (C,), "lnfb": (C,),
    }  # fmt: skip


def gpt2_logits(params, inp, NH, V):
    """Logits (B,T,V) for tokens inp (B,T): pre-norm blocks, tanh GELU, output layer = token embedding, no dropout."""
    x = params["wte"][inp.long()] + params["wpe"][: inp.shape[1]]
    for l in range(params["ln1w"].shape[0]):  # noqa: E741
        w = {name: params[name][l] for name in GPT2_TENSORS[2:14]}
        qkvr = F.linear(layernorm(x, w["ln1w"], w["ln1b"]), w["qkvw"], w["qkvb"])
        x = x + F.linear(attention(qkvr, NH), w["attprojw"], w["attprojb"])
        fch = gelu(F.linear(layernorm(x, w["ln2w"], w["ln2b"]), w["fcw"], w["fcb"]))
        x = x + F.linear(fch, w["fcprojw"], w["fcprojb"])
    return F.linear(layernorm(x, params["lnfw"], params["lnfb"]), params["wte"][:V])


def gpt2_loss(params, inp, targets, NH, V):
    """Mean loss in nats per token."""
    return cross_entropy(gpt2_logits(params, inp, NH, V), targets).mean()


def noise(position, seed):
    """SquirrelNoise5 as its description states it, on Python integers."""
    mask = 0xFFFFFFFF
    position = (position & mask) + 198491317 * (position >> 32)
    m = (position * 0xD2A80A3F + seed) & mask
    m = ((m ^ (m >> 9)) + 0xA884F197) & mask
    m = ((m ^ (m >> 11)) * 0x6C736F4B) & mask
    m = ((m ^ (m >> 13)) + 0xB79F3ABB) & mask
    m = ((m ^ (m >> 15)) * 0x1B56C4F5) & mask
    return m ^ (m >> 17)
