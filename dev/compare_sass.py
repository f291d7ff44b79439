"""Compares the machine code of every production kernel with that of another checkout. Needs neither GPU nor driver.

    python dev/compare_sass.py ../llmc-before
    python dev/compare_sass.py ../llmc-before --only gelu adamw --arch sm_90a --dtype bf16 fp16

In each checkout a process of its own calls every public op of llmc.cuda with shapes that lead to each of its kernels,
and writes down what would have been launched: file, kernel, dtype and defines. NVRTC compiles that with the checkout's
own options, and nvdisasm (pip install nvidia-cuda-nvdisasm) reads the result. Two kernels are identical if all their
instructions have the same bits, scheduling included, and if they take as many registers and as much static shared
memory. Addresses, line tables and names do not count: a kernel is compared with the one of its name if their code is
the same, else with one of the same code ("renamed from"), else with the one of its name, or of a name that differs in
numbers alone. The exit code is 1 where a kernel differs, has nothing to be compared with, or is gone, else 0.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/ +(.*?);? +/\* (0x[0-9a-f]{16}) \*/\n +/\* (0x[0-9a-f]{16}) \*/")

# ----------------------------------------------------------------------------------------------------------------------
# in each checkout: what its ops launch, compiled


def calls(ops, dtype, grads):
    """Yields (file, function), where the function calls the file's ops of llmc.cuda on zeros that nothing ever reads.
    dtype is the model's, grads that of the weights' gradients. At these shapes the launchers choose differently."""
    import numpy as np

    f32, B, T = np.dtype(np.float32), 4, 1024

    def zeros(*shape, dtype=dtype):
        return np.zeros(shape, dtype)

    def layernorm(C):
        row, stat, weight, grad = zeros(B, T, C), zeros(B, T, dtype=f32), zeros(C), zeros(C, dtype=grads)
        scratch = zeros(ops.layernorm_scratch_size(B, T, C), dtype=f32)
        ops.layernorm_forward(row, stat, stat, row, weight, weight)
        ops.residual_forward(row, row, row)
        ops.fused_residual_forward(row, row, stat, stat, row, row, weight, weight)
        ops.layernorm_backward(row, grad, grad, scratch, row, row, weight, stat, stat)

    def matmul(C, OC):
        inp, out, weight, bias = zeros(B, T, C), zeros(B, T, OC), zeros(OC, C), zeros(OC)
        dweight, dbias = zeros(OC, C, dtype=grads), zeros(OC, dtype=grads)
        scratch = zeros(ops.matmul_scratch_size(B, T, C, OC), dtype=f32)
        ops.matmul_forward(out, inp, weight, bias)
        ops.matmul_forward(out, inp, weight, bias, pre_gelu=out)
        ops.matmul_backward(inp, dweight, dbias, scratch, out, inp, weight)
        ops.matmul_backward(inp, dweight, None, scratch, out, inp, weight, pre_gelu=inp, recompute=True)

    def attention(HS):
        NH = 3
        out, qkvr, att = zeros(B, T, NH * HS), zeros(B, T, 3 * NH * HS), zeros(B, NH, T, dtype=f32)
        scratch = zeros(ops.attention_scratch_size(B, T, NH * HS, NH), dtype=f32)
        ops.attention_forward(out, att, qkvr)
        ops.attention_backward(qkvr, scratch, out, out, qkvr, att)

    def encoder():
        C, Vp = 768, 50304
        inp, out, wte, wpe = zeros(B, T, dtype=np.int32), zeros(B, T, C), zeros(Vp, C), zeros(T, C)
        dwte, dwpe, seed = zeros(Vp, C, dtype=grads), zeros(T, C, dtype=grads), zeros(1, dtype=np.uint32)
        scratch = zeros(ops.encoder_scratch_size(B, T, C, Vp), dtype=np.int32)
        ops.encoder_forward(out, inp, wte, wpe)
        ops.encoder_backward(dwte, dwpe, scratch, out, inp, seed)

    def fused_classifier(V):
        losses, targets = zeros(B, T, dtype=f32), zeros(B, T, dtype=np.int32)
        ops.fused_classifier(zeros(B, T, V), losses, 1.0, targets, V)

    def gelu():
        array = zeros(B, T, 768)
        ops.gelu_forward(array, array)
        ops.gelu_backward_inplace(array, array)

    def adamw():
        N, tensors = 1 << 20, 16
        params, master, grad = zeros(N), zeros(N, dtype=f32), zeros(N, dtype=grads)
        ends, seeds = zeros(tensors, dtype=np.int64), zeros(tensors, dtype=np.uint32)
        decays, hyper, norms = zeros(tensors, dtype=f32), zeros(4, dtype=f32), zeros(2, dtype=f32)
        state = (params, master, grad, master, master, ends, decays, seeds, hyper, norms)
        ops.adamw_update(*state, 0.9, 0.95, 1e-8, 1.0)
        ops.init_from_master(params, master, ends, seeds)

    def global_norm():
        ops.global_norm_squared(
            zeros(1, dtype=f32), zeros(ops.global_norm_scratch_size(1 << 20), dtype=f32), zeros(1 << 20)
        )

    shapes = {
        layernorm: [(768,), (1024,), (8448,)],  # three packs a thread, four, and rows too wide for either
        matmul: [(768, 2304), (1024, 1024), (1024, 4096), (3072, 768)],
        attention: [(64,), (80,), (128,), (136,)],  # heads of 136 run the kernel without tiles
        fused_classifier: [(50257,), (150000,)],  # the second row does not fit shared memory
    }
    for op in (encoder, layernorm, matmul, attention, gelu, fused_classifier, adamw, global_norm):
        for sizes in shapes.get(op, [()]):
            yield op.__name__, functools.partial(op, *sizes)


def launched(arch, dtype, rung=None):
    """{(file, kernel, dtype, defines)} of what the calls launch at the compute capability of `arch`. The calls are
    those of the public functions, or of one rung of llmc.cuda.ladder alone."""
    import ml_dtypes
    import numpy as np

    from llmc import cuda

    found, capability, ops = set(), int(re.search(r"\d+", arch)[0]), cuda
    if rung is not None:
        names = [name for name in cuda.__all__ if name != "device"]
        sizes = {name: getattr(cuda, name) for name in names if name.endswith("_scratch_size")}
        ops = SimpleNamespace(**dict.fromkeys(names, lambda *args, **kwargs: None) | sizes | {rung.op: rung.call})

    def record(file, name, dtype, defines=(), smem=0, arch=None, strict=False):
        found.add((file, name, str(getattr(dtype, "name", dtype)), tuple(defines)))
        return lambda grid, block, args, shared_mem=0: None

    nothing_runs = dict(capability=lambda: capability, multiprocessors=lambda: 132, tensor_map=lambda *args: None)
    with mock.patch.multiple(cuda.module, kernel=record, **nothing_runs):
        for grads in (dtype, "float32"):
            types = (np.dtype(getattr(ml_dtypes, name, name)) for name in (dtype, grads))
            for file, call in calls(ops, *types):
                if rung is None or rung.call.__module__.endswith(f".{file}"):
                    with contextlib.suppress(*([AssertionError] if rung else [])):  # a rung need not take every shape
                        call()
    return found


def compile_cubin(file, dtype, defines, arch):
    """(cubin, {kernel: "N registers, M bytes"}) of kernels/<file>."""
    from cuda.bindings import nvrtc
    from cuda.pathfinder import find_nvidia_header_directory

    from llmc.cuda import module

    source = (module.kernels_dir() / file).read_text()
    options = [*module.options(dtype, defines), f"-arch={arch}", f"-I{find_nvidia_header_directory('cudart')}"]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), file.encode(), 0, [], [])
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(bytearray(size + 1))  # a new object, as NVRTC writes into it: Python shares each bytes of length 1
    nvrtc.nvrtcGetProgramLog(program, log)
    log = log.rstrip(b"\0").decode()
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise SystemExit(f"kernels/{file} does not compile for {arch} in {dtype} with {defines}:\n{log}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = bytes(bytearray(size))
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    resources = {}
    for part in log.split("Compiling entry function '")[1:]:
        registers, smem = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        resources[part.split("'", 1)[0]] = f"{registers[1]} registers, {smem[1] if smem else 0} bytes of shared memory"
    return cubin, resources


def disassemble(cubin):
    """{kernel: [[instruction, its 128 bits]]}; labels are numbered from 0 in each kernel."""
    import importlib.metadata

    files = importlib.metadata.files("nvidia-cuda-nvdisasm")
    tool = next(file.locate() for file in files if file.name in ("nvdisasm", "nvdisasm.exe"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-c", "-hex", "-ndf", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {}
    for part in re.split(r"\n\t\.section\t\.text\.", text)[1:]:
        labels, rows = {}, []
        for instruction, low, high in INSTRUCTION.findall(part):
            for label in re.findall(r"\.L_x?_?\d+", instruction):
                instruction = instruction.replace(label, f".L{labels.setdefault(label, len(labels))}")
            rows.append([" ".join(instruction.split()), low + high])
        found[part.split(",", 1)[0]] = rows
    return found


def dump(archs, dtypes, only):
    """[{file, kernel, dtype, arch, defines, resources, code}] of this process's checkout."""
    wanted = [
        (arch, *found)
        for arch, dtype in product(archs, dtypes)
        for found in sorted(launched(arch, DTYPES[dtype]))
        if not only or found[0].split(".")[0].removesuffix("_sm90") in only
    ]
    jobs = sorted({(file, dtype, defines, arch) for arch, file, _, dtype, defines in wanted})
    with ThreadPoolExecutor() as pool:
        cubins = dict(zip(jobs, pool.map(lambda job: compile_cubin(*job), jobs), strict=True))
        codes = dict(zip(jobs, pool.map(lambda job: disassemble(cubins[job][0]), jobs), strict=True))
    rows = []
    for arch, file, kernel, dtype, defines in dict.fromkeys(wanted):
        job = (file, dtype, defines, arch)
        row = dict(file=file, kernel=kernel, dtype=dtype, arch=arch, defines=defines, code=codes[job][kernel])
        rows.append(row | dict(resources=cubins[job][1][kernel]))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# the comparison


