"""Token and position embeddings (llm.c: llmc/encoder.cuh)."""

import numpy as np

from llmc.buffers import Array

from . import device

ROWS = 512  # tokens in a block


def encoder_scratch_size(B: int, T: int, C: int, Vp: int) -> int:
    """int32 elements of scratch that encoder_backward wants: none, as NumPy sorts token ids in memory of its own."""
    return 0


def encoder_forward(out: Array, inp: Array, wte: Array, wpe: Array) -> None:
    """out[b,t] = wte[inp[b,t]] + wpe[t]

    out (B, T, C) f32 written (=);  inp (B, T) i32, each id < Vp (the caller checks it);  wte (Vp, C), wpe (maxT, C).
    Requires T <= maxT.  Source: llm.c llmc/encoder.cuh encoder_forward.
    """
    B, T, C = out.shape
    assert inp.shape == (B, T) and wte.shape[1] == C and wpe.shape[1] == C and T <= wpe.shape[0], (out.shape, wpe.shape)
    pieces = device.split(T, ROWS)

    def body(i: int) -> None:
        b, (t0, t1) = i // len(pieces), pieces[i % len(pieces)]
        o = out[b, t0:t1]
        np.take(wte, inp[b, t0:t1], axis=0, out=o, mode="clip")  # NumPy copies through a buffer in any other mode
        o += wpe[t0:t1]

    device.parallel(body, B * len(pieces))


def encoder_backward(
    dwte: Array, dwpe: Array, scratch: Array, dout: Array, inp: Array, seed: Array
) -> None:  # fmt: skip
    """dwte[inp[b,t]] += dout[b,t];  dwpe[t] += dout[b,t]

    dwte (Vp, C), dwpe (maxT, C) f32 accumulated (+=);  dout (B, T, C);  inp (B, T) i32.
    scratch and seed are unused in fp32.
    The result is deterministic: rows of one token are summed in the order of their positions.
    Source: llm.c llmc/encoder.cuh encoder_backward.
    """
    B, T, C = dout.shape
    assert inp.shape == (B, T) and dwte.shape[1] == C and dwpe.shape[1] == C and T <= dwpe.shape[0], dout.shape
    rows = dout.reshape(B * T, C)
    order = np.argsort(inp, axis=None, kind="stable")
    tokens = inp.reshape(-1)[order]
    pieces = device.split(T, ROWS)

    def wte() -> None:
        step = min(ROWS, device.SCRATCH // (2 * C))
        gathered, sums = device.scratch(2, step, C)
        for a in range(0, B * T, step):
            ids = tokens[a : a + step]
            first = np.flatnonzero(np.diff(ids, prepend=-1))  # where a new token begins
            g, s = gathered[: len(ids)], sums[: len(first)]
            np.take(rows, order[a : a + step], axis=0, out=g, mode="clip")
            dwte[ids[first]] += np.add.reduceat(g, first, axis=0, out=s)

    def body(i: int) -> None:
        if i == 0:
            wte()
        else:
            t0, t1 = pieces[i - 1]
            for b in range(B):
                dwpe[t0:t1] += dout[b, t0:t1]

    device.parallel(body, 1 + len(pieces))
