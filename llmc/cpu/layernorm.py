"""LayerNorm, the residual add, and the two fused (llm.c: llmc/layernorm.cuh; Ba et al. 2016, arXiv:1607.06450)."""

import numpy as np

from llmc.buffers import Array

from . import device

EPS = 1e-5
BLOCK = 1 << 17  # elements in a block of rows; a few blocks fit a core's cache


def _starts(N: int, C: int) -> range:
    """Where the blocks of rows start.

    They depend on the shape alone, so that sums over rows have the same bits on any number of threads.
    """
    pieces = -(-N * C // BLOCK)
    return range(0, N, -(-N // (pieces + pieces % 2)))


def _rows(N: int, C: int) -> list[tuple[int, int]]:
    """The blocks of rows, (start, stop) each."""
    starts = _starts(N, C)
    return [(a, min(a + starts.step, N)) for a in starts]


def layernorm_scratch_size(B: int, T: int, C: int) -> int:
    """f32 elements of scratch that layernorm_backward wants: a partial dweight and dbias for each block of rows."""
    return len(_starts(B * T, C)) * 2 * C


def _normalize(out: Array, mean: Array, rstd: Array, x: Array, weight: Array, bias: Array) -> None:
    """out (n, C) = LN(x) for one block of rows; mean, rstd (n,) = its statistics, the variance in a second pass."""
    C = x.shape[1]
    np.mean(x, axis=1, out=mean)
    np.subtract(x, mean[:, None], out=out)
    square = device.scratch(*x.shape)
    np.multiply(out, out, out=square)
    np.add.reduce(square, axis=1, out=rstd)
    rstd *= 1.0 / C
    rstd += EPS
    np.sqrt(rstd, out=rstd)
    np.reciprocal(rstd, out=rstd)
    out *= rstd[:, None]
    out *= weight
    out += bias


def layernorm_forward(
    out: Array, mean: Array, rstd: Array, inp: Array, weight: Array, bias: Array
) -> None:  # fmt: skip
    """out = (inp - mean) * rstd * weight + bias;  mean over C;  rstd = 1/sqrt(var + 1e-5), var biased

    out (B, T, C) f32 written (=);  mean, rstd (B, T) f32 written, saved for backward;  inp (B, T, C);
    weight, bias (C,).  Source: llm.c llmc/layernorm.cuh layernorm_forward.
    """
    B, T, C = inp.shape
    assert out.shape == inp.shape and mean.shape == rstd.shape == (B, T), (out.shape, inp.shape, mean.shape)
    assert weight.shape == bias.shape == (C,), (weight.shape, bias.shape)
    x, o, mu, rs = inp.reshape(-1, C), out.reshape(-1, C), mean.reshape(-1), rstd.reshape(-1)
    rows = _rows(B * T, C)

    def body(i: int) -> None:
        a, b = rows[i]
        _normalize(o[a:b], mu[a:b], rs[a:b], x[a:b], weight, bias)

    device.parallel(body, len(rows))


def residual_forward(out: Array, inp1: Array, inp2: Array) -> None:
    """out = inp1 + inp2;  all (B, T, C) f32, out written (=).  Source: llm.c llmc/layernorm.cuh residual_forward."""
    assert out.shape == inp1.shape == inp2.shape, (out.shape, inp1.shape, inp2.shape)
    o, x, y = out.reshape(-1), inp1.reshape(-1), inp2.reshape(-1)
    pieces = device.split(o.size, BLOCK)
    device.parallel(lambda i: np.add(x[slice(*pieces[i])], y[slice(*pieces[i])], out=o[slice(*pieces[i])]), len(pieces))


def fused_residual_forward(
    residual: Array, normed: Array, mean: Array, rstd: Array, inp1: Array, inp2: Array, weight: Array, bias: Array
) -> None:  # fmt: skip
    """residual = inp1 + inp2;  normed = LN(residual), as layernorm_forward

    residual, normed (B, T, C) f32 written (=);  mean, rstd (B, T) f32 written;  inp1, inp2 (B, T, C);
    weight, bias (C,).  Source: llm.c llmc/layernorm.cuh fused_residual_forward5.
    """
    B, T, C = inp1.shape
    assert residual.shape == normed.shape == inp2.shape == inp1.shape, (residual.shape, normed.shape, inp1.shape)
    assert mean.shape == rstd.shape == (B, T) and weight.shape == bias.shape == (C,), (mean.shape, weight.shape)
    r, o, x, y = (t.reshape(-1, C) for t in (residual, normed, inp1, inp2))
    mu, rs = mean.reshape(-1), rstd.reshape(-1)
    rows = _rows(B * T, C)

    def body(i: int) -> None:
        a, b = rows[i]
        np.add(x[a:b], y[a:b], out=r[a:b])
        _normalize(o[a:b], mu[a:b], rs[a:b], r[a:b], weight, bias)

    device.parallel(body, len(rows))


def layernorm_backward(
    dinp: Array, dweight: Array, dbias: Array, scratch: Array, dout: Array, inp: Array, weight: Array, mean: Array,
    rstd: Array,
) -> None:  # fmt: skip
    """dinp += rstd * (dn - mean(dn) - xhat * mean(dn * xhat));  dn = dout * weight;  xhat = (inp - mean) * rstd
    dweight += sum over B,T of dout * xhat;  dbias += sum over B,T of dout

    dinp (B, T, C) f32 accumulated (+=);  dweight, dbias (C,) accumulated (+=);  dout, inp (B, T, C);
    scratch f32, layernorm_scratch_size(B, T, C);  weight (C,);  mean, rstd (B, T) from the forward pass.
    Source: llm.c llmc/layernorm.cuh layernorm_backward.
    """
    B, T, C = inp.shape
    assert dinp.shape == dout.shape == inp.shape, (dinp.shape, dout.shape, inp.shape)
    assert mean.shape == rstd.shape == (B, T), (mean.shape, rstd.shape)
    assert dweight.shape == dbias.shape == weight.shape == (C,), (dweight.shape, dbias.shape, weight.shape)
    dx, dy, x = (t.reshape(-1, C) for t in (dinp, dout, inp))
    mu, rs = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    rows = _rows(B * T, C)
    partial = scratch[: len(rows) * 2 * C].reshape(len(rows), 2, C)

    def body(i: int) -> None:
        a, b = rows[i]
        xhat, dn, t = device.scratch(3, b - a, C)
        np.subtract(x[a:b], mu[a:b], out=xhat)
        xhat *= rs[a:b]
        np.multiply(dy[a:b], xhat, out=t)
        np.add.reduce(t, axis=0, out=partial[i, 0])
        np.add.reduce(dy[a:b], axis=0, out=partial[i, 1])
        np.multiply(dy[a:b], weight, out=dn)
        np.multiply(dn, xhat, out=t)
        xhat *= t.mean(axis=1, keepdims=True)
        dn -= dn.mean(axis=1, keepdims=True)
        dn -= xhat
        dn *= rs[a:b]
        dx[a:b] += dn

    device.parallel(body, len(rows))
    for p in partial:
        dweight += p[0]
        dbias += p[1]
