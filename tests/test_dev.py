"""The benchmarks in dev/: they run, stop on a wrong result, count what the model does, and keep their files whole."""

import argparse
import csv
import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, op_set
from reference import OPS, file_of

from dev import bench, bench_all, bench_ranks, bench_step, compare_sass, gpu_check, mutate, roofline, sanitize
from llmc import cpu, cuda, gpt2, simt
from llmc.cuda import ladder
from llmc.errors import UserError
from llmc.model import AdamW, Model


@pytest.fixture(autouse=True)
def denormals():
    """The benchmarks flush denormals, as training does; other tests in this process do not expect that."""
    yield
    torch.set_flush_denormal(False)


def test_every_op_has_its_bench():
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "dev").glob("bench_*.py")}
    assert set(bench.OPS) == set(OPS) and set(OPS) <= files


def test_bench_all_on_the_cpu(tmp_path, capsys, monkeypatch):
    """Every op of the op sets is checked and timed, in a table of 120 columns; CSV, comparison and JSON follow."""
    monkeypatch.setattr(bench, "BUDGET", 1.0)
    monkeypatch.setattr(bench, "torch_or_none", lambda: None)
    path = tmp_path / "results.csv"
    argv = ["-e", "tiny:d1", "-b", "1", "-t", "8", "--device", "cpu", "--csv", str(path)]
    monkeypatch.setattr("sys.argv", ["bench_all", *argv])
    bench_all.main()
    *text, last = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in text[2:]) <= 120
    names = {name for file in OPS.values() for name in file}
    assert {row["op"] for row in json.loads(last)["rows"]} == names
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == names and all(float(row["us_p50"]) > 0 for row in rows)

    rows[0]["us_p20"], rows[1]["us_p80"] = "1e12", "1e-12"  # the first was slower than anything, the second faster
    path.unlink()
    bench.append_rows(path, rows)
    now = [row | {q: float(row[f"us_{q}"]) for q in ("p20", "p50", "p80")} for row in rows]
    now[0]["p20"], now[1]["p80"] = now[0]["p50"], now[1]["p50"]
    bench.compare(path, now[:2])
    text = capsys.readouterr().out
    assert re.search(f"faster  {rows[0]['op']}", text) and re.search(f"SLOWER  {rows[1]['op']}", text), text
    bench.compare(path, now[2:])
    assert " 0 moved" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no such file. HINT"):  # before anything is measured
        bench.main(bench_all, argv=["--compare", str(tmp_path / "none.csv")])


@pytest.mark.parametrize("op", ("gelu_backward_inplace", "layernorm_backward", "fused_classifier", "adamw_update"))
def test_a_wrong_result_stops_the_bench(op, monkeypatch):
    """One element of one output is off by 1 % of the largest, in the row or column that is compared: the last."""
    file = importlib.import_module(f"llmc.cpu.{file_of(op)}")
    function, written = getattr(file, op), next(iter(OPS[file_of(op)][op]))
    names = list(inspect.signature(function).parameters)

    def wrong(*args):
        function(*args)
        array = args[names.index(written)]
        array[(-1,) * (array.ndim - 1) + (-1 if op != "fused_classifier" else 0,)] += 0.01 * np.abs(array).max()

    b = bench.Bench("cpu", model="tiny:d1", B=2, T=8)
    monkeypatch.setattr(b, "time", lambda row: bench.quantiles([1.0]))
    case = next(c for c in importlib.import_module(f"dev.bench_{file_of(op)}").cases(b) if c.op == op)
    bench.run_case(b, case._replace(peers=None, naive=None))
    monkeypatch.setattr(file, op, wrong)
    with pytest.raises(SystemExit, match=f"{op} llmc.cpu: {written} is off by"):
        bench.run_case(b, case)


def test_unwritten_output_stops_the_bench(monkeypatch):
    b = bench.Bench("cpu", model="tiny:d1", B=2, T=8)
    case = next(importlib.import_module("dev.bench_gelu").cases(b))
    monkeypatch.setattr(importlib.import_module("llmc.cpu.gelu"), "gelu_forward", lambda out, inp: None)
    with pytest.raises(SystemExit, match="off by inf"):
        bench.run_case(b, case)


