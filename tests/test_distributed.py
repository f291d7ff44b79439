"""Many processes: real ones under mpirun on the CPU op set, the calls that reach NCCL, who is who, and who died."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from llmc import buffers, gpt2
from llmc.data.loader import DataLoader
from llmc.data.shards import write_shard
from llmc.errors import UserError
from llmc.files import checkpoint
from llmc.parallel import hub, zero
from llmc.parallel import world as distributed

ROOT = Path(__file__).resolve().parents[1]
MPIRUN = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
BATCH = ("-e", "tiny:d2", "-b", "2", "-t", "32", "-d", "512", "-x", "6", "-v", "3", "-m", "5", "-s", "0", "-n", "3")

# llmc.train, whose weights are compared over the ranks, bit by bit, after every update; STEP RANK: who dies, and when
TRAIN = """
import os, signal, sys, zlib
from llmc import gpt2, train
from mpi4py import MPI
step, rank = map(int, sys.argv[1:3])
update = gpt2.GPT2.update
def update_and_compare(self, *args):
    update(self, *args)
    sums = MPI.COMM_WORLD.allgather(zlib.crc32(self.params_flat))
    assert len(set(sums)) == 1, f"the weights differ after step {args[-1]}: {sums}"
    if args[-1] == step and MPI.COMM_WORLD.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
