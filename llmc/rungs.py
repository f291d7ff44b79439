"""Any rung of an op inside real training, --kernel matmul_forward=4: rungs are the numbered functions of llmc/cuda."""

import importlib
import pkgutil
import re

from llmc import UserError


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


def use(ops, text):
    """Replace a public function of the op set by one of its rungs; text is "op=N". UserError names those there are."""
    found = rungs(ops)
    op, _, number = text.partition("=")
    if not found:
        raise UserError(f"--kernel {text}: {ops.__name__} has no rungs. HINT: they are those of --device cuda.")
    if op not in found:
        raise UserError(f"--kernel {text}: no op of that name has rungs. HINT: one of {', '.join(sorted(found))}.")
    if not number.isdigit() or int(number) not in found[op]:
        numbers = ", ".join(str(n) for n in sorted(found[op]))
        raise UserError(f"--kernel {text}: no such rung. HINT: {op}=N with N one of {numbers}.")
    setattr(ops, op, found[op][int(number)])
