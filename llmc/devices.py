"""The device: the op set that runs on it, the precision that it has, and its kernels, compiled before they are used."""

import sys
import time
from types import ModuleType
from typing import Any

from llmc.errors import UserError


def pick_device(wanted: str, threads: int | None = None) -> tuple[ModuleType, str, str]:
    """The op set, its name, and one line that says which and why: (ops, "cpu" or "cuda", text).

    wanted: auto, cpu or cuda. auto takes cuda where a kernel can be launched, else cpu, and the line says why.
    threads: those of the CPU op set; None leaves them. Errors: UserError where cuda is wanted and does not work.
    """
    why = "asked for"
    if wanted != "cpu":
        from llmc import cuda

        try:
            cuda.device.start()  # launches a kernel: only that shows that a GPU can be used
            return cuda, "cuda", f"cuda ({why if wanted == 'cuda' else 'auto: it works'}), {cuda.device.describe()}"
        except UserError as error:
            if wanted == "cuda":
                raise UserError(f"--device cuda: {error}") from error
            why = f"auto: {str(error).partition('. HINT')[0].partition(' HINT')[0]}"
    from llmc import cpu

    if threads:
        cpu.device.threads(threads)
    return cpu, "cpu", f"cpu ({why}), {cpu.device.describe()}"


def check_dtype(name: str | None, device: str) -> str:
    """The name of the precision: the one given, else bf16 on a GPU and fp32 on a CPU, which has nothing else."""
    if device == "cpu" and name not in (None, "fp32"):
        raise UserError(f"--dtype {name}: the CPU op set has fp32 only. HINT: --device cuda, or leave --dtype out.")
    return name or ("bf16" if device == "cuda" else "fp32")


def model_dtype(name: str) -> Any:
    """What NumPy takes as the dtype of --dtype: bf16, fp16 or fp32."""
    if name != "bf16":
        return {"fp32": "float32", "fp16": "float16"}[name]
    import ml_dtypes

    return ml_dtypes.bfloat16


def prepare_kernels(
    config: Any, dtype: Any, check: bool = False, grad_dtype: str | None = None, tensors: int | None = None
) -> str:
    """Compile what the cache does not have yet, several files at a time, so that no step has to. -> a line about it.

    config: of the model, for the sizes that kernels are compiled for. dtype, grad_dtype: NumPy's, of the parameters and
    of the gradients (None: the same). check: wait for each launch, and name the kernel that fails (--check). tensors:
    how many tensors the parameters have, for the update; None where there will be no update.
    Hopper's kernels are tried; where they do not work, stderr says so, whichever command it is.
    """
    import numpy as np

    from llmc.cuda import device, matmul, module

    module.check_launches = check
    timer = time.perf_counter()
    C, HS, Vp = config.channels, config.channels // config.num_heads, config.padded_vocab_size
    module.compile_all(np.dtype(dtype).name, device.step_modules(dtype, C, HS, Vp, tensors, grad_dtype))
    fallback = device.try_hopper(dtype, HS, matmul.turned(C, Vp))
    if fallback:
        print(fallback, file=sys.stderr)
    return f"kernels ready after {time.perf_counter() - timer:.1f} s, {len(module.compilations)} files compiled"
