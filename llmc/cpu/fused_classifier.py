"""Softmax, cross-entropy and their gradient in one pass over the logits (llm.c: llmc/fused_classifier.cuh)."""

import numpy as np

from llmc.buffers import Array

from . import device

BLOCK = 1 << 16  # logits in a block of rows


def fused_classifier(
    logits: Array, losses: Array, dloss: float, targets: Array, V: int, write_dlogits: bool = True
) -> None:  # fmt: skip
    """p = softmax(logits[..., :V]);  losses += -log p[target];  logits[..., :V] = (p - onehot(target)) * dloss

    logits (B, T, Vp) f32, first V columns overwritten (=) if write_dlogits, else untouched; columns V..Vp are never
    read or written;  losses (B, T) f32 accumulated (+=), nats;  targets (B, T) i32 < V;
    dloss float, the gradient of each loss: 1/(B*T*micro-steps).
    Source: llm.c llmc/fused_classifier.cuh fused_classifier.
    """
    B, T, Vp = logits.shape
    assert losses.shape == targets.shape == (B, T) and 0 < V <= Vp, (logits.shape, losses.shape, targets.shape, V)
    x, loss, target = logits.reshape(-1, Vp), losses.reshape(-1), targets.reshape(-1)
    pieces = device.split(B * T, max(1, min(BLOCK, device.SCRATCH) // V))

    def body(i: int) -> None:
        a, b = pieces[i]
        row, column = np.arange(b - a), target[a:b]
        z = x[a:b, :V]
        p = z if write_dlogits else device.scratch(b - a, V)
        top = z.max(axis=1)
        np.subtract(z, top[:, None], out=p)
        at_target = p[row, column]
        np.exp(p, out=p)
        total = p.sum(axis=1)
        loss[a:b] += np.log(total) - at_target
        if write_dlogits:
            p *= (dloss / total)[:, None]
            p[row, column] -= dloss

    device.parallel(body, len(pieces))
