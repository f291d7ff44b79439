"""The rungs of AdamW and of the first rounding of the parameters."""

import numpy as np

from llmc.buffers import Array

from .. import module
from ..adamw import adamw_update, check, init_from_master, update_args
from .rung import Rung


def update_naive(
    params: Array, master: Array, grads: Array, m: Array, v: Array, ends: Array, decays: Array, seeds: Array,
    hyper: Array, norm_squared: Array, beta1: float, beta2: float, eps: float, grad_clip: float,
) -> None:  # fmt: skip
    """Rung 1 of adamw_update: one thread per element."""
    arrays = (params, master, grads, m, v, ends, decays, seeds, hyper, norm_squared)
    launch("ladder/adamw_01_naive.cu", "adamw_update_naive", 1, *arrays, beta1, beta2, eps, grad_clip)


def update_packs(
    params: Array, master: Array, grads: Array, m: Array, v: Array, ends: Array, decays: Array, seeds: Array,
    hyper: Array, norm_squared: Array, beta1: float, beta2: float, eps: float, grad_clip: float,
) -> None:  # fmt: skip
    """Rung 2 of adamw_update: one thread per 16 bytes of params."""
    arrays = (params, master, grads, m, v, ends, decays, seeds, hyper, norm_squared)
    elements = 16 // params.itemsize
    launch("ladder/adamw_02_packs.cu", "adamw_update_packs", elements, *arrays, beta1, beta2, eps, grad_clip)


def launch(file: str, name: str, elements: int, params: Array, master: Array, grads: Array, m: Array, v: Array,
           ends: Array, *rest: Array) -> None:  # fmt: skip
    """The kernel `name`, whose threads take so many elements each."""
    check(params, master, ends, rest[1], grads, m, v)
    defines = (f"TENSORS={ends.size}", *module.grad_defines(params.dtype, (grads,)))
    kernel = module.kernel(file, name, params.dtype, defines)
    kernel((-(-params.size // (256 * elements)),), (256,), update_args(params, master, grads, m, v, ends, *rest))


def init_naive(params: Array, master: Array, ends: Array, seeds: Array) -> None:
    """Rung 1 of init_from_master: one thread per element."""
    check(params, master, ends, seeds)
    defines = (f"TENSORS={ends.size}",)
    kernel = module.kernel("ladder/adamw_01_naive.cu", "init_from_master_naive", params.dtype, defines)
    kernel((-(-params.size // 256),), (256,), (params, master, ends, seeds, np.int64(params.size)))


RUNGS = (
    Rung("adamw_update", 1, update_naive),
    Rung("adamw_update", 2, update_packs),
    Rung("adamw_update", 3, adamw_update, production=True),
    Rung("init_from_master", 1, init_naive),
    Rung("init_from_master", 2, init_from_master, production=True),
)
