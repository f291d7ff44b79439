"""What kernels read and write, counted on the CPU executor: it may shrink but not grow.

The counts are exact and the same on every machine. TABLE holds those of each rung of each op at a small shape: bytes
read, bytes written, 32-byte sectors of global memory, wavefronts of shared memory (traffic() in dev/bench.py says how
often an access counts). A failure prints the present counts. Hopper's own rungs cannot be counted.
"""

import importlib
import itertools
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
    "encoder_forward": {
        1: (75776, 65536, 7168, 0),
        2: (72704, 65536, 6176, 0),
    },
    "encoder_backward": {
        1: (158344, 25216, 268210, 0),
        2: (166536, 29312, 25797, 3456),
        3: (182412, 41088, 23499, 5072),
        5: (180872, 45696, 10574, 4673),
    },
    "layernorm_forward": {
        1: (100663552, 33685504, 4263936, 0),
        2: (6291712, 2228224, 425984, 0),
        3: (2097408, 2228224, 294912, 0),
        4: (2097408, 2228224, 294912, 0),
        5: (2097408, 2228224, 294912, 0),
    },
    "residual_forward": {
        1: (4194304, 2097152, 196608, 0),
        2: (4194304, 2097152, 196608, 0),
    },
    "fused_residual_forward": {
        1: (6291712, 4325376, 491520, 0),
        2: (8388864, 4325376, 557056, 0),
        3: (4194560, 4325376, 425984, 0),
        4: (4194560, 4325376, 425984, 0),
        5: (4194560, 4325376, 425984, 0),
    },
    "layernorm_backward": {
        1: (14942592, 2097408, 753680, 0),
        2: (15466880, 2621696, 786688, 256),
        3: (6947200, 3145984, 475392, 114944),
        6: (6558080, 2232576, 307600, 1230720),  # of 96 packs 8 have channels here, the others are zeros
    },
    "matmul_forward fc": {
        1: (276825088, 262144, 8663040, 0),
        2: (2098176, 262144, 75776, 589824),
        3: (263168, 262144, 16896, 73728),
        4: (263168, 262144, 16448, 12288),
        5: (263168, 262144, 16448, 12288),
    },
    "matmul_backward fc": {
        1: (50462720, 164864, 1582112, 0),
        2: (4333568, 173056, 140832, 1181440),
        3: (663552, 173056, 26144, 149248),
        4: (663552, 173056, 26144, 21760),
        5: (663552, 173056, 26144, 21760),
    },
    "matmul_forward fcproj": {
        1: (276824320, 32768, 8652800, 0),
        2: (2097408, 32768, 67072, 589824),
        3: (262400, 32768, 9344, 73728),
        4: (262400, 32768, 9232, 7680),
        5: (262400, 32768, 9232, 7680),
    },
    "matmul_backward fcproj": {
        1: (50495488, 262400, 1586184, 0),
        2: (4360192, 264448, 144520, 1180352),
        3: (690176, 264448, 29832, 148160),
        4: (690176, 264448, 29832, 25280),
        5: (690176, 264448, 29832, 25280),
    },
    "attention_forward": {
        1: (36438016, 525312, 1155104, 0),
        2: (131072, 132096, 8256, 48640),
        3: (131072, 33792, 5152, 2560),
    },
    "attention_backward": {
        1: (274601984, 1573888, 8639680, 0),
        2: (464896, 394240, 27168, 168448),
        3: (527872, 99328, 19616, 14616),
    },
    "gelu_forward": {
        1: (65536, 65536, 4096, 0),
        2: (65536, 65536, 4096, 0),
    },
    "gelu_backward_inplace": {
        1: (131072, 65536, 6144, 0),
        2: (131072, 65536, 6144, 0),
    },
    "fused_classifier": {
        1: (19298848, 6432912, 804119, 0),
        2: (1206688, 402192, 50412, 512),
        3: (804512, 402192, 37844, 512),
        4: (402592, 402192, 25252, 384),
        5: (402208, 402320, 25276, 53964),
    },
    "adamw_update": {
        1: (5346712, 5346432, 479054, 0),
        2: (9929368, 9929088, 640187, 0),
        3: (5346712, 5346432, 354155, 0),
    },
    "init_from_master": {
        1: (1527744, 763776, 132968, 0),
        2: (1527744, 763776, 81093, 0),
    },
    "global_norm_squared": {
        1: (763776, 4, 23869, 64),
        2: (767872, 4100, 25021, 16400),
        4: (764544, 4100, 24079, 3040),
    },
}
# Rungs that move as much as the one before them, or more, and why they are there. All others move fewer bytes, touch
# fewer sectors or have fewer conflicts in shared memory.
KEPT = {
    ("residual_forward", 2): "16 bytes a thread: an eighth of the instructions",
    ("gelu_forward", 2): "16 bytes a thread: an eighth of the instructions",
    ("gelu_backward_inplace", 2): "16 bytes a thread: an eighth of the instructions",
    ("layernorm_forward", 4): "conversions in pairs, smaller blocks",
    ("layernorm_forward", 5): "weights are loaded beside the row",
    ("fused_residual_forward", 2): "one launch, but the residual is read back: worse, and shows it",
    ("fused_residual_forward", 4): "conversions in pairs, smaller blocks",
    ("fused_residual_forward", 5): "weights are loaded beside the row",
    ("layernorm_backward", 2): "many blocks for dw and db, for a second kernel's partial sums",
    ("matmul_forward fc", 5): "three tiles in flight",
    ("matmul_forward fcproj", 5): "three tiles in flight",
    ("matmul_backward fc", 5): "three tiles in flight",
    ("matmul_backward fcproj", 5): "three tiles in flight",
    ("adamw_update", 2): "fewer instructions, but more sectors: worse, and shows it",
    ("global_norm_squared", 2): "many blocks instead of one",
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
def test_traffic_of_every_rung(file, monkeypatch):
    C, NH, V, B, T = SHAPES[file]
    ops = op_set("executor", monkeypatch)
    monkeypatch.setattr(bench, "op_set", lambda device: ops)
    config = GPT2Config(T, V, -(-V // 128) * 128, 1, NH, C)
    changed = []
    for case in importlib.import_module(f"dev.bench_{file}").cases(bench.Bench("executor", True, config, B, T, "bf16")):
        name, rungs = " ".join([case.op, *case.shape.split()[:1]]) if file == "matmul" else case.op, {}
        for label, function in bench.rungs_of(ops, case.op, "bf16"):
            if name.endswith("fcproj") and label in ("1", "2"):
                continue  # slow, and the same as on fc
            r = bench.traffic(case, function)
            got = (r["read"], r["written"], r["units"], r["wavefronts"])
            if label != "production":
                rungs[int(label.split()[0])] = got
            if "production" in label:
                assert r["ratio"] <= LIMITS.get(case.op, float("inf")), (name, r)
                assert got in rungs.values(), (name, label, got)  # it is one of the rungs, which are held to the table
        for number, got in rungs.items():
            known = TABLE.get(name, {}).get(number, (0, 0, 0, 0))
            if any(now > before for now, before in zip(got, known, strict=True)):
                changed.append(f"{name}: {number}: {got},  was {known}")
    assert not changed, "kernels move more than they did:\n" + "\n".join(changed)


def test_each_rung_moves_less_than_the_one_below():
    """Fewer bytes, sectors or wavefronts, or a reason why it is there."""
    without = set()
    for name, rungs in TABLE.items():
        for below, above in itertools.pairwise(sorted(rungs)):
            (read, written, *units), (was_read, was_written, *was_units) = rungs[above], rungs[below]
            less = read + written < was_read + was_written or units[0] < was_units[0]
            if not less and not 0 < units[1] < was_units[1]:
                without.add((name, above))
    assert without == set(KEPT), (without - set(KEPT), set(KEPT) - without)


def test_counts_follow_the_kernel(monkeypatch):
    """A rung that sweeps the logits three times counts more than one that keeps them: the counter sees the kernel."""
    ops = op_set("executor", monkeypatch)
    monkeypatch.setattr(bench, "op_set", lambda device: ops)
    b = bench.Bench("executor", True, GPT2Config(4, 1000, 1024, 1, 2, 64), 1, 4, "bf16")
    (case,) = importlib.import_module("dev.bench_fused_classifier").cases(b)
    ratios = {label[0]: bench.traffic(case, f)["ratio"] for label, f in bench.rungs_of(ops, case.op, "bf16")}
    assert ratios["4"] < 1.1 < 1.4 < ratios["3"] < 1.6 < 1.9 < ratios["2"]
