"""Softmax, cross-entropy and their gradient, in place on the logits: dev.bench_fused_classifier (dev/bench.py).

Fewest bytes: B*T*V logits read and written once. PyTorch: cross_entropy of the same logits, forward and backward.
"""

import sys

import numpy as np

from dev import bench
from dev.bench import Case, spread


def classifier(logits, targets, dloss):
    """losses (rows,), dlogits (rows, V) of logits (rows, V)."""
    top = logits.max(-1, keepdims=True)
    p = np.exp(logits - top)
    total = p.sum(-1, keepdims=True)
    rows = np.arange(len(logits))
    losses = (np.log(total) + top)[:, 0] - logits[rows, targets]
    p /= total
    p[rows, targets] -= 1
    return losses, p * dloss


def cases(b):
    B, T, V, Vp = b.B, b.T, b.V, b.Vp
    logits, losses, targets = b.normal((B, T, Vp), scale=2.0), b.normal((B, T), np.float32), b.tokens((B, T))
    dloss, rows = 1.0 / (B * T), (spread(B, 4), spread(T, 8))
    torch = b.torch

    def want():
        own, target = b.host(logits, rows)[..., :V], b.host(targets, rows)
        loss, grad = classifier(own.reshape(-1, V), target.reshape(-1), dloss)
        added = b.host(losses, rows) + loss.reshape(target.shape)
        return [("losses", rows, added), ("logits", (*rows, slice(V)), grad.reshape(own.shape))]

    def peers():
        x, y = b.t(logits, grad=True), b.t(targets).long().view(-1)

        def function():
            return torch.nn.functional.cross_entropy(x.view(-1, Vp)[:, :V], y)

        def both_ways(call):
            return call and (lambda: torch.autograd.grad(call(), x))

        found = {name: both_ways(call) for name, call in bench.torch_peers(b, function).items()}
        try:
            from liger_kernel.transformers.functional import liger_cross_entropy
        except ImportError:
            return found | {"Liger": None}
        return found | {"Liger": both_ways(lambda: liger_cross_entropy(x.view(-1, Vp), y))}

    args = dict(logits=logits, losses=losses, dloss=dloss, targets=targets, V=V, write_dlogits=True)
    naive = bench.numpy_only(lambda x, y: classifier(x.reshape(-1, Vp)[:, :V], y.reshape(-1), dloss), logits, targets)
    nbytes = 2 * B * T * V * b.dtype.itemsize
    shape = f"B={B} T={T} V={V}"
    yield Case("fused_classifier", shape, args, "", "logits losses", want, nbytes, 0, naive, peers)


if __name__ == "__main__":
    bench.finish(*bench.main(sys.modules[__name__]))
