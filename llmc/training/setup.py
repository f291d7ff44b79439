"""From Settings to a run that is ready for its first step: data, folder, model, and what is resumed.

prepare() finds what is wrong with the settings or with files, and allocates nothing. build() allocates and loads.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmc import devices, gpt2, loading
from llmc.cuda import ladder
from llmc.data.loader import DataLoader, EveryPair
from llmc.data.prepare import prepare_default
from llmc.data.shards import check_apart, vocabulary_of
from llmc.data.tokenizer import Tokenizer, tokenizer_for, tokenizer_name
from llmc.errors import UserError
from llmc.files import checkpoints
from llmc.model import Model
from llmc.parallel import launch, zero
from llmc.training import checkpointing, memory, mfu, multiple_choice, schedulers
from llmc.training.loss_scaler import LossScaler
from llmc.training.outlier_detector import OutlierDetector
from llmc.training.run_folder import NOWHERE, Folder
from llmc.training.settings import Settings

Detectors = dict[str, Any]  # name in a checkpoint -> an object with a state about the steps so far


class Machine(NamedTuple):
    """Where this process computes, and with whom."""

    ops: Any  # the op set, its device ready
    line: str  # which device it is, and why
    ranks: Any  # the ranks.Ranks that this process is one of, None for a process on its own
    sums: Any  # their communicator, Mpi or Nccl, or None

    @property
    def rank(self) -> int:
        return self.ranks.rank if self.ranks else 0


@dataclass(frozen=True)
class Run:
    """A run whose settings and files are known to be good. Nothing is allocated for it yet."""

    settings: Settings
    machine: Machine
    notices: list  # lines to print before the tables
    train_data: str  # glob of the training shards
    val_data: str  # glob of the validation shards
    folder: Folder  # where logs and checkpoints go, and the step to continue from
    config: gpt2.GPT2Config
    model_path: str | None  # where the weights come from, None for fresh ones
    dtype: Any  # NumPy dtype of parameters and activations
    partition: zero.Partition | None  # how AdamW's state is cut over the processes, with -z 1
    T: int  # tokens of a row
    micro_steps: int  # micro-batches of one update, on each process
    steps: int  # the step at which the run ends
    train_loader: Any
    val_pairs: EveryPair  # what one validation reads
    all_val_pairs: EveryPair  # the same without the limit of -m
    examples: list  # HellaSwag's, or none
    tokenizer: Any  # of samples; None where token ids are printed
    gpu: tuple | None  # mfu.current_gpu()
    peak: float | None  # FLOP/s that the GPU can at most do
    gpu_stats: Any  # what reads the GPU for -lg, or None

    @property
    def total_batch(self) -> int:
        """Tokens of one update."""
        return self.micro_steps * self.settings.batch_size * self.T * self.settings.num_processes

    @property
    def precision(self) -> dict[str, Any]:
        """The arguments of the memory plan and the model that follow from -w, --grad-dtype and -z."""
        return precision_of(self.settings, self.partition)


def prepare(settings: Settings, machine: Machine, folder: Folder, notices: Sequence[str] = ()) -> Run:
    """The Run of these settings on this machine, in this Folder; notices: lines about the settings. All ranks call it.

    Errors: UserError for whatever is wrong with the settings or with files.
    """
    s, ops, ranks = settings, machine.ops, machine.ranks
    schedulers.check(s.lr_scheduler)
    gpu = mfu.current_gpu() if s.device == "cuda" else None
    gpu_stats = open_gpu_stats(s.log_gpu_every, gpu)
    dtype = devices.model_dtype(s.dtype)
    model_path = model_source(s, folder)
    train_data, val_data, data_line = launch.rank0_first(ranks, lambda: prepare_data(s, model_path))
    config = model_config(s, model_path, train_data, folder)
    if folder.resume_step is not None:
        checkpointing.check_resume(folder.place, folder.resume_step, config, dtype, s.use_master_weights)
    for text in s.kernel:
        ladder.use(ops, text, s.dtype, config.channels // config.num_heads)
    T = s.sequence_length or min(1024, config.max_seq_len)
    total_batch, micro_steps = total_batch_of(s, T)
    train_loader, pairs = open_data(s, train_data, val_data, config, T, machine.rank)
    steps = count_steps(s, train_loader.num_tokens, total_batch, folder)
    examples, hellaswag_line = open_hellaswag(train_data, config, T) if s.hellaswag else ([], None)
    tokenizer, tokenizer_line = sample_tokenizer(config, s.tokenizer) if s.sample_every else (None, None)
    partition, zero_line = partition_of(s, config, machine.rank)
    lines = [*notices, folder.line, zero_line, data_line, hellaswag_line, tokenizer_line]
    return Run(
        settings=s, machine=machine, notices=[line for line in lines if line], train_data=train_data,
        val_data=val_data, folder=folder, config=config, model_path=model_path,
        dtype=dtype, partition=partition, T=T, micro_steps=micro_steps, steps=steps, train_loader=train_loader,
        val_pairs=pairs[0], all_val_pairs=pairs[1], examples=examples, tokenizer=tokenizer, gpu=gpu,
        peak=mfu.peak_flops(*gpu[:2], s.dtype) if gpu else None, gpu_stats=gpu_stats,
    )  # fmt: skip


def build(run: Run, limits: memory.Limits) -> tuple[Model, Detectors]:
    """(model, detectors) of a Run: allocated, and with the weights and the state that the first step starts from.

    limits: what check_memory() has returned. Errors: UserError where the memory cannot be had.
    """
    s, ops = run.settings, run.machine.ops
    graphs = s.device == "cuda" and not (s.no_graph or s.check)
    try:
        model = Model(
            gpt2, ops, run.config, s.batch_size, run.T, recompute=s.recompute, dtype=run.dtype, graphs=graphs,
            ranks=run.machine.sums, **run.precision,
        )  # fmt: skip
    except MemoryError:
        memory.check(memory_needs(run), s.batch_size, run.T, s.recompute, *limits, failed=True)
    detectors: Detectors = {"loss": OutlierDetector(), "grad_norm": OutlierDetector()}
    if s.dtype == "fp16":
        detectors["loss_scale"] = LossScaler()
    step = run.folder.resume_step
    if step is not None:
        checkpointing.load(run.folder.place, step, model, run.train_loader, detectors, s.use_master_weights)
    elif run.model_path:
        loading.read_weights(model, run.model_path)
    else:
        model.init_weights(s.seed)
    if s.resume and run.machine.rank == 0:  # files are removed only now, when nothing can refuse the run any more
        checkpoints.prune_stray(run.folder.place)
        if step is not None:  # a kill may have come between its save and the removal of an old one
            checkpointing.let_go(run.folder.place, step, s)
    return model, detectors


# ----------------------------------------------------------------------------------------------------------------------
# files


def data_tokenizer(settings: Settings, model_path: str | None) -> str:
    """The tokenizer of data that this run prepares: the one named, else that of the model."""
    if settings.tokenizer or model_path is None:
        return settings.data_tokenizer
    vocab_size = loading.model_header(model_path)["vocab_size"]
    name = tokenizer_name(vocab_size)
    if name is None:
        raise UserError(f"{model_path}: no tokenizer has {vocab_size} tokens, as this model. HINT: give it -i and -j.")
    return name


def prepare_data(settings: Settings, model_path: str | None) -> tuple[str, str, str | None]:
    """(training pattern, validation pattern, a line about the default data or None), the data prepared where needed.

    What the user named is never substituted. Errors: UserError.
    """
    s = settings
    if s.input_bin is not None:
        if s.input_val_bin is None:
            raise UserError("-i needs -j, the validation shards. HINT: python -m llmc.data prepare makes both.")
        return s.input_bin, s.input_val_bin, None
    name = data_tokenizer(s, model_path)
    try:
        train, val, text = prepare_default(name, allow_fallback=s.default_job and name == "bytes")
    except UserError as error:
        if not s.default_job or s.tokenizer is not None:
            raise
        train, val, text = prepare_default("bytes", allow_fallback=True)
        text = f"byte-level, as GPT-2's tokenizer or data cannot be had ({str(error).partition('. HINT')[0]}): {text}"
    return train, s.input_val_bin or val, text


def open_data(
    settings: Settings, train_data: str, val_data: str, config: gpt2.GPT2Config, T: int, rank: int
) -> tuple[DataLoader, tuple[EveryPair, EveryPair]]:
    """(training loader, (pairs of one validation, all pairs)), every token id checked.

    -a 1 trains on validation data, unshuffled. P processes take turns at the batches of one process, in its order. So a
    step sees the same batches whatever P is.
    """
    B, P, overfit, V = settings.batch_size, settings.num_processes, settings.overfit_single_batch, config.vocab_size
    pattern, limit = val_data if overfit else train_data, settings.val_max_steps
    if not overfit:
        check_apart(train_data, val_data)
    train_loader = DataLoader(pattern, B, T, rank, P, should_shuffle=not overfit, vocab_size=V, streams=1, rows=B)
    all_pairs = EveryPair(val_data, B, T, rank, P, V)
    pairs = all_pairs if limit == -1 else EveryPair(val_data, B, T, rank, P, V, limit)
    train_loader.check_all_ids()
    all_pairs.check_all_ids()
    return train_loader, (pairs, all_pairs)


def open_hellaswag(train_data: str, config: gpt2.GPT2Config, T: int) -> tuple[list[Any], str | None]:
    """(the examples of -h 1, none without their file; a line to print about them or None)."""
    path, line = multiple_choice.find_hellaswag(train_data)
    return multiple_choice.load_examples(path, config.vocab_size, T) if path else ([], line)


def sample_tokenizer(config: gpt2.GPT2Config, name: str | None) -> tuple[Tokenizer | None, str | None]:
    """(tokenizer or None, a line about it or None). Without one, samples are printed as token ids, as llm.c does."""
    try:
        return tokenizer_for(config.vocab_size, name), None
    except UserError as error:
        if name is not None:
            raise
        return None, f"samples are printed as token ids: {error}"


def open_gpu_stats(every: int, gpu: tuple | None) -> mfu.GpuStats | None:
    """The reader of the GPU for -lg, or None if `every` is 0. gpu: mfu.current_gpu(), None on a CPU."""
    if not every:
        return None
    if gpu is None:
        raise UserError(f"-lg {every} reads a GPU, this run is on the CPU. HINT: leave -lg out.")
    return mfu.GpuStats(gpu[2])


# ----------------------------------------------------------------------------------------------------------------------
# the model and its sizes


def model_source(settings: Settings, folder: Folder = NOWHERE) -> str | None:
    """Where the weights come from: the checkpoint to resume, or the file that -e means; None for fresh weights."""
    if folder.resume_step is not None:
        return checkpoints.model_path(folder.place, folder.resume_step)
    name = settings.model_name
    return loading.model_file(name) if loading.names_a_file(name) else None


def model_config(
    settings: Settings, model_path: str | None, train_data: str | None, folder: Folder = NOWHERE
) -> gpt2.GPT2Config:
    """The GPT2Config of model_path, or of the descriptor of -e, which takes its vocabulary from the data."""
    name = settings.model_name
    if model_path is None:
        assert train_data is not None
        return gpt2.config_from_descriptor(name, vocabulary_of(train_data), settings.sequence_length)
    config = gpt2.config_from_header(loading.model_header(model_path))
    if folder.resume_step is not None and settings.model and (os.path.exists(name) or not name.endswith(".bin")):
        asked = model_config(settings, model_source(settings), train_data)
        for field in ("num_layers", "num_heads", "channels"):
            if getattr(asked, field) != getattr(config, field):
                found = f"has {field} {getattr(asked, field)}, {model_path} {getattr(config, field)}"
                raise UserError(f"-e {name} {found}. HINT: leave -e out, or give a new run another -o.")
    return config


def total_batch_of(settings: Settings, T: int) -> tuple[int, int]:
    """(tokens of one update, micro-steps that each of P processes makes of it)."""
    B, P = settings.batch_size, settings.num_processes
    at_once = B * T * P
    total_batch = settings.total_batch_size or at_once
    if total_batch % at_once:
        factors = f"-b {B} x -t {T}" + f" x {P} processes" * (P > 1)
        raise UserError(f"-d {total_batch} is not a multiple of {factors} = {at_once}. HINT: -d {at_once}.")
    return total_batch, total_batch // at_once


def partition_of(
    settings: Settings, config: gpt2.GPT2Config, rank: int = 0
) -> tuple[zero.Partition | None, str | None]:
    """(how AdamW's state is cut over the processes or None, a line about -z 1 where it has no effect or None)."""
    P = settings.num_processes
    if settings.zero_stage == 0:
        return None, None
    if P == 1:
        return None, "-z 1 has no effect on one process"
    partition = zero.partition(gpt2.parameter_specs(config), rank, P)
    if partition is None:
        return None, f"-z 1: {config.channels} channels cannot be cut into {P} equal shares; running with -z 0"
    return partition, None


def precision_of(settings: Settings, partition: zero.Partition | None) -> dict[str, Any]:
    """The arguments of memory_plan and Model that follow from -w, --grad-dtype and -z."""
    grad_dtype = "float32" if settings.grad_dtype == "fp32" else None  # None: that of the model
    return dict(use_master_weights=settings.use_master_weights, grad_dtype=grad_dtype, partition=partition)


def count_steps(settings: Settings, num_tokens: int, total_batch: int, folder: Folder) -> int:
    """Steps of the run: -x, or one epoch of the training tokens."""
    steps = num_tokens // total_batch if settings.max_steps == -1 else settings.max_steps
    if steps == 0:
        have = f"the training data has {num_tokens}"
        raise UserError(f"-d {total_batch}: one step takes that many tokens, {have}. HINT: lower -d, or give -x.")
    if (folder.resume_step or 0) > steps:
        raise UserError(f"-x {steps}: {folder.path} is already at step {folder.resume_step}. HINT: give a larger -x.")
    return steps


# ----------------------------------------------------------------------------------------------------------------------
# memory


def memory_needs(run: Run) -> memory.Needs:
    """needs(B, recompute): bytes of the plan of this run."""
    return memory.needs_of(run.config, run.machine.ops, run.T, run.dtype, **run.precision)


def check_memory(run: Run) -> memory.Limits:
    """The limits of the device, as memory.limits() gives them; UserError if it is too small for the plan.

    All ranks call it, before anything is allocated.
    """
    s, machine = run.settings, run.machine
    limits = memory.limits(
        run.config, machine.ops, run.T, run.dtype, total_batch_size=s.total_batch_size, P=s.num_processes,
        sharing=launch.ranks_here(machine.ranks, s.device),
    )  # fmt: skip
    memory.check(memory_needs(run), s.batch_size, run.T, s.recompute, *limits)
    return limits
