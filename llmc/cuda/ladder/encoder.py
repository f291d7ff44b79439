"""The rungs of the embeddings."""

import numpy as np
from numpy import int32 as i32

from llmc.buffers import Array

from .. import module
from ..encoder import PIECE, check_backward, check_forward, encoder_backward, encoder_forward, list_size
from .rung import Rung

NAIVE, SORTED, PIECES = "ladder/encoder_01_naive.cu", "ladder/encoder_02_sorted.cu", "ladder/encoder_03_pieces.cu"


def forward_naive(out: Array, inp: Array, wte: Array, wpe: Array) -> None:
    """Rung 1 of encoder_forward: one thread per element."""
    B, T, C = check_forward(out, inp, wte, wpe)
    kernel = module.kernel(NAIVE, "encoder_forward_naive", out.dtype)
    kernel((-(-out.size // 256),), (256,), (out, inp, wte, wpe, i32(T), i32(C), np.int64(out.size)))


def backward_naive(dwte: Array, dwpe: Array, scratch: Array, dout: Array, inp: Array, seed: Array) -> None:
    """Rung 1 of encoder_backward: one block for each row of the vocabulary reads all tokens."""
    B, T, C = check_backward(dwte, dwpe, scratch, dout, inp, seed)
    defines = module.grad_defines(dout.dtype, (dwte, dwpe))
    wpe = module.kernel(NAIVE, "wpe_backward_naive", dout.dtype, defines)
    wpe((-(-T * C // 256),), (256,), (dwpe, dout, seed, i32(B), i32(T), i32(C)))
    wte = module.kernel(NAIVE, "wte_backward_naive", dout.dtype, defines)
    wte((dwte.shape[0],), (min(256, -(-C // 32) * 32),), (dwte, dout, inp, seed, i32(B * T), i32(C)))


def backward_sorted(dwte: Array, dwpe: Array, scratch: Array, dout: Array, inp: Array, seed: Array) -> None:
    """Rung 2 of encoder_backward: positions are sorted by token, so that each row of dout is read once."""
    B, T, C = check_backward(dwte, dwpe, scratch, dout, inp, seed)
    defines = module.grad_defines(dout.dtype, (dwte, dwpe))
    wpe_backward(SORTED, "wpe_backward_sorted", dwpe, dout, seed, defines)
    positions = sort_by_token(SORTED, scratch, inp, dwte.shape[0], dout.dtype, defines)
    packs = C // (16 // dout.itemsize)
    block = min(128, -(-packs // 32) * 32)
    kernel = module.kernel(SORTED, "wte_backward_sorted", dout.dtype, defines)
    kernel((B * T, -(-packs // block)), (block,), (dwte, dout, inp, positions, seed, i32(B * T), i32(C)))


def backward_pieces(dwte: Array, dwpe: Array, scratch: Array, dout: Array, inp: Array, seed: Array) -> None:
    """Rung 3 of encoder_backward: every block has equal work, however often a token occurs."""
    B, T, C = check_backward(dwte, dwpe, scratch, dout, inp, seed)
    defines = (f"PIECE={PIECE}", *module.grad_defines(dout.dtype, (dwte, dwpe)))
    wpe_backward(PIECES, "wpe_backward_pieces", dwpe, dout, seed, defines)
    positions = sort_by_token(PIECES, scratch, inp, dwte.shape[0], dout.dtype, defines)
    partials = scratch[2 * list_size(B * T) :].view(np.float32)
    packs = C // (16 // dout.itemsize)
    block = min(128, -(-packs // 32) * 32)
    grid = (-(-B * T // PIECE), -(-packs // block))
    pieces = module.kernel(PIECES, "wte_backward_pieces", dout.dtype, defines)
    pieces(grid, (block,), (dwte, partials, dout, inp, positions, seed, i32(B * T), i32(C)))
    combine = module.kernel(PIECES, "wte_combine", dout.dtype, defines)
    combine(grid, (block,), (dwte, partials, inp, positions, seed, i32(B * T), i32(C)))


def wpe_backward(file: str, name: str, dwpe: Array, dout: Array, seed: Array, defines: tuple[str, ...]) -> None:
    """dwpe of rungs 2 and 3: one thread per 16 bytes."""
    B, T, C = dout.shape
    packs = T * C // (16 // dout.itemsize)
    kernel = module.kernel(file, name, dout.dtype, defines)
    kernel((-(-packs // 128),), (128,), (dwpe, dout, seed, i32(B), i32(T), i32(C)))


def sort_by_token(file: str, scratch: Array, inp: Array, Vp: int, dtype: np.dtype, defines: tuple[str, ...]) -> Array:
    """Positions 0..N-1 ordered by (token, position), in scratch: two passes of a stable radix sort."""
    N = inp.size
    other, positions = scratch[:N], scratch[list_size(N) :][:N]
    bits = max(2, (Vp - 1).bit_length())
    low, high = (bits + 1) // 2, bits // 2
    block = min(1024, -(-N // 64) * 32)  # a warp for every 64 positions
    kernel = module.kernel(file, "sort_by_token_kernel", dtype, defines)
    kernel((1 << low,), (block,), (other, None, inp, i32(N), i32(0), i32((1 << low) - 1)))
    kernel((1 << high,), (block,), (positions, other, inp, i32(N), i32(low), i32((1 << high) - 1)))
    return positions


RUNGS = (
    Rung("encoder_forward", 1, forward_naive),
    Rung("encoder_forward", 2, encoder_forward, production=True),
    Rung("encoder_backward", 1, backward_naive),
    Rung("encoder_backward", 2, backward_sorted),
    Rung("encoder_backward", 3, backward_pieces),
    Rung("encoder_backward", 5, encoder_backward, production=True),
)
