"""AdamW over the flat arenas (llm.c: llmc/adamw.cuh; Loshchilov and Hutter 2019, arXiv:1711.05101)."""

import math

import numpy as np

from llmc.buffers import Array

from . import device

BLOCK = 1 << 19  # elements; with fewer than 1 << 17 the threads spend their time handing the GIL to each other


def _blocks(ends: Array) -> list[tuple[int, int, int]]:
    """(start, stop, tensor) of each block. No block crosses from one tensor into the next."""
    starts = [0, *(int(e) for e in ends[:-1])]
    return [
        (a, min(a + BLOCK, int(end)), i)
        for i, (start, end) in enumerate(zip(starts, ends, strict=True))
        for a in range(start, int(end), BLOCK)
    ]


def adamw_update(
    params: Array, master: Array, grads: Array, m: Array, v: Array, ends: Array, decays: Array, seeds: Array,
    hyper: Array, norm_squared: Array, beta1: float, beta2: float, eps: float, grad_clip: float,
) -> None:  # fmt: skip
    """g = unscale * grads * (grad_clip / norm if grad_clip > 0 and norm > grad_clip else 1)
    norm = unscale * sqrt(norm_squared[0])
    m = beta1*m + (1-beta1)*g;  v = beta2*v + (1-beta2)*g^2
    params -= lr * ((m/c1) / (sqrt(v/c2) + eps) + decay*params);  c = 1 - beta^t

    params (N,) f32 written;  master None, or (N,) f32: then master is updated, and params becomes its copy;
    grads (N,) read;  m, v (N,) f32 written;  tensor i covers [ends[i-1], ends[i]), with weight decay decays[i];
    hyper (4,) f32 = lr, c1, c2, unscale, which is 1 / the loss scale of fp16, else 1;  seeds are unused in fp32
    norm_squared (2,) f32: sums of squares of grads and of the losses; if one is not finite, nothing is written.
    Source: llm.c llmc/adamw.cuh adamw_update.
    """
    N = params.size
    assert grads.shape == m.shape == v.shape == params.shape == (N,) and int(ends[-1]) == N, (params.shape, ends[-1])
    assert hyper.shape == (4,) and norm_squared.shape == (2,), (hyper.shape, norm_squared.shape)
    if not np.isfinite(norm_squared).all():
        return
    lr, c1, c2, unscale = (float(h) for h in hyper)
    norm = unscale * math.sqrt(norm_squared[0])
    scale = unscale * (grad_clip / norm if grad_clip > 0 and norm > grad_clip else 1.0)
    # The bias corrections become two scalars: lr * (m/c1) / (sqrt(v/c2) + eps) = rate * m / (sqrt(v) + epsilon).
    rate, epsilon = lr * math.sqrt(c2) / c1, eps * math.sqrt(c2)
    to_m, to_v = (1.0 - beta1) * scale, math.sqrt(1.0 - beta2) * scale
    weights = params if master is None else master
    blocks = _blocks(ends)

    def body(i: int) -> None:
        a, b, tensor = blocks[i]
        t = device.scratch(b - a)
        g, mm, vv, w = grads[a:b], m[a:b], v[a:b], weights[a:b]
        np.multiply(g, to_m, out=t)
        mm *= beta1
        mm += t
        np.multiply(g, to_v, out=t)
        t *= t
        vv *= beta2
        vv += t
        np.sqrt(vv, out=t)
        t += epsilon
        np.divide(mm, t, out=t)
        t *= rate
        if decays[tensor] != 0.0:
            w *= 1.0 - lr * float(decays[tensor])
        w -= t
        if master is not None:
            params[a:b] = w

    device.parallel(body, len(blocks))


def init_from_master(params: Array, master: Array, ends: Array, seeds: Array) -> None:
    """params = master

    params (N,) f32 written (=);  master (N,) f32;  ends, seeds are unused in fp32, where nothing is rounded.
    """
    assert params.shape == master.shape and int(ends[-1]) == params.size, (params.shape, master.shape)
    np.copyto(params, master)
