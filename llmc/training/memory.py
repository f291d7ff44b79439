"""Memory before it is allocated: the largest batch that fits, `llmc.train --plan`, and what to say where one does not.

The plan is gpt2.memory_plan, from which GPT2(...) allocates too: the two agree to the byte. `needs(B, recompute)` below
is its sum for the run at hand. The budget is what a device has for it, without what CUDA itself takes.
"""

import contextlib
import re

from llmc.errors import UserError


def largest_batch(needs, recompute, budget, most, divides=None):
    """The largest B <= most with needs(B, recompute) <= budget, 0 if there is none; divides: only divisors of it.

    needs grows with B, but for a few MiB of scratch that split sums take: another B near the answer may fit as well.
    """
    low, high = 0, 1
    while high <= most and needs(high, recompute) <= budget:
        low, high = high, 2 * high
    high = min(high, most + 1)  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needs(middle, recompute) <= budget else (low, middle)
    while low and divides and divides % low:
        low -= 1
    return low


def check(needs, B, T, recompute, budget, most, divides=None, failed=False):
    """UserError, with what does fit, for a plan that the budget does not hold; failed: for one whose allocation failed.

    B, T: the micro-batch; budget: bytes, None where it is not known; most: the largest B*T that the op set can index;
    divides: rows of one update, of which B has to be a divisor, or None. Source of the idea: llm.c's batch estimate.
    """
    if B * T > most:
        limit = f"{B * T} tokens in a micro-batch, the kernels count to {most}"
        raise UserError(f"-b {B} -t {T}: {limit}. HINT: -b {most // T} or less, with -d for more micro-steps.")
    wanted = needs(B, recompute)
    if failed:  # the device had less than it said, or in pieces
        had = "the allocation failed" if budget is None else f"of the {size(budget)} for it the allocation failed"
        budget = int(0.9 * min(wanted, budget or wanted))
    elif budget is None or wanted <= budget:
        return
    else:
        had = f"the device has {size(budget)} for it"
    fitting = []
    for r in range(recompute, 3):
        found = min(B, largest_batch(needs, r, budget, most // T, divides))
        if found and (not fitting or found > fitting[-1][0]):
            fitting.append((found, r))
    hint = " or ".join(f"-b {b} -r {r}" for b, r in fitting) + " fits"
    if not fitting:
        hint = f"not even -b 1 -r 2 fits: lower -t (now {T}), or take a smaller model"
    raise UserError(f"-b {B} -r {recompute}: the plan needs {size(wanted)}, {had}. HINT: {hint}.")


def table(needs, T, budget, most):
    """The largest batch for each recompute level, as text."""
    lines = [f"largest batch in {size(budget)}, T = {T}", f"  {'-r':<6}{'largest -b':>10}   plan at that"]
    for r in range(3):
        B = largest_batch(needs, r, budget, most // T)
        lines.append(f"  {r:<6}{B or 'none':>10}" + (f"   {size(needs(B, r))}" if B else ""))
    return "\n".join(lines)


def size(nbytes):
    """Bytes for people: GiB from 1 GiB on, else MiB."""
    return f"{nbytes / 2**30:,.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"


def needs_of(config, ops, T, dtype, **precision):
    """needs(B, recompute): bytes of the plan of a run with these settings; precision: as memory_plan takes it."""
    from llmc.gpt2 import memory_plan

    def needs(B, recompute):
        return sum(nbytes for *_, nbytes in memory_plan(config, ops, B, T, recompute, dtype, **precision)) + threads

    threads = ops.device.scratch_bytes()
    return needs


def limits(args, config, ops, T, dtype, P=1, sharing=1):
    """(budget, most, divides) for check(): of this device or --memory; what kernels index; rows of -d on one of P.

    sharing: the processes that this device is for.
    """
    try:
        budget = ops.device.budget(args.memory)
    except UserError:  # --plan without that device
        budget = None
    budget = budget and budget // sharing
    rows = args.total_batch_size // (T * P) if args.total_batch_size else None
    return budget, ops.device.max_positions(config.channels, config.padded_vocab_size, dtype), rows


def plan_text(plan, ops, dtype):
    """The plan as text, with what the op set has beside it."""
    from llmc.gpt2 import format_plan

    text, threads = format_plan(plan, dtype), ops.device.scratch_bytes()
    return text + (f"\n  {'scratch of the threads':<50}{threads:>16,} bytes" if threads else "")


def print_plan(args):
    """`llmc.train --plan`: the plan of the run that the other flags describe, and the largest batch. Allocates nothing.

    It works for the cuda op set on machines without a GPU or CuPy: what kernels want as scratch follows from the shapes
    alone. Data need not exist: the vocabulary is then the tokenizer's.
    """
    from llmc import gpt2, train
    from llmc.devices import model_dtype
    from llmc.parallel.world import world
    from llmc.training.flags import fill_defaults

    if args.process_count is None:
        rank, args.process_count, *_ = world(args.process_count, args.process_rank, args.gpus_per_node)
        if rank > 0:
            return
    ops, device, line = plan_device(args)
    fill_defaults(args, device)
    config = plan_config(args)
    B, T = args.batch_size, args.sequence_length or min(1024, config.max_seq_len)
    if T > config.max_seq_len:
        raise UserError(f"-t {T}: the model has positions for 1 to {config.max_seq_len} tokens. HINT: lower -t.")
    stand_in = False
    try:
        dtype = model_dtype(args.dtype)
    except ImportError:  # ml_dtypes, which only bf16 arrays need: the other 16-bit type has the same plan
        dtype, stand_in = "float16", True
    P = args.process_count
    notice = train.check_zero(args, config, P)
    precision = train.precision_of(args)
    plan = gpt2.memory_plan(config, ops, B, T, args.recompute, dtype, **precision)
    text = plan_text(plan, ops, dtype)
    print(line if notice is None else f"{line}\n{notice}")
    print(f"{args.model}: {gpt2.num_parameters(config):,} parameters, {args.dtype}; -b {B} -t {T} -r {args.recompute}")
    print(text.replace("float16 ", "bfloat16") if stand_in else text)
    needs = needs_of(config, ops, T, dtype, **precision)
    budget, most, divides = limits(args, config, ops, T, dtype, P)
    if budget is None:
        print("how much memory the device has is not known. HINT: --memory 80GiB tells the largest batch that fits.")
    else:
        print(table(needs, T, budget, most))
    train.total_batch_of(args, B, T, P)
    check(needs, B, T, args.recompute, budget, most, divides)


def plan_config(args):
    """The GPT2Config of a run whose data need not be there."""
    from llmc import train
    from llmc.data.shards import vocabulary_of
    from llmc.gpt2 import config_from_descriptor

    if re.match(r"(gpt2:)?d\d|gpt3:|tiny:", args.model):
        tokenizer = args.tokenizer or ("bytes" if args.model.startswith("tiny:") else "gpt2")
        vocab_size = {"gpt2": 50257, "bytes": 257}[tokenizer]
        with contextlib.suppress(UserError):  # no such file
            vocab_size = vocabulary_of(args.input_bin) if args.input_bin else vocab_size
        return config_from_descriptor(args.model, vocab_size, args.sequence_length)
    return train.model_config(args, None)[0]


def plan_device(args):
    """pick_device, but for the cuda op set, asked for or meant by a 16-bit --dtype, no GPU is needed."""
    from llmc import cuda
    from llmc.devices import pick_device

    if args.device == "cpu" or (args.device == "auto" and args.dtype not in ("bf16", "fp16")):
        return pick_device(args.device, args.threads)
    try:
        return pick_device("cuda")
    except UserError as error:
        return cuda, "cuda", f"cuda, which this machine cannot run ({str(error).partition(' HINT')[0]})"
