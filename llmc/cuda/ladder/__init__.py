"""The ladder: every rung of every op, from the naive kernel to the one in production.

RUNGS is the one table of them. Tests run all of its rungs, benchmarks measure them, and --kernel matmul_forward=4 puts
one into real training. The rungs below production are launched by the functions in this package from kernels/ladder/;
those in production are launched by the functions in llmc/cuda/<op>.py, and stand in the table with their numbers.
"""

from types import ModuleType

from llmc.errors import UserError

from .. import module
from . import adamw, attention, encoder, fused_classifier, gelu, global_norm, layernorm, matmul
from .rung import Rung

RUNGS: tuple[Rung, ...] = (
    *encoder.RUNGS,
    *layernorm.RUNGS,
    *matmul.RUNGS,
    *attention.RUNGS,
    *gelu.RUNGS,
    *fused_classifier.RUNGS,
    *adamw.RUNGS,
    *global_norm.RUNGS,
)


def of(op: str) -> list[Rung]:
    """The rungs of an op such as "gelu_forward", from the lowest number up."""
    return sorted((rung for rung in RUNGS if rung.op == op), key=lambda rung: rung.number)


def why_not(rung: Rung, dtype: str, head_size: int | None = None) -> str | None:
    """Why a model of this dtype ("bf16") and head size cannot have the rung on the current GPU; None if it can."""
    if dtype not in rung.dtypes:
        return f"a rung for {' and '.join(rung.dtypes)}, not {dtype}"
    if rung.arch is not None and (sm := module.capability()) != rung.arch:
        return f"a rung for Hopper, sm_{rung.arch}; this is sm_{sm}"
    if rung.head_sizes is not None and head_size is not None and head_size not in rung.head_sizes:
        return f"a rung for head sizes {' and '.join(map(str, rung.head_sizes))}, not {head_size}"
    return None


def use(ops: ModuleType, text: str, dtype: str, head_size: int) -> None:
    """Replaces a public function of the op set by one of its rungs; text is "op=N".

    Errors: UserError names the rungs there are, or says why a model of this dtype ("bf16") and head size cannot have
    the one asked for on this GPU.
    """
    op, _, number = text.partition("=")
    rungs = of(op)
    if ops.__name__ != __package__.rpartition(".")[0]:
        raise UserError(f"--kernel {text}: {ops.__name__} has no rungs. HINT: they are those of --device cuda.")
    if not rungs:
        names = ", ".join(sorted({rung.op for rung in RUNGS}))
        raise UserError(f"--kernel {text}: no op of that name has rungs. HINT: one of {names}.")
    rung = next((rung for rung in rungs if str(rung.number) == number), None)
    if rung is None:
        numbers = ", ".join(str(rung.number) for rung in rungs)
        raise UserError(f"--kernel {text}: no such rung. HINT: {op}=N with N one of {numbers}.")
    if why := why_not(rung, dtype, head_size):
        hint = "--dtype bf16, or another N" if dtype not in rung.dtypes else "another N"
        raise UserError(f"--kernel {text}: {why}. HINT: {hint}.")
    setattr(ops, op, rung.call)
