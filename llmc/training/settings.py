"""What a run is: one frozen Settings, made once of the flags or by hand, and the same on all ranks of the run."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from llmc.devices import check_dtype


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes and writes; flags.py has the flag of each field, of the same name.

    The defaults are llm.c's. What differs between the ranks of a run is not in here: the rank, its GPU, its threads.
    Where neither training data nor a model is named the run is the default job, on Tiny Shakespeare.
    """

    # data and files
    input_bin: str | None = None  # glob of the training shards; None: Tiny Shakespeare, prepared as needed
    input_val_bin: str | None = None  # glob of the validation shards; None: those of Tiny Shakespeare
    model: str | None = None  # a descriptor, file, folder or hf:NAME; None: the one to resume, else DEFAULT_MODEL
    output_dir: str | None = None  # where logs and checkpoints go; None: nowhere, of the default job a new one in runs/
    checkpoint_every: int = 0  # steps from checkpoint to checkpoint, and one at the end; 0: none
    checkpoints_keep: int = 0  # how many of the newest stay; 0: all
    major_checkpoint_every: int = 0  # multiples of this step stay in any case; 0: no step does
    resume: bool = False  # continue from the newest checkpoint in output_dir
    tokenizer: str | None = None  # "gpt2" or "bytes", for the default data and for samples; None: that of the model
    # batch
    batch_size: int = 4  # B, rows of a micro-batch on each process
    sequence_length: int | None = None  # T, tokens of a row; None: 1024, or fewer where the model has fewer positions
    total_batch_size: int | None = None  # tokens of one update over all processes and micro-steps; None: one micro-step
    overfit_single_batch: bool = False  # train on the first validation batch alone
    # optimization
    max_steps: int = -1  # updates of the run; -1: one epoch
    lr_scheduler: str = "cosine"  # one of schedulers.NAMES
    learning_rate: float = 3e-4  # the peak of the schedule
    warmup_iterations: int = 0  # steps of linear warm-up
    final_learning_rate_frac: float = 1.0  # learning rate at the end / peak
    weight_decay: float = 0.0  # of matrices and embeddings
    skip_update_loss_z: float = 0.0  # an update whose loss has a larger z-score is left out; 0: none is
    skip_update_grad_z: float = 0.0  # the same for the gradient norm
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.95  # AdamW's
    eps: float = 1e-8  # AdamW's
    grad_clip: float = 1.0  # largest norm of the gradient; 0: any
    seed: int = 42  # of fresh weights
    # evaluation
    val_loss_every: int = 20  # steps from validation to validation, and one at the end; 0: none
    val_max_steps: int = 20  # batches of a validation; -1: all
    sample_every: int = 20  # steps from sample to sample, and one at the end; 0: none
    sample_length: int = 64  # positions of a sample, its start included
    temperature: float = 1.0  # of samples
    hellaswag: bool = False  # HellaSwag accuracy with every validation but that of step 0
    # precision and memory
    dtype: str = "fp32"  # of parameters and activations: "bf16", "fp16" or "fp32"; a CPU has fp32 alone
    grad_dtype: str = "model"  # of gradients: "model", that of the parameters, or "fp32"
    use_master_weights: bool = True  # AdamW updates fp32 copies of the weights
    recompute: int = 1  # what backward computes again instead of keeping it: 1 GELU, 2 also layernorms, 0 nothing
    on_nonfinite: str = "stop"  # after a loss or gradient norm that is not finite: "stop" or "skip" the update
    # machine
    device: str = "cpu"  # where the run computes: "cpu" or "cuda"
    log_gpu_every: int = 0  # steps from one line about the GPU to the next; 0: none
    no_graph: bool = False  # launch each kernel, replay no CUDA graphs
    check: bool = False  # wait for each kernel and name the one that fails
    kernel: tuple = ()  # "op=N": rungs that take the place of the production kernels
    # many processes
    num_processes: int = 1  # P
    zero_stage: int = 0  # 1: each process keeps AdamW's state for a share of every tensor alone

    @property
    def default_job(self) -> bool:
        """Whether the run names neither data nor model."""
        return self.input_bin is None and self.model is None

    @property
    def model_name(self) -> str:
        """The model that was named, else the device's default."""
        return self.model or DEFAULT_MODEL[self.device]

    @property
    def data_tokenizer(self) -> str:
        """The tokenizer of data that this run prepares: the one named, else that of the model's kind."""
        return self.tokenizer or ("bytes" if self.model_name.startswith("tiny:") else "gpt2")


DEFAULT_MODEL = {"cpu": "tiny:d4", "cuda": "d12"}

# What the default job overrides: on a CPU a byte-level model that two cores train in under three minutes, on a GPU
# GPT-2 124M with its own tokenizer.
TINY_SHAKESPEARE = {
    "cpu": dict(
        batch_size=12,
        sequence_length=96,
        learning_rate=3e-3,
        warmup_iterations=150,
        final_learning_rate_frac=0.02,
        weight_decay=0.1,
        max_steps=1400,
        val_loss_every=200,
        sample_length=400,
        temperature=0.8,
        checkpoint_every=400,
    ),
    "cuda": dict(
        batch_size=16,
        sequence_length=1024,
        learning_rate=6e-4,
        warmup_iterations=20,
        final_learning_rate_frac=0.1,
        weight_decay=0.1,
        max_steps=150,
        val_loss_every=25,
        sample_length=256,
        checkpoint_every=150,
    ),
}
AT_THE_END = 10**9  # sample_every of a run that samples once, whose number of steps is not known yet


def settings_from(args: argparse.Namespace, device: str, num_processes: int = 1) -> tuple[Settings, list[str]]:
    """(Settings, lines to print about them) of parsed flags, on a device "cpu" or "cuda"; the only reader of flags.

    A flag that was not given is None, and the field's default or the default job's value holds.
    Errors: UserError for a precision that the device does not have.
    """
    given: dict[str, Any] = {}
    for field in fields(Settings):
        value = getattr(args, field.name, None)
        if value is not None:
            given[field.name] = KINDS.get(field.name, lambda value: value)(value)
    given |= dict(device=device, num_processes=num_processes, dtype=check_dtype(given.get("dtype"), device))
    lines = []
    if given.get("zero_stage", 0) > 1:
        stages = f"-z {given['zero_stage']}: there are ZeRO stages 0 and 1, here as in llm.c; running with -z 0"
        given["zero_stage"], lines = 0, [stages]
    settings = Settings(**given)
    if settings.default_job:
        given = TINY_SHAKESPEARE[device] | given
        steps = given["max_steps"]
        at_the_end: dict[str, Any] = dict(sample_every=steps if steps > 0 else AT_THE_END)
        settings = Settings(**at_the_end | given)
    return settings, lines


KINDS: dict[str, Callable[[Any], Any]] = dict(
    resume=bool, overfit_single_batch=bool, hellaswag=bool, use_master_weights=bool, no_graph=bool, check=bool,
    kernel=tuple,
)  # fmt: skip
