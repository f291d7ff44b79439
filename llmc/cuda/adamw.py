"""AdamW over the flat arenas: kernels/adamw.cu (llm.c: llmc/adamw.cuh)."""

import numpy as np

from llmc.buffers import Array

from . import module

BLOCK = 256
QUADS = 2  # groups of 4 elements that a thread has on their way


def defines(tensors: int) -> tuple[str, ...]:
    """The -D options of kernels/adamw.cu for parameters of so many tensors."""
    return f"TENSORS={tensors}", f"BLOCK={BLOCK}", f"QUADS={QUADS}"


def adamw_update(
    params: Array, master: Array, grads: Array, m: Array, v: Array, ends: Array, decays: Array, seeds: Array,
    hyper: Array, norm_squared: Array, beta1: float, beta2: float, eps: float, grad_clip: float,
) -> None:  # fmt: skip
    """g = unscale * grads * (grad_clip / norm if grad_clip > 0 and norm > grad_clip else 1)
    norm = unscale * sqrt(norm_squared[0])
    m = beta1*m + (1-beta1)*g;  v = beta2*v + (1-beta2)*g^2
    params -= lr * ((m/c1) / (sqrt(v/c2) + eps) + decay*params);  c = 1 - beta^t.

    params (N,) floatX written    master None, or (N,) f32: then it is what is updated, and params becomes its rounding:
                                  stochastic in bf16, to nearest in fp16, a copy in fp32
    grads  (N,) floatX or f32     m, v   (N,) f32 written
    ends (K,) i64, decays (K,) f32, seeds (K,) u32: tensor i covers [ends[i-1], ends[i]); its weight decay, its noise
    hyper (4,) f32 = lr, c1, c2, unscale: 1 / the loss scale of fp16, else 1
    norm_squared (2,) f32: sums of squares of grads and of the losses; where one is not finite, nothing is written
    The last five arrays are on the device and read there: a captured CUDA graph sees fresh values.
    Cost: (12 + 12 + 2*itemsize) bytes per parameter with a master.
    Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/adamw.cuh adamw_update; Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    check(params, master, ends, seeds, grads, m, v)
    args = update_args(
        params, master, grads, m, v, ends, decays, seeds, hyper, norm_squared, beta1, beta2, eps, grad_clip
    )
    options = (*defines(ends.size), *module.grad_defines(params.dtype, (grads,)))
    kernel = module.kernel("adamw.cu", "adamw_update_kernel", params.dtype, options)
    kernel((blocks(params),), (BLOCK,), args)


def init_from_master(params: Array, master: Array, ends: Array, seeds: Array) -> None:
    """params = stochastic_round(master), with the noise of adamw_update.

    params (N,) floatX written (=);  master (N,) f32;  ends (K,) i64, seeds (K,) u32 on the device: K tensors.
    Cost: (4 + itemsize) bytes per parameter.   Source: llm.c llmc/adamw.cuh init_from_master.
    """
    check(params, master, ends, seeds)
    assert master is not None, "there are no master weights to round"
    kernel = module.kernel("adamw.cu", "init_from_master_kernel", params.dtype, defines(ends.size))
    kernel((blocks(params),), (BLOCK,), (params, master, ends, seeds, np.int64(params.size)))


def blocks(params: Array) -> int:
    return -(-params.size // (BLOCK * 4 * QUADS))


def check(params: Array, master: Array, ends: Array, seeds: Array, *others: Array) -> None:
    N = params.size
    assert params.shape == (N,) and (master is None or (master.shape, master.dtype) == ((N,), np.float32)), params.shape
    assert ends.shape == seeds.shape == (ends.size,), (ends.shape, seeds.shape)
    assert ends.dtype == np.int64 and seeds.dtype == np.uint32, (ends.dtype, seeds.dtype)
    assert all(array.shape == (N,) for array in others), [array.shape for array in others]


def update_args(
    params: Array, master: Array, grads: Array, m: Array, v: Array, ends: Array, decays: Array, seeds: Array,
    hyper: Array, norm_squared: Array, beta1: float, beta2: float, eps: float, grad_clip: float,
) -> tuple:  # fmt: skip
    """The arguments of the update's kernels, which adamw_update and its rungs have in common."""
    assert hyper.shape == (4,) and norm_squared.shape == (2,), (hyper.shape, norm_squared.shape)
    assert decays.shape == ends.shape, (decays.shape, ends.shape)
    assert m.dtype == v.dtype == decays.dtype == hyper.dtype == norm_squared.dtype == np.float32, (m.dtype, hyper.dtype)
    scalars = [np.float32(x) for x in (beta1, 1 - beta1, beta2, 1 - beta2, eps, grad_clip)]
    return params, master, grads, m, v, ends, decays, seeds, hyper, norm_squared, *scalars, np.int64(params.size)
