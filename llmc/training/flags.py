"""The flags of llmc.train: llm.c's letters (train_gpt2.cu error_usage and main), each with a long name, and more.

A flag that is not given is None; settings.py has the defaults. -h is HellaSwag's, as in llm.c, so only --help is help.
"""

import argparse
from collections.abc import Callable
from typing import Any

from llmc.command import (
    Parser,
    above_zero,
    below_one,
    count,
    fraction,
    memory_size,
    named,
    natural,
    number,
    period,
    positive,
    seed,
    thread_count,
)
from llmc.errors import UserError

ON_OFF = dict(type=int, choices=(0, 1))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags in argv (None: sys.argv) as a namespace. Errors: UserError for flags that contradict each other."""
    args = parser().parse_args(argv)
    P, R, method = args.process_count, args.process_rank, args.nccl_init_method
    if P is not None and R is not None and R >= P:
        raise UserError(f"-pr {R}: with -pn {P} the ranks are 0 to {P - 1}. HINT: -pn counts processes.")
    if method == "fs" and not args.fs_path:
        raise UserError("-pi fs needs -pf, a folder that all processes share. HINT: -pf DIR on a shared file system.")
    if args.memory and not args.plan:
        raise UserError("--memory is for --plan: a run takes what the device has. HINT: add --plan, or lower -b.")
    return args


def parser() -> Parser:
    """The parser, its flags in the groups of --help."""
    p = Parser(
        prog="llmc.train",
        description="Train GPT-2. With no flags: Tiny Shakespeare.",
        allow_abbrev=False,
        add_help=False,
    )
    p.add_argument("--help", action="help", help="show this and exit (-h is HellaSwag's)")
    add_files(p.add_argument_group("data and files").add_argument)
    add_batch(p.add_argument_group("batch").add_argument)
    add_optimization(p.add_argument_group("optimization").add_argument)
    add_evaluation(p.add_argument_group("evaluation").add_argument)
    add_precision(p.add_argument_group("precision and memory").add_argument)
    add_nonfinite(p.add_argument_group("when a loss or gradient norm is NaN or Inf").add_argument)
    add_machine(p.add_argument_group("machine").add_argument)
    title = "many processes: mpirun, torchrun and srun tell -pn and -pr themselves"
    add_processes(p.add_argument_group(title).add_argument)
    return p


def add_files(add: Callable[..., Any]) -> None:
    add(
        "-i",
        "--input-bin",
        type=named,
        metavar="GLOB",
        help="training shards (default: Tiny Shakespeare, prepared as needed)",
    )
    add("-j", "--input-val-bin", type=named, metavar="GLOB", help="validation shards (Tiny Shakespeare's)")
    add(
        "-e",
        "--model",
        type=named,
        metavar="MODEL",
        help="a .bin file, a run's folder, hf:DIR, hf:NAME, or a descriptor: d12, tiny:d4",
    )
    add("-o", "--output-dir", type=named, metavar="DIR", help="logs and checkpoints (default: none, or runs/...)")
    add("-n", "--checkpoint-every", type=natural, metavar="N", help="checkpoint every N steps and at the end (0)")
    add("-nk", "--checkpoints-keep", type=natural, metavar="N", help="keep the newest N (0 = all)")
    text = "multiples that -nk spares (0 = none)"
    add("-nm", "--major-checkpoint-every", type=natural, metavar="N", help=text)
    add("-y", "--resume", **ON_OFF, help="1: continue from the newest checkpoint in -o")
    add("--tokenizer", choices=("gpt2", "bytes"), help="for the default data and for samples")


def add_batch(add: Callable[..., Any]) -> None:
    add("-b", "--batch-size", type=positive, metavar="B", help="rows of a micro-batch, on each process (4)")
    add("-t", "--sequence-length", type=positive, metavar="T", help="tokens in a row (1024, or what the model allows)")
    add("-d", "--total-batch-size", type=positive, metavar="TOKENS", help="tokens of one update (B*T*processes)")
    add("-a", "--overfit-single-batch", **ON_OFF, help="1: train on one validation batch")


def add_optimization(add: Callable[..., Any]) -> None:
    add("-x", "--max-steps", type=count, metavar="N", help="steps (-1 = one epoch)")
    add("-k", "--lr-scheduler", type=named, metavar="NAME", help="cosine, linear, constant or wsd")
    add("-l", "--learning-rate", type=number, metavar="LR", help="peak learning rate (3e-4)")
    add("-u", "--warmup-iterations", type=natural, metavar="N", help="steps of linear warm-up (0)")
    text = "final learning rate / peak (1 = no decay)"
    add("-q", "--final-learning-rate-frac", type=fraction, metavar="F", help=text)
    add("-c", "--weight-decay", type=number, metavar="W", help="of matrices and embeddings (0 = off)")
    text = "skip an update whose loss has a z-score above Z among the last 128 (0 = off)"
    add("-sl", "--skip-update-loss-z", type=number, metavar="Z", help=text)
    text = "skip an update whose gradient norm has a z-score above Z among the last 128 (0 = off)"
    add("-sg", "--skip-update-grad-z", type=number, metavar="Z", help=text)
    add("--beta1", type=below_one, help="AdamW's (0.9)")
    add("--beta2", type=below_one, help="AdamW's (0.95)")
    add("--eps", type=above_zero, help="AdamW's (1e-8)")
    add("--grad-clip", type=number, metavar="NORM", help="largest gradient norm (1.0; 0 = off)")
    add("--seed", type=seed, help="of fresh weights (42, as llm.c)")


def add_evaluation(add: Callable[..., Any]) -> None:
    add("-v", "--val-loss-every", type=natural, metavar="N", help="validate every N steps and at the end (20; 0 = off)")
    add("-m", "--val-max-steps", type=count, metavar="N", help="batches of one validation (20; -1 = all)")
    add("-s", "--sample-every", type=natural, metavar="N", help="sample every N steps and at the end (20; 0 = off)")
    add("-g", "--sample-length", type=positive, metavar="N", help="positions of a sample (64)")
    add("--temperature", type=number, help="of samples (1)")
    add("-h", "--hellaswag", **ON_OFF, help="1: HellaSwag accuracy every -v steps and at the end")


def add_precision(add: Callable[..., Any]) -> None:
    text = "of parameters and activations (bf16 on a GPU, fp32 on a CPU)"
    add("--dtype", choices=("bf16", "fp16", "fp32"), help=text)
    text = "of the gradients: model, that of --dtype, as llm.c; fp32 sums micro-steps without rounding (model)"
    add("--grad-dtype", choices=("model", "fp32"), help=text)
    text = "1: AdamW updates fp32 copies of the weights; 0: the weights themselves, in bf16 by stochastic rounding (1)"
    add("-w", "--use-master-weights", **ON_OFF, help=text)
    text = "in backward: 0 none, 1 GELU, 2 also layernorms (1)"
    add("-r", "--recompute", type=int, choices=(0, 1, 2), help=text)
    text = "llm.c's GELU fusion. Accepted and without effect: GELU is always part of the matmul kernels here"
    add("-ge", "--gelu-fusion", type=int, choices=(-1, 0, 1, 2), help=text)
    text = "llm.c's TF32. Accepted and without effect: --dtype fp32 multiplies in full fp32 here, as llm.c with -f 0"
    add("-f", "--tf32", **ON_OFF, help=text)

    text = "print the memory plan of this run and the largest batch that fits, and exit; needs no GPU and no data"
    add("--plan", action="store_true", help=text)
    text = "of the device to --plan for, as 80GiB or 80GB (what is free on this one)"
    add("--memory", type=memory_size, metavar="SIZE", help=text)


def add_nonfinite(add: Callable[..., Any]) -> None:
    text = "the weights stay, where it came from is printed and saved; then stop, or skip this update (stop)"
    add("--on-nonfinite", choices=("stop", "skip"), help=text)
    text = "do the step that such a run saved again, op by op; also with another --dtype. Exit code 1 if as bad"
    add("--replay", type=named, metavar="FILE", help=text)


def add_machine(add: Callable[..., Any]) -> None:
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where it works, else cpu")
    text = "print GPU use, clock, power and temperature every N steps (-1 or 0 = off; needs nvidia-ml-py)"
    add("-lg", "--log-gpu-every", type=period, metavar="N", help=text)
    add("--no-graph", action="store_true", help="GPU: launch each kernel, do not replay CUDA graphs")
    text = "GPU: wait for each kernel and name the one that fails (implies --no-graph)"
    add("--check", action="store_true", help=text)
    text = "GPU: rung N of an op, matmul_forward=4, instead of the one in production; may be repeated"
    add("--kernel", action="append", type=named, metavar="OP=N", help=text)
    add("--threads", type=thread_count, metavar="N", help="CPU threads (default: all cores this process may use)")


def add_processes(add: Callable[..., Any]) -> None:
    text = "0: every process has the whole optimizer state; 1: a share of it; 2 and 3 become 0, as in llm.c (0)"
    add("-z", "--zero-stage", type=int, choices=(0, 1, 2, 3), help=text)
    add("-pn", "--process-count", type=positive, metavar="P", help="number of processes (the launcher's, else 1)")
    add("-pr", "--process-rank", type=natural, metavar="R", help="rank of this process (the launcher's, else 0)")
    text = "rank R uses GPU R mod N (the launcher's local rank, else 8)"
    add("-pg", "--gpus-per-node", type=positive, metavar="N", help=text)
    text = "how the processes find each other: mpi, tcp (with -ps), fs (with -pf) (mpi, or the launcher's)"
    add("-pi", "--nccl-init-method", choices=("mpi", "tcp", "fs"), help=text)
    add("-ps", "--server-ip", default="", metavar="HOST", help="-pi tcp: the machine of rank 0 (the launcher's)")
    add("-pf", "--fs-path", default="", metavar="DIR", help="-pi fs: a folder that all processes share")
