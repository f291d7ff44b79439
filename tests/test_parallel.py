"""llmc/parallel without starting processes: the numbering of ranks, ZeRO's shares, and the calls that reach NCCL."""

from argparse import Namespace
from types import SimpleNamespace

import linear_model
import numpy as np
import pytest

from llmc import gpt2
from llmc.errors import UserError
from llmc.model import AdamW, Model, memory_plan
from llmc.parallel import communicators, zero
from llmc.parallel.world import Place, World, meeting_place, world

# ----------------------------------------------------------------------------------------------------------------------
# who is who


MPICH = dict(PMI_RANK="1", PMI_SIZE="4", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2")
OPEN_MPI = dict(OMPI_COMM_WORLD_RANK="5", OMPI_COMM_WORLD_SIZE="8", OMPI_COMM_WORLD_LOCAL_RANK="1")
TORCHRUN = dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="node7", MASTER_PORT="29500")
SLURM = dict(SLURM_PROCID="2", SLURM_STEP_NUM_TASKS="4", SLURM_LOCALID="0", SLURM_JOB_ID="77")
SLURM["SLURM_STEP_NODELIST"] = "gpu[07-08,11]"


@pytest.mark.parametrize(
    "environ, flags, place_flags, expected, place",
    [
        ({}, {}, {}, World(0, 1, 0, None), None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {}, {}, World(0, 1, 0, None), None),  # a batch script, no task
        (MPICH, {}, {}, World(1, 4, 1, "mpi"), Place("mpi")),
        ({**MPICH, "MPI_LOCALNRANKS": "4"}, {}, {}, World(1, 4, 1, "mpi", True), Place("mpi")),
        ({**OPEN_MPI, **SLURM}, {}, {}, World(5, 8, 1, "mpi"), Place("mpi")),  # srun has started mpirun's daemons
        (dict(PMI_RANK="2", PMI_SIZE="4", **SLURM), {}, {}, World(2, 4, 0, "mpi"), Place("mpi")),  # srun --mpi=pmi2
        (OPEN_MPI, dict(gpus_per_node=4), {}, World(5, 8, 1, "mpi"), Place("mpi")),
        (OPEN_MPI, {}, dict(method="tcp", server_ip="a"), World(5, 8, 1, "mpi"), Place("tcp", "a", 12345, run="run")),
        (TORCHRUN, {}, {}, World(3, 4, 1, "torchrun"), Place("tcp", "node7", 29501, run="run")),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "a1"}, {}, {}, World(3, 4, 1, "torchrun", True),
         Place("tcp", "node7", 29501, run="a1")),
        (SLURM, {}, {}, World(2, 4, 0, "srun"), Place("tcp", "gpu07", 20077, run="77.0")),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "1"}, {}, {}, World(2, 4, 0, "srun", True),
         Place("tcp", "gpu07", 20077, run="77.0")),
        ({**SLURM, "SLURM_JOB_NODELIST": "x"}, dict(process_count=4), dict(method="fs", fs_path="d"),
         World(2, 4, 0, "srun"), Place("fs", path="d/llmc-77.0-4.json")),
        ({}, dict(process_count=16, process_rank=9), dict(method="tcp", server_ip="h"), World(9, 16, 1, None),
         Place("tcp", "h", 12345, run="run")),
        ({}, dict(process_count=16, process_rank=9, gpus_per_node=4), dict(fs_path="d"), World(9, 16, 1, None),
         Place("fs", path="d/llmc-run-16.json")),
    ],
)  # fmt: skip
def test_world_and_meeting_place(environ, flags, place_flags, expected, place):
    assert world(**flags, environ=environ) == expected
    assert meeting_place(expected, **place_flags, environ=environ) == place


@pytest.mark.parametrize(
    "environ, flags, text",
    [
        ({**MPICH, **TORCHRUN}, {}, "PMI_RANK=1, PMI_SIZE=4 contradicts RANK=3, WORLD_SIZE=4"),
        (MPICH, dict(process_count=2), "-pn 2 contradicts PMI_SIZE=4"),
        (MPICH, dict(process_rank=0), "-pr 0 contradicts PMI_RANK=1"),
        (dict(RANK="4", WORLD_SIZE="4"), {}, "RANK=4 with WORLD_SIZE=4: no such rank"),
        (dict(RANK="a", WORLD_SIZE="4"), {}, "RANK=a with WORLD_SIZE=4: no such rank"),
        ({}, dict(process_count=2), "-pn 2 needs -pr"),
        ({}, dict(process_rank=1), "-pr 1: with 1 processes"),
    ],
)
def test_contradicting_variables(environ, flags, text):
    with pytest.raises(UserError, match=f"^{text}.* HINT: "):
        world(**flags, environ=environ)


@pytest.mark.parametrize(
    "launcher, flags, environ, text",
    [
        (None, {}, {}, "rank 1 of 2 cannot find the others"),
        (None, dict(method="mpi"), {}, "-pi mpi"),
        ("torchrun", {}, dict(MASTER_ADDR="a", MASTER_PORT="http"), "MASTER_PORT=http is not a number"),
    ],
)
def test_no_way_to_meet(launcher, flags, environ, text):
    with pytest.raises(UserError, match=f"^{text}.* HINT: "):
        meeting_place(World(1, 2, 1, launcher), **flags, environ=environ)


# ----------------------------------------------------------------------------------------------------------------------
# shares


