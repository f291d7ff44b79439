"""The sum of squares of all gradients: python -m dev.bench_global_norm (flags: dev/bench.py).

Fewest bytes: the array once. PyTorch: vector_norm with fp32 sums.
"""

import sys

import numpy as np

from dev import bench
from dev.bench import Case


def norm_squared(values):
    """The sum in float64, a piece at a time: a float64 copy of all would take much memory."""
    return np.array([sum(float(np.square(part.astype(np.float64)).sum()) for part in np.array_split(values, 64))])


def cases(b):
    values, out = b.normal((b.N,), scale=1e-2), b.empty((1,), np.float32)
    scratch = b.empty((b.ops.global_norm_scratch_size(b.N),), np.float32)

    def want():
        host = values if isinstance(values, np.ndarray) else values.get()
        return [("out", slice(None), norm_squared(host))]

    def peers():
        x, torch = b.t(values), b.torch
        return bench.torch_peers(b, lambda: torch.linalg.vector_norm(x, dtype=torch.float32))

    args = dict(out=out, scratch=scratch, values=values)
    naive = bench.numpy_only(lambda x: np.square(x).sum(), values)
    yield Case("global_norm_squared", f"{b.model} N={b.N}", args, "out", "", want, values.nbytes, 0, naive, peers)


if __name__ == "__main__":
    bench.finish(*bench.main(sys.modules[__name__]))
