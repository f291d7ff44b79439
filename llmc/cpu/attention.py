"""Causal self-attention on packed QKV; no T x T matrix is ever stored (llm.c: llmc/attention.cuh).

Softmax statistics are kept as one log-sum-exp per query, and backward recomputes the probabilities from it, as in
FlashAttention-2 (Dao 2023, arXiv:2307.08691). A block of work is a few heads of a few rows of the batch; within it the
queries (forward) or keys (backward) are walked in tiles, each against only the keys (queries) the mask leaves visible.
"""

import math

import numpy as np

from llmc.buffers import Array

from . import device

TILE = 128  # queries (forward) or keys (backward) in a tile
MASK = np.triu(np.full((TILE, TILE), -np.inf, np.float32), 1)  # is added to scores[query, key]: no later key is seen


def attention_scratch_size(B: int, T: int, C: int, NH: int) -> int:
    """f32 elements of scratch that attention_backward wants: none, as its tiles live in the threads' own scratch."""
    return 0


def _groups(B: int, NH: int, elements: int) -> list[tuple[slice, slice]]:
    """The blocks of work, as (batch slice, head slice): tiles of `elements` for each head fit a third of the scratch.

    Backward holds two tiles and dq. Small models get many heads in one call, large ones a single head.
    """
    heads = max(1, device.SCRATCH // (3 * elements))
    if heads < NH:
        return [(slice(b, b + 1), slice(h, min(h + heads, NH))) for b in range(B) for h in range(0, NH, heads)]
    step = max(1, min(heads // NH, B // (2 * device.threads())))
    return [(slice(b, min(b + step, B)), slice(0, NH)) for b in range(0, B, step)]


def _heads(x: Array, parts: int, NH: int) -> Array:
    """The `parts` views (B, NH, T, HS) of x (B, T, parts*C), without a copy."""
    B, T, width = x.shape
    return x.reshape(B, T, parts, NH, width // (parts * NH)).transpose(2, 0, 3, 1, 4)


def attention_forward(out: Array, att: Array, qkvr: Array) -> None:
    """out = softmax(mask(q @ k^T / sqrt(HS))) @ v for each head;  att = log sum exp of the masked, scaled scores

    out (B, T, C) f32 written (=);  att (B, NH, T) f32 written, nats;  qkvr (B, T, 3C) = packed (B, T, 3, NH, HS).
    Source: llm.c llmc/attention.cuh attention_forward; dev/cuda/attention_forward.cu.
    """
    B, T, C = out.shape
    NH = att.shape[1]
    assert qkvr.shape == (B, T, 3 * C) and att.shape == (B, NH, T) and C % NH == 0, (out.shape, att.shape, qkvr.shape)
    q, k, v = _heads(qkvr, 3, NH)
    (o,) = _heads(out, 1, NH)
    scale = 1.0 / math.sqrt(C // NH)
    groups = _groups(B, NH, min(TILE, T) * T)

    def body(i: int) -> None:
        b, h = groups[i]
        for t0 in range(0, T, TILE):
            t1 = min(t0 + TILE, T)
            queries = q[b, h, t0:t1]
            s = device.scratch(*queries.shape[:3], t1)
            np.matmul(queries, k[b, h, :t1].swapaxes(2, 3), out=s)
            s *= scale
            s[..., t0:] += MASK[: t1 - t0, : t1 - t0]
            top = s.max(axis=3, keepdims=True)
            s -= top
            np.exp(s, out=s)
            total = s.sum(axis=3, keepdims=True)
            np.matmul(s, v[b, h, :t1], out=o[b, h, t0:t1])
            o[b, h, t0:t1] /= total
            np.log(total, out=total)
            total += top
            att[b, h, t0:t1] = total[..., 0]

    device.parallel(body, len(groups))


def attention_backward(
    dqkvr: Array, scratch: Array, dout: Array, out: Array, qkvr: Array, att: Array
) -> None:  # fmt: skip
    """p = exp(q @ k^T / sqrt(HS) - att);  dv = p^T @ dout;  ds = p * (dout @ v^T - rowsum(dout * out)) / sqrt(HS)
    dq = ds @ k;  dk = ds^T @ q

    dqkvr (B, T, 3C) f32 written (=), packed as qkvr;  scratch is unused here;  dout, out (B, T, C);
    att (B, NH, T) from the forward pass.  Source: llm.c llmc/attention.cuh attention_backward; Dao 2023, algorithm 2.
    """
    B, T, C = out.shape
    NH = att.shape[1]
    assert dqkvr.shape == qkvr.shape == (B, T, 3 * C) and dout.shape == out.shape and att.shape == (B, NH, T), out.shape
    q, k, v = _heads(qkvr, 3, NH)
    dq, dk, dv = _heads(dqkvr, 3, NH)
    (o,), (do,) = _heads(out, 1, NH), _heads(dout, 1, NH)
    HS = C // NH
    scale = 1.0 / math.sqrt(HS)
    groups = _groups(B, NH, max(min(TILE, T), HS) * T)

    def body(i: int) -> None:
        b, h = groups[i]
        shape = q[b, h].shape[:2]
        D = np.einsum("bhtd,bhtd->bht", do[b, h], o[b, h])[..., None]
        lse = att[b, h, :, None]
        for t0 in range(0, T, TILE):  # a tile of keys; the queries from t0 on see it
            t1, n = min(t0 + TILE, T), T - t0
            size = shape[0] * shape[1] * n * (t1 - t0)
            flat = device.scratch(2 * size + shape[0] * shape[1] * n * HS)
            p, dp = flat[: 2 * size].reshape(2, *shape, n, t1 - t0)
            np.matmul(q[b, h, t0:], k[b, h, t0:t1].swapaxes(2, 3), out=p)
            p *= scale
            p[..., : t1 - t0, :] += MASK[: t1 - t0, : t1 - t0]
            p -= lse[:, :, t0:]
            np.exp(p, out=p)
            np.matmul(p.swapaxes(2, 3), do[b, h, t0:], out=dv[b, h, t0:t1])
            np.matmul(do[b, h, t0:], v[b, h, t0:t1].swapaxes(2, 3), out=dp)
            dp -= D[:, :, t0:]
            dp *= p
            dp *= scale
            np.matmul(dp.swapaxes(2, 3), q[b, h, t0:], out=dk[b, h, t0:t1])
            if t0 == 0:
                np.matmul(dp, k[b, h, t0:t1], out=dq[b, h])
            else:
                t = flat[2 * size :].reshape(*shape, n, HS)
                dq[b, h, t0:] += np.matmul(dp, k[b, h, t0:t1], out=t)

    device.parallel(body, len(groups))
