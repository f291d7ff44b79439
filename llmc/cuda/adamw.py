"""AdamW over the flat arenas: kernels/adamw.cu (llm.c: llmc/adamw.cuh)."""

import numpy as np

from . import module

QUADS = 2  # kernels/adamw.cu has the same number


def check(params, master, ends, seeds, *others):
    N = params.size
    assert params.shape == (N,) and (master is None or (master.shape, master.dtype) == ((N,), np.float32)), params.shape
    assert ends.shape == seeds.shape == (16,), (ends.shape, seeds.shape)
    assert ends.dtype == np.int64 and seeds.dtype == np.uint32, (ends.dtype, seeds.dtype)
    assert all(array.shape == (N,) for array in others), [array.shape for array in others]


def launch(number, elements, params, master, grads, m, v, ends, decays, seeds, hyper, norm_squared, *floats):
    """Kernel `number`, whose threads take `elements` each."""
    check(params, master, ends, seeds, grads, m, v)
    beta1, beta2, eps, grad_clip = floats
    defines = module.grad_defines(params.dtype, (grads,))
    assert hyper.shape == (4,) and norm_squared.shape == (2,), (hyper.shape, norm_squared.shape)
    assert m.dtype == v.dtype == decays.dtype == hyper.dtype == norm_squared.dtype == np.float32, (m.dtype, hyper.dtype)
    kernel = module.kernel("adamw.cu", f"adamw_update_kernel{number}", params.dtype, defines)
    scalars = [np.float32(x) for x in (beta1, 1 - beta1, beta2, 1 - beta2, eps, grad_clip)]
    args = (params, master, grads, m, v, ends, decays, seeds, hyper, norm_squared, *scalars, np.int64(params.size))
    kernel((-(-params.size // (256 * elements)),), (256,), args)


def adamw_update1(params, master, grads, m, v, ends, decays, seeds, hyper, norm_squared, beta1, beta2, eps, grad_clip):
    """g = unscale * grads * (grad_clip / norm if grad_clip > 0 and norm > grad_clip else 1)
    norm = unscale * sqrt(norm_squared[0])
    m = beta1*m + (1-beta1)*g;  v = beta2*v + (1-beta2)*g^2
    params -= lr * ((m/c1) / (sqrt(v/c2) + eps) + decay*params);  c = 1 - beta^t.

    params (N,) floatX written    master None, or (N,) f32: then it is what is updated, and params becomes its rounding:
                                  stochastic in bf16, to nearest in fp16, a copy in fp32
    grads  (N,) floatX or f32     m, v   (N,) f32 written
    ends (16,) i64, decays (16,) f32, seeds (16,) u32: tensor i covers [ends[i-1], ends[i]); its weight decay, its noise
    hyper (4,) f32 = lr, c1, c2, unscale: 1 / the loss scale of fp16, else 1
    norm_squared (2,) f32: sums of squares of grads and of the losses; where one is not finite, nothing is written
    The last five arrays are on the device and read there: a captured CUDA graph sees fresh values.
    Cost: (12 + 12 + 2*itemsize) bytes per parameter with a master.
    Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/adamw.cuh adamw_update; Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    launch(1, 1, params, master, grads, m, v, ends, decays, seeds, hyper, norm_squared, beta1, beta2, eps, grad_clip)


def adamw_update2(params, master, grads, m, v, ends, decays, seeds, hyper, norm_squared, beta1, beta2, eps, grad_clip):
    """adamw_update1 with 16-byte accesses."""
    elements = 16 // params.itemsize
    args = (params, master, grads, m, v, ends, decays, seeds, hyper, norm_squared, beta1, beta2, eps, grad_clip)
    launch(2, elements, *args)


def adamw_update3(params, master, grads, m, v, ends, decays, seeds, hyper, norm_squared, beta1, beta2, eps, grad_clip):
    """adamw_update1 with 16 bytes of fp32 per thread and access, all loads in flight at once, and fast arithmetic."""
    args = (params, master, grads, m, v, ends, decays, seeds, hyper, norm_squared, beta1, beta2, eps, grad_clip)
    launch(3, 4 * QUADS, *args)


def init_from_master1(params, master, ends, seeds):
    """params = stochastic_round(master), with the noise of adamw_update.

    params (N,) floatX written (=);  master (N,) f32;  ends (16,) i64, seeds (16,) u32 on the device.
    Cost: (4 + itemsize) bytes per parameter.   Source: llm.c llmc/adamw.cuh init_from_master.
    """
    check(params, master, ends, seeds)
    kernel = module.kernel("adamw.cu", "init_from_master_kernel1", params.dtype)
    kernel((-(-params.size // 256),), (256,), (params, master, ends, seeds, np.int64(params.size)))


def init_from_master2(params, master, ends, seeds):
    """init_from_master1 with 4 elements of a thread at once, two times."""
    check(params, master, ends, seeds)
    kernel = module.kernel("adamw.cu", "init_from_master_kernel2", params.dtype)
    kernel((-(-params.size // (256 * 4 * QUADS)),), (256,), (params, master, ends, seeds, np.int64(params.size)))


adamw_update = adamw_update3  # whole sectors, and arithmetic that fits under the memory time
init_from_master = init_from_master2  # eight elements of a thread under way; runs once
