"""Memory before it is allocated: the largest batch that fits, and what to say where one does not.

The plan is model.memory_plan. Model allocates from the same plan, so the two agree to the byte. `needs(B, recompute)`
below is the sum of the plan for the run at hand. The budget is what a device has for it, without what CUDA itself
takes.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from llmc.errors import UserError
from llmc.gpt2 import GPT2Config

Needs = Callable[[int, int], int]  # bytes of a plan with this B and this recompute
Limits = tuple[int | None, int, int | None]  # see limits()


def largest_batch(needs: Needs, recompute: int, budget: int, most: int, divides: int | None = None) -> int:
    """The largest B <= most with needs(B, recompute) <= budget, or 0 if there is none.

    divides: a number that B has to divide, or None. The search takes it that needs grows with B. That is not so for a
    few MiB of scratch, which split sums take: a B slightly above the answer may fit as well.
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


def check(
    needs: Needs,
    B: int,
    T: int,
    recompute: int,
    budget: int | None,
    most: int,
    divides: int | None = None,
    failed: bool = False,
) -> None:
    """UserError, with what does fit, for a plan that is larger than the budget.

    B, T: the micro-batch; budget: bytes, None where it is not known; most: the largest B*T that the op set can index;
    divides: rows of one update, of which B has to be a divisor, or None; failed: the allocation has failed, so the plan
    is too large whatever the budget says. Source of the idea: llm.c's batch estimate.
    """
    if B * T > most:
        limit = f"{B * T} tokens in a micro-batch, the kernels count to {most}"
        raise UserError(f"-b {B} -t {T}: {limit}. HINT: -b {most // T} or less, with -d for more micro-steps.")
    wanted = needs(B, recompute)
    if failed:  # the device had less than it said, or not in one piece
        had = "the allocation failed" if budget is None else f"of the {size(budget)} for it the allocation failed"
        budget = int(0.9 * min(wanted, budget or wanted))
    elif budget is None or wanted <= budget:
        return
    else:
        had = f"the device has {size(budget)} for it"
    fitting: list[tuple[int, int]] = []  # B, recompute
    for r in range(recompute, 3):
        found = min(B, largest_batch(needs, r, budget, most // T, divides))
        if found and (not fitting or found > fitting[-1][0]):
            fitting.append((found, r))
    hint = " or ".join(f"-b {b} -r {r}" for b, r in fitting) + " fits"
    if not fitting:
        hint = f"not even -b 1 -r 2 fits: lower -t (now {T}), or take a smaller model"
    raise UserError(f"-b {B} -r {recompute}: the plan needs {size(wanted)}, {had}. HINT: {hint}.")


def table(needs: Needs, T: int, budget: int, most: int) -> str:
    """The largest batch for each recompute level, as text."""
    lines = [f"largest batch in {size(budget)}, T = {T}", f"  {'-r':<6}{'largest -b':>10}   plan at that"]
    for r in range(3):
        B = largest_batch(needs, r, budget, most // T)
        lines.append(f"  {r:<6}{B or 'none':>10}" + (f"   {size(needs(B, r))}" if B else ""))
    return "\n".join(lines)


def size(nbytes: int) -> str:
    """Bytes for people: GiB from 1 GiB on, else MiB."""
    return f"{nbytes / 2**30:,.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"


def needs_of(config: GPT2Config, ops: ModuleType, T: int, dtype: Any, **precision: Any) -> Needs:
    """needs(B, recompute): bytes of the plan of a run with these settings; precision: as memory_plan takes it."""
    from llmc import gpt2
    from llmc.model import memory_plan

    def needs(B: int, recompute: int) -> int:
        plan = memory_plan(gpt2, ops, config, B, T, recompute=recompute, dtype=dtype, **precision)
        return sum(buffer.nbytes for buffer in plan) + threads

    threads = ops.device.scratch_bytes()
    return needs


def limits(
    config: GPT2Config,
    ops: ModuleType,
    T: int,
    dtype: Any,
    *,
    total_batch_size: int | None = None,
    P: int = 1,
    sharing: int = 1,
    memory: int | None = None,
) -> Limits:
    """(budget, most, divides) for check(): bytes of this device, positions that its kernels index, rows of an update.

    total_batch_size: tokens of one update over P processes, None for one micro-batch; sharing: how many processes share
    the device; memory: bytes of the device to plan for, None for this one. A budget that is not known is None.
    """
    try:
        budget = ops.device.budget(memory)
    except UserError:  # a plan for a device that this machine does not have
        budget = None
    budget = budget and budget // sharing
    rows = total_batch_size // (T * P) if total_batch_size else None
    return budget, ops.device.max_positions(config.channels, config.padded_vocab_size, dtype), rows


def plan_text(plan: list[Any], ops: ModuleType, dtype: Any) -> str:
    """The plan as text, and below it the scratch that the threads of the op set have besides."""
    from llmc.model import format_plan

    text, threads = format_plan(plan, dtype), ops.device.scratch_bytes()
    return text + (f"\n  {'scratch of the threads':<50}{threads:>16,} bytes" if threads else "")
