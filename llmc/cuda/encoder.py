"""Token and position embeddings: kernels/encoder.cu (llm.c: llmc/encoder.cuh)."""

import numpy as np
from numpy import int32 as i32

from llmc.buffers import Array

from . import module

PIECE = 32  # entries of the list of sorted tokens that one block sums
BLOCK, SORT_BLOCK = 128, 1024  # most threads of a block


def defines() -> tuple[str, ...]:
    """The -D options of kernels/encoder.cu."""
    return f"PIECE={PIECE}", f"BLOCK={BLOCK}", f"SORT_BLOCK={SORT_BLOCK}"


def encoder_scratch_size(B: int, T: int, C: int, Vp: int) -> int:
    """int32 elements of scratch that encoder_backward wants: two lists of tokens and positions, and two fp32 rows per
    piece."""
    return 4 * list_size(B * T) + pieces_of(B * T) * 2 * C


def encoder_forward(out: Array, inp: Array, wte: Array, wpe: Array) -> None:
    """out[b,t] = wte[inp[b,t]] + wpe[t].

    out  (B, T, C) floatX written (=)      inp (B, T) i32, ids below Vp (the loader has checked)
    wte  (Vp, C)   floatX                  wpe (maxT, C) floatX, T <= maxT
    Requires: C % 8 == 0, all arrays C-contiguous.
    Cost: (2*B*T + T) * C * itemsize bytes.
    Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/encoder.cuh encoder_forward.
    """
    B, T, C = check_forward(out, inp, wte, wpe)
    packs = out.size // (16 // out.itemsize)
    assert packs < 2**31, packs
    kernel = module.kernel("encoder.cu", "encoder_forward_kernel", out.dtype, defines())
    kernel((-(-packs // 256),), (256,), (out, inp, wte, wpe, i32(T), i32(C), i32(packs)))


def encoder_backward(dwte: Array, dwpe: Array, scratch: Array, dout: Array, inp: Array, seed: Array) -> None:
    """dwte[inp[b,t]] += dout[b,t];  dwpe[t] += dout[b,t].

    dwte    (Vp, C) floatX or f32 accumulated (+=)    dwpe (maxT, C), the same dtype, accumulated (+=): rows t < T
    scratch i32, encoder_scratch_size(B, T, C, Vp)
    dout    (B, T, C) floatX                   inp (B, T) i32
    seed    (1,) u32 on the device: noise of the stochastic rounding of both += in bf16; unused in fp32 and fp16.
    Sums are fp32 in the order of positions, each element is rounded once: bitwise repeatable. The time hardly depends
    on how often the most frequent token occurs.
    Requires: C % 8 == 0, all arrays C-contiguous.
    Cost: B*T*C * itemsize bytes once for each table.
    Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/encoder.cuh encoder_backward.
    """
    B, T, C = check_backward(dwte, dwpe, scratch, dout, inp, seed)
    N, packs, pieces = B * T, C // (16 // dout.itemsize), pieces_of(B * T)
    tokens, positions = sort_by_token(scratch, inp, dwte.shape[0], dout.dtype)
    partials = scratch[4 * list_size(N) :].view(np.float32)
    block = min(BLOCK, -(-packs // 32) * 32)
    columns = -(-packs // block)
    options = (*defines(), *module.grad_defines(dout.dtype, (dwte, dwpe)))
    tables = module.kernel("encoder.cu", "tables_backward_kernel", dout.dtype, options)
    args = (dwte, partials, dwpe, dout, tokens, positions, seed, *(i32(n) for n in (pieces, columns, B, T, C)))
    tables((pieces * columns + -(-T * packs // block),), (block,), args)
    combine = module.kernel("encoder.cu", "wte_combine_kernel", dout.dtype, options)
    combine((pieces, columns), (block,), (dwte, partials, tokens, seed, i32(N), i32(C)))


def sort_by_token(scratch: Array, inp: Array, Vp: int, dtype: np.dtype) -> tuple[Array, Array]:
    """(tokens, positions), ordered by token and then by position, in scratch: three passes of a stable radix sort, the
    low digit first. The last pass writes to where the first one did."""
    N, size = inp.size, list_size(inp.size)
    first, second = ((scratch[i * size :][:N], scratch[(i + 1) * size :][:N]) for i in (0, 2))
    bits, shift, tokens, positions = max(3, (Vp - 1).bit_length()), 0, inp, None
    block = min(SORT_BLOCK, -(-N // 64) * 32)  # a warp for every 64 positions
    sort = module.kernel("encoder.cu", "sort_by_token_kernel", dtype, defines())
    for digit, to in (((bits + 2) // 3, first), ((bits + 1) // 3, second), (bits // 3, first)):
        args = (*to, tokens, positions, i32(N), i32(shift), i32((1 << digit) - 1))
        sort((1 << digit,), (block,), args)
        (tokens, positions), shift = to, shift + digit
    return tokens, positions


def pieces_of(N: int) -> int:
    """Pieces of the sorted list of N positions."""
    return -(-N // PIECE)


def list_size(N: int) -> int:
    """Elements of a list of N positions, padded so that what follows it starts at 16 bytes."""
    return -(-N // 4) * 4


def check_forward(out: Array, inp: Array, wte: Array, wpe: Array) -> tuple[int, int, int]:
    """(B, T, C)"""
    B, T, C = out.shape
    assert inp.shape == (B, T) and wte.shape[1] == wpe.shape[1] == C, (out.shape, inp.shape, wte.shape, wpe.shape)
    assert T <= wpe.shape[0] and C % 8 == 0, (T, wpe.shape, C)
    assert out.dtype == wte.dtype == wpe.dtype and inp.dtype == np.int32, (out.dtype, wte.dtype, wpe.dtype, inp.dtype)
    return B, T, C


def check_backward(
    dwte: Array, dwpe: Array, scratch: Array, dout: Array, inp: Array, seed: Array
) -> tuple[int, int, int]:
    """(B, T, C)"""
    B, T, C = dout.shape
    assert inp.shape == (B, T) and dwte.shape[1] == dwpe.shape[1] == C, (dout.shape, inp.shape, dwte.shape, dwpe.shape)
    assert T <= dwpe.shape[0] and C % 8 == 0, (T, dwpe.shape, C)
    assert inp.dtype == scratch.dtype == np.int32 and seed.dtype == np.uint32, (inp.dtype, scratch.dtype, seed.dtype)
    assert scratch.size >= encoder_scratch_size(B, T, C, dwte.shape[0]), scratch.size
    return B, T, C
