"""The memory plan: allocations to the byte, the largest batch, --plan on any machine, and running out of memory."""

import importlib
import re
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import op_set
from reference import DTYPES

from llmc import cpu, cuda, evaluate, generate, gpt2, train
from llmc.command import memory_size
from llmc.data.shards import write_shard
from llmc.errors import UserError
from llmc.gpt2 import GPT2Config, parameter_specs
from llmc.model import AdamW, Model, piece_sizes, pieces
from llmc.parallel import launch as launching
from llmc.parallel import zero
from llmc.training import memory

GIB, MIB = 2**30, 2**20
CONFIG = GPT2Config(32, 61, 128, 2, 2, 16)


def run(capsys, *argv):
    """(exit code, stdout, stderr) of the trainer."""
    capsys.readouterr()
    try:
        code = train.main([str(a) for a in argv])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def record(monkeypatch, ops, fail_at=None):
    """The list that the sizes of ops.device.alloc go to from now on; the allocation number fail_at fails."""
    sizes, alloc = [], ops.device.alloc

    def recorded(nbytes):
        if threading.current_thread() is threading.main_thread():  # threads have scratch of their own, in the plan too
            if len(sizes) == fail_at:
                raise MemoryError(f"cannot allocate {nbytes} bytes")
            sizes.append(nbytes)
        return alloc(nbytes)

    monkeypatch.setattr(ops.device, "alloc", recorded)
    return sizes


# ----------------------------------------------------------------------------------------------------------------------
# the plan is what is allocated


@pytest.mark.parametrize("kind", ("cpu", "executor"))
def test_the_plan_is_what_is_allocated(kind, monkeypatch):
    ops = op_set(kind, monkeypatch)
    sizes = record(monkeypatch, ops)
    dtypes = ("fp32",) if kind == "cpu" else ("bf16", "fp16", "fp32")
    for i, dtype in enumerate(dtypes * 3):  # -w and --grad-dtype go through their combinations as -r does
        P = 2 ** (i % 3)
        partition = zero.partition(parameter_specs(CONFIG), 0, P) if P > 1 else None
        settings = dict(
            use_master_weights=i % 2 == 0, grad_dtype="float32" if i // 2 % 2 else None, partition=partition
        )
        B, T, recompute = 1 + i, 5 + 3 * i, i % 3 if kind == "cpu" else i // 3
        sizes.clear()
        ranks = SimpleNamespace(rank=0, size=P) if P > 1 else None
        model = Model(gpt2, ops, CONFIG, B, T, recompute=recompute, dtype=DTYPES[dtype], ranks=ranks, **settings)
        planned = memory.needs_of(CONFIG, ops, T, DTYPES[dtype], **settings)(B, recompute)
        assert planned == sum(sizes) + ops.device.scratch_bytes(), (dtype, settings)
        inputs = np.zeros((B, T), np.int32)
        if kind == "cpu" and ranks is None:  # and nothing later
            count = len(sizes)
            model.token_losses(inputs, inputs)
            model.backward(inputs, inputs)
            model.update(AdamW(1e-3, weight_decay=0.1), 1)
            assert len(sizes) == count


# ----------------------------------------------------------------------------------------------------------------------
# the largest batch


@pytest.mark.parametrize("ops, dtype", [(cpu, "fp32"), (cuda, "bf16"), (cuda, "fp32")])
def test_largest_batch(ops, dtype):
    """It fits, one more does not; not more than can be indexed, and only divisors where they are asked for."""
    needs = memory.needs_of(CONFIG, ops, 32, DTYPES[dtype])
    for recompute in range(3):
        for wanted in (1, 2, 3, 37, 256, 1000):
            budget = needs(wanted, recompute)
            found = memory.largest_batch(needs, recompute, budget, 10**6)
            assert needs(found, recompute) <= budget < needs(found + 1, recompute) and abs(found - wanted) < 5
            assert memory.largest_batch(needs, recompute, budget, wanted - 1) == wanted - 1
        assert memory.largest_batch(needs, recompute, needs(37, recompute), 10**6, divides=48) == 24
        assert memory.largest_batch(needs, recompute, 0, 10**6) == 0


