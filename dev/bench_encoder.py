"""Token and position embeddings and their gradient: python -m dev.bench_encoder (flags: dev/bench.py).

Tokens have the frequencies of text. Fewest bytes: forward, out written and a row of wte read for each token, and wpe
once; backward, dout read once, and the rows of both tables that occur read and written.
PyTorch's backward writes all Vp rows of dwte; ours adds to those that occur, in a fixed order.
"""

import sys

import numpy as np

from dev import bench
from dev.bench import Case, spread


def embed(wte, wpe, inp):
    return wte[inp] + wpe[: inp.shape[1]]


def embed_backward(dout, inp, dwte, dwpe):
    np.add.at(dwte, inp, dout)
    dwpe[: inp.shape[1]] += dout.sum(0)


def cases(b):
    B, T, C, Vp = b.B, b.T, b.C, b.Vp
    shape, rows = f"B={B} T={T} C={C} Vp={Vp}", (spread(B, 4), spread(T, 32))
    inp, out = b.tokens((B, T)), b.empty((B, T, C))
    wte, wpe = b.normal((Vp, C), scale=0.02), b.normal((b.config.max_seq_len, C), scale=0.02)
    torch = b.torch

    def want():
        own = b.host(inp, rows)
        token = np.stack([b.host(wte, int(t)) for t in own.reshape(-1)]).reshape(*own.shape, C)
        return [("out", rows, token + b.host(wpe, slice(T))[rows[1]])]

    def peers():
        ids, table, positions = b.t(inp), b.t(wte), b.t(wpe)
        return bench.torch_peers(b, lambda: torch.nn.functional.embedding(ids, table) + positions[:T])

    args = dict(out=out, inp=inp, wte=wte, wpe=wpe)
    naive, nbytes = bench.numpy_only(embed, wte, wpe, inp), 2 * out.nbytes + T * C * out.itemsize
    yield Case("encoder_forward", shape, args, "out", "", want, nbytes, 0, naive, peers)

    dwte, dwpe, dout = b.normal((Vp, C)), b.normal((b.config.max_seq_len, C)), b.normal((B, T, C))
    scratch = b.empty((b.ops.encoder_scratch_size(B, T, C, Vp),), np.int32)
    seed = b.array(np.array([1337], np.uint32))
    host_inp, columns, tokens = b.host(inp), spread(C, 32), spread(Vp, 64)

    def want_backward():
        d = b.host(dout, (..., columns))
        sums = b.host(dwte, (tokens, columns)).copy()
        for i, token in enumerate(range(Vp)[tokens]):
            sums[i] += d[host_inp == token].sum(0)
        first = b.host(dwte, (slice(4), columns)) + np.stack([d[host_inp == t].sum(0) for t in range(4)])
        positions = b.host(dwpe, (slice(T), columns)) + d.sum(0)
        return [
            ("dwte", (tokens, columns), sums),
            ("dwte", (slice(4), columns), first),
            ("dwpe", (slice(T), columns), positions),
        ]

    def backward_peers():
        ids, table, positions, d = b.t(inp), b.t(wte, grad=True), b.t(wpe, grad=True), b.t(dout)

        def function():
            return torch.nn.functional.embedding(ids, table) + positions[:T]

        return bench.torch_peers(b, function, dout=d, inputs=(table, positions))

    args = dict(dwte=dwte, dwpe=dwpe, scratch=scratch, dout=dout, inp=inp, seed=seed)
    nbytes = dout.nbytes + 2 * (len(np.unique(host_inp)) + T) * C * dout.itemsize
    naive = bench.numpy_only(embed_backward, dout, inp, dwte, dwpe)
    case = Case("encoder_backward", shape, args, "", "dwte dwpe", want_backward, nbytes, 0, naive, backward_peers)
    yield case


if __name__ == "__main__":
    bench.finish(*bench.main(sys.modules[__name__]))
