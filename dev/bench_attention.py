"""Causal attention on packed queries, keys and values: python -m dev.bench_attention (flags: dev/bench.py).

FLOPs, the causal half: forward 2 B NH T^2 HS, backward 5 (each product once). PyTorch's backends get q, k, v as views
of the packed array and return dq, dk, dv unpacked; ours writes the packed gradient.
"""

import sys

import numpy as np

from dev import bench
from dev.bench import Case


def attention(q, k, v):
    """out, log-sum-exp, probabilities of (..., T, HS) queries, keys and values."""
    T, HS = q.shape[-2:]
    scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(HS).astype(q.dtype)
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    p = np.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    p /= total
    return p @ v, (np.log(total) + top)[..., 0], p


def attention_backward(dout, q, k, v):
    """dq, dk, dv."""
    out, _, p = attention(q, k, v)
    scale = np.sqrt(q.shape[-1]).astype(q.dtype)
    ds = p * (dout @ np.swapaxes(v, -1, -2) - (dout * out).sum(-1, keepdims=True)) / scale
    return ds @ k, np.swapaxes(ds, -1, -2) @ q, np.swapaxes(p, -1, -2) @ dout


def heads(array, parts, NH):
    """(B, T, parts*C) -> parts views (B, NH, T, HS), of a NumPy array or a tensor."""
    B, T, C = array.shape
    five = array.reshape(B, T, parts, NH, C // parts // NH)
    return [five[:, :, i].swapaxes(1, 2) for i in range(parts)]


def backends():
    """{label: function that makes a context in which SDPA has this backend alone}"""
    import functools

    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
    return {label: functools.partial(sdpa_kernel, backend) for label, backend in names.items()}


def cases(b):
    B, T, C, NH = b.B, b.T, b.C, b.NH
    HS, torch = C // NH, b.torch
    shape = f"B={B} T={T} NH={NH} HS={HS}"
    qkvr, out, att = b.normal((B, T, 3 * C)), b.empty((B, T, C)), b.empty((B, NH, T), np.float32)
    row, head = slice(B - 1, B), slice((NH - 1) * HS, NH * HS)  # only the last head of the last row is compared
    places = [(row, slice(None), slice(i * C + head.start, i * C + head.stop)) for i in range(3)]
    flops = 2 * B * NH * T * T * HS

    def want():
        own, lse, _ = attention(*(b.host(qkvr, place)[0] for place in places))
        return [("out", (row, slice(None), head), own[None]), ("att", (row, slice(NH - 1, NH)), lse[None, None])]

    def call(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def peers():
        qkv = heads(b.t(qkvr), 3, NH)

        def inside(context):
            def run():
                with context():
                    return call(*qkv)

            return run

        found = bench.torch_peers(b, lambda: call(*qkv))
        contexts = backends() if b.device == "cuda" else {"SDPA flash": None, "SDPA cuDNN": None}
        return found | {label: context and inside(context) for label, context in contexts.items()}

    args = dict(out=out, att=att, qkvr=qkvr)
    naive = bench.numpy_only(lambda x: attention(*heads(x, 3, NH)), qkvr)
    nbytes = qkvr.nbytes + out.nbytes + att.nbytes
    case = Case("attention_forward", shape, args, "out att", "", want, nbytes, flops, naive, peers)
    yield case._replace(ulps=4.0)

    dout, dqkvr = b.normal((B, T, C)), b.empty((B, T, 3 * C))
    scratch = b.empty((b.ops.attention_scratch_size(B, T, C, NH),), np.float32)
    b.ops.attention_forward(out, att, qkvr)

    def want_backward():
        own = attention_backward(b.host(dout, (row, slice(None), head))[0], *(b.host(qkvr, p)[0] for p in places))
        return [("dqkvr", place, value[None]) for place, value in zip(places, own, strict=True)]

    def backward_peers():
        leaves = [x.detach().requires_grad_() for x in heads(b.t(qkvr), 3, NH)]
        d = heads(b.t(dout), 1, NH)[0]
        found = bench.torch_peers(b, lambda: call(*leaves), dout=d, inputs=leaves)
        if b.device != "cuda":
            return found | {"SDPA flash": None, "SDPA cuDNN": None}
        for label, context in backends().items():
            try:
                with context():
                    found[label] = bench.backward_of(torch, call(*leaves), leaves, d)
            except RuntimeError:
                found[label] = None
        return found

    args = dict(dqkvr=dqkvr, scratch=scratch, dout=dout, out=out, qkvr=qkvr, att=att)
    naive = bench.numpy_only(lambda d, x: attention_backward(heads(d, 1, NH)[0], *heads(x, 3, NH)), dout, qkvr)
    nbytes = 2 * qkvr.nbytes + 2 * out.nbytes + att.nbytes
    case = Case("attention_backward", shape, args, "dqkvr", "", want_backward, nbytes, 5 * flops // 2, naive)
    yield case._replace(peers=backward_peers, ulps=6.0)


if __name__ == "__main__":
    bench.finish(*bench.main(sys.modules[__name__]))