def test_refused_with_what_fits():
    needs = memory.needs_of(CONFIG, cuda, 32, DTYPES["bf16"])
    memory.check(needs, 64, 32, 0, needs(64, 0), 2**30)
    memory.check(needs, 64, 32, 0, None, 2**30)  # a device that does not tell what it has

    def message(*args, **options):
        with pytest.raises(UserError) as error:
            memory.check(needs, *args, **options)
        return str(error.value)

    text = message(64, 32, 0, needs(40, 0), 2**30)
    assert (
        f"-b 64 -r 0: the plan needs {needs(64, 0) / MIB:.1f} MiB, the device has {needs(40, 0) / MIB:.1f} MiB" in text
    )
    fits = [(int(b), int(r)) for b, r in re.findall(r"-b (\d+) -r (\d)", text.partition("HINT: ")[2])]
    assert fits[0] == (40, 0) and all(needs(b, r) <= needs(40, 0) < needs(b + 1, r) for b, r in fits)
    assert [r for _, r in fits] == sorted({r for _, r in fits}) and [b for b, _ in fits] == sorted({b for b, _ in fits})
    assert message(64, 32, 0, needs(64, 0) - 1, 2**30).endswith("HINT: -b 63 -r 0 or -b 64 -r 1 fits.")
    assert message(64, 32, 2, needs(63, 2), 2**30).endswith("HINT: -b 63 -r 2 fits.")
    assert "HINT: -b 48 -r 2 fits." in message(64, 32, 2, needs(63, 2), 2**30, divides=96)
    assert "HINT: not even -b 1 -r 2 fits" in message(64, 32, 0, 1000, 2**30)
    text = message(64, 32, 1, needs(70, 1), 2**30, failed=True)
    assert "the allocation failed" in text and f"of the {needs(70, 1) / MIB:.1f} MiB for it" in text
    assert needs(int(re.search(r"HINT: -b (\d+)", text)[1]), 1) <= 0.9 * needs(64, 1)
    assert "-b 64 -t 32: 2048 tokens in a micro-batch, the kernels count to 1999. HINT: -b 62 or less" in message(
        64, 32, 0, None, 1999
    )


def test_budgets(monkeypatch):
    """On a GPU what is free counts, without what CUDA itself will take; on a CPU all of main memory."""
    for ops in (cpu, cuda):
        monkeypatch.setattr(ops.device, "memory", lambda: (10 * GIB, 100 * GIB))
    assert 9.5 * GIB < cuda.device.budget() < 10 * GIB
    assert 79 * GIB < cuda.device.budget(80 * GIB) < 79.5 * GIB and cuda.device.budget(1) == 0
    assert cpu.device.budget() == 100 * GIB and cpu.device.budget(3 * GIB) == 3 * GIB
    monkeypatch.setattr(cpu.device, "memory", lambda: (0, 0))
    assert cpu.device.budget() is None


def test_ranks_of_a_machine_share_its_memory(monkeypatch):
    ranks = SimpleNamespace(rank=0, exchange=lambda value: [value, value, "another machine"])
    assert [launching.ranks_here(r, d) for r, d in ((ranks, "cpu"), (ranks, "cuda"), (None, "cpu"))] == [2, 1, 1]
    monkeypatch.setattr(cpu.device, "memory", lambda: (0, 3 * GIB))
    limits = memory.limits(CONFIG, cpu, 10, "float32", total_batch_size=1200, P=3, sharing=2)
    assert limits[::2] == (1.5 * GIB, 40)


@pytest.mark.parametrize(
    "text, size",
    [("80GiB", 80 * GIB), ("80 GB", 80 * 10**9), ("1.5gib", 1.5 * GIB), ("500MiB", 500 * MIB), ("2TB", 2 * 10**12)],
)
def test_memory_size(text, size):
    assert memory_size(text) == size and type(memory_size(text)) is int


@pytest.mark.parametrize("text", ("80", "80G", "GiB", "-1GiB", "0GiB", "1e3GiB", "80GiBs", "", "nanGiB"))
def test_bad_memory_size(text, capsys):
    code, _, err = run(capsys, "--plan", f"--memory={text}")
    assert code == 2 and f"{text} is not a number with a unit" in err and err.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# --plan


def without_cupy(monkeypatch, *more):
    for name in ("cupy", *more):
        monkeypatch.setitem(sys.modules, name, None)  # an import raises ImportError
    cuda.module.capability.cache_clear()