gpt2.GPT2.update = update_and_compare
sys.exit(train.main(sys.argv[3:]))
"""


def start(P, *command, **environ):
    pytest.importorskip("mpi4py")
    if not MPIRUN:
        pytest.skip("no mpirun: pip install mpich")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    mpirun = [MPIRUN, "-n", str(P)] if P else []
    return subprocess.run([*mpirun, *command], env=environ, capture_output=True, text=True, timeout=100)


def run(P, shards, out, *flags, die=(0, 0)):
    """llmc.train on P ranks; returns its training and validation losses and gradient norms: {(step, name): value}."""
    files = ("-i", shards / "train.bin", "-j", shards / "val.bin", "-o", out, "--device", "cpu")
    done = start(P, sys.executable, "-c", TRAIN, *map(str, die), *map(str, files), *BATCH, *flags)
    assert (done.returncode != 0) == (die != (0, 0)), (done.stdout, done.stderr)
    run.stdout, run.stderr = done.stdout, done.stderr
    losses = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        losses |= {(row["step"], name): row[name] for name in ("train_loss", "grad_norm", "val_loss") if name in row}
    return losses


def assert_close(losses, expected, rtol):
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        assert losses[key] == pytest.approx(value, rel=rtol), (key, losses[key], value)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(5)
    text = np.cumsum(rng.integers(-3, 4, 30000)) % 96 + 32
    write_shard(folder / "train.bin", text[:24000].astype(np.uint16), 257)
    write_shard(folder / "val.bin", text[24000:].astype(np.uint16), 257)
    return folder


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    """The losses of one process, and its folder."""
    out = tmp_path_factory.mktemp("alone")
    return run(1, shards, out), out


# ----------------------------------------------------------------------------------------------------------------------
# real runs


@pytest.mark.parametrize("P, zero_stage", [(2, 0), (2, 1), (4, 0), (4, 1)])
def test_results_do_not_depend_on_the_number_of_processes(alone, shards, tmp_path, P, zero_stage):
    losses, folder = alone
    assert len(losses) == 6 + 6 + 3
    assert_close(run(P, shards, tmp_path, "-z", str(zero_stage)), losses, 1e-6)
    assert f"| num_processes         | {P} " in run.stdout and f"| zero_stage            | {zero_stage} " in run.stdout
    assert run.stdout.count("step    6/6") == 1 and not run.stderr  # rank 0 alone prints
    N = gpt2.num_parameters(gpt2.GPT2Config(32, 257, 384, 2, 4, 64))
    for step in (3, 6):
        assert checkpoint.latest_checkpoint(tmp_path) == 6  # every file is there and belongs to the others
        first = checkpoint.read_state_header(checkpoint.state_path(folder, step, 0), (N,))
        for rank in range(P):
            S = N // P if zero_stage else N
            state = checkpoint.read_state_header(
                checkpoint.state_path(tmp_path, step, rank), (S,), num_processes=P, rank=rank
            )
            for name in ("step", "rng_state", "rng_state_last_update"):
                assert state[name] == first[name]
            llmc = DataLoader(str(shards / "train.bin"), 2, 32, rank, P, should_shuffle=True)
            for _ in range(step * 512 // (P * 2 * 32)):
                llmc.next_batch(*np.empty((2, 2, 32), np.int32))
            for name, value in llmc.state().items():  # llm.c can go on from here, in an order of its own
                assert name == "streams" or np.array_equal(state["loader_state"][name], value), name


@pytest.mark.parametrize("P, zero_stage", [(1, 0), (2, 1)])
def test_death_of_a_rank_and_elastic_resume(alone, shards, tmp_path, P, zero_stage):
    """A rank of four is killed in step 5; the run resumes from step 3 on another number of ranks."""
    run(4, shards, tmp_path, "-z", "1", die=(5, 2))
    assert "llmc.train: error: rank 2 died, the other ranks stop. HINT: -y 1 continues" in run.stderr
    assert checkpoint.latest_checkpoint(tmp_path) == 3
    assert_close(run(P, shards, tmp_path, "-z", str(zero_stage), "-y", "1"), alone[0], 1e-6)


def test_resume_on_as_many_ranks_is_bit_exact(shards, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    losses = run(2, shards, whole, "-z", "1")
    run(2, shards, parts, "-z", "1", die=(5, 0))
    assert "rank 0 died" in run.stderr
    assert run(2, shards, parts, "-z", "1", "-y", "1") == losses
    for name in ("model_00000006.bin", "state_00000006_00000.bin", "state_00000006_00001.bin"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


def test_one_process_imports_nothing_of_this(shards):
    flags = ["-i", str(shards / "train.bin"), "-j", str(shards / "val.bin"), "--device", "cpu", *BATCH[:-2], "-x", "1"]
    code = "import sys; from llmc import train; train.main(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *flags], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert "step    1/1" in done.stdout, done.stderr
    assert not {"llmc.parallel.hub", "mpi4py", "cupy"} & set(done.stdout.splitlines()[-1].split())


def test_errors_are_one_line(shards, tmp_path):
    train = (sys.executable, "-m", "llmc.train", "-j", str(shards / "val.bin"), "--device", "cpu")
    both = (*train, "-i", str(shards / "train.bin"), *BATCH)
    different = [*both, ":", "-n", "1", *both, "--seed", "43"]
    cases = [
        (start(2, *train, "-i", "nothing.bin", "-e", "tiny:d1"), "cannot read nothing.bin: No such file or "),
        (start(2, *both, "-l", "x"), "argument -l/--learning-rate: x is not a number of at least 0. HINT: "),
        (start(2, *both, "-pn", "4"), "-pn 4 contradicts PMI_SIZE=2. HINT: leave -pn out."),
        (start(1, *different), "rank 1 was started with --seed 43, rank 0 with --seed 42. HINT: the flags"),
        (start(3, *both), "-d 512 is not a multiple of -b 2 x -t 32 x 3 processes = 192. HINT: -d 192."),
        (start(3, *both, "-d", "192", "-o", str(shards / "val.bin" / "x")), "-o "),  # rank 0 alone finds out
        (start(0, *both, RANK="0", WORLD_SIZE="2"), "this process is one of 2, but MPI sees 1. HINT: the CPU op set"),
        (start(0, *both, "-pn", "2"), "-pn 2 needs -pr, the rank of this process. HINT: mpirun -n 2 tells both."),
    ]
    for done, text in cases:
        assert done.returncode == 2 and done.stderr.startswith(f"llmc.train: error: {text}"), (done.stderr, text)
        assert done.stderr.count("\n") == 1, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# who is who


def flags_of(**given):
    names = ("process_count", "process_rank", "gpus_per_node", "nccl_init_method")
    return Namespace(**{**dict.fromkeys(names), "server_ip": "", "fs_path": "", **given})


MPICH = dict(PMI_RANK="1", PMI_SIZE="4", MPI_LOCALRANKID="1")
OPEN_MPI = dict(OMPI_COMM_WORLD_RANK="5", OMPI_COMM_WORLD_SIZE="8", OMPI_COMM_WORLD_LOCAL_RANK="1")
TORCHRUN = dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="node7", MASTER_PORT="29500")
SLURM = dict(SLURM_PROCID="2", SLURM_STEP_NUM_TASKS="4", SLURM_LOCALID="0", SLURM_JOB_ID="77")
SLURM["SLURM_STEP_NODELIST"] = "gpu[07-08,11]"


@pytest.mark.parametrize(
    "environ, flags, expected, place",
    [
        ({}, {}, (0, 1, 0, None), None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {}, (0, 1, 0, None), None),  # a batch script, not a task of srun
        (MPICH, {}, (1, 4, 1, "mpi"), ("mpi",)),
        ({**OPEN_MPI, **SLURM}, {}, (5, 8, 1, "mpi"), ("mpi",)),  # srun has started mpirun's daemons
        (dict(PMI_RANK="2", PMI_SIZE="4", **SLURM), {}, (2, 4, 0, "mpi"), ("mpi",)),  # srun --mpi=pmi2
        (OPEN_MPI, dict(gpus_per_node=4), (5, 8, 1, "mpi"), ("mpi",)),
        (OPEN_MPI, dict(nccl_init_method="tcp", server_ip="a"), (5, 8, 1, "mpi"), ("tcp", "a", 12345)),
        (TORCHRUN, {}, (3, 4, 1, "torchrun"), ("tcp", "node7", 29501)),
        (SLURM, {}, (2, 4, 0, "srun"), ("tcp", "gpu07", 20077)),
        ({**SLURM, "SLURM_JOB_NODELIST": "x"}, dict(nccl_init_method="fs", fs_path="d", process_count=4),
         (2, 4, 0, "srun"), ("fs", "d/llmc-77.0-4.json")),
        ({}, dict(process_count=16, process_rank=9, nccl_init_method="tcp", server_ip="h"), (9, 16, 1, None),
         ("tcp", "h", 12345)),
        ({}, dict(process_count=16, process_rank=9, gpus_per_node=4, fs_path="d"), (9, 16, 1, None),
         ("fs", "d/llmc-run-16.json")),
    ],
)  # fmt: skip
def test_world_and_meeting_place(environ, flags, expected, place):
    args = flags_of(**flags)
    assert distributed.world(args, environ) == expected
    if place:
        rank, size, _, launcher = expected
        assert distributed.meeting_place(args, rank, size, launcher, environ) == place


@pytest.mark.parametrize(
    "environ, flags, text",
    [
        ({**MPICH, **TORCHRUN}, {}, "PMI_RANK=1, PMI_SIZE=4 contradicts RANK=3, WORLD_SIZE=4"),
        (MPICH, dict(process_count=2), "-pn 2 contradicts PMI_SIZE=4"),
        (MPICH, dict(process_rank=0), "-pr 0 contradicts PMI_RANK=1"),
        (dict(RANK="4", WORLD_SIZE="4"), {}, "RANK=4 with WORLD_SIZE=4: no such rank"),
        (dict(RANK="a", WORLD_SIZE="4"), {}, "RANK=a with WORLD_SIZE=4: no such rank"),
        ({}, dict(process_count=2), "-pn 2 needs -pr"),
    ],
)
def test_contradicting_variables(environ, flags, text):
    with pytest.raises(UserError, match=f"^{text}.* HINT: "):
        distributed.world(flags_of(**flags), environ)


@pytest.mark.parametrize("method, text", [(None, "rank 1 of 2 cannot find the others"), ("mpi", "-pi mpi")])
def test_no_way_to_meet(method, text):
    with pytest.raises(UserError, match=f"^{text}.* HINT: "):
        distributed.meeting_place(flags_of(nccl_init_method=method), 1, 2, None, {})


# ----------------------------------------------------------------------------------------------------------------------
# the hub, with real processes

RANK = """
import os, sys, time
from llmc.parallel import world as distributed
from llmc.parallel import hub
rank, size, where, does = int(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3]), sys.argv[4]
ranks = hub.Ranks(rank, size, rank, where, connect=float(sys.argv[5]), silence=float(sys.argv[6]))
print(ranks.exchange({"rank": rank}), distributed.on_rank0(ranks, lambda: list(range(-64, 64))), flush=True)
if does == "die" and rank == 1: os._exit(0)
if does == "hang" and rank == 2: os.kill(os.getpid(), 19)
if does == "fail" and rank == 1: ranks.fail("disk full", 2)
ranks.barrier()
ranks.close()
"""


def meet(where, does="nothing", started=3, size=3, connect=60, silence=60, late=0):
    """[(exit code, stdout, stderr)] of the ranks; `late` seconds pass before rank 0 is started."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = {}
    for rank in reversed(range(started)):
        if rank == 0 and late:
            threading.Event().wait(late)
        settings = (rank, size, where, does, connect if rank == 0 else 60, silence)  # of rank 0: the hub's patience
        command = [sys.executable, "-c", RANK, *map(str, settings)]
        processes[rank] = subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    results = []
    for rank in range(started):
        if does == "hang" and rank == 2:
            processes[rank].kill()
        out, err = processes[rank].communicate(timeout=100)
        results.append((processes[rank].returncode, out, err))
    return results


