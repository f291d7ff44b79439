"""What a run prints besides its steps: llm.c's start-up tables, the memory plan, and what it says at the end."""

import sys
from typing import Any

from llmc import gpt2
from llmc.files.checkpoints import unchecked
from llmc.model import memory_plan
from llmc.training import memory
from llmc.training.setup import Run, memory_needs
from llmc.training.step import Speed

Row = tuple[str, Any] | None  # None: a rule between groups


def print_start(run: Run) -> None:
    """The device, notices, the tables of settings and model, and the memory plan."""
    print(run.machine.line)
    for line in run.notices:
        print(line)
    if run.folder.resume_step is not None:
        remark = unchecked(run.folder.place, run.folder.resume_step)
        print(f"resuming from step {run.folder.resume_step} in {run.folder.path}" + (remark and f"; {remark}"))
    print(table(settings_rows(run)))
    print(table(model_rows(run)))
    s, ops = run.settings, run.machine.ops
    options = dict(recompute=s.recompute, dtype=run.dtype, **run.precision)
    plan = memory_plan(gpt2, ops, run.config, s.batch_size, run.T, **options)
    print(memory.plan_text(plan, ops, run.dtype))


def print_batch(run: Run) -> None:
    """How the batch of an update comes about."""
    B, T, P, M = run.settings.batch_size, run.T, run.settings.num_processes, run.micro_steps
    each = "1 micro-step" if M == 1 else f"{M} micro-steps"
    batch = f"B * T = {B} * {T} = {B * T}" if P == 1 else f"B * T * processes = {B} * {T} * {P} = {B * T * P}"
    print(f"batch {batch} tokens; total batch {run.total_batch} => {each} a step")


def print_end(run: Run, speed: Speed, val_loss: float | None, baseline: int) -> None:
    """Time, the default job's loss on all validation data, memory, and what can be done next.

    speed: the step.Speed of the run; val_loss: the last one, or None; baseline: peak_memory() before the model.
    """
    s = run.settings
    if speed.average_ms():
        print(f"total average iteration time: {speed.average_ms():f} ms")
    if s.default_job and val_loss is not None:
        print(f"validation loss on all {run.all_val_pairs.num_pairs} held-out tokens: {val_loss:.4f} nats per token")
    print_memory_used(run, baseline)
    if run.folder.path and s.checkpoint_every:
        print(f'more text: python -m llmc.generate {run.folder.path} --prompt "ROMEO:"')


def print_memory_used(run: Run, baseline: int) -> None:
    """What the run took, next to its plan; baseline: bytes that this process had before the model was built."""
    plan_mib, peak = memory_needs(run)(run.settings.batch_size, run.settings.recompute) / 2**20, peak_memory()
    if run.settings.device == "cuda":
        free, total = run.machine.ops.device.memory()
        print(f"device memory in use: {(total - free) / 2**20:.0f} MiB (plan {plan_mib:.0f} MiB, the rest is CUDA's)")
    elif peak:
        parts = f"plan {plan_mib:.0f} MiB + Python, NumPy and BLAS {baseline / 2**20:.0f} MiB"
        print(f"peak memory: {peak / 2**20:.0f} MiB ({parts})")


def table(rows: list[Row]) -> str:
    """llm.c's start-up table of (label, value) rows; None makes a rule between groups."""
    rule = f"+-{'-' * 21}-+-{'-' * 50}-+"
    lines = [f"| {row[0]:<21} | {row[1]!s:<50} |" if row else rule for row in rows]
    return "\n".join([rule, f"| {'Parameter':<21} | {'Value':<50} |", rule, *lines, rule])


def settings_rows(run: Run) -> list[Row]:
    """Rows of the start-up table: the settings."""
    s = run.settings
    return [
        ("train data pattern", run.train_data),
        ("val data pattern", run.val_data),
        ("output log dir", run.folder.path or "NULL"),
        ("checkpoint_every", s.checkpoint_every),
        ("resume", int(s.resume)),
        ("micro batch size B", s.batch_size),
        ("sequence length T", run.T),
        ("total batch size", run.total_batch),
        ("LR scheduler", s.lr_scheduler),
        ("learning rate (LR)", f"{s.learning_rate:e}"),
        ("warmup iterations", s.warmup_iterations),
        ("final LR fraction", f"{s.final_learning_rate_frac:e}"),
        ("weight decay", f"{s.weight_decay:e}"),
        ("skip update lossz", f"{s.skip_update_loss_z:f}"),
        ("skip update gradz", f"{s.skip_update_grad_z:f}"),
        ("AdamW beta1, beta2", f"{s.beta1:g}, {s.beta2:g}"),
        ("gradient clip", f"{s.grad_clip:g}"),
        ("max_steps", s.max_steps),
        ("val_loss_every", s.val_loss_every),
        ("val_max_steps", s.val_max_steps),
        ("sample_every", s.sample_every),
        ("genT", s.sample_length),
        ("overfit_single_batch", int(s.overfit_single_batch)),
        ("use_master_weights", "enabled" if s.use_master_weights else "disabled"),
        ("gelu_fusion", "always, in the matmul kernels"),
        ("recompute", s.recompute),
    ]


def model_rows(run: Run) -> list[Row]:
    """Rows of the start-up table: the device, the model and what follows from it."""
    s, config = run.settings, run.config
    return [
        ("device", run.gpu[0] if run.gpu else "CPU"),
        ("peak TFlops", f"{run.peak / 1e12:.1f}" if run.peak else "n/a"),
        ("precision", s.dtype.upper() + (", gradients FP32" if s.grad_dtype == "fp32" else "")),
        None,
        ("weight init method", run.model_path or f"{s.model_name}, seed {s.seed}"),
        ("max_sequence_length T", config.max_seq_len),
        ("vocab_size V", config.vocab_size),
        ("padded_vocab_size Vp", config.padded_vocab_size),
        ("num_layers L", config.num_layers),
        ("num_heads NH", config.num_heads),
        ("channels C", config.channels),
        ("num_parameters", f"{gpt2.num_parameters(config)}"),
        None,
        ("train_num_batches", run.steps),
        ("val_num_batches", run.val_pairs.num_batches),
        None,
        ("run hellaswag", "yes" if run.examples else "no"),
        None,
        ("num_processes", s.num_processes),
        ("zero_stage", int(run.partition is not None)),
    ]


def peak_memory() -> int:
    """The largest resident size of this process so far in bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/status") as file:  # on Linux ru_maxrss would include that of the parent process
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
