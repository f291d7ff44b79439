"""What production kernels read and write, counted on the CPU executor: it may shrink, it may not grow.

The counts are exact and the same on every machine. TABLE holds those of the production rung of each op at a small
shape: bytes read, bytes written, 32-byte sectors of global memory, wavefronts of shared memory (dev/bench.py, traffic,
says what counts how often). A failure prints what they are now.
"""

import importlib
import shutil

import pytest
from conftest import op_set

from dev import bench
from llmc.gpt2 import GPT2Config

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the CPU executor needs g++")

# file: C, NH, V, B, T. Proportions count: sums over rows need many rows before the partial sums of blocks are small
SHAPES = {
    "encoder": (64, 2, 200, 8, 64),
    "layernorm": (64, 2, 200, 16, 1024),
    "matmul": (128, 2, 200, 1, 128),
    "attention": (128, 2, 200, 1, 128),
    "gelu": (64, 2, 200, 2, 64),
    "fused_classifier": (64, 2, 50257, 1, 4),
    "adamw": (64, 2, 5000, 1, 64),
    "global_norm": (64, 2, 5000, 1, 64),
}
TABLE = {
    "encoder_forward": (72704, 65536, 6176, 0),
    "encoder_backward": (176780, 41600, 11827, 5969),
    "layernorm_forward": (2097408, 2228224, 294912, 0),
    "residual_forward": (4194304, 2097152, 196608, 0),
    "fused_residual_forward": (4194560, 4325376, 425984, 0),
    "layernorm_backward": (6693248, 2367744, 320512, 500736),
    "matmul_forward fc": (263168, 262144, 16448, 12288),
    "matmul_backward fc": (663552, 173056, 26144, 21760),
    "matmul_forward fcproj": (262400, 32768, 9232, 7680),
    "matmul_backward fcproj": (690176, 264448, 29832, 25280),
    "attention_forward": (131072, 33792, 5152, 2560),
    "attention_backward": (527360, 99328, 19616, 14616),
    "gelu_forward": (65536, 65536, 4096, 0),
    "gelu_backward_inplace": (131072, 65536, 6144, 0),
    "fused_classifier": (402592, 402192, 25252, 384),
    "adamw_update": (5346712, 5346432, 354155, 0),
    "init_from_master": (1527744, 763776, 132968, 0),
    "global_norm_squared": (764544, 4100, 24079, 2992),
}
# Bytes moved over the fewest possible, for ops whose time is that of their bytes
LIMITS = {
    "encoder_forward": 1.1,
    "encoder_backward": 2.0,  # dout is read for each table, and tokens are sorted: sums in a fixed order
    "layernorm_forward": 1.1,
    "residual_forward": 1.1,
    "fused_residual_forward": 1.1,
    "layernorm_backward": 1.1,
    "gelu_forward": 1.1,
    "gelu_backward_inplace": 1.1,
    "fused_classifier": 1.1,
    "adamw_update": 1.1,
    "init_from_master": 1.1,
    "global_norm_squared": 1.1,
}


@pytest.mark.parametrize("file", bench.OPS)
def test_production_traffic(file, monkeypatch):
    C, NH, V, B, T = SHAPES[file]
    ops = op_set("executor", monkeypatch)
    monkeypatch.setattr(bench, "op_set", lambda device: ops)
    config = GPT2Config(T, V, -(-V // 128) * 128, 1, NH, C)
    grown = []
    for case in importlib.import_module(f"dev.bench_{file}").cases(bench.Bench("executor", True, config, B, T, "bf16")):
        label, function = next(v for v in bench.versions(ops, case.op, "bf16") if "production" in v[0])
        name = " ".join([case.op, *case.shape.split()[:1]]) if file == "matmul" else case.op
        r = bench.traffic(case, function)
        got = (r["read"], r["written"], r["units"], r["wavefronts"])
        known = TABLE.get(name, (0, 0, 0, 0))
        if any(now > before for now, before in zip(got, known, strict=True)):
            grown.append(f'"{name}": {got},  was {known}, {label}')
        assert r["ratio"] <= LIMITS.get(case.op, float("inf")), (name, r)
    assert not grown, "production kernels move more than they did:\n" + "\n".join(grown)


def test_counts_follow_the_kernel(monkeypatch):
    """A rung that sweeps the logits three times counts more than one that keeps them: the counter sees the kernel."""
    ops = op_set("executor", monkeypatch)
    monkeypatch.setattr(bench, "op_set", lambda device: ops)
    b = bench.Bench("executor", True, GPT2Config(4, 1000, 1024, 1, 2, 64), 1, 4, "bf16")
    (case,) = importlib.import_module("dev.bench_fused_classifier").cases(b)
    ratios = {label[0]: bench.traffic(case, f)["ratio"] for label, f in bench.versions(ops, case.op, "bf16")}
    assert ratios["4"] < 1.1 < 1.4 < ratios["3"] < 1.6 < 1.9 < ratios["2"]
