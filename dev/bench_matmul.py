"""The five linear layers of GPT-2, forward and backward: python -m dev.bench_matmul (flags: dev/bench.py).

FLOPs: 2 B T C OC forward, 4 backward. Fewest bytes: every operand read once, every result written once.
cuBLAS is the bare products (torch.mm into a given output), without bias, GELU and bias gradient: ours have them.
The whole ladder runs on fc; the other layers run the tensor-core rungs.

python -m dev.bench_matmul --products [RUNG ...] [-e d12] [-b 64]     compute capability 9.0: each product of a step
bf16, T=1024: TFLOP/s of cuBLAS, which makes the bare products, and of Hopper's rungs, taking turns, medians of 20,
L2 overwritten before each. Forward with bias, weight gradients with the reduction of their parts; then the same with
what a step adds: +gelu two outputs, +dgelu, and of rung 11 +regelu the recomputed GELU too, +dbias.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dev import bench
from dev.bench import Case, spread
from llmc.cuda import ladder, matmul
from llmc.cuda.ladder import matmul as rungs_below

LAYERS = {"qkv": (1, 3), "attproj": (1, 1), "fc": (1, 4), "fcproj": (4, 1), "lmhead": (1, None)}  # C, OC in units of C


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_grad(x):
    t = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)


def linear(inp, weight, bias=None):
    out = inp @ weight.T
    return out if bias is None else out + bias


def linear_backward(dout, inp, weight):
    """dinp, dweight, dbias."""
    d, x = dout.reshape(-1, dout.shape[-1]), inp.reshape(-1, inp.shape[-1])
    return d @ weight, d.T @ x, d.sum(0)


def cases(b):
    for layer, (width, outputs) in LAYERS.items():
        if b.executor and layer not in ("fc", "fcproj"):  # counts scale with the sizes, so two layers stand for all
            continue
        yield from layer_cases(b, layer, b.C * width, b.Vp if outputs is None else b.C * outputs)


def layer_cases(b, layer, C, OC):
    B, T = b.B, b.T
    shape = f"{layer} B={B} T={T} C={C} OC={OC}"
    tensor_cores = tuple(rung.number for rung in ladder.of("matmul_forward") if "fp32" not in rung.dtypes)
    rungs = None if layer == "fc" else tensor_cores[1:] if b.dtype.itemsize == 2 else (3,)
    inp, out = b.normal((B, T, C)), b.empty((B, T, OC))
    weight, bias = b.normal((OC, C), scale=0.02), None if layer == "lmhead" else b.normal((OC,))
    with_gelu, before_gelu = layer == "fc", layer == "fcproj"
    bi, ti, oi, ci = spread(B, 2), spread(T, 16), spread(OC, 64), spread(C, 64)
    flops = 2 * B * T * C * OC
    nbytes = inp.nbytes + weight.nbytes + out.nbytes * (1 + with_gelu)
    pre_gelu = b.empty((B, T, OC)) if with_gelu else None
    F = b.torch and b.torch.nn.functional
    blas = "cuBLAS" if b.device == "cuda" else "torch.mm"

    def want():
        own = linear(b.host(inp, (bi, ti)), b.host(weight, oi), None if bias is None else b.host(bias, oi))
        where = (bi, ti, oi)
        return [("pre_gelu", where, own), ("out", where, gelu(own))] if with_gelu else [("out", where, own)]

    def peers():
        x, w, o = b.t(inp), b.t(weight), b.torch.empty((B * T, OC), dtype=b.t(inp).dtype, device=b.t(inp).device)
        beta, flat = None if bias is None else b.t(bias), b.t(inp).view(B * T, C)

        def function():
            own = F.linear(x, w, beta)
            return (own, F.gelu(own, approximate="tanh")) if with_gelu else own

        return {blas: lambda: b.torch.mm(flat, w.T, out=o)} | bench.torch_peers(b, function)

    args = dict(out=out, inp=inp, weight=weight, bias=bias, pre_gelu=pre_gelu)
    naive = bench.numpy_only(linear, inp, weight, bias)
    writes = "out pre_gelu" if with_gelu else "out"
    yield Case("matmul_forward", shape, args, writes, "", want, nbytes, flops, naive, peers, rungs=rungs)
    del args

    pre = b.normal((B, T, C)) if before_gelu else None
    dout, dinp, dweight = b.normal((B, T, OC)), out if C == OC else b.empty((B, T, C)), b.empty((OC, C))
    dbias = None if bias is None else b.empty((OC,))
    nbytes = 2 * inp.nbytes + 2 * weight.nbytes + out.nbytes + (inp.nbytes if before_gelu else 0)

    def want_backward():
        dx = b.host(dout, (bi, ti)) @ b.host(weight, (slice(None), ci))
        if before_gelu:
            dx *= gelu_grad(b.host(pre, (bi, ti, ci)))
        columns = b.host(dout, (..., oi)).reshape(B * T, -1)
        dw = columns.T @ b.host(inp, (..., ci)).reshape(B * T, -1)
        bias_want = [] if dbias is None else [("dbias", oi, columns.sum(0))]
        return [("dinp", (bi, ti, ci), dx), ("dweight", (oi, ci), dw), *bias_want]

    def backward_peers():
        x, w, d = b.t(pre if before_gelu else inp, grad=True), b.t(weight, grad=True), b.t(dout)
        leaves = (x, w) if bias is None else (x, w, b.t(bias, grad=True))

        def function():
            return F.linear(F.gelu(x, approximate="tanh") if before_gelu else x, *leaves[1:])

        flat, source, weights = d.view(B * T, OC), b.t(inp).view(B * T, C), b.t(weight)
        dx, dw = b.torch.empty_like(source), b.torch.empty_like(weights)

        def products():
            b.torch.mm(flat, weights, out=dx)
            b.torch.mm(flat.T, source, out=dw)

        return {blas: products} | bench.torch_peers(b, function, dout=d, inputs=leaves)

    scratch = b.empty((b.ops.matmul_scratch_size(B, T, C, OC),), np.float32)
    args = dict(dinp=dinp, dweight=dweight, dbias=dbias, scratch=scratch, dout=dout, inp=inp, weight=weight)
    args |= dict(pre_gelu=pre, accumulate=False)
    naive = bench.numpy_only(linear_backward, dout, inp, weight)
    writes = "dinp dweight" if dbias is None else "dinp dweight dbias"
    case = Case("matmul_backward", shape, args, writes, "", want_backward, nbytes, 2 * flops, naive, backward_peers)
    yield case._replace(rungs=rungs)


class Products(NamedTuple):
    """The three products of one of Hopper's rungs. The last two fields say what it computes beside them."""

    forward: Callable  # (out, inp, weight, bias, pre_gelu)
    dgrad: Callable  # (dinp, dout, weight, pre_gelu); with regelu also gelu_out
    wgrad: Callable  # (dweight, dbias, scratch, dout, inp)
    regelu: bool = False
    dbias: bool = False