@pytest.mark.parametrize("hidden", [(), ("ml_dtypes",)])
def test_plan_without_gpu_cupy_data(hidden, tmp_path, capsys, monkeypatch):
    """llm.c's own command line: the table is right, nothing is allocated or written, and no data is needed."""
    without_cupy(monkeypatch, *hidden)
    monkeypatch.chdir(tmp_path)
    for ops in (cpu, cuda):
        record(monkeypatch, ops, fail_at=0)
    argv = "-i dev/data/fineweb10B/fineweb_train_*.bin -j x.bin -o log -e d12 -b 64 -t 1024 -d 524288 -r 0 -z 0 -h 1"
    code, out, err = run(capsys, *argv.split(), "--device", "cuda", "--plan", "--memory", "80GiB")
    assert (code, err) == (0, "") and not list(tmp_path.iterdir())
    assert out.startswith("cuda, which this machine cannot run (") and "d12: 124,475,904 parameters, bf16" in out
    config = gpt2.config_from_descriptor("d12")
    needs = memory.needs_of(config, cuda, 1024, "float16")
    assert f"{needs(64, 0):,} bytes = " in out.partition("  total ")[2].partition("\n")[0]
    assert "bfloat16  " in out and " float16" not in out and "50304 x 768" in out
    rows = re.findall(
        r"^  (\d) +(\d+)   ([\d.]+) GiB$", out.partition("largest batch in 79.4 GiB, T = 1024\n")[2], re.M
    )
    assert [r for r, *_ in rows] == ["0", "1", "2"]
    for r, b, gib in rows:
        r, b = int(r), int(b)
        assert needs(b, r) <= 80 * GIB - cuda.device.CONTEXT < needs(b + 1, r) and gib == f"{needs(b, r) / GIB:.1f}"
    code, out, _ = run(capsys, *argv.split(), "--dtype", "bf16", "--plan", "-w", 0, "--grad-dtype", "fp32")
    assert code == 0 and "--memory 80GiB tells" in out and "largest batch in" not in out and "master" not in out
    assert "gradients (tensor by tensor as the parameters)         497,903,616 bytes" in out
    code, out, _ = run(capsys, *argv.split(), "--dtype", "bf16", "--plan", "-z", 1, "-pn", 8, "-d", 2**22)
    assert (
        code == 0
        and "  master        15559488  " in out
        and "optimizer                                              186,7" in out
    )
    code, out, err = run(capsys, *argv.split(), "--dtype", "bf16", "--plan", "-pn", 3)
    assert code == 2 and "-d 524288 is not a multiple of -b 64 x -t 1024 x 3 processes" in err


def test_plan_that_does_not_fit(capsys, monkeypatch):
    without_cupy(monkeypatch)
    flags = "--plan -e d48 --device cuda -b 64 -d 1048576 -r 0 --memory 80GB".split()
    code, out, err = run(capsys, *flags)
    assert code == 2 and "memory plan" in out and "largest batch in" in out
    assert re.fullmatch(
        r"llmc.train: error: -b 64 -r 0: the plan needs 17\d\.\d GiB, the device has 73\.9 GiB for it. "
        r"HINT: -b 16 -r 0 or -b 32 -r 2 fits\.\n", err,
    ), err  # fmt: skip


