"""Do the tests of the kernels notice what is wrong with a kernel? One-token mutations of kernels/, judged by the tests.

    python dev/mutate.py --count 200 --seed 0 --out mutants.jsonl      of all production kernels
    python dev/mutate.py --count 20 --op layernorm                     of one op
    python dev/mutate.py --report mutants.jsonl                        what an earlier run found

A mutation changes one token of one kernel file: an operator (<= for <, - for +), a constant or an index by one, x for
y, min for max; or drops one barrier, fence, wait, arrival or __syncwarp. The tests of that op on the CPU executor then
run, those of production rungs alone, the quickest first, up to the first failure. It ends as

    caught     a test fails: by a fault that the executor names, or by a wrong number
    harmless   all tests pass, and the compiled code is that of the kernel itself: nothing has changed
    survived   all tests pass, though the code is another: a hole in the tests, or a change without consequence; each is
               printed as a diff and wants an explanation

Mutations that do not compile are drawn again. It works in a copy of the package, with compiled kernels of its own; a
run that was cut off goes on where it was (--out). A mutant that is caught takes seconds, a survivor as long as the op's
tests.
"""

import argparse
import contextlib
import difflib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SHARED = "encoder", "layernorm", "fused_classifier", "adamw", "gelu"  # the ops whose tests judge common.cuh
TOKEN = re.compile(
    r"//[^\n]*|/\*.*?\*/|static_assert\([^;]*;"
    r"|\"(?:\\.|[^\"\\])*\"|^[ \t]*#[^\n]*|0x[0-9a-fA-F]+u?|\d+\.\d*(?:e[-+]?\d+)?f?|\d+u?"
    r"|[A-Za-z_]\w*"
    r"|<<=|>>=|<<|>>|<=|>=|==|!=|&&|\|\||\+\+|--|\+=|-=|\*=|\|=|\^=|->|::|[-+*/%<>=!&|^~?:;,.(){}\[\]]",
    re.M | re.S,
)
SWAPS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+", "/": "*",
    "%": "/", "&&": "||", "||": "&&", "<<": ">>", ">>": "<<", "+=": "-=", "-=": "+=", "^": "|", "|": "&", "&": "|",
    "min": "max", "max": "min", "fminf": "fmaxf", "fmaxf": "fminf", "true": "false", "false": "true", "x": "y",
    "y": "x", "++": "--", "threadIdx": "blockIdx", "blockIdx": "threadIdx", "lane": "warp", "warp": "lane",
    "continue": "break", "T": "C", "C": "T", "B": "T", "K": "N", "N": "K",
}  # fmt: skip
DROPPED = re.compile(  # statements that a mutation drops whole
    r"\b(?:__syncthreads|__syncwarp|__threadfence|fence_async|mbarrier_init_done|named_barrier|mbarrier_wait"
    r"|cp_async_commit|cp_async_wait(?:<[^;>]*>)?|wgmma_begin|wgmma_commit|wgmma_wait(?:<[^;]*?>)?|tma_store_commit"
    r"|tma_store_wait(?:<[^;>]*>)?|release|mbarrier_arrive)\([^;{}]*\);"
)


class Mutation(NamedTuple):
    file: str
    start: int
    end: int
    new: str


def candidates(file: str, text: str) -> list[Mutation]:
    """Every mutation of a kernel file: comments, strings and preprocessor lines stay."""
    found, skip = [], []
    for match in TOKEN.finditer(text):
        token, start, end = match[0], match.start(), match.end()
        if token.startswith(("//", "/*", '"', "static_assert")) or token.lstrip().startswith("#"):
            skip.append((start, end))
        elif token in SWAPS:
            found.append(Mutation(file, start, end, SWAPS[token]))
        elif re.fullmatch(r"\d+u?", token):
            number, suffix = int(token.rstrip("u")), "u" if token.endswith("u") else ""
            found += [Mutation(file, start, end, f"{n}{suffix}") for n in (number + 1, number - 1) if n >= 0]
        elif re.fullmatch(r"\d+\.\d*(?:e[-+]?\d+)?f?", token):
            found.append(Mutation(file, start, end, f"{float(token.rstrip('f')) * 1.5 + 0.25:g}f"))
        elif token == "]":
            found += [Mutation(file, start, end, f" {sign} 1]") for sign in "+-"]
    for match in DROPPED.finditer(text):
        if not any(start <= match.start() < end for start, end in skip):
            found += [Mutation(file, match.start(), match.end(), ";")] * 4  # few, and the hardest for tests to see
    return found


def apply(text: str, mutation: Mutation) -> str:
    return text[: mutation.start] + mutation.new + text[mutation.end :]


