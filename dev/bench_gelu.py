"""GELU and its gradient on (B, T, 4C): python -m dev.bench_gelu (flags: dev/bench.py).

Fewest bytes, in elements: forward 2, backward in place 3.
"""

import sys

from dev import bench
from dev.bench import Case, spread
from dev.bench_matmul import gelu, gelu_grad


def cases(b):
    shape = (b.B, b.T, 4 * b.C)
    text, some = f"B={b.B} T={b.T} 4C={4 * b.C}", (spread(b.B, 4), spread(b.T, 32))
    inp, out = b.normal(shape), b.empty(shape)
    torch = b.torch

    def want():
        return [("out", some, gelu(b.host(inp, some)))]

    def peers():
        x = b.t(inp)
        return bench.torch_peers(b, lambda: torch.nn.functional.gelu(x, approximate="tanh"))

    args, naive = dict(out=out, inp=inp), bench.numpy_only(gelu, inp)
    yield Case("gelu_forward", text, args, "out", "", want, 2 * inp.nbytes, 0, naive, peers)

    grad = b.normal(shape)

    def want_backward():
        return [("d_in_out", some, b.host(grad, some) * gelu_grad(b.host(inp, some)))]

    def backward_peers():
        x, d = b.t(inp, grad=True), b.t(grad)
        return bench.torch_peers(b, lambda: torch.nn.functional.gelu(x, approximate="tanh"), dout=d, inputs=(x,))

    args, naive = dict(d_in_out=grad, inp=inp), bench.numpy_only(lambda d, x: d * gelu_grad(x), grad, inp)
    nbytes = 3 * inp.nbytes
    yield Case("gelu_backward_inplace", text, args, "", "d_in_out", want_backward, nbytes, 0, naive, backward_peers)


if __name__ == "__main__":
    bench.finish(*bench.main(sys.modules[__name__]))
