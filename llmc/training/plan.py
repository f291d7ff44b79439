"""`llmc.train --plan`: the memory plan of a run, and the largest batch. Nothing is allocated, and data need not exist.

It works for the cuda op set on machines without a GPU or CuPy, as the scratch of a kernel follows from shapes alone.
"""

import contextlib
import re
from types import ModuleType

from llmc import devices, gpt2
from llmc.data import tokenizer
from llmc.data.shards import vocabulary_of
from llmc.errors import UserError
from llmc.model import memory_plan
from llmc.training import memory
from llmc.training.settings import Settings
from llmc.training.setup import model_config, model_source, partition_of, precision_of, total_batch_of


def print_plan(settings: Settings, ops: ModuleType, line: str, memory_size: int | None = None) -> None:
    """Print the plan of the run that the settings describe, then raise UserError if the device is too small for it.

    line: which device it is for, as plan_device() tells; memory_size: bytes of that device, None for what it has.
    """
    s, config = settings, plan_config(settings)
    B, T, P = s.batch_size, s.sequence_length or min(1024, config.max_seq_len), s.num_processes
    if T > config.max_seq_len:
        raise UserError(f"-t {T}: the model has positions for 1 to {config.max_seq_len} tokens. HINT: lower -t.")
    stand_in = False
    try:
        dtype = devices.model_dtype(s.dtype)
    except ImportError:  # bf16 arrays need ml_dtypes, a plan does not: that of the other 16-bit type is the same
        dtype, stand_in = "float16", True
    partition, notice = partition_of(s, config)
    precision = precision_of(s, partition)
    plan = memory_plan(gpt2, ops, config, B, T, recompute=s.recompute, dtype=dtype, **precision)
    text = memory.plan_text(plan, ops, dtype)
    print(line if notice is None else f"{line}\n{notice}")
    print(f"{s.model_name}: {gpt2.num_parameters(config):,} parameters, {s.dtype}; -b {B} -t {T} -r {s.recompute}")
    print(text.replace("float16 ", "bfloat16") if stand_in else text)
    needs = memory.needs_of(config, ops, T, dtype, **precision)
    budget, most, divides = memory.limits(
        config, ops, T, dtype, total_batch_size=s.total_batch_size, P=P, memory=memory_size
    )
    if budget is None:
        print("how much memory the device has is not known. HINT: --memory 80GiB tells the largest batch that fits.")
    else:
        print(memory.table(needs, T, budget, most))
    total_batch_of(s, T)
    memory.check(needs, B, T, s.recompute, budget, most, divides)


def plan_config(settings: Settings) -> gpt2.GPT2Config:
    """The GPT2Config of a run. Its data need not exist: without data the vocabulary is the tokenizer's."""
    name = settings.model_name
    if not re.match(r"(gpt2:)?d\d|gpt3:|tiny:", name):
        return model_config(settings, model_source(settings), settings.input_bin)
    vocab_size = tokenizer.vocabulary(settings.data_tokenizer)
    with contextlib.suppress(UserError):  # no such file
        vocab_size = vocabulary_of(settings.input_bin) if settings.input_bin else vocab_size
    return gpt2.config_from_descriptor(name, vocab_size, settings.sequence_length)


def plan_device(device: str, dtype: str | None, threads: int | None = None) -> tuple[ModuleType, str, str]:
    """pick_device for a plan, where the cuda op set needs no GPU. auto with a 16-bit --dtype means cuda here."""
    from llmc import cuda

    if device == "cpu" or (device == "auto" and dtype not in ("bf16", "fp16")):
        return devices.pick_device(device, threads)
    try:
        return devices.pick_device("cuda")
    except UserError as error:
        return cuda, "cuda", f"cuda, which this machine cannot run ({str(error).partition(' HINT')[0]})"