def hang_up(server):
    while True:
        server.accept()[0].close()


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(params=["tcp", "fs"])
def where(request, tmp_path):
    return ("tcp", "127.0.0.1", free_port()) if request.param == "tcp" else ("fs", str(tmp_path / "llmc-run-3.json"))


def test_ranks_meet(where):
    """128 numbers, as the unique id of NCCL, and a value of each, reach all ranks, also where rank 0 comes last."""
    if where[0] == "fs":  # an earlier run left a file: a port that nothing, or that another run listens on
        other = socket.create_server(("127.0.0.1", 0))
        Path(where[1]).write_text(json.dumps({"llmc": ["old", ["127.0.0.1"], other.getsockname()[1]]}))
        threading.Thread(target=hang_up, args=(other,), daemon=True).start()
    expected = f"{[{'rank': r} for r in range(3)]} {list(range(-64, 64))}\n"
    assert meet(where, late=0.5) == [(0, expected, "")] * 3
    assert not os.path.exists(where[1])


@pytest.mark.parametrize(
    "does, code, text",
    [
        ("die", 1, "rank 1 died, the other ranks stop. HINT: -y 1"),
        ("hang", 1, "rank 2 has not been heard of for 4 s, the other ranks stop. HINT: -y 1"),
        ("fail", 2, "rank 1: disk full"),
    ],
)
def test_the_hub_names_who_failed(tmp_path, does, code, text):
    results = meet(("fs", str(tmp_path / "llmc-run-3.json")), does, silence=4)
    assert results[0][0] == code
    assert results[0][2].startswith(f"llmc.train: error: {text}") and results[0][2].count("\n") == 1, results
    for rank, (theirs, _, stderr) in enumerate(results[1:], 1):  # the hub's words go to rank 0's stderr, once
        assert stderr == "" and (theirs == code or (does, rank) in (("die", 1), ("hang", 2)))


