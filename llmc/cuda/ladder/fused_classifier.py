"""The rungs of the classifier."""

import numpy as np

from llmc.buffers import Array

from .. import module
from ..fused_classifier import check, in_registers, in_shared_memory, launch_rows
from .rung import Rung


def naive(logits: Array, losses: Array, dloss: float, targets: Array, V: int, write_dlogits: bool = True) -> None:
    """Rung 1 of fused_classifier: one thread per row."""
    N, Vp = check(logits, losses, targets, V)
    kernel = module.kernel("ladder/fused_classifier_01_naive.cu", "fused_classifier_naive", logits.dtype)
    dims = (np.int32(N), np.int32(V), np.int32(Vp), np.int32(bool(write_dlogits)))
    kernel((-(-N // 32),), (32,), (logits, losses, targets, np.float32(dloss), *dims))


def block_per_row(
    logits: Array, losses: Array, dloss: float, targets: Array, V: int, write_dlogits: bool = True
) -> None:
    """Rung 2 of fused_classifier: one block per row, three sweeps."""
    args = (logits, losses, dloss, targets, V, write_dlogits)
    launch_rows("ladder/fused_classifier_02_block_per_row.cu", "fused_classifier_block_per_row", 1024, *args)


def online(logits: Array, losses: Array, dloss: float, targets: Array, V: int, write_dlogits: bool = True) -> None:
    """Rung 3 of fused_classifier: two sweeps of 16-byte accesses."""
    args = (logits, losses, dloss, targets, V, write_dlogits)
    launch_rows("ladder/fused_classifier_03_online.cu", "fused_classifier_online", 1024, *args)


RUNGS = (
    Rung("fused_classifier", 1, naive),
    Rung("fused_classifier", 2, block_per_row),
    Rung("fused_classifier", 3, online),
    Rung("fused_classifier", 4, in_registers, production=True),
    Rung("fused_classifier", 5, in_shared_memory, production=True),
)
