"""Loss curves of llmc and PyTorch from the same weights over the same batches of Tiny Shakespeare.

    python -m dev.loss_curves                      GPT-2 124M, 200 steps; on a GPU both in bf16
    python -m dev.loss_curves -e tiny:d2 -b 2 -t 64 --steps 20 --device cpu

PyTorch trains with autocast to bf16 and fp32 weights, as users train it. Both start from the same fp32 weights: of
weights rounded to bf16, as llm.c's are, autocast would round the first small updates away. Exit code 1 if any tenth
step differs by more than --tolerance (0.5 %). The rows go to dev/results/loss_curves_<device>.csv, unless --csv says
where else.
"""

import argparse
import csv
import dataclasses
import sys
from pathlib import Path

import numpy as np

from dev import bench_step
from dev.torch_gpt2 import Trainer
from llmc import cpu, devices, gpt2
from llmc.data.loader import DataLoader
from llmc.data.prepare import prepare_default
from llmc.data.shards import read_shard_header
from llmc.model import Model
from llmc.training.schedulers import get_learning_rate


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-e", "--model", default="d12")
    p.add_argument("-b", "--batch-size", type=int, default=16)
    p.add_argument("-t", "--sequence-length", type=int, default=1024)
    p.add_argument("-l", "--learning-rate", type=float, default=1e-4)
    p.add_argument("-u", "--warmup-iterations", type=int, default=20)
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--tolerance", type=float, default=0.005)
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    p.add_argument("--csv", type=Path)
    args = p.parse_args(argv)

    ops, device, line = devices.pick_device(args.device)
    dtype = devices.model_dtype(devices.check_dtype(None, device))
    train, _, text = prepare_default("bytes" if args.model.startswith("tiny:") else "gpt2")
    vocabulary = read_shard_header(train).vocab_size or 50257
    config = gpt2.config_from_descriptor(args.model, vocabulary, args.sequence_length)
    B, T = args.batch_size, args.sequence_length
    print(f"{line}\n{text}\n{args.model} B={B} T={T}, {args.steps} steps, learning rate {args.learning_rate:g}")

    ours = Model(gpt2, ops, config, B, T, dtype=dtype, graphs=device == "cuda")
    drawn = Model(gpt2, cpu, config, 1, 8, training=False)
    drawn.init_weights()
    ours.load_parameters(drawn.params_flat)
    if ours.master is not None:
        ops.device.upload(ours.master, drawn.params_flat)
    params = {s.name: getattr(drawn.params, s.name) for s in gpt2.parameter_specs(config)}
    theirs = Trainer(config, device, compiled=False, params=params)
    theirs.net.classes = config.vocab_size
    loader = DataLoader(train, B, T, should_shuffle=True, vocab_size=config.vocab_size)
    x, y = np.empty((2, B, T), np.int32)
    rows, worst = [], 0.0
    print("  step       ours    PyTorch   difference")
    for step in range(args.steps):
        lr = get_learning_rate("cosine", step, args.learning_rate, args.warmup_iterations, args.steps, 0.1)
        for group in theirs.optimizer.param_groups:
            group["lr"] = lr
        loader.next_batch(x, y)
        ours.forward(x)
        ours.backward(x, y)
        ours.update(dataclasses.replace(bench_step.HYPER, lr=lr), step + 1)
        rows.append((step + 1, ours.mean_loss(), theirs.step(x, y)))
        if (step + 1) % 10 == 0 or step == 0:
            _, a, b = rows[-1]
            worst = max(worst, abs(a / b - 1))
            print(f"{step + 1:6d} {a:10.4f} {b:10.4f} {100 * (a / b - 1):+11.3f} %", flush=True)
    mean = np.mean([abs(a / b - 1) for _, a, b in rows])
    print(f"largest difference at a tenth step {100 * worst:.3f} %, mean over all steps {100 * mean:.3f} %")
    path = args.csv or Path(__file__).parent / "results" / f"loss_curves_{device}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "llmc", "torch"))
        writer.writerows((step, f"{a:.6f}", f"{b:.6f}") for step, a, b in rows)
    return 0 if worst <= args.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