def test_plan_of_this_machine(tmp_path, capsys, monkeypatch):
    """For the cpu op set, a model file, and the memory that there is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cpu.device, "memory", lambda: (1 * GIB, 2 * GIB))
    code, out, _ = run(capsys, "--plan", "--device", "cpu")
    assert code == 0 and "largest batch in 2.0 GiB, T = 96" in out and "tiny:d4: " in out and "384 x 128" in out
    assert not list(tmp_path.iterdir())  # the default job's folder in runs/ is not made
    code, out, err = run(capsys, "--plan", "--device", "cpu", "-e", "none.bin")
    assert code == 2 and "none.bin" in err and not out
    code, out, err = run(capsys, "--plan", "--device", "cpu", "-t", 4096, "-e", "d12")
    assert code == 2 and "-t 4096: the model has positions for 1 to 1024" in err
    for rank in "01":  # under a launcher: for one of its processes, printed once
        monkeypatch.setenv("PMI_RANK", rank)
        monkeypatch.setenv("PMI_SIZE", "2")
        code, out, _ = run(capsys, "--plan", "--device", "cpu", "-z", 1)
        assert code == 0 and ("  share  " in out if rank == "0" else not out)
    monkeypatch.delenv("PMI_RANK")
    code, out, err = run(capsys, "--memory", "80GiB")
    assert code == 2 and "--memory is for --plan" in err


# ----------------------------------------------------------------------------------------------------------------------
# running out of it


TRAIN = "-i train.bin -j val.bin -e tiny:d1 -b 16 -t 32 -r 0 -x 1 -v 0 -s 0 --device cpu".split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.bin", "val.bin"):
        write_shard(name, np.full(4000, 97, np.uint16), 257)


def test_out_of_memory_is_predicted(folder, capsys, monkeypatch):
    """Nothing is allocated, and what the message proposes runs."""
    config = gpt2.config_from_descriptor("tiny:d1", 257, 32)
    needs = memory.needs_of(config, cpu, 32, "float32")
    monkeypatch.setattr(cpu.device, "memory", lambda: (0, needs(11, 0)))
    with monkeypatch.context() as patch:
        record(patch, cpu, fail_at=0)
        code, out, err = run(capsys, *TRAIN)
    assert code == 2 and "memory plan" in out and err.count("\n") == 1
    assert re.match(
        r"llmc.train: error: -b 16 -r 0: the plan needs [\d.]+ MiB, the device has [\d.]+ MiB for it. ", err
    )
    assert "HINT: -b 11 -r 0" in err
    assert run(capsys, *TRAIN, "-b", 11)[0] == 0 and run(capsys, *TRAIN, "-b", 12)[0] == 2
    assert "HINT: -b 8 -r 0" in run(capsys, *TRAIN, "-d", 1024)[2]


@pytest.mark.parametrize("fail_at", range(5))
def test_a_failing_allocation_is_reported_alike(fail_at, folder, capsys, monkeypatch):
    record(monkeypatch, cpu, fail_at)
    code, out, err = run(capsys, *TRAIN)
    assert code == 2 and err.count("\n") == 1 and "memory plan" in out
    assert "-b 16 -r 0: the plan needs" in err and "the allocation failed. HINT: -b 1" in err, err


@pytest.mark.parametrize("memory, fail_at", [((0, 2**20), None), ((0, 2**40), 0)])
def test_generate_and_evaluate_say_so_too(memory, fail_at, folder, capsys, monkeypatch):
    assert train.main([*TRAIN, "-n", "1", "-o", "out"]) == 0
    monkeypatch.setattr(cpu.device, "memory", lambda: memory)
    record(monkeypatch, cpu, fail_at)
    for command, argv in ((generate, []), (evaluate, ["-j", "val.bin", "-b", "2"])):
        capsys.readouterr()
        assert command.main(["out", "--device", "cpu", *argv]) == 2
        out, err = capsys.readouterr()
        assert not out and re.search(r"error: out\S*: [12] x 32 tokens at once need [\d.]+ MiB on ", err)
        assert "HINT: " in err and err.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# what the kernels can index


def hopper(monkeypatch):
    """The launches are those of capability 9.0, with TMA's limits: sizes of 2^32, but signed coordinates; rows that are
    2^40 bytes apart. A block goes from tile to tile by adding the number of blocks: the last sum counts too."""

    def tensor_map(array, rows, columns, box_rows):
        assert 0 < rows < 2**31 - 256 and columns < 2**31 - 256 and columns * 2 < 2**40 and box_rows <= 256
        assert columns * 2 % 16 == 0 and rows * columns <= array.size, (rows, columns, array.shape)
        return array

    def launch_sm90(name, dtype, tile, items, args, defines=()):
        assert 0 < items + 132 < 2**31, (name, items)
        launch(name, dtype, tile, items, args, defines)

    matmul = importlib.import_module("llmc.cuda.matmul")
    launch = matmul._launch_sm90
    monkeypatch.setattr(matmul, "_launch_sm90", launch_sm90)
    monkeypatch.setattr(cuda.module, "tensor_map", tensor_map)
    monkeypatch.setattr(cuda.module, "multiprocessors", lambda: 132)
    monkeypatch.setattr(cuda.module, "no_hopper", None)


def launch_all(monkeypatch, B, T, C, NH, V, dtype, capability=80):
    """Every launch of a step, on arrays that have the shapes asked for but one element: all numbers are in range."""

    def kernel(file, name, dtype, defines=(), smem=0, arch=None, strict=False):
        def launch(grid, block, args, shared_mem=0):
            assert all(0 < x < 2**31 for x in grid) and max((1, *grid[1:])) <= 65535, (name, grid)

        return launch

    def array(*shape, kind=None):
        return np.lib.stride_tricks.as_strided(np.zeros(1, kind or dtype), shape, [0] * len(shape))

    monkeypatch.setattr(cuda.module, "kernel", kernel)
    monkeypatch.setattr(cuda.module, "capability", lambda: capability)
    Vp, f32, i32 = -(-V // 128) * 128, np.float32, np.int32
    inp, seed, x = array(B, T, kind=i32), array(1, kind=np.uint32), array(B, T, C)
    w, statistic, scratch = array(C), array(B, T, kind=f32), array(10**13, kind=f32)
    cuda.encoder_forward(x, inp, array(Vp, C), array(T, C))
    size = cuda.encoder_scratch_size(B, T, C, Vp)
    cuda.encoder_backward(array(Vp, C), array(T, C), array(size, kind=i32), x, inp, seed)
    cuda.layernorm_forward(x, statistic, statistic, x, w, w)
    cuda.fused_residual_forward(x, x, statistic, statistic, x, x, w, w)
    cuda.layernorm_backward(x, w, w, scratch, x, x, w, statistic, statistic)
    cuda.attention_forward(x, array(B, NH, T, kind=f32), array(B, T, 3 * C))
    cuda.attention_backward(array(B, T, 3 * C), scratch, x, x, array(B, T, 3 * C), array(B, NH, T, kind=f32))
    for c, oc in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C), (C, Vp)):
        out, inp_c, weight = array(B, T, oc), array(B, T, c), array(oc, c)
        assert cuda.matmul_scratch_size(B, T, c, oc) < scratch.size
        cuda.matmul_forward(out, inp_c, weight, array(oc))
        cuda.matmul_backward(inp_c, weight, array(oc), scratch, out, inp_c, weight)
    cuda.gelu_forward(array(B, T, 4 * C), array(B, T, 4 * C))
    cuda.fused_classifier(array(B, T, Vp), statistic, 1.0, inp, V)
    cuda.global_norm_squared(array(1, kind=f32), scratch, array(B * T, kind=f32))


@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
@pytest.mark.parametrize("C, NH, V", [(64, 4, 257), (768, 12, 50257), (8, 1, 50257), (12288, 96, 50257)])
def test_launches_at_the_largest_size(C, NH, V, dtype, monkeypatch):
    """At max_positions every launcher's numbers and grids are in range, and somewhat above not all of them."""
    dtype, Vp = DTYPES[dtype], -(-V // 128) * 128
    most = cuda.device.max_positions(C, Vp, dtype)
    assert most * Vp > 2**31  # far more elements than 32 bits count
    for T in (1, 1024):
        launch_all(monkeypatch, most // T, T, C, NH, V, dtype)
    if most < 2**30:
        with pytest.raises((AssertionError, OverflowError)):
            launch_all(monkeypatch, most + 128, 1, C, NH, V, dtype)


@pytest.mark.parametrize("C, NH, V", [(64, 1, 257), (768, 12, 50257), (8, 1, 50257), (12288, 96, 50257)])
def test_hopper_launches_at_the_largest_size(C, NH, V, monkeypatch):
    dtype, Vp = DTYPES["bf16"], -(-V // 128) * 128
    most = cuda.device.max_positions(C, Vp, dtype)
    hopper(monkeypatch)
    for T in (1, 1024):
        launch_all(monkeypatch, most // T, T, C, NH, V, dtype, capability=90)
    with pytest.raises((AssertionError, OverflowError)):
        launch_all(monkeypatch, 2**31 - 128, 1, C, NH, V, dtype, capability=90)


def test_the_largest_batch_is_refused_at_once(capsys, monkeypatch):
    """Not after a list of its pieces has been made."""
    without_cupy(monkeypatch)
    for size in (1, 7, 16896, 16897, 50000):
        assert piece_sizes(size) == {piece.stop - piece.start for piece in pieces(size)}
    code, _, err = run(capsys, "--plan", "-e", "tiny:d1", "--device", "cpu", "-t", 256, "-b", 2**31 - 1)
    assert code == 2 and "-b 2147483647" in err and err.count("\n") == 1


def test_a_plan_beyond_it_is_refused(capsys, monkeypatch):
    without_cupy(monkeypatch)
    flags = "--plan -e tiny:d1 --device cuda --dtype fp32 -t 256 --memory 2TB -b".split()
    assert run(capsys, *flags, 32767)[0] == 0
    code, _, err = run(capsys, *flags, 32768)
    assert code == 2 and "-b 32768 -t 256: 8388608 tokens in a micro-batch, the kernels count to 8388480" in err
    assert err.endswith("HINT: -b 32767 or less, with -d for more micro-steps.\n")