def products_of(number):
    """The Products of a rung."""
    if number == 11:

        def own_wgrad(dweight, dbias, scratch, dout, inp):
            matmul.wgrad_sm90(dweight, dbias, scratch, dout, inp, False)

        return Products(matmul.forward_sm90, matmul.dgrad_sm90, own_wgrad, regelu=True, dbias=True)
    name = {6: rungs_below.WGMMA, 7: rungs_below.TURNS}[number]

    def wgrad(dweight, dbias, scratch, dout, inp):
        rungs_below.wgrad_hopper(name, dweight, scratch, dout, inp, False)

    return Products(
        lambda *args: rungs_below.forward_hopper(name, *args),
        lambda *args: rungs_below.dgrad_hopper(name, *args),
        wgrad,
    )


def products(argv):
    numbers = [rung.number for rung in ladder.of("matmul_forward") if rung.arch == 90]
    p = bench.flags(__doc__)
    p.add_argument("rungs", nargs="*", type=int, default=numbers, metavar="RUNG")
    p.add_argument("--products", action="store_true")
    args = p.parse_args(argv)
    if wrong := set(args.rungs) - set(numbers):
        p.error(f"no such rung: {', '.join(map(str, sorted(wrong)))}. HINT: {', '.join(map(str, numbers))}")
    rungs = {number: products_of(number) for number in args.rungs}
    b = bench.Bench("cuda", model=args.model, B=args.batch_size or 64, T=args.sequence_length, dtype=args.dtype)
    print(f"{b.description} | {bench.software(b)} | commit {bench.commit()}")
    alone = np.median(b.overwritten_ms(lambda: None, 10, 1))
    for layer, (width, outputs) in LAYERS.items():
        for product, flops, blas, ours, has in layer_products(b, layer, b.C * width, outputs and b.C * outputs):
            jobs = {"cuBLAS": blas}
            jobs |= {
                n: lambda rung=rung, ours=ours: ours(rung) for n, rung in rungs.items() if has is None or has(rung)
            }
            ms = [[b.overwritten_ms(job, 1, 1)[0] - alone for job in jobs.values()] for _ in range(23)][3:]
            rates = flops / np.median(ms, axis=0) / 1e9
            cells = (f"{name} {rate:.0f} ({rate / rates[0]:.2f})" for name, rate in zip(jobs, rates, strict=True))
            print(f"{layer + ' ' + product:22}", "   ".join(cells), flush=True)


