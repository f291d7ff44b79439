"""A second judge for the kernels: NVIDIA's compute-sanitizer over every production kernel, on a GPU.

    python dev/gpu_check.py sanitize               memcheck, initcheck, synccheck and racecheck; some minutes
    python dev/gpu_check.py sanitize --pattern     what racecheck says of the smallest kernels with the ring's pattern
    python dev/gpu_check.py sanitize --tool memcheck racecheck

The tools watch a process of its own, which runs two steps of a small GPT-2 in every dtype without graphs, with Hopper's
kernels and without them, and the ops that such steps do not reach; kernels of kernels/*.cu that it has not launched are
named. Findings are summed by place. Exit code 1 where one is not explained, or a kernel was not launched.

compute-sanitizer is part of the CUDA toolkit; pip install nvidia-cuda-sanitizer-api has it too.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from dev import compare_sass
from llmc.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TOOLS = {
    "memcheck": ("--leak-check", "no"),
    "initcheck": (),
    "synccheck": (),
    "racecheck": ("--racecheck-report", "analysis"),
}
INDIRECT = ("--racecheck-indirect-barrier-dependency",)  # not in --help: follows what threads know through others
PATTERN = {  # {kernel of tests/simt/faults/ring.cu: whether it is right by CUDA's rules}
    "nothing_bad": False,
    "syncwarp_good": True,
    "fence_good": True,
    "all_arrive_good": True,
    "block_good": True,
}


class Explained(NamedTuple):
    """Findings of a tool that are no fault of ours."""

    tool: str
    pattern: str  # a regex over the finding
    twin: str | None  # a right kernel of PATTERN: the explanation holds if the tool reports this one, too
    reason: str


EXPLAINED = (
    Explained(
        "racecheck", r"attention_backward_dkv_sm90", "syncwarp_good",
        "TMA brings statistics where lanes have read, after __syncwarp and lane 0's arrival at the mbarrier that the "
        "loading thread waits for: ordered by CUDA's rules. This racecheck reports the smallest such kernel too",
    ),
)  # fmt: skip


def find() -> str:
    """compute-sanitizer's path: on PATH, in the CUDA toolkit, in NVIDIA's pip package. UserError without one."""
    places = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    places += [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places.append(Path("/usr/local/cuda/bin"))
    for folder in map(Path, sys.path):
        places += sorted((folder / "nvidia").glob("*/bin"))
    for folder in places:
        path = folder / "compute-sanitizer"
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
        if path.is_file():
            raise UserError(f"{path} is not executable. HINT: chmod +x {path}")
    raise UserError("compute-sanitizer is not installed. HINT: pip install nvidia-cuda-sanitizer-api, or set CUDA_HOME")


def findings(output: str) -> Counter[str]:
    """{a finding and where: how often} from what compute-sanitizer prints. Addresses and numbers of hazards are left
    out, so that findings at one place count as one."""
    found: Counter[str] = Counter()
    lines = [line[9:] for line in output.splitlines() if line.startswith("=========")]
    for i, line in enumerate(lines):
        head = line.strip()
        if (
            not head
            or line.startswith("  ")
            or re.match(r"COMPUTE-SANITIZER|[A-Z]+ SUMMARY|Target|Saved|This tool", head)
        ):
            continue
        text = head
        for detail in lines[i + 1 :]:
            if not detail.startswith("     "):
                break
            if re.match(r"\s*(at |and |Device Frame|in )", detail) and "Host Frame" not in detail:
                text += " " + detail.strip()
        text = re.sub(r"\+?0x[0-9a-f]+", "", re.sub(r"\[\d+ hazards?\]", "", text))
        found[" ".join(re.sub(r"thread \(\d+,\d+,\d+\)|block \(\d+,\d+,\d+\)", "", text).split())] += 1
    return found


def explanation(tool: str, finding: str, reported: set[str]) -> str | None:
    """Why a finding is no fault, or None. `reported` are the kernels of PATTERN that the tool reports."""
    for e in EXPLAINED:
        if e.tool == tool and re.search(e.pattern, finding) and (e.twin is None or e.twin in reported):
            return e.reason
    return None


def watch(tool: str, *command: str, options: tuple[str, ...] = (), timeout: int = 900) -> tuple[int, str]:
    """Runs python with these arguments under a tool -> (the process's exit code, all that was printed)."""
    head = [find(), "--tool", tool, *TOOLS[tool], *options, "--print-limit", "2000", "--error-exitcode", "0"]
    run = subprocess.run([*head, sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    return run.returncode, run.stdout + run.stderr


def pattern_reports(options: tuple[str, ...] = ()) -> dict[str, Counter[str]]:
    """{kernel of PATTERN: racecheck's findings}."""
    reports = {}
    for name in PATTERN:
        code, output = watch("racecheck", "-m", "dev.sanitize", "--kernel", name, options=options)
        if code or f"{name}: right" not in output:
            raise UserError(f"{name} did not run under racecheck: {' '.join(output.split())[-600:]}")
        reports[name] = findings(output)
    return reports


def pattern() -> bool:
    """Prints what racecheck says of the ring's pattern, with and without INDIRECT -> whether it ran."""
    print(f"{'kernel of ring.cu':<20}{'by the rules':<16}{'racecheck':>12}{'indirect':>12}")
    default, indirect = pattern_reports(), pattern_reports(INDIRECT)
    for name, right in PATTERN.items():
        counts = "".join(f"{sum(reports[name].values()):>12}" for reports in (default, indirect))
        print(f"{name:<20}{'right' if right else 'a race':<16}{counts}")
    for name in PATTERN:
        for text, n in (default[name] | indirect[name]).items():
            print(f"  {name}: {n} x {text}")
    return True


def kernel_names() -> set[str]:
    """The kernels that the ops launch in production, on Hopper and elsewhere."""
    cases = (("sm_80", "bfloat16"), ("sm_90a", "bfloat16"), ("sm_90a", "float32"))
    return {name for case in cases for _, name, *_ in compare_sass.launched(*case)}


def sanitize(args: argparse.Namespace, rows: list[dict[str, Any]]) -> bool:
    """The section of gpu_check.py -> whether every finding is explained and every kernel was launched."""
    if args.pattern:
        return pattern()
    find()
    ok, launched = True, None
    reported = {name for name, found in pattern_reports().items() if found} if "racecheck" in args.tool else set()
    print(f"{'tool':<12}{'findings':>10}{'explained':>11}{'exit':>6}")
    for tool in args.tool:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "launched.json"
            code, output = watch(tool, "-m", "dev.sanitize", "--work", str(path))
            launched = set(json.loads(path.read_text())) if path.exists() else None
        found = findings(output)
        reasons = {text: explanation(tool, text, reported) for text in found}
        count, explained = sum(found.values()), sum(n for text, n in found.items() if reasons[text])
        print(f"{tool:<12}{count:>10}{explained:>11}{code:>6}", flush=True)
        for text, n in found.most_common():
            print(f"    {n} x {text}\n" + (f"        explained: {reasons[text]}\n" if reasons[text] else ""), end="")
        if code:
            print("    the process failed: " + " ".join(output.split())[-1500:])
        ok &= code == 0 and explained == count
        rows.append(dict(bench="sanitize", tool=tool, findings=count, explained=explained, exit=code))
    missing = sorted(kernel_names() - launched) if launched is not None else []
    if missing:
        print(f"not launched, so not judged: {', '.join(missing)}")
    return ok and not missing and launched is not None


# ----------------------------------------------------------------------------------------------------------------------
# in the process that the tools watch


def run_pattern(name: str) -> None:
    """Launches one kernel of the pattern and checks its sums."""
    import numpy as np

    from llmc import cuda

    cupy = cuda.module.import_cupy()
    rounds, file = 8, ROOT / "tests" / "simt" / "faults" / "ring.cu"
    inp = np.random.default_rng(0).integers(-8, 9, (rounds, 128)).astype(np.float32)
    out = cupy.zeros((rounds, 32), np.float32)
    kernel = cuda.module.kernel(str(file), name, "float16", arch="sm_90a")
    kernel((1,), (64,), (out, cupy.asarray(inp), np.int32(rounds)))
    right = np.array_equal(out.get(), np.roll(inp.reshape(rounds, 4, 32).sum(1), -1, axis=1))
    print(f"{name}: {'right' if right else 'WRONG'}")


def steps(ops: Any, dtype: Any, config: Any, B: int, T: int, **options: Any) -> None:
    """Runs two steps of a small model; T is smaller in the second."""
    import numpy as np

    from llmc import gpt2
    from llmc.model import AdamW, Model

    model, rng = Model(gpt2, ops, config, B, T, dtype=dtype, **options), np.random.default_rng(0)
    model.init_weights()
    adamw = AdamW(lr=1e-3, weight_decay=0.1)
    for t in (T, T - 3):
        x, y = (rng.integers(0, config.vocab_size, (B, t), np.int32) for _ in range(2))
        model.forward(x)
        model.backward(x, y)
        model.update(adamw, model.steps + 1)
        assert np.isfinite(model.mean_loss()), (config, dtype)
    if model.master is not None:  # fp32 weights are their own master
        model.round_master()


def other_ops(ops: Any, dtype: Any) -> None:
    """Calls ops at shapes for which the launchers choose kernels that the steps do not reach."""
    import numpy as np

    rng = np.random.default_rng(0)

    def array(*shape: int, kind: Any = dtype) -> Any:
        made = ops.device.alloc(int(np.prod(shape)) * np.dtype(kind).itemsize).view(kind).reshape(shape)
        ops.device.upload(made, rng.standard_normal(shape, np.float32).astype(kind))
        return made

    f32 = np.dtype(np.float32)
    for T, NH, HS in ((70, 2, 80), (130, 2, 128), (70, 1, 136)):
        out, qkvr, dqkvr = array(1, T, NH * HS), array(1, T, 3 * NH * HS), array(1, T, 3 * NH * HS)
        att = array(1, NH, T, kind=f32)
        ops.attention_forward(out, att, qkvr)
        scratch = array(ops.attention_scratch_size(1, T, NH * HS, NH), kind=f32)
        ops.attention_backward(dqkvr, scratch, array(1, T, NH * HS), out, qkvr, att)
    for C in (1024, 8448):
        row, stat, weight = array(1, 9, C), [array(1, 9, kind=f32) for _ in range(2)], array(C)
        ops.layernorm_forward(array(1, 9, C), *stat, row, weight, weight)
        ops.residual_forward(array(1, 9, C), row, row)
        ops.fused_residual_forward(array(1, 9, C), array(1, 9, C), *stat, row, row, weight, weight)
        scratch = array(ops.layernorm_scratch_size(1, 9, C), kind=f32)
        ops.layernorm_backward(array(1, 9, C), array(C), array(C), scratch, row, row, weight, *stat)
    logits, targets = array(1, 5, 150000), ops.device.alloc(20).view(np.int32).reshape(1, 5)
    ops.fused_classifier(logits, array(1, 5, kind=f32), 1.0, targets, 150000)
    ops.gelu_forward(array(1, 9, 40), array(1, 9, 40))
    ops.gelu_backward_inplace(array(1, 9, 40), array(1, 9, 40))


def launch_all(ops: Any, config: Any) -> set[str]:
    """Launches every production kernel that this GPU runs -> their names. config: a small model with heads of 64."""
    import ml_dtypes
    import numpy as np

    from llmc.gpt2 import config_from_descriptor

    tiny = config_from_descriptor("tiny:d1", vocab_size=300)  # heads of 16
    launched, kernel = set(), ops.module.kernel

    def noting(file: str, name: str, *args: Any, **kwargs: Any) -> Any:
        launched.add(name)
        return kernel(file, name, *args, **kwargs)

    ops.module.kernel = noting
    for hopper in (True, False):
        ops.module.no_hopper = None if hopper else "left out by dev/sanitize.py"
        for dtype in map(np.dtype, (ml_dtypes.bfloat16, np.float16, np.float32)[: 3 if hopper else 2]):
            steps(ops, dtype, config, 2, 512 if hopper else 128, recompute=1)
            steps(ops, dtype, tiny, 1, 67, recompute=0, grad_dtype="float32")
            other_ops(ops, dtype)
    ops.module.kernel, ops.module.no_hopper = kernel, None
    return launched


def work(path: str) -> None:
    """The process that the tools watch. Writes the names of the kernels to a file."""
    from llmc import cuda
    from llmc.gpt2 import config_from_descriptor

    cupy = cuda.module.import_cupy()
    cupy.cuda.set_allocator(None)  # a pool would hide accesses out of bounds and memory not written
    cuda.device.start()
    launched = launch_all(cuda, config_from_descriptor("d6"))
    cupy.cuda.Device().synchronize()
    Path(path).write_text(json.dumps(sorted(launched)))


def add_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--pattern", action="store_true", help="what racecheck says of the smallest kernels of the ring")
    group.add_argument("--tool", nargs="+", choices=TOOLS, default=list(TOOLS), help="some of the tools (all)")


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description="What the tools watch; see gpu_check.py sanitize.")
    flags.add_argument("--kernel", choices=PATTERN, help="launch one kernel of the pattern")
    flags.add_argument("--work", metavar="FILE", help="launch every production kernel, and write their names here")
    given = flags.parse_args()
    run_pattern(given.kernel) if given.kernel else work(given.work)
