"""The trainer's flags: their defaults, the parser, and what can be wrong with several of them together."""

import os

from llmc.command import (
    Parser,
    above_zero,
    below_one,
    count,
    fraction,
    memory_size,
    natural,
    number,
    period,
    positive,
    thread_count,
)  # fmt: skip
from llmc.devices import check_dtype
from llmc.errors import UserError

# ----------------------------------------------------------------------------------------------------------------------
# the trainer's

# What a flag is when it is not given. LLMC_DEFAULTS are llm.c's; with neither -i nor -e the run is the default job, and
# one of the TINY_SHAKESPEARE tables overrides them: on a CPU a byte-level model that two cores train in under
# three minutes, on a GPU GPT-2 124M with its own tokenizer.
LLMC_DEFAULTS = dict(
    batch_size=4,
    learning_rate=3e-4,
    warmup_iterations=0,
    final_learning_rate_frac=1.0,
    weight_decay=0.0,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    grad_clip=1.0,
    max_steps=-1,
    val_loss_every=20,
    val_max_steps=20,
    sample_every=20,
    sample_length=64,
    temperature=1.0,
    checkpoint_every=0,
)
TINY_SHAKESPEARE_CPU = dict(
    model="tiny:d4",
    batch_size=12,
    sequence_length=96,
    learning_rate=3e-3,
    warmup_iterations=150,
    final_learning_rate_frac=0.02,
    weight_decay=0.1,
    max_steps=1400,
    val_loss_every=200,
    sample_every=0,
    sample_length=400,
    temperature=0.8,
    checkpoint_every=400,
)
TINY_SHAKESPEARE_CUDA = dict(
    model="d12",
    batch_size=16,
    sequence_length=1024,
    learning_rate=6e-4,
    warmup_iterations=20,
    final_learning_rate_frac=0.1,
    weight_decay=0.1,
    max_steps=150,
    val_loss_every=25,
    sample_every=0,
    sample_length=256,
    checkpoint_every=150,
)