def difference(file: str, text: str, mutated: str) -> str:
    lines = difflib.unified_diff(text.splitlines(), mutated.splitlines(), f"kernels/{file}", "mutated", "", "", 0, "")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


def ops_of(file: str) -> tuple[str, ...]:
    return (file.removesuffix(".cu").removesuffix("_sm90"),) if file.endswith(".cu") else SHARED


class Judge:
    """The plugin that pytest gets: it keeps the tests that judge a file, the quickest first, and notes results."""

    def __init__(self, hopper: bool, seconds: dict[str, float]):
        self.hopper, self.seconds = hopper, seconds
        self.took: dict[str, float] = {}
        self.failure = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        def judges(item: Any) -> bool:
            kind, _, _, rung = getattr(item, "callspec", None) and item.callspec.params.get("op") or ("", "", "", None)
            right = rung is None or (rung.production and (rung.arch == 90) == self.hopper)
            return kind == "executor" and right and (rung is not None or not self.hopper)

        items[:] = sorted(filter(judges, items), key=lambda item: self.seconds.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            self.took[report.nodeid] = report.duration
        if report.failed and not self.failure:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = " ".join(crash.message.split()) if crash else str(report.longrepr)
            self.failure = f"{report.nodeid.split('::')[-1]}: {text}"


def run_tests(folder: Path, file: str, seconds: dict[str, float], limit: float) -> dict[str, Any]:
    """Runs the tests that judge a file in a process of their own -> what failed, {test: its seconds}, and what was
    compiled for them: (file, dtype, defines)."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        with open(folder / "tests.log", "w") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            os.chdir(folder)
            import pytest

            from llmc.simt import launch

            libraries, load = [], launch.load

            def noting(path: Path, changed: int, dtype: str, defines: tuple[str, ...], fast: bool) -> Any:
                libraries.append((path.name, dtype, defines))
                return load(path, changed, dtype, defines, fast)

            launch.load = noting
            judge = Judge("sm90" in file, seconds)
            files = [f"tests/test_{op}.py" for op in ops_of(file)]
            options = ["-o", "addopts=", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--full", *files]
            pytest.main(options, plugins=[judge])
            result.write_text(json.dumps({"failure": judge.failure, "took": judge.took, "libraries": libraries}))
            log.flush()
            os._exit(0)
    end = time.monotonic() + limit
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"failure": f"more than {limit:.0f} seconds", "took": {}}
        time.sleep(0.05)
    if not result.exists():
        return {"failure": f"the tests' process died: {(folder / 'tests.log').read_text()[-300:]}", "took": {}}
    return json.loads(result.read_text())


def compiled(folder: Path, file: str, dtype: str, defines: tuple[str, ...]) -> str | None:
    """The assembly of a kernel file; None: it does not compile."""
    from llmc.cuda.module import DTYPE_DEFINE
    from llmc.simt import build
    from llmc.simt.translate import translate

    kernels = folder / "kernels"
    include = [f"-I{kernels}", f"-I{build.HERE / 'include'}"]
    options = ["-std=c++17", f"-D{DTYPE_DEFINE[dtype]}", "-DLLMC_SIMT", *(f"-D{define}" for define in defines)]
    flags = [flag for flag in build.COMMON_FLAGS if flag != "-g1"]
    try:
        text = build.gxx("-E", "-P", "-x", "c++", *include, *options, "-include", "simt_cuda.h", kernels / file)
        return build.gxx("-S", *flags, "-o", "-", "-x", "c++-cpp-output", "-", text=translate(text, []).text)
    except (RuntimeError, ValueError):
        return None


def prepare(folder: Path) -> None:
    """A copy of what the tests need, and this process's package and compiled kernels in it."""
    for name in ("llmc", "tests", "kernels", "dev"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tmp").mkdir()
    os.environ["TMPDIR"] = str(folder / "tmp")
    tempfile.tempdir = None
    sys.path[:0] = [str(folder), str(folder / "tests")]
    with contextlib.redirect_stdout(io.StringIO()):
        import hypothesis  # noqa: F401  every test file imports these: here it is done once for all
        import ml_dtypes  # noqa: F401
        import numpy  # noqa: F401
        import pytest  # noqa: F401
        import torch

        torch.set_num_threads(1)


def judge(folder: Path, mutation: Mutation, tested: dict[str, Any]) -> dict[str, Any] | None:
    """Judges a mutation -> a row of results; None if it does not compile. tested: the result of the file itself."""
    file, path = mutation.file, folder / "kernels" / mutation.file
    text = (ROOT / "kernels" / file).read_text()
    mutated, before, begun = apply(text, mutation), set((folder / "tmp").rglob("*")), time.monotonic()
    libraries, seconds = sorted({(f, d, tuple(o)) for f, d, o in tested["libraries"]}), tested["took"]
    try:
        same, failure = True, ""
        for library in libraries:  # one library whose code differs is enough
            path.write_text(text)
            plain = compiled(folder, *library)
            path.write_text(mutated)
            code = compiled(folder, *library)
            if code is None:
                return None
            same = same and code == plain
            if not same:
                break
        if not same:
            failure = run_tests(folder, file, seconds, 120 + 4 * sum(seconds.values()))["failure"]
    finally:
        path.write_text(text)
        for left in set((folder / "tmp").rglob("*")) - before:
            if left.is_file():
                left.unlink()
    result = "caught" if failure else "harmless" if same else "survived"
    row = dict(file=file, start=mutation.start, end=mutation.end, new=mutation.new, result=result, by=failure[:300])
    return row | dict(diff=difference(file, text, mutated), seconds=round(time.monotonic() - begun, 1))


def report(rows: list[dict[str, Any]]) -> int:
    """Prints a line for each file and the survivors -> the number of survivors."""
    files = sorted({row["file"] for row in rows})
    print(f"{'file':<24}{'mutants':>9}{'caught':>9}{'harmless':>10}{'survived':>10}")
    for file in [*files, "all"]:
        own = Counter(row["result"] for row in rows if file in (row["file"], "all"))
        counts = f"{own['caught']:>9}{own['harmless']:>10}{own['survived']:>10}"
        print(f"{file:<24}{sum(own.values()):>9}{counts}")
    caught = [row["by"] for row in rows if row["result"] == "caught"]
    named = sum("KernelFault" in by for by in caught)
    print(f"{named} of {len(caught)} were caught by a fault that the executor names, the others by a wrong result")
    survivors = [row for row in rows if row["result"] == "survived"]
    for row in survivors:
        print(f"\nsurvived: kernels/{row['file']}\n{row['diff']}")
    return len(survivors)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--count", type=int, default=200, metavar="N", help="mutations that compile (200)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="what is drawn (0)")
    p.add_argument("--op", metavar="NAME", help="the kernels of one op, such as layernorm, or common.cuh (all)")
    p.add_argument("--barriers", action="store_true", help="only drop barriers, fences, waits and arrivals, each once")
    p.add_argument("--out", metavar="FILE", help="append the results here, and leave out what is there already")
    p.add_argument("--report", metavar="FILE", help="print an earlier run's results")
    args = p.parse_args(argv)
    if args.report:
        sys.exit(report([json.loads(line) for line in Path(args.report).read_text().splitlines()]) > 0)
    files = [path.name for path in sorted((ROOT / "kernels").glob("*.cu"))] + ["common.cuh"]
    files = [file for file in files if args.op in (None, file, *(ops_of(file) if file.endswith(".cu") else ()))]
    if not files:
        p.error(f"no kernels of {args.op!r}")
    out = Path(args.out) if args.out else None
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
    done = {(row["file"], row["start"], row["end"], row["new"]) for row in rows}
    draw = random.Random(args.seed)
    pool = [m for file in files for m in candidates(file, (ROOT / "kernels" / file).read_text())]
    if args.barriers:
        pool = list(dict.fromkeys(mutation for mutation in pool if mutation.new == ";"))
    draw.shuffle(pool)
    with tempfile.TemporaryDirectory(prefix="llmc-mutate-") as name:
        folder = Path(name)
        prepare(folder)
        tested: dict[str, dict[str, Any]] = {}
        judged = 0
        for mutation in pool:
            if judged == args.count:
                break
            if mutation in done:
                judged += 1
                continue
            if mutation.file not in tested:
                first = run_tests(folder, mutation.file, {}, 3600)
                if first["failure"] or not first["took"]:
                    sys.exit(f"mutate: the tests fail without a mutation: {first['failure'] or 'there are none'}")
                tested[mutation.file] = first
                print(f"{mutation.file}: {len(first['took'])} tests, {sum(first['took'].values()):.0f} s", flush=True)
            row = judge(folder, mutation, tested[mutation.file])
            if row is None:
                continue
            judged += 1
            rows.append(row)
            if out:
                with out.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
            print(
                f"{judged:>4} {row['result']:<9}{row['seconds']:>7.1f} s  {row['file']}: {row['by'][:80]}", flush=True
            )
    sys.exit(report(rows) > 0)


if __name__ == "__main__":
    main()