def test_a_rung_that_fails_does_not_stop_bench_all(tmp_path, capsys, monkeypatch):
    """It is reported; the other rungs and ops are measured, the CSV is written, and the exit code is 1."""
    monkeypatch.setattr(bench, "BUDGET", 1.0)
    monkeypatch.setattr(bench, "torch_or_none", lambda: None)
    gelu, norm = (importlib.import_module(f"llmc.cpu.{name}") for name in ("gelu", "global_norm"))
    monkeypatch.setattr(gelu, "gelu_forward", lambda out, inp: None)
    monkeypatch.setattr(norm, "global_norm_squared", lambda out, scratch, values: 1 / 0)
    path = tmp_path / "results.csv"
    monkeypatch.setattr(
        "sys.argv", ["bench_all", *"-e tiny:d1 -b 1 -t 8 --device cpu --brief --csv".split(), str(path)]
    )
    with pytest.raises(SystemExit) as stopped:
        bench_all.main()
    assert stopped.value.code == 1
    text = capsys.readouterr().out
    failed = {row["op"] for row in json.loads(text.splitlines()[-1])["rows"] if "failed" in row}
    assert failed == {"gelu_forward", "global_norm_squared"}
    assert "FAILED  gelu_forward llmc.cpu: out is off by inf" in text and "ZeroDivisionError" in text, text
    with open(path, newline="") as file:
        timed = {row["op"] for row in csv.DictReader(file) if row["name"] == "llmc.cpu"}
    assert timed == {op for names in OPS.values() for op in names} - failed


def test_brief_names_a_faster_rung(capsys):
    """By more than the spread of both; rungs that are far from the fastest are left out."""

    def result(name, p50):
        return dict(name=name, p20=p50 - 1, p50=p50, p80=p50 + 1, limit=80.0)

    case = bench.Case("gelu_forward", "B=1", {}, "", "", None, 1)
    copy = result("copy of as many bytes", 90.0)
    bench.print_brief(case, [result("1", 300.0), result("2 production", 110.0), result("3", 100.0), copy], 80.0)
    text = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in text] == ["81.8", "%"] and "<- production to 3: +10 %" in text[1], text
    assert "90.0" in text[1] and max(len(line) for line in text) <= 120
    bench.print_brief(case, [result("production", 101.0), result("3", 100.0)], 80.0)
    assert "<-" not in capsys.readouterr().out


@pytest.mark.parametrize("read,written", ((250, 0), (50, 50), (150, 50), (0, 0)))
def test_time_is_that_of_the_bytes_a_call_moves(read, written):
    """A call is charged with what it reads and writes, wherever its writes are when it ends: on a model of a memory
    that moves a byte in a unit of time, behind an L2 of 60 bytes that writes back late, with events that take 2."""
    L2, state = 60, dict(now=0.0, dirty=0)

    def move(reads, writes):  # what is read or written pushes out what was written before
        kept = min(writes, L2)
        old = max(0, min(state["dirty"], L2 - reads - writes))
        state["now"] += reads + (state["dirty"] - old) + (writes - kept)
        state["dirty"] = kept + old

    def clock():
        start = state["now"]
        state["now"] += 2
        return lambda: lambda end=state["now"]: end - start

    b = bench.Bench.__new__(bench.Bench)
    b.scrubs, b.clock = itertools.cycle([None]), clock
    b.ops = argparse.Namespace(device=argparse.Namespace(zero=lambda _: move(0, 2 * L2), synchronize=lambda: None))
    for calls in (1, 10):
        assert np.allclose(b.gpu_ms(lambda: move(read, written), 5, calls), read + written)


def test_rows_with_new_columns(tmp_path):
    bench.append_rows(tmp_path / "x.csv", [dict(a=1, b=2)])
    bench.append_rows(tmp_path / "x.csv", [dict(b=3, c=4)])
    assert (tmp_path / "x.csv").read_text().split() == ["a,b,c", "1,2,", ",3,4"]


