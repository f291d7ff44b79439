"""The rungs of the sum of squares."""

import numpy as np

from llmc.buffers import Array

from .. import module
from ..global_norm import MAX_BLOCKS, check, global_norm_squared
from .rung import Rung


def one_block(out: Array, scratch: Array, values: Array) -> None:
    """Rung 1 of global_norm_squared: one block walks the array."""
    check(out, scratch, values)
    kernel = module.kernel("ladder/global_norm_01_one_block.cu", "global_norm_squared_one_block", values.dtype)
    kernel((1,), (1024,), (out, values, np.int64(values.size)))


def many_blocks(out: Array, scratch: Array, values: Array) -> None:
    """Rung 2 of global_norm_squared: many blocks, whose sums a second kernel adds."""
    check(out, scratch, values)
    blocks = max(1, min(MAX_BLOCKS, -(-values.size // 256)))
    kernel = module.kernel("ladder/global_norm_02_many_blocks.cu", "global_norm_squared_many_blocks", values.dtype)
    kernel((blocks,), (256,), (scratch, values, np.int64(values.size)))
    combine = module.kernel("ladder/global_norm_02_many_blocks.cu", "global_norm_combine", values.dtype)
    combine((1,), (256,), (out, scratch, np.int32(blocks)))


RUNGS = (
    Rung("global_norm_squared", 1, one_block),
    Rung("global_norm_squared", 2, many_blocks),
    Rung("global_norm_squared", 4, global_norm_squared, production=True),
)
