"""Every bench_<op>.py, then one summary: python -m dev.bench_all (flags: dev/bench.py).

The summary has a line for each op and shape: the production rung, its time, its share of the limit measured in the same
run, and how many times faster it is than PyTorch eager and torch.compile. A rung that fails is reported, the others are
measured, and the exit code is 1. --brief prints, as they are measured, the rungs that are near the fastest, and where
production is not the fastest; `python dev/gpu_check.py rungs` is that at B=32.
"""

import importlib

from dev import bench


def summary(results):
    """Prints a line for each case."""
    cases = {}
    for r in results:
        cases.setdefault((r["op"], r["shape"]), []).append(r)
    print(f"\n{'op':<24}{'shape':<36}{'production':>14}{'us p50':>12}{'% limit':>10}{'x torch':>10}{'x compile':>12}")
    for (op, shape), rows in cases.items():
        own = next((r for r in rows if r["name"].endswith(("production", "llmc.cpu")) and "p50" in r), None)
        if own is None:
            print(f"{op:<24}{shape[:35]:<36}{'FAILED':>14}")
            continue
        ratios = ""
        for name, width in (("torch", 10), ("torch.compile", 12)):
            peer = bench.find(rows, name)
            ratios += f"{peer['p50'] / own['p50']:>{width}.2f}" if peer else f"{'absent':>{width}}"
        label = own["name"].replace("production", "").strip() or "by dtype"
        print(f"{op:<24}{shape[:35]:<36}{label:>14}{own['p50']:>12.1f}{own['limit']:>10.1f}{ratios}")


def measure(argv=None):
    """Runs every op -> (Bench, results)."""
    modules = [importlib.import_module(f"dev.bench_{op}") for op in bench.OPS]
    return bench.main(*modules, argv=argv, description=__doc__, keep_going=True)


def main():
    b, results = measure()
    if not b.executor and b.print is not bench.print_brief:
        summary(results)
    bench.finish(b, results)


if __name__ == "__main__":
    main()
