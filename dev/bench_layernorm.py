"""LayerNorm, the residual add, both fused, and the backward pass: python -m dev.bench_layernorm (flags: dev/bench.py).

Fewest bytes, in N*C elements: forward 2 (inp, out), residual 3, fused 4, backward 4 (dout, inp, dinp read and written).
PyTorch's backward writes a fresh dinp: 3. Rows of statistics and weights are not counted.
"""

import sys

import numpy as np

from dev import bench
from dev.bench import Case, spread


def layernorm(inp, weight, bias):
    """out, mean, rstd in the precision of the arguments."""
    mean = inp.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt(((inp - mean) ** 2).mean(-1, keepdims=True) + 1e-5)
    return (inp - mean) * rstd * weight + bias, mean[..., 0], rstd[..., 0]


def layernorm_backward(dout, inp, weight, mean, rstd):
    """dinp, dweight, dbias."""
    xhat = (inp - mean[..., None]) * rstd[..., None]
    dn = dout * weight
    dinp = rstd[..., None] * (dn - dn.mean(-1, keepdims=True) - xhat * (dn * xhat).mean(-1, keepdims=True))
    return dinp, (dout * xhat).sum((0, 1)), dout.sum((0, 1))


def liger(b, x, w, bias, dout=None):
    """{"Liger": its layernorm, or the backward pass of it}"""
    try:
        from liger_kernel.transformers.functional import liger_layer_norm
    except ImportError:
        return {"Liger": None}
    if dout is None:
        return {"Liger": lambda: liger_layer_norm(x, w, bias, 1e-5)}
    return {"Liger": bench.backward_of(b.torch, liger_layer_norm(x, w, bias, 1e-5), (x, w, bias), dout)}


def cases(b):
    B, T, C = b.B, b.T, b.C
    shape, rows = f"B={B} T={T} C={C}", (spread(B, 4), spread(T, 32))
    inp, inp2, out, dout, dinp = (b.normal((B, T, C)) for _ in range(5))
    weight, bias = b.normal((C,), scale=0.1, mean=1.0), b.normal((C,))
    mean, rstd = (b.empty((B, T), np.float32) for _ in range(2))
    nbytes = inp.nbytes

    def want_forward(x=None):
        x = b.host(inp, rows) if x is None else x
        values = layernorm(x, b.host(weight), b.host(bias))
        return [(name, rows, value) for name, value in zip(("out", "mean", "rstd"), values, strict=True)]

    def peers():
        x, w, beta = b.t(inp), b.t(weight), b.t(bias)
        function = b.torch.nn.functional.layer_norm
        return bench.torch_peers(b, lambda: function(x, (C,), w, beta, 1e-5)) | liger(b, x, w, beta)

    args = dict(out=out, mean=mean, rstd=rstd, inp=inp, weight=weight, bias=bias)
    naive = bench.numpy_only(layernorm, inp, weight, bias)
    yield Case("layernorm_forward", shape, args, "out mean rstd", "", want_forward, 2 * nbytes, 0, naive, peers)

    def want_residual():
        return [("out", rows, b.host(inp, rows) + b.host(inp2, rows))]

    def residual_peers():
        x, y = b.t(inp), b.t(inp2)
        return bench.torch_peers(b, lambda: x + y)

    args = dict(out=out, inp1=inp, inp2=inp2)
    naive = bench.numpy_only(np.add, inp, inp2)
    yield Case("residual_forward", shape, args, "out", "", want_residual, 3 * nbytes, 0, naive, residual_peers)

    def want_fused():
        total = (b.host(inp, rows) + b.host(inp2, rows)).astype(b.dtype).astype(np.float64)
        normed = layernorm(total, b.host(weight), b.host(bias))
        names = ("residual", "normed", "mean", "rstd")
        return [(name, rows, value) for name, value in zip(names, (total, *normed), strict=True)]

    def fused_peers():
        x, y, w, beta = (b.t(a) for a in (inp, inp2, weight, bias))

        def function():
            total = x + y
            return total, b.torch.nn.functional.layer_norm(total, (C,), w, beta, 1e-5)

        return bench.torch_peers(b, function)

    residual = b.empty((B, T, C))
    args = dict(residual=residual, normed=out, mean=mean, rstd=rstd, inp1=inp, inp2=inp2, weight=weight, bias=bias)
    naive = bench.numpy_only(lambda x, y, w, beta: layernorm(x + y, w, beta), inp, inp2, weight, bias)
    writes = "residual normed mean rstd"
    yield Case("fused_residual_forward", shape, args, writes, "", want_fused, 4 * nbytes, 0, naive, fused_peers)

    dweight, dbias = (b.normal((C,)) for _ in range(2))
    b.ops.layernorm_forward(out, mean, rstd, inp, weight, bias)

    def want_backward():
        own = [b.host(a, rows) for a in (dout, inp)]
        stats = [b.host(a, rows) for a in (mean, rstd)]
        dx = layernorm_backward(*own, b.host(weight), *stats)[0]
        columns = spread(C, 16)
        own = [b.host(a, (..., columns)) for a in (dout, inp)]  # whole columns, for dweight and dbias alone
        _, dw, db = layernorm_backward(*own, b.host(weight, columns), b.host(mean), b.host(rstd))
        sums = [("dweight", columns, b.host(dweight, columns) + dw), ("dbias", columns, b.host(dbias, columns) + db)]
        return [("dinp", rows, b.host(dinp, rows) + dx), *sums]

    def backward_peers():
        x, w, beta = (b.t(a, grad=True) for a in (inp, weight, bias))
        function, d = b.torch.nn.functional.layer_norm, b.t(dout)
        call = bench.torch_peers(b, lambda: function(x, (C,), w, beta, 1e-5), dout=d, inputs=(x, w, beta))
        return call | liger(b, x, w, beta, d)

    scratch = b.empty((b.ops.layernorm_scratch_size(B, T, C),), np.float32)
    args = dict(dinp=dinp, dweight=dweight, dbias=dbias, scratch=scratch, dout=dout, inp=inp, weight=weight)
    args |= dict(mean=mean, rstd=rstd)
    naive = bench.numpy_only(layernorm_backward, dout, inp, weight, mean, rstd)
    updates = "dinp dweight dbias"
    yield Case("layernorm_backward", shape, args, "", updates, want_backward, 4 * nbytes, 0, naive, backward_peers)


if __name__ == "__main__":
    bench.finish(*bench.main(sys.modules[__name__]))