def parser():
    """The flags of llmc.train: llm.c's letters (train_gpt2.cu error_usage and main), each with a long name, and more.

    Not given is None wherever what then holds depends on the device, the data or the launcher (fill_defaults).
    -h is HellaSwag's, as in llm.c: help is --help alone.
    """
    p = Parser(
        prog="llmc.train",
        description="Train GPT-2. With no flags: Tiny Shakespeare.",
        allow_abbrev=False,
        add_help=False,
    )
    p.add_argument("--help", action="help", help="show this and exit (-h is HellaSwag's)")
    on_off = dict(type=int, choices=(0, 1))

    add = p.add_argument_group("data and files").add_argument
    add("-i", "--input-bin", metavar="GLOB", help="training shards (default: Tiny Shakespeare, prepared as needed)")
    add("-j", "--input-val-bin", metavar="GLOB", help="validation shards (default: Tiny Shakespeare's)")
    add("-e", "--model", metavar="MODEL", help="a .bin file, hf:DIR, hf:NAME, or a descriptor: d12, gpt3:c768, tiny:d4")
    add("-o", "--output-dir", metavar="DIR", help="logs and checkpoints (default: none, or runs/...)")
    add("-n", "--checkpoint-every", type=natural, metavar="N", help="checkpoint every N steps and at the end (0)")
    add("-nk", "--checkpoints-keep", type=natural, default=0, metavar="N", help="keep the newest N (0 = all)")
    text = "multiples that -nk spares (0 = none)"
    add("-nm", "--major-checkpoint-every", type=natural, default=0, metavar="N", help=text)
    add("-y", "--resume", **on_off, default=0, help="1: continue from the newest checkpoint in -o")
    add("--tokenizer", choices=("gpt2", "bytes"), help="for the default data and for samples")

    add = p.add_argument_group("batch").add_argument
    add("-b", "--batch-size", type=positive, metavar="B", help="rows of a micro-batch, on each process (4)")
    add("-t", "--sequence-length", type=positive, metavar="T", help="tokens in a row (1024, or what the model allows)")
    add("-d", "--total-batch-size", type=positive, metavar="TOKENS", help="tokens of one update (B*T*processes)")
    add("-a", "--overfit-single-batch", **on_off, default=0, help="1: train on one validation batch")

    add = p.add_argument_group("optimization").add_argument
    add("-x", "--max-steps", type=count, metavar="N", help="steps (-1 = one epoch)")
    add("-k", "--lr-scheduler", default="cosine", metavar="NAME", help="cosine, linear, constant or wsd")
    add("-l", "--learning-rate", type=number, metavar="LR", help="peak learning rate (3e-4)")
    add("-u", "--warmup-iterations", type=natural, metavar="N", help="steps of linear warm-up (0)")
    text = "final learning rate / peak (1 = no decay)"
    add("-q", "--final-learning-rate-frac", type=fraction, metavar="F", help=text)
    add("-c", "--weight-decay", type=number, metavar="W", help="of matrices and embeddings (0 = off)")
    text = "skip an update whose loss has a z-score above Z among the last 128 (0 = off)"
    add("-sl", "--skip-update-loss-z", type=number, default=0.0, metavar="Z", help=text)
    text = "skip an update whose gradient norm has a z-score above Z among the last 128 (0 = off)"
    add("-sg", "--skip-update-grad-z", type=number, default=0.0, metavar="Z", help=text)
    add("--beta1", type=below_one, help="AdamW's (0.9)")
    add("--beta2", type=below_one, help="AdamW's (0.95)")
    add("--eps", type=above_zero, help="AdamW's (1e-8)")
    add("--grad-clip", type=number, metavar="NORM", help="largest gradient norm (1.0; 0 = off)")
    add("--seed", type=natural, default=42, help="of fresh weights (42, as llm.c)")

    add = p.add_argument_group("evaluation").add_argument
    add("-v", "--val-loss-every", type=natural, metavar="N", help="validate every N steps and at the end (20; 0 = off)")
    add("-m", "--val-max-steps", type=count, metavar="N", help="batches of one validation (20; -1 = all)")
    add("-s", "--sample-every", type=natural, metavar="N", help="sample every N steps and at the end (20; 0 = off)")
    add("-g", "--sample-length", type=positive, metavar="N", help="positions of a sample (64)")
    add("--temperature", type=number, help="of samples (1)")
    add("-h", "--hellaswag", **on_off, default=0, help="1: HellaSwag accuracy every -v steps and at the end")

    add = p.add_argument_group("precision and memory").add_argument
    text = "of parameters and activations (bf16 on a GPU, fp32 on a CPU)"
    add("--dtype", choices=("bf16", "fp16", "fp32"), help=text)
    text = "of the gradients: model, that of --dtype, as llm.c; fp32 sums micro-steps without rounding (model)"
    add("--grad-dtype", choices=("model", "fp32"), default="model", help=text)
    text = "1: AdamW updates fp32 copies of the weights; 0: the weights themselves, in bf16 by stochastic rounding (1)"
    add("-w", "--use-master-weights", **on_off, default=1, help=text)
    text = "in backward: 0 none, 1 GELU, 2 also layernorms (1)"
    add("-r", "--recompute", type=int, choices=(0, 1, 2), default=1, help=text)
    text = "llm.c's GELU fusion. Accepted and without effect: GELU is always part of the matmul kernels here"
    add("-ge", "--gelu-fusion", type=int, choices=(-1, 0, 1, 2), default=-1, help=text)
    text = "llm.c's TF32. Accepted and without effect: --dtype fp32 multiplies in full fp32 here, as llm.c with -f 0"
    add("-f", "--tf32", **on_off, default=1, help=text)

    text = "print the memory plan of this run and the largest batch that fits, and exit; needs no GPU and no data"
    add("--plan", action="store_true", help=text)
    text = "of the device to --plan for, as 80GiB or 80GB (what is free on this one)"
    add("--memory", type=memory_size, metavar="SIZE", help=text)

    add = p.add_argument_group("when a loss or gradient norm is NaN or Inf").add_argument
    text = "the weights stay, where it came from is printed and saved; then stop, or skip this update (stop)"
    add("--on-nonfinite", choices=("stop", "skip"), default="stop", help=text)
    text = "do the step that such a run saved again, op by op; also with another --dtype. Exit code 1 if as bad"
    add("--replay", metavar="FILE", help=text)

    add = p.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where it works, else cpu")
    text = "print GPU use, clock, power and temperature every N steps (-1 or 0 = off; needs nvidia-ml-py)"
    add("-lg", "--log-gpu-every", type=period, default=0, metavar="N", help=text)
    add("--no-graph", action="store_true", help="GPU: launch each kernel, do not replay CUDA graphs")
    text = "GPU: wait for each kernel and name the one that fails (implies --no-graph)"
    add("--check", action="store_true", help=text)
    text = "GPU: rung N of an op, matmul_forward=4, instead of the one in production; may be repeated"
    add("--kernel", action="append", default=[], metavar="OP=N", help=text)
    add("--threads", type=thread_count, metavar="N", help="CPU threads (default: all cores this process may use)")

    add = p.add_argument_group("many processes: mpirun, torchrun and srun tell -pn and -pr themselves").add_argument
    text = "0: every process has the whole optimizer state; 1: a share of it; 2 and 3 become 0, as in llm.c (0)"
    add("-z", "--zero-stage", type=int, choices=(0, 1, 2, 3), default=0, help=text)
    add("-pn", "--process-count", type=positive, metavar="P", help="number of processes (the launcher's, else 1)")
    add("-pr", "--process-rank", type=natural, metavar="R", help="rank of this process (the launcher's, else 0)")
    text = "rank R uses GPU R mod N (the launcher's local rank, else 8)"
    add("-pg", "--gpus-per-node", type=positive, metavar="N", help=text)
    text = "how the processes find each other: mpi, tcp (with -ps), fs (with -pf) (mpi, or the launcher's)"
    add("-pi", "--nccl-init-method", choices=("mpi", "tcp", "fs"), help=text)
    add("-ps", "--server-ip", default="", metavar="HOST", help="-pi tcp: the machine of rank 0 (the launcher's)")
    add("-pf", "--fs-path", default="", metavar="DIR", help="-pi fs: a folder that all processes share")
    return p


