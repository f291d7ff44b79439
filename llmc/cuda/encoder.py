"""Token and position embeddings: kernels/encoder.cu (llm.c: llmc/encoder.cuh)."""

import numpy as np

from . import module

PIECE = 32  # kernels/encoder.cu has the same number


def encoder_scratch_size(B, T, C, Vp):
    """int32 elements of scratch that encoder_backward wants: two lists of tokens and positions, and two fp32 rows per
    piece."""
    pieces = -(-B * T // PIECE)
    return 4 * list_size(B * T) + pieces * 2 * C


def list_size(N):
    """Elements of a list of N positions, padded so that what follows it starts at 16 bytes."""
    return -(-N // 4) * 4


def check_forward(out, inp, wte, wpe):
    B, T, C = out.shape
    assert inp.shape == (B, T) and wte.shape[1] == wpe.shape[1] == C, (out.shape, inp.shape, wte.shape, wpe.shape)
    assert T <= wpe.shape[0] and C % 8 == 0, (T, wpe.shape, C)
    assert out.dtype == wte.dtype == wpe.dtype and inp.dtype == np.int32, (out.dtype, wte.dtype, wpe.dtype, inp.dtype)
    return B, T, C


def encoder_forward1(out, inp, wte, wpe):
    """out[b,t] = wte[inp[b,t]] + wpe[t].

    out  (B, T, C) floatX written (=)      inp (B, T) i32, ids below Vp (the loader has checked)
    wte  (Vp, C)   floatX                  wpe (maxT, C) floatX, T <= maxT
    Requires: C % 8 == 0, all arrays C-contiguous.
    Cost: (2*B*T + T) * C * itemsize bytes.
    Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/encoder.cuh encoder_forward.
    """
    B, T, C = check_forward(out, inp, wte, wpe)
    kernel = module.kernel("encoder.cu", "encoder_forward_kernel1", out.dtype)
    kernel((-(-out.size // 256),), (256,), (out, inp, wte, wpe, np.int32(T), np.int32(C), np.int64(out.size)))


def encoder_forward2(out, inp, wte, wpe):
    """encoder_forward1 with 16-byte accesses."""
    B, T, C = check_forward(out, inp, wte, wpe)
    packs = out.size // (16 // out.itemsize)
    assert packs < 2**31, packs
    kernel = module.kernel("encoder.cu", "encoder_forward_kernel2", out.dtype)
    kernel((-(-packs // 256),), (256,), (out, inp, wte, wpe, np.int32(T), np.int32(C), np.int32(packs)))


def check_backward(dwte, dwpe, scratch, dout, inp, seed):
    B, T, C = dout.shape
    assert inp.shape == (B, T) and dwte.shape[1] == dwpe.shape[1] == C, (dout.shape, inp.shape, dwte.shape, dwpe.shape)
    assert T <= dwpe.shape[0] and C % 8 == 0, (T, dwpe.shape, C)
    assert inp.dtype == scratch.dtype == np.int32 and seed.dtype == np.uint32, (inp.dtype, scratch.dtype, seed.dtype)
    assert scratch.size >= encoder_scratch_size(B, T, C, dwte.shape[0]), scratch.size
    return B, T, C


def encoder_backward1(dwte, dwpe, scratch, dout, inp, seed):
    """dwte[inp[b,t]] += dout[b,t];  dwpe[t] += dout[b,t].

    dwte    (Vp, C) floatX or f32 accumulated (+=)    dwpe (maxT, C), the same dtype, accumulated (+=): rows t < T
    scratch i32, encoder_scratch_size(B, T, C, Vp)
    dout    (B, T, C) floatX                   inp (B, T) i32
    seed    (1,) u32 on the device: noise of the stochastic rounding of both += in bf16; unused in fp32 and fp16.
    Sums are fp32 in the order of positions, each element is rounded once: bitwise repeatable.
    Requires: C % 8 == 0, all arrays C-contiguous.
    Cost: B*T*C * itemsize bytes once for each table.
    Errors: AssertionError on shape or dtype mismatch.
    Source: llm.c llmc/encoder.cuh encoder_backward.
    """
    B, T, C = check_backward(dwte, dwpe, scratch, dout, inp, seed)
    defines = module.grad_defines(dout.dtype, (dwte, dwpe))
    wpe = module.kernel("encoder.cu", "wpe_backward_kernel1", dout.dtype, defines)
    wpe((-(-T * C // 256),), (256,), (dwpe, dout, seed, np.int32(B), np.int32(T), np.int32(C)))
    wte = module.kernel("encoder.cu", "wte_backward_kernel1", dout.dtype, defines)
    wte((dwte.shape[0],), (min(256, -(-C // 32) * 32),), (dwte, dout, inp, seed, np.int32(B * T), np.int32(C)))


def wpe_backward(dwpe, dout, seed):
    B, T, C = dout.shape
    packs = T * C // (16 // dout.itemsize)
    defines = module.grad_defines(dout.dtype, (dwpe,))
    kernel = module.kernel("encoder.cu", "wpe_backward_kernel2", dout.dtype, defines)
    kernel((-(-packs // 128),), (128,), (dwpe, dout, seed, np.int32(B), np.int32(T), np.int32(C)))


def sort_by_token(scratch, inp, Vp, dtype):
    """Positions 0..N-1 ordered by (token, position), in scratch: two passes of a stable radix sort."""
    N = inp.size
    other, positions = scratch[:N], scratch[list_size(N) :][:N]
    bits = max(2, (Vp - 1).bit_length())
    low, high = (bits + 1) // 2, bits // 2
    block = min(1024, -(-N // 64) * 32)  # a warp for every 64 positions
    kernel = module.kernel("encoder.cu", "sort_by_token_kernel", dtype)
    kernel((1 << low,), (block,), (other, None, inp, np.int32(N), np.int32(0), np.int32((1 << low) - 1)))
    kernel((1 << high,), (block,), (positions, other, inp, np.int32(N), np.int32(low), np.int32((1 << high) - 1)))
    return positions


def encoder_backward2(dwte, dwpe, scratch, dout, inp, seed):
    """encoder_backward1, with the positions sorted by token: each row of dout is read once."""
    B, T, C = check_backward(dwte, dwpe, scratch, dout, inp, seed)
    wpe_backward(dwpe, dout, seed)
    positions = sort_by_token(scratch, inp, dwte.shape[0], dout.dtype)
    packs = C // (16 // dout.itemsize)
    block = min(128, -(-packs // 32) * 32)
    defines = module.grad_defines(dout.dtype, (dwte, dwpe))
    kernel = module.kernel("encoder.cu", "wte_backward_kernel2", dout.dtype, defines)
    args = (dwte, dout, inp, positions, seed, np.int32(B * T), np.int32(C))
    kernel((B * T, -(-packs // block)), (block,), args)


def encoder_backward3(dwte, dwpe, scratch, dout, inp, seed):
    """encoder_backward2, with equal work for every block however often a token occurs."""
    B, T, C = check_backward(dwte, dwpe, scratch, dout, inp, seed)
    wpe_backward(dwpe, dout, seed)
    positions = sort_by_token(scratch, inp, dwte.shape[0], dout.dtype)
    partials = scratch[2 * list_size(B * T) :].view(np.float32)
    packs = C // (16 // dout.itemsize)
    block = min(128, -(-packs // 32) * 32)
    grid = (-(-B * T // PIECE), -(-packs // block))
    defines = module.grad_defines(dout.dtype, (dwte, dwpe))
    pieces = module.kernel("encoder.cu", "wte_backward_kernel3", dout.dtype, defines)
    pieces(grid, (block,), (dwte, partials, dout, inp, positions, seed, np.int32(B * T), np.int32(C)))
    combine = module.kernel("encoder.cu", "wte_combine_kernel3", dout.dtype, defines)
    combine(grid, (block,), (dwte, partials, inp, positions, seed, np.int32(B * T), np.int32(C)))


def encoder_backward4(dwte, dwpe, scratch, dout, inp, seed):
    """encoder_backward3 with loads far ahead of their use: the same bits in a third of the time."""
    B, T, C = check_backward(dwte, dwpe, scratch, dout, inp, seed)
    wpe_backward(dwpe, dout, seed)
    N, size, defines = B * T, list_size(B * T), module.grad_defines(dout.dtype, (dwte, dwpe))
    some_tokens, some_positions, tokens, positions = (scratch[i * size :][:N] for i in range(4))
    bits = max(2, (dwte.shape[0] - 1).bit_length())
    low, high = (bits + 1) // 2, bits // 2
    block = min(1024, -(-N // 64) * 32)  # a warp for every 64 positions
    sort = module.kernel("encoder.cu", "sort_by_token_kernel4", dout.dtype)
    low_digit, high_digit = (np.int32(0), np.int32((1 << low) - 1)), (np.int32(low), np.int32((1 << high) - 1))
    sort((1 << low,), (block,), (some_tokens, some_positions, inp, None, np.int32(N), *low_digit))
    sort((1 << high,), (block,), (tokens, positions, some_tokens, some_positions, np.int32(N), *high_digit))

    partials = scratch[4 * size :].view(np.float32)
    packs = C // (16 // dout.itemsize)
    block = min(128, -(-packs // 32) * 32)
    grid = (-(-N // PIECE), -(-packs // block))
    pieces = module.kernel("encoder.cu", "wte_backward_kernel4", dout.dtype, defines)
    pieces(grid, (block,), (dwte, partials, dout, tokens, positions, seed, np.int32(N), np.int32(C)))
    combine = module.kernel("encoder.cu", "wte_combine_kernel4", dout.dtype, defines)
    combine(grid, (block,), (dwte, partials, tokens, seed, np.int32(N), np.int32(C)))


def encoder_backward5(dwte, dwpe, scratch, dout, inp, seed):
    """encoder_backward4 with a sort in three passes and both tables in one launch: the same bits."""
    B, T, C = check_backward(dwte, dwpe, scratch, dout, inp, seed)
    N, size, defines = B * T, list_size(B * T), module.grad_defines(dout.dtype, (dwte, dwpe))
    lists = [scratch[i * size :][:N] for i in range(4)]
    bits, shift, tokens, positions = max(3, (dwte.shape[0] - 1).bit_length()), 0, inp, None
    block = min(1024, -(-N // 64) * 32)  # a warp for every 64 positions
    sort = module.kernel("encoder.cu", "sort_by_token_kernel5", dout.dtype)
    for digit, to in zip(((bits + 2) // 3, (bits + 1) // 3, bits // 3), (lists[:2], lists[2:], lists[:2]), strict=True):
        args = (*to, tokens, positions, np.int32(N), np.int32(shift), np.int32((1 << digit) - 1))
        sort((1 << digit,), (block,), args)
        (tokens, positions), shift = to, shift + digit

    partials = scratch[4 * size :].view(np.float32)
    packs, pieces = C // (16 // dout.itemsize), -(-N // PIECE)
    block = min(128, -(-packs // 32) * 32)
    columns = -(-packs // block)
    tables = module.kernel("encoder.cu", "tables_backward_kernel5", dout.dtype, defines)
    args = (dwte, partials, dwpe, dout, tokens, positions, seed, *(np.int32(n) for n in (pieces, columns, B, T, C)))
    tables((pieces * columns + -(-T * packs // block),), (block,), args)
    combine = module.kernel("encoder.cu", "wte_combine_kernel5", dout.dtype, defines)
    combine((pieces, columns), (block,), (dwte, partials, tokens, seed, np.int32(N), np.int32(C)))


encoder_forward = encoder_forward2  # an eighth of the memory instructions
encoder_backward = encoder_backward5  # time hardly depends on the most frequent token