GPT2_SPECS = gpt2.parameter_specs(gpt2.GPT2Config(8, 50, 128, 3, 2, 32))
FIVE_SPECS = linear_model.parameter_specs(linear_model.Config(max_seq_len=8, vocab_size=40, num_layers=3, channels=16))


@pytest.mark.parametrize("specs, P, parts", [(GPT2_SPECS, 2, 3), (GPT2_SPECS, 4, 3), (FIVE_SPECS, 2, 2)])
def test_update_of_shares_is_the_update_of_the_whole(ops, specs, P, parts):
    """Also the noise of bf16 rounding is that of the element, whichever rank updates it: the bits are the same."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = np.dtype(np.float32 if ops.__name__ == "llmc.cpu" else ml_dtypes.bfloat16)
    N, rng = sum(spec.size for spec in specs), np.random.default_rng(0)
    assert len(zero.partition(specs, 0, P).parts) == parts and zero.partition(specs, 0, 3) is None

    def device(host):
        array = ops.device.alloc(host.nbytes).view(host.dtype).reshape(host.shape)
        ops.device.upload(array, np.ascontiguousarray(host))
        return array

    host = [rng.standard_normal(N).astype(np.float32) for _ in range(3)]
    master, grads, m, v = host[0], host[1].astype(dtype), 0.1 * host[2], np.abs(0.1 * host[2])
    seeds = rng.integers(0, 2**32, len(specs), np.uint32)
    hyper, norm = device(np.array([0.01, 0.5, 0.5, 1], np.float32)), device(np.array([4, 1], np.float32))
    scalars = (hyper, norm, 0.9, 0.95, 1e-8, 1.0)
    ends = device(np.cumsum([spec.size for spec in specs], dtype=np.int64))
    decays = device(np.array([0.1 if spec.decay else 0 for spec in specs], np.float32))
    whole = [device(array) for array in (master.astype(dtype), master, grads, m, v)]
    ops.adamw_update(*whole, ends, decays, device(seeds), *scalars)
    expected = [ops.device.download(array) for array in whole]

    for rank in range(P):
        cut = zero.partition(specs, rank, P)
        arenas = [device(cut.of(array)) for array in (master.astype(dtype), master, grads, m, v)]
        share = SimpleNamespace(ends=device(cut.ends()), decays=device(cut.decays(0.1)), seeds=device(cut.seeds(seeds)))
        for views, tables in cut.calls(share, *arenas):
            ops.adamw_update(*views, *tables, *scalars)
        for array, want in zip(arenas, expected, strict=True):
            assert ops.device.download(array).tobytes() == cut.of(want).tobytes()


def test_shares_are_laid_out_as_llmc_has_them():
    """Tensor i starts at its place in the whole / P, with [layers][1/P of a layer] behind (llm.c zero.cuh)."""
    specs, P = GPT2_SPECS, 4
    flat = np.arange(sum(spec.size for spec in specs), dtype=np.float32)
    start = 0
    for spec in specs:
        layers = flat[start : start + spec.size].reshape(max(1, spec.layers), -1)
        for rank in range(P):
            n = layers.shape[1] // P
            own = zero.partition(specs, rank, P).of(flat)[start // P :][: spec.size // P]
            assert np.array_equal(own.reshape(layers.shape[0], n), layers[:, rank * n : (rank + 1) * n])
        start += spec.size


def test_plan_of_shares():
    from llmc import cpu

    config = gpt2.GPT2Config(8, 50, 128, 3, 2, 32)
    cut = zero.partition(gpt2.parameter_specs(config), 0, 4)
    plans = [memory_plan(gpt2, cpu, config, 1, 8, partition=partition) for partition in (None, cut)]
    sizes = [{buffer.title: buffer.nbytes for buffer in plan} for plan in plans]
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
    monkeypatch.setattr(communicators, "import_nccl", lambda: (FakeCupy(nccl.calls), nccl))

    def array(n, dtype, at):
        return Namespace(size=n, dtype=Namespace(name=dtype), data=Namespace(ptr=at), shape=(n,))

    ranks = communicators.Nccl(1, 4, bytes(range(128)))
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
        communicators.import_nccl()
    except (cupy.cuda.runtime.CUDARuntimeError, UserError) as error:
        pytest.skip(f"no GPU: {error}")
    from llmc import cuda

    cuda.device.start()
    ranks = communicators.Nccl(0, 1)
    x, share = cupy.arange(8, dtype=np.float32), cupy.zeros(8, np.float32)
    ranks.reduce_scatter([share], [x])
    ranks.all_gather([x], [share])
    ranks.wait()
    assert x.get().tolist() == share.get().tolist() == list(range(8)) and ranks.sums([1.5, 2]) == [1.5, 2]

    config = gpt2.GPT2Config(64, 250, 256, 2, 2, 128)
    batch = np.random.default_rng(0).integers(0, 250, (4, 2, 2, 64), np.int32)
    results = []
    for with_ranks in (None, ranks):
        model = Model(gpt2, cuda, config, 2, 64, dtype=ml_dtypes.bfloat16, graphs=True, ranks=with_ranks)
        model.init_weights()
        losses = []
        for t, (inputs, targets) in enumerate(batch, 1):
            for micro_step in range(2):
                model.forward(inputs)
                model.backward(inputs, targets, 2, micro_step)
            model.update(AdamW(1e-3, weight_decay=0.1), t)
            losses.append((model.mean_loss(2), model.grad_norm()))
        results.append((losses, model.params_flat.get().tobytes()))
    ranks.close()
    assert results[0] == results[1]
