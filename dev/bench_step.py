"""A whole training step (forward, backward, gradient norm, clip, AdamW): llmc against PyTorch eager on the same cores.

    python dev/bench_step.py --device cpu                   GPT-2 124M, fp32, B=4, T=64: medians, interleaved
    python dev/bench_step.py --device cpu --pace 200        ours alone for 200 steps: does it hold its speed?

The peer is what a PyTorch user would write: F.linear, F.layer_norm, scaled_dot_product_attention, cross_entropy, fused
AdamW, with denormals flushed (torch.set_flush_denormal), the same weights, batches and number of threads. Both run in
one process, a step each in turn, so that a busy machine disturbs both alike; the ratio of medians is the result. Losses
of the two are compared at every step, and a mismatch ends the benchmark. The last line of output is JSON.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import subprocess
import sys
import time

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from llmc import gpt2

HYPER = dict(learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0)


class TorchPeer:
    """The same step in PyTorch eager. Parameters have llm.c's names; the model is a function over them."""

    def __init__(self, torch, model, threads):
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)
        self.torch, self.F, self.config = torch, torch.nn.functional, model.config
        self.w = {}
        for spec in gpt2.parameter_specs(model.config):
            array = getattr(model.params, spec.name)
            parts = array if spec.layers else [array]
            self.w[spec.name] = [torch.tensor(np.array(part), requires_grad=True) for part in parts]
        decays = {spec.name: spec.decay for spec in gpt2.parameter_specs(model.config)}
        groups = [
            dict(params=[p for n, ps in self.w.items() if decays[n] == d for p in ps], weight_decay=wd)
            for d, wd in ((True, HYPER["weight_decay"]), (False, 0.0))
        ]
        betas = (HYPER["beta1"], HYPER["beta2"])
        self.optimizer = torch.optim.AdamW(groups, HYPER["learning_rate"], betas, HYPER["eps"], fused=True)
        self.all = [p for ps in self.w.values() for p in ps]

    def loss(self, x, y):
        F, w, NH = self.F, self.w, self.config.num_heads
        (B, T), C = x.shape, self.config.channels
        h = F.embedding(x, w["wte"][0]) + w["wpe"][0][:T]
        for layer in range(self.config.num_layers):
            p = {name: ps[layer] for name, ps in w.items() if len(ps) > layer}
            n = F.layer_norm(h, (C,), p["ln1w"], p["ln1b"])
            qkv = F.linear(n, p["qkvw"], p["qkvb"]).view(B, T, 3, NH, C // NH).permute(2, 0, 3, 1, 4)
            a = F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=True).transpose(1, 2).reshape(B, T, C)
            h = h + F.linear(a, p["attprojw"], p["attprojb"])
            n = F.layer_norm(h, (C,), p["ln2w"], p["ln2b"])
            n = F.gelu(F.linear(n, p["fcw"], p["fcb"]), approximate="tanh")
            h = h + F.linear(n, p["fcprojw"], p["fcprojb"])
        h = F.layer_norm(h, (C,), w["lnfw"][0], w["lnfb"][0])
        logits = F.linear(h, w["wte"][0][: self.config.vocab_size])
        return F.cross_entropy(logits.view(B * T, -1), y.view(-1))

    def step(self, x, y):
        loss = self.loss(self.torch.from_numpy(x).long(), self.torch.from_numpy(y).long())
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.all, HYPER["grad_clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def our_step(model, x, y, t):
    model.forward(x)
    model.backward(x, y)
    model.update(**HYPER, t=t)
    return model.mean_loss()


def timed(f, *args):
    start = time.perf_counter()
    value = f(*args)
    return value, (time.perf_counter() - start) * 1e3


def quantiles(ms):
    return {f"p{q}": round(float(np.percentile(ms, q)), 2) for q in (20, 50, 80)}


def commit():
    here = os.path.dirname(os.path.abspath(__file__))
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def append_csv(path, row):
    fresh = not os.path.exists(path)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu",), default="cpu")
    p.add_argument("-e", "--model", default="d12", help="descriptor (d12)")
    p.add_argument("-b", "--batch-size", type=int, default=4)
    p.add_argument("-t", "--sequence-length", type=int, default=64)
    p.add_argument("-r", "--recompute", type=int, choices=(0, 1, 2), default=1)
    p.add_argument("--steps", type=int, default=15, help="timed steps of each (15), after 3 to warm up")
    p.add_argument("--pace", type=int, default=0, metavar="N", help="time N steps of ours alone instead")
    p.add_argument("--threads", type=int, help="for both (default: all cores this process may use)")
    p.add_argument("--csv", metavar="FILE", help="append a row, e.g. dev/results/cpu.csv")
    args = p.parse_args()

    from llmc import cpu as ops

    threads = ops.device.threads(args.threads)
    B, T = args.batch_size, args.sequence_length
    config = gpt2.config_from_descriptor(args.model)
    model = gpt2.GPT2(config, ops, B, T, args.recompute)
    model.init_weights()
    rng = np.random.default_rng(0)
    # Zipf-like token frequencies, as text has: most of the vocabulary is rare, and its moments become denormal
    p_token = 1.0 / np.arange(1, config.vocab_size + 1)
    tokens = rng.choice(config.vocab_size, size=(8, B, T + 1), p=p_token / p_token.sum()).astype(np.int32)
    batches = [(np.ascontiguousarray(b[:, :-1]), np.ascontiguousarray(b[:, 1:])) for b in tokens]
    flops = gpt2.flops_per_token(config, T) * B * T
    what = f"GPT-2 {args.model} fp32 B={B} T={T} recompute {args.recompute}"
    print(f"{what} | {ops.device.describe()} | {flops / 1e9:.0f} GFLOP a step")

    if args.pace:
        ms, tenth = [], max(1, args.pace // 10)
        for t in range(args.pace):
            ms.append(timed(our_step, model, *batches[t % 8], t + 1)[1])
            if (t + 1) % tenth == 0:
                print(f"steps {t + 2 - tenth:4d} to {t + 1:4d}: median {np.median(ms[-tenth:]):9.2f} ms", flush=True)
        result = dict(first_tenth_ms=float(np.median(ms[1 : tenth + 1])), last_tenth_ms=float(np.median(ms[-tenth:])))
        print(json.dumps({"bench": "step_pace", "model": args.model, "B": B, "T": T, "steps": args.pace, **result}))
        return

    try:
        import torch
    except ImportError:
        torch = None
        print("PyTorch eager      absent")
    peer = TorchPeer(torch, model, threads) if torch else None
    ours, theirs = [], []
    for t in range(3 + args.steps):
        x, y = batches[t % 8]
        loss, ms = timed(our_step, model, x, y, t + 1)
        ours.append(ms)
        if peer:
            peer_loss, ms = timed(peer.step, x, y)
            theirs.append(ms)
            if abs(loss - peer_loss) > 2e-3:
                sys.exit(f"step {t}: loss {loss:.6f}, PyTorch {peer_loss:.6f}: not the same computation")

    print(f"{'':<18}{'ms p50':>10}{'[p20':>10}{'p80]':>10}{'tokens/s':>12}{'GFLOP/s':>10}{'x PyTorch':>11}")
    rows = {"llmc": quantiles(ours[3:])} | ({"PyTorch eager": quantiles(theirs[3:])} if peer else {})
    for name, q in rows.items():
        ratio = f"{rows['PyTorch eager']['p50'] / q['p50']:>11.2f}" if peer else ""
        rates = f"{B * T / q['p50'] * 1e3:>12.1f}{flops / q['p50'] / 1e6:>10.1f}"
        print(f"{name:<18}{q['p50']:>10.1f}{q['p20']:>10.1f}{q['p80']:>10.1f}{rates}{ratio}")
    row = dict(
        bench="step",
        date=datetime.date.today().isoformat(),
        commit=commit(),
        device=ops.device.describe(),
        python=platform.python_version(),
        numpy=np.__version__,
        torch=torch.__version__ if torch else "absent",
        model=args.model,
        B=B,
        T=T,
        recompute=args.recompute,
        ms_p50=rows["llmc"]["p50"],
        ms_p20=rows["llmc"]["p20"],
        ms_p80=rows["llmc"]["p80"],
        torch_ms_p50=rows["PyTorch eager"]["p50"] if peer else None,
        x_torch=round(rows["PyTorch eager"]["p50"] / rows["llmc"]["p50"], 3) if peer else None,
    )
    if args.csv:
        append_csv(args.csv, row)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