def test_bench_step_on_the_cpu(tmp_path, capsys):
    """Ours and PyTorch's losses agree, and every op of the step has its work in the roofline."""
    path = tmp_path / "r.csv"
    argv = ["--device", "cpu", "-e", "tiny:d1", "-b", "2", "-t", "16", "--steps", "2", "--ops", "--csv", str(path)]
    bench_step.main([*argv, "--variant", "recompute=0"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)  # NaN is no JSON
    steps = [r for r in result["rows"] if r["bench"] == "step"]
    assert [r["name"] for r in steps] == ["llmc", "llmc recompute=0", "torch eager"]
    assert all(r["ms_p50"] > 0 for r in steps)
    config = gpt2.config_from_descriptor("tiny:d1")
    calls = {r["op"]: r["calls"] for r in result["rows"] if r["bench"] == "step_op"}
    assert calls == {w.label: w.calls for w in roofline.step_work(config, 2, 16, 4)}
    roofline.main(["-e", "tiny:d1", "-b", "2", "-t", "16", "--dtype", "fp32", "--results", str(path),
                   "--plot", str(tmp_path / "roof.png")])  # fmt: skip
    assert "% of floor" in capsys.readouterr().out and (tmp_path / "roof.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit, match="HINT"):
        roofline.main(["-b", "3", "--results", str(path)])


@pytest.mark.parametrize("recompute", (0, 1, 2))
def test_roofline_counts_what_the_model_does(recompute, monkeypatch):
    """FLOPs and bytes of the table against those of the arrays that a step really hands to each op."""
    config, B, T = gpt2.config_from_descriptor("tiny:d2", 300), 2, 16
    model = Model(gpt2, cpu, config, B, T, recompute=recompute)
    layers = {shape: name for name, shape in roofline.linear_layers(config).items()}
    seen = {}

    class Recorder:
        def __getattr__(self, name):
            function = getattr(cpu, name)
            if not any(name in file for file in OPS.values()):
                return function

            def record(*args, **kwargs):
                a = inspect.signature(function).bind(*args, **kwargs).arguments
                written = OPS[file_of(name)][name]
                add = 1 + (a.get("accumulate", True) and 1)  # "+=" reads too
                nbytes = sum(
                    x.nbytes * {"=": 1, "+=": add, None: 1}[written.get(k)]
                    for k, x in a.items()
                    if isinstance(x, np.ndarray) and k not in ("scratch", "ends", "decays", "seeds", "hyper", "seed")
                )
                if name == "fused_classifier":
                    nbytes = 2 * a["targets"].size * a["V"] * 4
                label = name + (f" {layers[a['weight'].shape]}" if "weight" in a and name.startswith("matmul") else "")
                old = seen.get(label, (0, 0, 0))
                flops = 2 * a["inp"].size * len(a["weight"]) if name.startswith("matmul") else 0
                flops *= 2 if name == "matmul_backward" else 1
                seen[label] = (old[0] + 1, old[1] + flops, old[2] + nbytes)
                function(*args, **kwargs)

            return record

    model.ops = Recorder()
    x = np.zeros((B, T), np.int32)
    model.forward(x)
    model.backward(x, x)
    model.update(AdamW(1e-4, weight_decay=0.1), 1)
    work = {w.label: w for w in roofline.step_work(config, B, T, 4, recompute)}
    assert {label: s[0] for label, s in seen.items()} == {label: w.calls for label, w in work.items()}
    for label, (_, flops, nbytes) in seen.items():
        if label.startswith("matmul"):
            assert work[label].flops == flops, label
        if not label.startswith("encoder"):  # of its tables only the rows that occur
            assert abs(work[label].bytes - nbytes) <= 0.07 * nbytes, (label, work[label].bytes, nbytes)


def test_rungs(monkeypatch):
    ops = argparse.Namespace(**vars(op_set("executor", monkeypatch)))
    ladder.use(ops, "gelu_forward=1", "bf16", 64)
    assert ops.gelu_forward is ladder.of("gelu_forward")[0].call
    assert cuda.gelu_forward is not ops.gelu_forward
    for text, hint in (("gelu=1", "HINT: one of .*gelu_forward"), ("gelu_forward=9", "N one of 1, 2"), ("x", "HINT")):
        with pytest.raises(UserError, match=hint):
            ladder.use(ops, text, "bf16", 64)
    with pytest.raises(UserError, match="--device cuda"):
        ladder.use(cpu, "gelu_forward=1", "fp32", 64)
    with pytest.raises(UserError, match="bf16 and fp16, not fp32. HINT"):
        ladder.use(ops, "matmul_forward=5", "fp32", 64)
    with pytest.raises(UserError, match="for Hopper, sm_90; this is sm_80. HINT"):
        ladder.use(ops, "attention_forward=4", "bf16", 64)
    monkeypatch.setattr(cuda.module, "capability", lambda: 90)
    with pytest.raises(UserError, match="head sizes 64 and 128, not 80. HINT"):
        ladder.use(ops, "attention_forward=4", "bf16", 80)
    ladder.use(ops, "attention_forward=4", "bf16", 128)
    assert ops.attention_forward is next(rung for rung in ladder.of("attention_forward") if rung.number == 4).call


def test_set_a_constant(monkeypatch):
    """Launchers see it, so that a size of block or grid can be tried without an edit."""
    ops, layernorm = op_set("executor", monkeypatch), importlib.import_module("llmc.cuda.layernorm")
    monkeypatch.setattr(layernorm, "ROW_THREADS", layernorm.ROW_THREADS)  # and back
    bench.set_constant(ops, "layernorm.ROW_THREADS=128")
    assert layernorm.rows_grid(32, 768, 2, 3) == ((8,), (32, 4))
    for text in ("layernorm.NONE=1", "layernorm.ROW_THREADS=x", "nothing.ROW_THREADS=1", "layernorm.np=1"):
        with pytest.raises(SystemExit, match="no such constant.*HINT"):
            bench.set_constant(ops, text)


def test_gpu_check_rungs(capsys, monkeypatch):
    """Rows for the CSV file, and whether every rung was right."""
    gelu, argv = importlib.import_module("dev.bench_gelu"), "-e tiny:d1 -b 1 -t 8 --device cpu --brief".split()
    monkeypatch.setattr(bench_all, "measure", lambda _: bench.main(gelu, argv=argv, keep_going=True))
    rows = []
    assert gpu_check.rungs(None, rows)
    assert {(r["bench"], r["op"]) for r in rows} == {("op", "gelu_forward"), ("op", "gelu_backward_inplace")}
    monkeypatch.setattr(importlib.import_module("llmc.cpu.gelu"), "gelu_forward", lambda out, inp: None)
    assert gpu_check.rungs(None, rows) is False and "FAILED" in capsys.readouterr().out


def test_compare_sass(capsys):
    """Kernels are matched by name, else by code, else by name without numbers; whatever is not identical is said."""

    def row(kernel, *code, file="a.cu", defines=(), resources="8 registers"):
        common = dict(dtype="bfloat16", arch="sm_80", resources=resources)
        return dict(file=file, kernel=kernel, defines=list(defines), code=[[c, c] for c in code], **common)

    old = [
        row("f_kernel2", "A", "B"),
        row("g", "C"),
        row("h", "D", defines=["HEAD_SIZE=64"]),
        row("h", "E", defines=["TALL"]),
    ]
    assert compare_sass.compare(
        old, [row("f_kernel", "A", "B"), row("g", "C"), row("h", "D"), row("h", "E", defines=["TALL"])]
    )
    assert "identical, renamed from f_kernel2" in capsys.readouterr().out
    for new, said in (
        ([row("f_kernel2", "A", "X")], "at instruction 1: B  ->  X"),
        ([row("f_kernel", "A", "X")], "at instruction 1: B  ->  X, renamed from f_kernel2"),
        ([row("f_kernel2", "A")], "2 instructions before"),
        ([row("f_kernel2", "A", "B", resources="9 registers")], "8 registers  ->  9 registers"),
        ([row("f_kernel2", "A", "B"), row("other", "Z")], "NEW"),
        ([row("g", "C")], "GONE"),
    ):
        assert not compare_sass.compare(old[:1] if len(new) > 1 or said != "GONE" else old[:2], new), said
        assert said in capsys.readouterr().out, said


RANKS = ("--device", "cpu", "-e", "tiny:d1", "-b", "2", "-t", "16", "--ranks", "2", "--steps", "2")


def test_ranks_against_one(capsys):
    """Two real ranks over MPI: losses and weights equal, what a ring sends, and the hours and dollars of a run."""
    pytest.importorskip("mpi4py")
    assert bench_ranks.main([*RANKS, "--no-death", "--price", "2", "--run-steps", "3600000"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert [(r["ranks"], r["zero_stage"]) for r in rows] == [(1, 0), (2, 0), (2, 1), (2, 1)]
    config = gpt2.config_from_descriptor("tiny:d1", 257, 16)
    assert {r["bytes"] for r in rows[1:3]} == {4 * gpt2.num_parameters(config)} and rows[0]["bytes"] == 0
    assert sum("equal to fp32 rounding" in line for line in lines) == 2 and max(map(len, lines)) <= 120
    pace = rows[-1]
    assert pace["batch_tokens"] == 8 * 2 * 2 * 16 and pace["hours"] == pytest.approx(pace["ms_p50"], abs=0.1)
    (said,) = (line for line in lines if "such steps" in line)
    hours, dollars = map(float, re.findall(r"([\d.]+) (?:hours|dollars)", said.replace(",", "")))
    assert dollars == pytest.approx(hours * 2 * 2, abs=0.05) and "calculated from 4 measured steps, not run" in said


@pytest.mark.full
def test_death_of_a_rank_in_the_comparison(capsys):
    args = bench_ranks.fill_flags(None, bench_flags(*RANKS), "cpu")
    assert bench_ranks.death(args, 2)
    out = capsys.readouterr().out
    assert "rank 1 of 2 killed in step 8" in out and "llmc.train: error: rank 1 died" in out


def bench_flags(*argv):
    parser = argparse.ArgumentParser()
    bench_ranks.add_flags(parser)
    return parser.parse_args(argv)


def test_ranks_that_disagree_are_noticed(capsys):
    case = dict(model="d12", zero_stage=0)
    assert bench_ranks.same_losses(case, dict(losses=[1, 2], same_weights=True), 2, [1, 2])
    assert not bench_ranks.same_losses(case, dict(losses=[1, 2.0001], same_weights=True), 2, [1, 2])
    assert not bench_ranks.same_losses(case, dict(losses=[1, 2], same_weights=False), 2, [1, 2])
    assert capsys.readouterr().out.count("NOT EQUAL") == 2


def test_gpu_check_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["parity"])
    assert stopped.value.code != 0


def test_gpu_check_runs_all_of_it_once(capsys, monkeypatch):
    """The section `run` with a tiny model on the CPU; its commands are those of a GPU. It notices other bits."""

    def no_data(*args, **kwargs):
        raise UserError("no network")

    monkeypatch.setattr(gpu_check, "prepare_default", no_data)
    rows, size = [], dict(model="tiny:d1", B=2, T=32, steps=100, every=20, device="cpu", vocab_size=257)
    assert gpu_check.run(None, rows, **size), capsys.readouterr().out
    (row,) = rows
    assert row["bit_equal"] == "yes" and row["difference"] < 1e-5 and 4 < row["val_loss"] < 6, row
    out = capsys.readouterr().out
    assert "killed after step 52 (exit code -9), resumed from step" in out and max(map(len, out.splitlines())) <= 120

    killed = gpu_check.killed
    monkeypatch.setattr(gpu_check, "killed", lambda step, *flags: killed(step, *flags, "--seed", 43))
    monkeypatch.setattr(gpu_check, "logit_difference", lambda *args: None)
    assert not gpu_check.run(None, rows, **size)
    assert rows[1]["bit_equal"] == "no" and rows[1]["difference"] == "absent"


# ----------------------------------------------------------------------------------------------------------------------
# sanitize.py


def test_sanitize_launches_every_production_kernel(monkeypatch):
    """All kernels of kernels/*.cu, on a GPU of capability 9.0. Nothing is computed here."""
    ops = simt.install(capability=90, patch=monkeypatch.setattr)
    monkeypatch.setattr(ops.module, "kernel", lambda *args, **kwargs: lambda *launch, **shared: None)
    monkeypatch.setattr(ops.module, "no_hopper", None)
    launched, names = sanitize.launch_all(ops, gpt2.GPT2Config(512, 300, 384, 1, 2, 128)), sanitize.kernel_names()
    assert {"gelu_forward_kernel", "attention_forward_sm90", "adamw_update_kernel"} <= names
    assert not names - launched, f"never launched: {names - launched}"


SANITIZER = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at gelu_forward_kernel+0x60 in gelu.cu:12
=========     by thread (1,0,0) in block (0,0,0)
=========     Address 0x7f0000 is out of bounds
=========     Host Frame: [0x2c] in libcuda.so
=========
========= Invalid __global__ read of size 4 bytes
=========     at gelu_forward_kernel+0x60 in gelu.cu:12
=========     by thread (2,0,0) in block (0,0,0)
=========
========= Error: Race reported between Write access at attention_backward_dkv_sm90+0x90 in ptx_sm90.cuh:110
=========     and Read access at attention_backward_dkv_sm90+0xa0 in attention_sm90.cu:480 [1024 hazards]
=========
========= ERROR SUMMARY: 3 errors
"""


def test_sanitize_sums_findings_by_place():
    found = sanitize.findings(SANITIZER)
    assert sorted(found.values()) == [1, 2]
    (race,) = (text for text in found if "Race" in text)
    assert "ptx_sm90.cuh:110" in race and "attention_sm90.cu:480" in race and "hazards" not in race
    assert not sanitize.findings("========= COMPUTE-SANITIZER\nstep 1\n========= ERROR SUMMARY: 0 errors\n")
    assert sanitize.explanation("racecheck", race, {"syncwarp_good"})
    assert not sanitize.explanation("racecheck", race, set())
    assert not sanitize.explanation("memcheck", race, {"syncwarp_good"})


def test_sanitize_finds_the_tool(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sanitize.sys, "path", [str(tmp_path)])
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        with pytest.raises(UserError, match="not installed. HINT: pip install nvidia-cuda-sanitizer-api"):
            sanitize.find()
    tool = tmp_path / "nvidia" / "cu13" / "bin" / "compute-sanitizer"
    for path in (tool, tmp_path / "cuda" / "bin" / "compute-sanitizer"):
        path.parent.mkdir(parents=True)
        path.touch(mode=0o644)
        if path == tool and Path("/usr/local/cuda/bin/compute-sanitizer").exists():
            continue
        with pytest.raises(UserError, match="not executable. HINT: chmod"):
            sanitize.find()
        path.chmod(0o755)
        assert sanitize.find() == str(path)


def fake_tool(tmp_path, monkeypatch, output, code=0):
    """A compute-sanitizer that prints, after what the pattern prints, and notes which kernels were launched."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!{sys.executable}\nimport json, pathlib, sys\n"
        "if '--kernel' in sys.argv: print(sys.argv[-1] + ': right')\n"
        f"else:\n    pathlib.Path(sys.argv[-1]).write_text(json.dumps({sorted(sanitize.kernel_names())}))\n"
        f"    print({output!r})\n    sys.exit({code})\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize, "find", lambda: str(tool))


def test_sanitize_fails_on_what_is_not_explained(tmp_path, monkeypatch, capsys):
    args, rows = argparse.Namespace(pattern=False, tool=["memcheck", "racecheck"]), []
    fake_tool(tmp_path, monkeypatch, "")
    assert sanitize.sanitize(args, rows) and [row["findings"] for row in rows] == [0, 0]
    fake_tool(tmp_path, monkeypatch, SANITIZER)
    assert not sanitize.sanitize(args, rows) and "gelu.cu:12" in capsys.readouterr().out
    fake_tool(tmp_path, monkeypatch, "", code=1)
    assert not sanitize.sanitize(args, rows) and "the process failed" in capsys.readouterr().out
    fake_tool(tmp_path, monkeypatch, "")
    monkeypatch.setattr(sanitize, "kernel_names", lambda: {"new_kernel"})
    assert not sanitize.sanitize(args, rows) and "not launched, so not judged: new_kernel" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# mutate.py


@pytest.mark.full
def test_mutate_judges(tmp_path):
    """One mutation that no code shows, and one that a test catches."""
    text = (mutate.ROOT / "kernels" / "gelu.cu").read_text()
    pool = mutate.candidates("gelu.cu", text)
    assert len(pool) > 30 and all(text[m.start : m.end] != m.new for m in pool)
    start = text.index("store128(out + i, pack)") + len("store128(out ")
    assert text[start] == "+" and mutate.Mutation("gelu.cu", start, start + 1, "-") in pool
    command = [sys.executable, str(mutate.ROOT / "dev" / "mutate.py"), "--op", "gelu", "--count", "2", "--seed", "1"]
    out = tmp_path / "mutants.jsonl"
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=600)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 2 and {row["result"] for row in rows} <= {"caught", "harmless", "survived"}, done.stderr
    assert any(row["result"] == "caught" for row in rows) and "gelu.cu" in done.stdout
    again = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=600)
    assert len(out.read_text().splitlines()) == 2 and "gelu.cu" in again.stdout  # nothing is judged twice