def layer_products(b, layer, K, N):
    """(name, FLOPs, what cuBLAS does, what a rung does given its Products, which rungs have it or None) of a layer."""
    M, has_bias, N = b.B * b.T, N is not None, N or b.Vp
    inp, weight, dout = b.normal((M, K)), b.normal((N, K), scale=0.02), b.normal((M, N))
    out, dinp, dweight = b.empty((M, N)), b.empty((M, K)), b.empty((N, K))
    bias = b.normal((N,)) if has_bias else None
    scratch = b.empty((matmul.matmul_scratch_size(b.B, b.T, K, N),), np.float32)
    x, w, d, o, dx, dw = (b.t(array) for array in (inp, weight, dout, out, dinp, dweight))
    flops, mm = 2 * M * N * K, b.torch.mm

    def blas_forward():
        mm(x, w.T, out=o)

    def blas_dgrad():
        mm(d, w, out=dx)

    def blas_wgrad():
        mm(d.T, x, out=dw)

    yield "forward", flops, blas_forward, lambda rung: rung.forward(out, inp, weight, bias, None), None
    if layer == "fc":
        pre_gelu = b.empty((M, N))
        yield "forward+gelu", flops, blas_forward, lambda rung: rung.forward(out, inp, weight, bias, pre_gelu), None
    yield "dgrad", flops, blas_dgrad, lambda rung: rung.dgrad(dinp, dout, weight, None), None
    if layer == "fcproj":
        pre_gelu, has = b.normal((M, K)), lambda rung: rung.regelu
        yield "dgrad+dgelu", flops, blas_dgrad, lambda rung: rung.dgrad(dinp, dout, weight, pre_gelu), None
        yield "dgrad+dgelu+regelu", flops, blas_dgrad, lambda rung: rung.dgrad(dinp, dout, weight, pre_gelu, inp), has
    yield "wgrad", flops, blas_wgrad, lambda rung: rung.wgrad(dweight, None, scratch, dout, inp), None
    if has_bias:  # dbias goes over bias, which nothing uses after this
        has = lambda rung: rung.dbias  # noqa: E731
        yield "wgrad+dbias", flops, blas_wgrad, lambda rung: rung.wgrad(dweight, bias, scratch, dout, inp), has


if __name__ == "__main__":
    if "--products" in sys.argv:
        products(sys.argv[1:])
        sys.exit()
    bench.finish(*bench.main(sys.modules[__name__]))
