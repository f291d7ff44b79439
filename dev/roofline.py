"""The least work of a training step, op by op, and how near measured times come to it.

    python dev/roofline.py -e d12 -b 64 -t 1024                      FLOPs, bytes and floor of each op and of the step
    python dev/roofline.py --results dev/results/nvidia_h200.csv     beside the times that bench_step.py --csv measured
    python dev/roofline.py --results dev/results/nvidia_h200.csv --plot roofline.png

FLOPs are those of the matmuls and of causal attention (half of T x T); bytes are each operand read once and each
result written once. floor = max(FLOPs / matmul rate, bytes / copy bandwidth): no op runs faster, whatever its kernel;
the floor of the step is their sum, as ops run one after another. The rates are measured ones: from the result file, or
--matmul and --copy. The plot has the matmuls under their roof, and every op's share of its limit: filled, the newest
commit in the file, and hollow, the oldest.
"""

import argparse
import csv
import os
import sys
from typing import NamedTuple

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from llmc import gpt2
from llmc.errors import UserError


class Work(NamedTuple):
    """One op of the step: its label, its number of calls, and FLOPs and bytes of all calls together."""

    label: str
    calls: int
    flops: int
    bytes: int


def linear_layers(config):
    """{name: (OC, C)} of the weight matrices."""
    C = config.channels
    return {
        "qkv": (3 * C, C),
        "attproj": (C, C),
        "fc": (4 * C, C),
        "fcproj": (C, 4 * C),
        "lmhead": (config.padded_vocab_size, C),
    }