def test_strangers_are_dropped():
    """Who does not know the token, or does not speak as a rank does, is not answered; the hub goes on."""
    port = hub.start_hub(1, "secret", "127.0.0.1")
    for said in (b'{"rank": 0, "size": 1, "token": "guess"}\n', b"GET / HTTP/1.1\r\n\r\n", b"[]\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as stranger:
            stranger.sendall(said)
            assert stranger.recv(100) == b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as rank:
        rank.sendall(b'{"rank": 0, "size": 1, "token": "secret"}\n')
        assert json.loads(rank.recv(100)) == {"welcome": 0}
        rank.sendall(b'{"bye": 1}\n')
        assert hub.start_hub.process.wait(timeout=30) == 0


def test_missing_rank(tmp_path):
    results = meet(("fs", str(tmp_path / "llmc-run-3.json")), started=2, connect=3, late=1)
    assert [code for code, *_ in results] == [2, 2]
    text = "llmc.train: error: rank 2 of 3 did not connect within 3 s. HINT: start 3 processes, see -pn\n"
    assert results[0][2] == text


def test_foreign_file(tmp_path):
    path = tmp_path / "llmc-run-2.json"
    path.write_text("my notes")
    with pytest.raises(UserError, match="not a file of a run. HINT: "):
        hub.write_place(str(path), "t", ["h"], 1)
    assert path.read_text() == "my notes"


def test_two_runs_in_one_folder(tmp_path):
    """The second to start is told so while the first one's hub is there; what a dead one left is replaced."""
    path, port = str(tmp_path / "llmc-run-2.json"), hub.start_hub(2, "first", "127.0.0.1")
    hub.write_place(path, "first", ["127.0.0.1"], port)
    with pytest.raises(UserError, match="llmc-run-2.json is of another run that starts now. HINT: "):
        hub.write_place(path, "second", ["127.0.0.1"], 1)
    assert hub.read_place(path)[0] == "first"
    hub.start_hub.process.kill()
    hub.start_hub.process.wait()
    hub.write_place(path, "second", ["127.0.0.1"], 1)
    assert hub.read_place(path)[0] == "second"


# ----------------------------------------------------------------------------------------------------------------------
# shares


def share_of(ops, specs, rank, P, dtype):
    table = zero.share_specs(specs, P)
    nbytes = buffers.offsets(table, dtype, 256)[1]
    views = buffers.carve(ops.device.alloc(nbytes), table, 0, dtype, 256)
    return zero.Share(specs, rank, P, views, ops.device)


@pytest.mark.parametrize("P", [2, 4])
def test_update_of_shares_is_the_update_of_the_whole(ops, P):
    """Also the noise of bf16 rounding is that of the element, whichever rank updates it: the bits are the same."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = np.dtype(np.float32 if ops.__name__ == "llmc.cpu" else ml_dtypes.bfloat16)
    specs = gpt2.parameter_specs(gpt2.GPT2Config(8, 50, 128, 3, 2, 32))
    N, rng = sum(spec.size for spec in specs), np.random.default_rng(0)
    assert len(zero.share_rows(specs, P)) == 3 and zero.share_rows(specs, 3) is None

    def device(host):
        array = ops.device.alloc(host.nbytes).view(host.dtype).reshape(host.shape)
        ops.device.upload(array, np.ascontiguousarray(host))
        return array

    host = [rng.standard_normal(N).astype(np.float32) for _ in range(3)]
    master, grads, m, v = host[0], host[1].astype(dtype), 0.1 * host[2], np.abs(0.1 * host[2])
    seeds = rng.integers(0, 2**32, 16, np.uint32)
    hyper, norm = device(np.array([0.01, 0.5, 0.5, 1], np.float32)), device(np.array([4, 1], np.float32))
    scalars = (hyper, norm, 0.9, 0.95, 1e-8, 1.0)
    ends = device(np.cumsum([spec.size for spec in specs], dtype=np.int64))
    decays = device(np.array([0.1 if spec.decay else 0 for spec in specs], np.float32))
    whole = [device(array) for array in (master.astype(dtype), master, grads, m, v)]
    ops.adamw_update(*whole, ends, decays, device(seeds), *scalars)
    expected = [ops.device.download(array) for array in whole]

    for rank in range(P):
        share = share_of(ops, specs, rank, P, dtype)
        arenas = [device(share.of(array)) for array in (master.astype(dtype), master, grads, m, v)]
        share.set_tables(seeds, 0.1)
        for views, tables in share.calls(*arenas):
            ops.adamw_update(*views, *tables, *scalars)
        for array, want in zip(arenas, expected, strict=True):
            assert ops.device.download(array).tobytes() == share.of(want).tobytes()


def test_shares_are_laid_out_as_llmc_has_them():
    """Tensor i starts at its place in the whole / P, with [layers][1/P of a layer] behind (llm.c zero.cuh)."""
    from llmc import cpu

    specs, P = gpt2.parameter_specs(gpt2.GPT2Config(8, 50, 128, 3, 2, 32)), 4
    flat = np.arange(sum(spec.size for spec in specs), dtype=np.float32)
    start = 0
    for spec in specs:
        layers = flat[start : start + spec.size].reshape(max(1, spec.layers), -1)
        for rank in range(P):
            n = layers.shape[1] // P
            own = share_of(cpu, specs, rank, P, np.float32).of(flat)[start // P :][: spec.size // P]
            assert np.array_equal(own.reshape(layers.shape[0], n), layers[:, rank * n : (rank + 1) * n])
        start += spec.size


def test_plan_of_shares():
    from llmc import cpu

    config = gpt2.GPT2Config(8, 50, 128, 3, 2, 32)
    sizes = [{title: n for title, *_, n in gpt2.memory_plan(config, cpu, 1, 8, shards=P)} for P in (1, 4)]
    assert sizes[1]["optimizer"] * 4 == sizes[0]["optimizer"] and "share" not in sizes[0]
    assert sizes[1]["share"] >= 2 * 4 * gpt2.num_parameters(config) // 4


# ----------------------------------------------------------------------------------------------------------------------
# NCCL


class FakeNccl:
    """Writes down what is called; a group is one entry."""

    available, NcclError = True, RuntimeError

    def __init__(self):
        self.calls = []

    def get_unique_id(self):
        return bytes(range(128))

    def groupStart(self):
        self.calls.append("group")

    def groupEnd(self):
        self.calls.append("end")

    def NcclCommunicator(self, size, unique_id, rank):
        self.calls.append(("join", size, len(unique_id), rank))
        return self

    def __getattr__(self, name):
        return lambda *args: self.calls.append((name, *args))


class FakeCupy:
    """Streams and events that write down who waits for whom."""

    def __init__(self, calls):
        self.cuda, self.calls = self, calls
        self.ptr = "own"
        self.wait_event = lambda event: calls.append(("own waits for", event.on))

    def Stream(self, non_blocking):
        return self

    def get_current_stream(self):
        return Namespace(ptr="current", wait_event=lambda event: self.calls.append(("current waits for", event.on)))

    def Event(self, disable_timing):
        event = Namespace(on=None)
        event.record = lambda stream: setattr(event, "on", stream.ptr)
        return event

    def zeros(self, n, dtype):
        return np.zeros(n, dtype)


def test_calls_of_nccl(monkeypatch):
    """Types, counts and addresses; its own stream waits for the current one before a group, and the other way after."""
    nccl = FakeNccl()
    monkeypatch.setattr(distributed, "import_nccl", lambda: (FakeCupy(nccl.calls), nccl))

    def array(n, dtype, at):
        return Namespace(size=n, dtype=Namespace(name=dtype), data=Namespace(ptr=at), shape=(n,))

    ranks = distributed.Nccl(1, 4, bytes(range(128)))
    assert nccl.calls == [("join", 4, 128, 1)] and (ranks.rank, ranks.size) == (1, 4)
    nccl.calls.clear()
    ranks.all_reduce([array(10, "float32", 100), array(6, "bfloat16", 200)])
    before = ["current"]
    assert nccl.calls == [
        ("own waits for", *before), "group",
        ("allReduce", 100, 100, 10, 7, 0, "own"), ("allReduce", 200, 200, 6, 9, 0, "own"), "end",
    ]  # fmt: skip
    nccl.calls.clear()
    ranks.reduce_scatter([array(3, "float16", 1)], [array(12, "float16", 2)])
    ranks.all_gather([array(12, "float16", 2)], [array(3, "float16", 1)])
    assert nccl.calls[2] == ("reduceScatter", 2, 1, 3, 6, 0, "own")
    assert nccl.calls[6] == ("allGather", 1, 2, 3, 6, "own")
    nccl.calls.clear()
    ranks.wait()
    assert nccl.calls == [("current waits for", "own")]
    with pytest.raises(AssertionError):
        ranks.all_gather([array(12, "float16", 2)], [array(4, "float16", 1)])


@pytest.mark.gpu
def test_nccl_of_one_rank_changes_nothing():
    """Two steps of a tiny model in bf16, launched and then as graphs, with a communicator of one rank and without."""
    cupy = pytest.importorskip("cupy", reason="no GPU: CuPy is not installed")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    try:
        cupy.cuda.runtime.getDeviceCount()
        distributed.import_nccl()
    except (cupy.cuda.runtime.CUDARuntimeError, UserError) as error:
        pytest.skip(f"no GPU: {error}")
    from llmc import cuda

    cuda.device.start()
    ranks = distributed.Nccl(0, 1)
    x, share = cupy.arange(8, dtype=np.float32), cupy.zeros(8, np.float32)
    ranks.reduce_scatter([share], [x])
    ranks.all_gather([x], [share])
    ranks.wait()
    assert x.get().tolist() == share.get().tolist() == list(range(8)) and ranks.sums([1.5, 2]) == [1.5, 2]

    config = gpt2.GPT2Config(64, 250, 256, 2, 2, 128)
    batch = np.random.default_rng(0).integers(0, 250, (4, 2, 2, 64), np.int32)
    results = []
    for with_ranks in (None, ranks):
        model = gpt2.GPT2(config, cuda, 2, 64, dtype=ml_dtypes.bfloat16, graphs=True, ranks=with_ranks)
        model.init_weights()
        losses = []
        for t, (inputs, targets) in enumerate(batch, 1):
            for micro_step in range(2):
                model.forward(inputs)
                model.backward(inputs, targets, 2, micro_step)
            model.update(1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0, t)
            losses.append((model.mean_loss(2), model.grad_norm()))
        results.append((losses, model.params_flat.get().tobytes()))
    ranks.close()
    assert results[0] == results[1]
