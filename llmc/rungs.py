"""Any rung of an op inside real training, --kernel matmul_forward=4: rungs are the numbered functions of llmc/cuda."""

import importlib
import pkgutil
import re
import sys

from llmc.errors import UserError


def rungs(ops):
    """{op: {number: function}} of an op set: what its files define beside the public functions."""
    found = {}
    for file in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"{ops.__name__}.{file.name}")
        for name, value in vars(module).items():
            match = re.fullmatch(r"([a-z_]+[a-z])(\d+)", name)
            if match and callable(value) and hasattr(ops, match[1]):
                found.setdefault(match[1], {})[int(match[2])] = value
    return found


def use(ops, text, dtype, head_size):
    """Replace a public function of the op set by one of its rungs; text is "op=N". UserError names those there are, or
    says why a model of this dtype ("bf16") and head size cannot have it on this GPU."""
    found = rungs(ops)
    op, _, number = text.partition("=")
    if not found:
        raise UserError(f"--kernel {text}: {ops.__name__} has no rungs. HINT: they are those of --device cuda.")
    if op not in found:
        raise UserError(f"--kernel {text}: no op of that name has rungs. HINT: one of {', '.join(sorted(found))}.")
    if not number.isdigit() or int(number) not in found[op]:
        numbers = ", ".join(str(n) for n in sorted(found[op]))
        raise UserError(f"--kernel {text}: no such rung. HINT: {op}=N with N one of {numbers}.")
    number = int(number)
    function = found[op][number]
    file = sys.modules[function.__module__]
    sizes = getattr(file, "HEAD_SIZES", {}).get(number, (head_size,))
    if number in getattr(file, "SIXTEEN_BIT", ()) and dtype == "fp32":
        raise UserError(f"--kernel {text}: a rung for bf16 and fp16, not fp32. HINT: --dtype bf16, or another N.")
    if number in getattr(file, "HOPPER", ()) and (sm := ops.module.capability()) != 90:
        raise UserError(f"--kernel {text}: a rung for Hopper, sm_90; this is sm_{sm}. HINT: another N.")
    if head_size not in sizes:
        sizes = " and ".join(map(str, sizes))
        raise UserError(f"--kernel {text}: a rung for head sizes {sizes}, not {head_size}. HINT: another N.")
    setattr(ops, op, function)