def check(args):
    """What can be wrong with flags together, before anything is looked up; returns lines to print about them."""
    P, R, method = args.process_count, args.process_rank, args.nccl_init_method
    if P is not None and R is not None and R >= P:
        raise UserError(f"-pr {R}: with -pn {P} the ranks are 0 to {P - 1}. HINT: -pn counts processes.")
    if method == "fs" and not args.fs_path:
        raise UserError("-pi fs needs -pf, a folder that all processes share. HINT: -pf DIR on a shared file system.")
    if args.memory and not args.plan:
        raise UserError("--memory is for --plan: a run takes what the device has. HINT: add --plan, or lower -b.")
    lines = []
    if args.zero_stage > 1:
        lines.append(f"-z {args.zero_stage}: there are ZeRO stages 0 and 1, here as in llm.c; running with -z 0")
        args.zero_stage = 0
    return lines


def fill_defaults(args, device="cpu"):
    """Settle every flag that was not given; returns whether this is the default job."""
    default_job = args.input_bin is None and args.model is None
    args.model_given = args.model is not None
    sample_at_end = default_job and args.sample_every is None
    preset = TINY_SHAKESPEARE_CUDA if device == "cuda" else TINY_SHAKESPEARE_CPU
    for name, value in {**LLMC_DEFAULTS, **(preset if default_job else {})}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.model = args.model or preset["model"]
    args.dtype = check_dtype(args.dtype, device)
    if sample_at_end:
        args.sample_every = args.max_steps if args.max_steps > 0 else 10**9
    if default_job and args.output_dir is None and not args.resume:
        args.output_dir = next(d for i in range(1, 10**6) if not os.path.exists(d := f"runs/shakespeare-{i:03d}"))
    return default_job