def step_work(config, B, T, X=2, recompute=1, G=None, master=True):
    """[Work] of one training step (one micro-step and the update). X, G: bytes of a model number and of a gradient."""
    L, C, NH, N = config.num_layers, config.channels, config.num_heads, B * T
    V, Vp, P, G = config.vocab_size, config.padded_vocab_size, gpt2.num_parameters(config), G or X
    act = N * C * X  # bytes of a (B, T, C) activation
    rows = 8 * N  # mean and rstd
    work = [Work("encoder_forward", 1, 0, 2 * act + T * C * X + 4 * N)]
    layernorms = 1 + (2 * L if recompute >= 2 else 0)
    work.append(Work("layernorm_forward", layernorms, 0, layernorms * (2 * act + rows)))
    work.append(Work("fused_residual_forward", 2 * L, 0, 2 * L * (4 * act + rows)))
    backward = []
    for name, (OC, c) in linear_layers(config).items():
        n = 1 if name == "lmhead" else L
        weight, inp, out = OC * c, N * c * X, N * OC * X
        flops = 2 * N * c * OC
        forward_bytes = inp + weight * X + out * (2 if name == "fc" else 1)
        work.append(Work(f"matmul_forward {name}", n, n * flops, n * forward_bytes))
        # fcproj reads pre_gelu. It reads inp too, or writes it where the GELU is recomputed
        backward_bytes = out + 2 * inp + weight * (X + G) + (inp if name == "fcproj" else 0)
        backward.append(Work(f"matmul_backward {name}", n, n * 2 * flops, n * backward_bytes))
    att, flops = 4 * B * NH * T, 2 * B * T * T * C
    work.append(Work("attention_forward", L, L * flops, L * (4 * act + att)))
    work.append(Work("fused_classifier", 1, 0, 2 * N * V * X))
    work += backward
    work.append(Work("attention_backward", L, L * 5 * flops // 2, L * (8 * act + att)))
    work.append(Work("layernorm_backward", 2 * L + 1, 0, (2 * L + 1) * (4 * act + rows)))
    work.append(Work("encoder_backward", 1, 0, act + 2 * (min(N, Vp) + T) * C * G))
    work.append(Work("global_norm_squared", 2, 0, P * G + 4 * N))
    work.append(Work("adamw_update", 1, 0, P * (16 + G + (8 + X if master and X < 4 else 2 * X))))
    return work


def floor_ms(work, matmul, copy):
    """(least ms, "flops" or "bytes": what sets it) for rates in TFLOP/s and GB/s."""
    flops, bytes_ = work.flops / matmul / 1e9, work.bytes / copy / 1e6
    return (flops, "flops") if flops > bytes_ else (bytes_, "bytes")


def measured(path, B, T, model):
    """[(commit, {label: ms}, copy GB/s, matmul TFLOP/s)] of the per-op rows in a result file, oldest commit first."""
    if not os.path.exists(path):
        raise UserError(f"--results {path}: no such file. HINT: bench_step.py --ops --csv {path} makes one")
    found = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if row.get("bench") == "step_op" and (row["model"], row["B"], row["T"]) == (model, str(B), str(T)):
                times = found.setdefault(row["commit"], ({}, float(row["copy_GBs"]), float(row["matmul_TFLOPs"])))[0]
                times[row["op"]] = float(row["ms_p50"])
    if not found:
        have = f"has no per-op rows of {model}, B={B}, T={T}"
        raise UserError(f"--results {path}: {have}. HINT: bench_step.py --ops --csv {path}, or other -e -b -t")
    return [(commit, *values) for commit, values in found.items()]


def table(work, matmul, copy, times=None):
    """Prints the step op by op. Returns its floor in ms."""
    heads = ("calls", "GFLOP", "MB", "FLOP/byte", "floor ms", "bound") + (("ms", "% of floor") if times else ())
    print(f"{'op':<26}" + "".join(f"{h:>11}" for h in heads))
    total, spent, reached = 0.0, 0.0, 0.0
    for w in work:
        floor, bound = floor_ms(w, matmul, copy)
        total += floor
        numbers = f"{w.calls:>11}{w.flops / 1e9:>11.1f}{w.bytes / 1e6:>11.1f}{w.flops / w.bytes:>11.1f}{floor:>11.3f}"
        ms = times.get(w.label) if times else None
        spent, reached = spent + (ms or 0.0), reached + (floor if ms else 0.0)
        print(f"{w.label:<26}{numbers}{bound:>11}" + (f"{ms:>11.3f}{100 * floor / ms:>11.1f}" if ms else ""))
    sums = f"{sum(w.calls for w in work):>11}{sum(w.flops for w in work) / 1e9:>11.1f}"
    sums += f"{sum(w.bytes for w in work) / 1e6:>11.1f}{'':>11}{total:>11.3f}{'':>11}"
    print(f"{'step':<26}{sums}" + (f"{spent:>11.3f}{100 * reached / spent:>11.1f}" if spent else ""))
    return total


def plot(path, title, work, matmul, copy, runs):
    """Draws a PNG: matmuls and attention under the roof, every op's share of its own roof; hollow: oldest commit."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--plot needs matplotlib. HINT: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    colors = {"flops": "#c2510a", "bytes": "#1f5fa8"}  # the color says what bounds an op
    (first, before, *_), (last, after, *_) = runs[0], runs[-1]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 7), width_ratios=(1, 1.15))
    figure.suptitle(title, fontsize=12)

    under = [w for w in work if w.flops and w.label in after]
    ends = (min(100.0, matmul * 500 / copy), matmul * 1e3 / copy, 3e3)  # FLOP per byte: the roof's ends and its corner
    left.loglog(ends, [min(matmul, i * copy / 1e3) for i in ends], "k-", lw=1.5)
    left.text(ends[1] * 1.1, matmul * 1.03, f"{matmul:.3g} TFLOP/s, measured", fontsize=8)
    left.text(ends[0] * 1.12, ends[0] * copy / 1e3, f"a copy's {copy / 1e3:.3g} TB/s", fontsize=8)
    for w in under:
        at = w.flops / w.bytes
        points = [w.flops / times[w.label] / 1e9 for times in (before, after) if w.label in times]
        left.plot([at] * len(points), points, "-", color=colors["flops"], lw=0.8, alpha=0.6)
        left.plot(at, points[0], "o", color=colors["flops"], markerfacecolor="white", ms=5)
        left.plot(at, points[-1], "o", color=colors["flops"], ms=6)
        name = w.label.replace("matmul_", "").replace("forward", "fwd").replace("backward", "bwd")
        left.annotate(name, (at, points[-1]), (5, -3), textcoords="offset points", fontsize=7)
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 4, 6)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(ticker.NullLocator())
    left.set_xlim(ends[0] * 0.9, 4e3)
    left.set(xlabel="FLOP per byte", ylabel="TFLOP/s", title="matmuls and attention under the roof")

    timed = sorted((w for w in work if w.label in after), key=lambda w: after[w.label])
    for row, w in enumerate(timed):
        floor, bound = floor_ms(w, matmul, copy)
        shares = [100 * floor / times[w.label] for times in (before, after) if w.label in times]
        right.plot(shares, [row] * len(shares), "-", color=colors[bound], lw=1.2, alpha=0.6)
        right.plot(shares[0], row, "o", color=colors[bound], markerfacecolor="white", ms=5)
        right.plot(shares[-1], row, "o", color=colors[bound], ms=6)
        right.text(103, row, f"{shares[-1]:.0f} %", fontsize=8, va="center", ha="left")
        right.text(121, row, f"{after[w.label]:.2f} ms", fontsize=8, va="center", ha="right")
    right.axvline(100, color="k", lw=1.5)
    right.set_yticks(range(len(timed)), [w.label for w in timed], fontsize=8)
    right.set(
        xlim=(0, 122), ylim=(-0.7, len(timed) - 0.3), xlabel="% of the limit", title="each op of a step, slowest on top"
    )
    right.set_xticks(range(0, 101, 20))
    marks = [("o", "white", "k", f"commit {first}")] * (len(runs) > 1) + [("o", "k", "k", f"commit {last}")]
    marks += [("s", color, color, f"bound by {name}") for name, color in colors.items()]
    lines = [pyplot.Line2D([], [], ls="", marker=m, markerfacecolor=f, color=c, label=t) for m, f, c, t in marks]
    left.legend(handles=lines, fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.grid(True, which="major", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-e", "--model", default="d12", help="descriptor (d12)")
    p.add_argument("-b", "--batch-size", type=int, default=32)
    p.add_argument("-t", "--sequence-length", type=int, default=1024)
    p.add_argument("-r", "--recompute", type=int, choices=(0, 1, 2), default=1)
    p.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    p.add_argument("--matmul", type=float, default=790.0, help="TFLOP/s (790: measured on an H200, bf16)")
    p.add_argument("--copy", type=float, default=4200.0, help="GB/s read and written (4200: measured on an H200)")
    p.add_argument("--results", metavar="FILE", help="result file with rows of bench_step.py --ops")
    p.add_argument("--plot", metavar="FILE", help="write a PNG; needs --results and matplotlib")
    args = p.parse_args(argv)
    try:
        B, T, config = args.batch_size, args.sequence_length, gpt2.config_from_descriptor(args.model)
        work = step_work(config, B, T, 4 if args.dtype == "fp32" else 2, args.recompute)
        matmul, copy, times, runs = args.matmul, args.copy, None, []
        if args.results:
            runs = measured(args.results, B, T, args.model)
            commit, times, copy, matmul = runs[-1]
        title = f"GPT-2 {args.model} {args.dtype} B={B} T={T} recompute {args.recompute}"
        print(title)
        print(f"limits: {matmul:.0f} TFLOP/s, {copy:.0f} GB/s" + (f"; times of commit {commit}" if times else ""))
        floor = table(work, matmul, copy, times)
        print(f"floor of the step: {floor:.2f} ms = {B * T / floor * 1e3:,.0f} tokens/s")
        if args.plot:
            if not runs:
                raise UserError("--plot needs measured times. HINT: --results FILE")
            plot(args.plot, title, work, matmul, copy, runs)
            print(f"wrote {args.plot}")
    except UserError as error:
        sys.exit(f"roofline: {error}")


if __name__ == "__main__":
    main()
