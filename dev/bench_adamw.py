"""AdamW over all parameters of a model: python -m dev.bench_adamw -e d12 (flags: dev/bench.py).

Fewest bytes per parameter, 16-bit with fp32 master weights: master, m and v read and written, grads read, params
written: 28. fp32 without master: 28 too. init_from_master: 6 (fp32: 8).
PyTorch is torch.optim.AdamW(fused=True) on one flat fp32 parameter: 28 bytes, without the 16-bit copy and the clipping.
"""

import sys

import numpy as np

from dev import bench
from dev.bench import Case, spread
from llmc import gpt2

BETA1, BETA2, EPS, CLIP, LR, STEP = 0.9, 0.95, 1e-8, 1.0, 3e-4, 10


def adamw(old, grads, m, v, decay, norm):
    """new, m, v in the precision of the arguments."""
    g = grads * (CLIP / norm if norm > CLIP else 1.0)
    m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
    step = (m / (1 - BETA1**STEP)) / (np.sqrt(v / (1 - BETA2**STEP)) + EPS)
    return old - LR * (step + decay * old), m, v


def cases(b):
    specs = gpt2.parameter_specs(b.config)
    ends, N = np.cumsum([s.size for s in specs], dtype=np.int64), b.N
    decays = np.array([0.1 * s.decay for s in specs], np.float32)
    shape, f32, some = f"{b.model} N={N}", np.float32, spread(N, 200_000)
    master = None if b.dtype == f32 else b.normal((N,), f32, 0.02)
    params, grads = b.normal((N,), scale=0.02), b.normal((N,), scale=1e-3)
    m, v = b.normal((N,), f32, 1e-4), b.normal((N,), f32, 1e-8, 1e-6)
    norm = 2.0
    tables = dict(ends=b.array(ends), decays=b.array(decays), seeds=b.array(np.arange(1, 17, dtype=np.uint32)))
    hyper = b.array(np.array([LR, 1 - BETA1**STEP, 1 - BETA2**STEP, 1.0], f32))
    args = dict(params=params, master=master, grads=grads, m=m, v=v, **tables, hyper=hyper)
    args |= dict(norm_squared=b.array(np.array([norm * norm, 1.0], f32)))
    args |= dict(beta1=BETA1, beta2=BETA2, eps=EPS, grad_clip=CLIP)

    def want():
        decay = decays[np.searchsorted(ends, np.arange(N)[some], side="right")].astype(np.float64)
        old = b.host(params if master is None else master, some)
        new, *moments = adamw(old, *(b.host(a, some) for a in (grads, m, v)), decay, norm)
        rows = [("params", some, new)] + ([] if master is None else [("master", some, new)])
        return rows + [("m", some, moments[0]), ("v", some, moments[1])]

    def peers():
        torch = b.torch
        p = torch.zeros(N, device=b.t(m).device).copy_(b.t(params)).requires_grad_()
        p.grad = b.t(grads).float()
        fused = torch.optim.AdamW([p], LR, (BETA1, BETA2), EPS, 0.1, fused=True)
        rows = {"torch": fused.step}
        prepare = bench.compiled(torch)
        foreach = torch.optim.AdamW([p], torch.tensor(LR), (BETA1, BETA2), EPS, 0.1)
        rows["torch.compile"] = prepare and prepare(foreach.step)
        return rows

    nbytes = N * (24 + 2 * params.itemsize if master is not None else 28)
    adds = "params m v" if master is None else "params master m v"
    old = params if master is None else master
    naive = bench.numpy_only(lambda o, g, m, v: adamw(o, g, m, v, np.float32(0.1), norm), old, grads, m, v)
    yield Case("adamw_update", shape, args, "", adds, want, nbytes, 0, naive, peers)

    master = b.normal((N,), f32, 0.02)

    def want_init():
        return [("params", some, b.host(master, some))]

    def init_peers():
        source, target = b.t(master), b.t(params)
        return bench.torch_peers(b, lambda: target.copy_(source))

    args = dict(params=params, master=master, ends=tables["ends"], seeds=tables["seeds"])
    nbytes = N * (4 + params.itemsize)
    naive = bench.numpy_only(np.copy, master)
    yield Case("init_from_master", shape, args, "params", "", want_init, nbytes, 0, naive, init_peers)


if __name__ == "__main__":
    bench.finish(*bench.main(sys.modules[__name__]))
