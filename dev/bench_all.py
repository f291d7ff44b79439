"""Every bench_<op>.py, then one summary: python -m dev.bench_all (flags: dev/bench.py).

The summary has a line for each op and shape: the production rung, its time, its share of the limit measured in the same
run, and how many times faster it is than PyTorch eager and torch.compile.
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
        own = next((r for r in rows if r["version"].endswith("production")), rows[0])
        ratios = ""
        for name, width in (("torch", 10), ("torch.compile", 12)):
            peer = bench.find(rows, name)
            ratios += f"{peer['p50'] / own['p50']:>{width}.2f}" if peer else f"{'absent':>{width}}"
        label = own["version"].replace("production", "").strip() or "by dtype"
        print(f"{op:<24}{shape[:35]:<36}{label:>14}{own['p50']:>12.1f}{own['limit']:>10.1f}{ratios}")


def main():
    modules = [importlib.import_module(f"dev.bench_{op}") for op in bench.OPS]
    b, results = bench.main(*modules, description=__doc__)
    if not b.executor:
        summary(results)
    bench.finish(b, results)


if __name__ == "__main__":
    main()