def dump_of(checkout, args):
    """Calls dump() in a process of its own, whose llmc is that of the checkout."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, str(checkout), "--dump", file.name, "--arch", *args.arch]
        command += ["--dtype", *args.dtype, *(["--only", *args.only] if args.only else [])]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(checkout)}, cwd=checkout)
        return json.loads(Path(file.name).read_text())


def variant(row):
    """The defines that tell apart the variants of one kernel. Other defines are sizes and numbers that either checkout
    may have in the source instead; a head size of 64 is the default."""
    names = ("GRADS_FP32", "HEAD_SIZE", "TALL")
    found = {"TALL" if d == "ROWS=192" else d for d in row["defines"]}  # of Hopper's matmul
    return frozenset(d for d in found if d.split("=")[0] in names and d != "HEAD_SIZE=64")


def code(row):
    return tuple(bits for _, bits in row["code"]), row["resources"]


def partner(row, others):
    """The row of the other checkout that this one is to be compared with, or None. The first that exists is taken:
    one of the same name and code, of the same code, of the same name, of a name that differs in numbers alone."""
    same_job = [o for o in others if (o["dtype"], o["arch"], variant(o)) == (row["dtype"], row["arch"], variant(row))]
    same_code = [o for o in same_job if code(o) == code(row)]
    name, plain = (row["file"], row["kernel"]), without_numbers(row["kernel"])
    for candidates, fits in (
        (same_code, lambda o: (o["file"], o["kernel"]) == name),
        (same_code, lambda o: True),
        (same_job, lambda o: (o["file"], o["kernel"]) == name),
        (same_job, lambda o: without_numbers(o["kernel"]) == plain),
    ):
        for other in filter(fits, candidates):
            return other
    return None


def without_numbers(name):
    return re.sub(r"_?\d+|_kernel", "", name)


def difference(old, new):
    """The first difference in words, or "" where there is none."""
    for i, (before, after) in enumerate(zip(old["code"], new["code"], strict=False)):
        if before[1] != after[1]:
            return f"at instruction {i}: {before[0]}  ->  {after[0]}" + (
                " (its scheduling)" if before[0] == after[0] else ""
            )
    if len(old["code"]) != len(new["code"]):
        return f"{len(old['code'])} instructions before"
    return "" if old["resources"] == new["resources"] else f"{old['resources']}  ->  {new['resources']}"


def compare(old, new):
    """Prints the table; True if every kernel of `new` has the code that it had and none is gone."""
    width = max(len(row["kernel"]) for row in new) + 2
    print(f"{'kernel':<{width}}{'file':<22}{'dtype':<10}{'arch':<8}{'defines':<24}{'instructions':>12}  result")
    taken = set()
    counts = dict.fromkeys(("identical", "differ", "new", "gone"), 0)
    for row in new:
        found = partner(row, old)
        if found is None:
            result, key = "NEW: nothing to compare it with", "new"
        else:
            taken.add(id(found))
            what = difference(found, row)
            result, key = (f"DIFFERS {what}", "differ") if what else ("identical", "identical")
            if found["kernel"] != row["kernel"] or found["file"] != row["file"]:
                result += f", renamed from {found['kernel']}" + f" ({found['file']})" * (found["file"] != row["file"])
        counts[key] += 1
        defines = " ".join(sorted(variant(row)))
        line = f"{row['kernel']:<{width}}{row['file']:<22}{row['dtype']:<10}{row['arch']:<8}{defines:<24}"
        print(f"{line}{len(row['code']):>12}  {result}")
    for row in old:
        if id(row) not in taken:
            counts["gone"] += 1
            line = f"{row['kernel']:<{width}}{row['file']:<22}{row['dtype']:<10}{row['arch']:<8}"
            print(f"{line}GONE: no step launches it now")
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return counts["identical"] == sum(counts.values())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkout", type=Path, help="the checkout to compare this one with")
    p.add_argument("--arch", nargs="+", default=["sm_80", "sm_90a"], help="GPUs to compile for (default sm_80 sm_90a)")
    p.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=DTYPES, help="default: bf16 fp32")
    p.add_argument("--only", nargs="+", metavar="OP", help="ops by the names of their files, such as gelu adamw")
    p.add_argument("--dump", type=Path, help=argparse.SUPPRESS)  # the process within a checkout: where the result goes
    args = p.parse_args()
    if args.dump:
        args.dump.write_text(json.dumps(dump(args.arch, args.dtype, args.only)))
        return
    if not (args.checkout / "llmc" / "cuda" / "module.py").is_file():
        raise SystemExit(f"{args.checkout}: no checkout of llmc. HINT: git worktree add ../llmc-before COMMIT")
    with ThreadPoolExecutor() as pool:
        old, new = pool.map(lambda checkout: dump_of(checkout.resolve(), args), (args.checkout, ROOT))
    raise SystemExit(0 if compare(old, new) else 1)


if __name__ == "__main__":
    main()
