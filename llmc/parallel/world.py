"""Many processes: who is who, what happens when one dies, and the sums over all of them.

Every process trains on batches of its own; gradients are summed over all ranks as the backward pass makes them final.
With -z 1 (ZeRO-1) a rank keeps AdamW's state for a share of every tensor alone, updates that share, and the shares of
all ranks are gathered. One process needs none of this, and then nothing here is imported or called.

What is not an array goes through the hub (hub.py): flags to compare, barriers, and the news that a rank has died.
Arrays go over MPI (the CPU op set) or NCCL (GPUs), class Mpi and class Nccl: the same methods, of which only wait and
sums wait.

Source: llm.c llmc/zero.cuh, train_gpt2.cu. Its ncclAvg is a sum here: 1/P is part of the loss's gradient.
"""

import contextlib
import io
import os
import re
import sys

from llmc.errors import UserError

PORT = 12345  # of -pi tcp, as in llm.c

# ----------------------------------------------------------------------------------------------------------------------
# who is who

MPI_VARIABLES = [
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
]
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


def world(args, environ=os.environ):
    """(rank, size, local rank, launcher) of this process: launcher is "mpi", "torchrun", "srun" or None.

    From what mpirun, torchrun or srun put into the environment, else -pn and -pr. The local rank counts the processes
    of one machine; without a launcher that tells it is rank mod -pg. srun may start the daemons of mpirun and not the
    ranks: MPI's variables go before its own. Errors: UserError for values that are impossible or contradict each other.
    """
    found = {}
    for launcher, names in [*(("mpi", n) for n in MPI_VARIABLES), ("torchrun", TORCHRUN_VARIABLES)]:
        if launcher not in found and names[0] in environ and names[1] in environ:
            found[launcher] = names
    if not found and SRUN_VARIABLES[0] in environ and SRUN_VARIABLES[1] in environ:
        found["srun"] = SRUN_VARIABLES
    seen = []
    for launcher, names in found.items():
        try:
            rank, size = int(environ[names[0]]), int(environ[names[1]])
        except ValueError:
            rank, size = -1, -1
        if not 0 <= rank < size:
            text = f"{names[0]}={environ[names[0]]} with {names[1]}={environ[names[1]]}: no such rank"
            raise UserError(f"{text}. HINT: unset them, or start all processes with one launcher.")
        if args.process_count not in (None, size):
            raise UserError(f"-pn {args.process_count} contradicts {names[1]}={size}. HINT: leave -pn out.")
        if args.process_rank not in (None, rank):
            raise UserError(f"-pr {args.process_rank} contradicts {names[0]}={rank}. HINT: leave -pr out.")
        local = environ.get(names[2])
        if local is None and environ.get("SLURM_PROCID") == str(rank):  # srun --mpi=pmi2
            local = environ.get("SLURM_LOCALID")
        seen.append((rank, size, local, launcher, f"{names[0]}={rank}, {names[1]}={size}"))
    if len(seen) == 2 and seen[0][:2] != seen[1][:2]:
        raise UserError(f"{seen[0][4]} contradicts {seen[1][4]}. HINT: one launcher only; unset what another one left.")
    if seen:
        rank, size, local, launcher, _ = seen[0]
    else:
        size, rank, local, launcher = args.process_count or 1, args.process_rank, None, None
        if rank is None and size > 1:
            raise UserError(f"-pn {size} needs -pr, the rank of this process. HINT: mpirun -n {size} tells both.")
    rank = rank or 0
    local = int(local) if local is not None and args.gpus_per_node is None else rank % (args.gpus_per_node or 8)
    return rank, size, local, launcher


def first_host(nodelist):
    """The first machine of a Slurm list: node[03-05,7],other -> node03."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodelist)
    return match[1] + (match[2] or "")


def meeting_place(args, rank, size, launcher, environ=os.environ):
    """How to find the hub: ("mpi",), ("tcp", host, port) or ("fs", path). -pi decides, else the launcher.

    torchrun keeps MASTER_PORT for itself, so the hub has the port after it.
    """
    method = args.nccl_init_method or {"mpi": "mpi", "torchrun": "tcp", "srun": "tcp"}.get(launcher)
    method = method or ("tcp" if args.server_ip else "fs" if args.fs_path else None)
    if method == "fs":
        job = environ.get("SLURM_JOB_ID", "run")
        if launcher == "srun":  # else the ranks may have been started in steps of their own
            job += f".{environ.get('SLURM_STEP_ID', 0)}"
        return "fs", os.path.join(args.fs_path, f"llmc-{job}-{size}.json")
    if method == "tcp" and args.server_ip:
        return "tcp", args.server_ip, PORT
    if method == "tcp" and launcher == "torchrun" and "MASTER_ADDR" in environ:
        return "tcp", environ["MASTER_ADDR"], int(environ.get("MASTER_PORT", PORT - 1)) + 1
    if method == "tcp" and launcher == "srun":
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "localhost")
        return "tcp", first_host(nodes), 20000 + int(environ.get("SLURM_JOB_ID", 0)) % 20000
    if method == "mpi" and launcher == "mpi":
        return ("mpi",)
    if method == "mpi":
        raise UserError("-pi mpi: this process was not started by mpirun. HINT: mpirun -n P, or -pi tcp, or -pi fs.")
    text = f"rank {rank} of {size} cannot find the others"
    raise UserError(f"{text}. HINT: start with mpirun, torchrun or srun, or give -pi tcp -ps HOST or -pi fs -pf DIR.")


# ----------------------------------------------------------------------------------------------------------------------
# arrays


def import_mpi(size):
    """mpi4py's MPI, if this process is one of `size` to it, else UserError."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        hint = "pip install llmc[mpi]; on GPUs -pi tcp or -pi fs work without it"
        raise UserError(f"{size} processes need mpi4py ({error}). HINT: {hint}.") from error
    if MPI.COMM_WORLD.size != size:
        text = f"this process is one of {size}, but MPI sees {MPI.COMM_WORLD.size}"
        hint = f"the CPU op set needs mpirun -n {size} python -m llmc.train ..., of the MPI that mpi4py uses"
        hint += "; with srun, --mpi=pmi2 for MPICH" if "SLURM_PROCID" in os.environ else ""
        raise UserError(f"{text}. HINT: {hint}.")
    return MPI


class Mpi:
    """Sums and gathers of NumPy arrays over all ranks. Calls only start; wait() returns when all have finished.

    All ranks make the same calls in the same order. The sum has the same bits on every rank.
    """

    def __init__(self, rank, size):
        self.mpi = import_mpi(size)
        self.comm, self.rank, self.size, self.requests = self.mpi.COMM_WORLD, rank, size, []

    def _start(self, requests):
        self.requests += requests
        self.mpi.Request.Testall(self.requests)  # MPI moves data while it is called

    def all_reduce(self, arrays):
        """Each array = its sum over the ranks."""
        self._start([self.comm.Iallreduce(self.mpi.IN_PLACE, array) for array in arrays])

    def reduce_scatter(self, shares, arrays):
        """share (n/P,) = this rank's part of the sum of array (n,): the r-th of P equal parts on rank r."""
        self._start([self.comm.Ireduce_scatter_block(a, s) for s, a in zip(shares, arrays, strict=True)])

    def all_gather(self, arrays, shares):
        """array (n,) = the shares (n/P,) of all ranks, in order."""
        self._start([self.comm.Iallgather(s, a) for a, s in zip(arrays, shares, strict=True)])

    def wait(self):
        """What follows reads what was started before."""
        self.mpi.Request.Waitall(self.requests)
        self.requests = []

    def sums(self, values):
        """The sum over the ranks of each number, as floats."""
        import numpy as np

        array = np.array(values, np.float64)
        self.comm.Allreduce(self.mpi.IN_PLACE, array)
        return array.tolist()

    def close(self):
        """Nothing: mpi4py ends MPI with the interpreter."""


NCCL_TYPES = {"float16": 6, "float32": 7, "float64": 8, "bfloat16": 9}  # ncclDataType_t
NCCL_SUM = 0  # ncclRedOp_t


class Nccl:
    """The same for arrays on GPUs, one for each rank. Calls queue work on a stream of their own and return at once.

    That stream first waits for the work queued before the call on the current one; wait() makes the current stream wait
    for it in turn. With both the calls can be captured into a CUDA graph.
    """

    def __init__(self, rank, size, unique_id=None):
        cupy, self.nccl = import_nccl()
        self.rank, self.size = rank, size
        try:
            self.comm = self.nccl.NcclCommunicator(size, unique_id or self.nccl.get_unique_id(), rank)
        except self.nccl.NcclError as error:
            hint = "NCCL_DEBUG=WARN as environment variable makes NCCL say why"
            raise UserError(f"rank {rank} cannot join NCCL's ranks: {error}. HINT: {hint}.") from error
        self.cuda = cupy.cuda
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.before, self.after = (cupy.cuda.Event(disable_timing=True) for _ in range(2))
        self.scalars = cupy.zeros(16, "float64")

    @contextlib.contextmanager
    def _queued(self):
        self.before.record(self.cuda.get_current_stream())
        self.stream.wait_event(self.before)
        self.nccl.groupStart()  # one launch for all calls of a group
        try:
            yield self.comm
        finally:
            self.nccl.groupEnd()

    def all_reduce(self, arrays):
        """Each array = its sum over the ranks."""
        with self._queued() as comm:
            for array in arrays:
                at, kind = array.data.ptr, NCCL_TYPES[array.dtype.name]
                comm.allReduce(at, at, array.size, kind, NCCL_SUM, self.stream.ptr)

    def reduce_scatter(self, shares, arrays):
        """share (n/P,) = this rank's part of the sum of array (n,): the r-th of P equal parts on rank r."""
        with self._queued() as comm:
            for share, array in zip(shares, arrays, strict=True):
                assert share.size * self.size == array.size and share.dtype == array.dtype, (share.shape, array.shape)
                kind = NCCL_TYPES[array.dtype.name]
                comm.reduceScatter(array.data.ptr, share.data.ptr, share.size, kind, NCCL_SUM, self.stream.ptr)

    def all_gather(self, arrays, shares):
        """array (n,) = the shares (n/P,) of all ranks, in order."""
        with self._queued() as comm:
            for array, share in zip(arrays, shares, strict=True):
                assert share.size * self.size == array.size and share.dtype == array.dtype, (share.shape, array.shape)
                kind = NCCL_TYPES[array.dtype.name]
                comm.allGather(share.data.ptr, array.data.ptr, share.size, kind, self.stream.ptr)

    def wait(self):
        """What is queued from now on reads what was queued before."""
        self.after.record(self.stream)
        self.cuda.get_current_stream().wait_event(self.after)

    def sums(self, values):
        """The sum over the ranks of each number, as floats."""
        import numpy as np

        part = self.scalars[: len(values)]
        part.set(np.array(values, np.float64))
        self.all_reduce([part])
        self.wait()
        return part.get().tolist()

    def close(self):
        """Give NCCL's memory back."""
        self.comm.destroy()


def import_nccl():
    """(cupy, cupy.cuda.nccl), or UserError where NCCL cannot be loaded."""
    import warnings

    import cupy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy's own text about it takes ten lines
        from cupy.cuda import nccl
    if not nccl.available:
        major = cupy.cuda.runtime.runtimeGetVersion() // 1000
        raise UserError(f"several GPUs need NCCL, which is not installed. HINT: pip install nvidia-nccl-cu{major}.")
    return cupy, nccl


def arrays(ranks, device):
    """The Mpi or Nccl of a run's ranks, on device "cpu" or "cuda"."""
    if device == "cpu":
        ranks.arrays = Mpi(ranks.rank, ranks.size)
        return ranks.arrays
    cupy, nccl = import_nccl()
    gpus = ranks.exchange([os.uname().nodename, cupy.cuda.Device().pci_bus_id])
    if gpus.count(gpus[ranks.rank]) > 1:
        who = [rank for rank, gpu in enumerate(gpus) if gpu == gpus[ranks.rank]]
        raise UserError(f"ranks {who} have the same GPU {gpus[ranks.rank]}. HINT: -pg, or a launcher with local ranks.")
    unique_id = on_rank0(ranks, lambda: nccl.get_unique_id().hex())
    ranks.arrays = Nccl(ranks.rank, ranks.size, bytes.fromhex(unique_id))
    return ranks.arrays


# ----------------------------------------------------------------------------------------------------------------------
# a run


@contextlib.contextmanager
def one_voice(environ=os.environ):
    """Flags are parsed in here: what is wrong with them on all ranks of mpirun is printed once, and so is --help."""
    size = next((int(environ[n]) for _, n, _ in MPI_VARIABLES if environ.get(n, "1").isdigit() and n in environ), 1)
    if size == 1:
        yield
        return
    printed, ended = io.StringIO(), None
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            yield
    except (SystemExit, UserError) as error:
        ended = error
    try:
        comm = import_mpi(size).COMM_WORLD
    except UserError:  # GPUs can do without it
        print(printed.getvalue(), end="", file=sys.stderr)
        if ended:
            raise ended from None
        return
    text = None if ended is None else printed.getvalue() or f"llmc.train: error: {ended}\n"
    texts = comm.allgather(text)
    if any(texts):
        if comm.rank == 0:
            same = len(set(texts)) == 1
            print("".join(texts[:1] if same else [f"rank {r}: {t}" for r, t in enumerate(texts) if t]), end="",
                  file=sys.stderr)  # fmt: skip
        sys.exit(getattr(ended, "code", 2))


@contextlib.contextmanager
def launched(args):
    """Yield the Ranks that this process is one of, or None for a process on its own. Nothing is printed but on rank 0.

    -pn and -pr are set in args; flags are compared. An exception on any rank ends all of them with one message.
    """
    rank, size, local_rank, launcher = world(args)
    if size == 1:
        yield None
        return
    args.process_count, args.process_rank = size, rank
    if args.device == "cpu":
        import_mpi(size)  # if it is missing, the others need not be waited for
    from llmc.parallel.hub import Ranks

    ranks = Ranks(rank, size, local_rank, meeting_place(args, rank, size, launcher))
    if rank:
        sys.stdout = open(os.devnull, "w")
    try:
        same_flags(args, ranks)
        yield ranks
        ranks.close()
    except UserError as error:
        ranks.fail(str(error), 2)
    except KeyboardInterrupt:
        ranks.fail("interrupted", 2)
    except BaseException as error:
        import traceback

        print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        ranks.fail(f"{type(error).__name__}: {error}", 1)


def same_flags(args, ranks):
    """UserError that names the rank and the first flag that differ, if the ranks were started with different ones."""
    mine = {name: value for name, value in vars(args).items() if name not in ("process_rank", "threads")}
    first, *others = ranks.exchange(mine)
    for rank, theirs in enumerate(others, 1):
        for name in first:
            if theirs[name] != first[name]:
                flag = "--" + name.replace("_", "-")
                text = f"rank {rank} was started with {flag} {theirs[name]}, rank 0 with {flag} {first[name]}"
                raise UserError(f"{text}. HINT: the flags of all processes must be the same.")


def pick_device(args, ranks):
    """devices.pick_device for this process or rank, and the Mpi or Nccl of the ranks, None for one process."""
    from llmc.devices import pick_device

    if ranks is None:
        return *pick_device(args.device, args.threads), None
    if args.device != "cpu":
        choose_gpu(ranks.local_rank)
    ops, device, line = pick_device(args.device, args.threads or threads_each(ranks))
    devices = ranks.exchange(device)
    for rank, other in enumerate(devices):
        if other != devices[0]:
            raise UserError(f"rank {rank} would run on {other}, rank 0 on {devices[0]}. HINT: give --device.")
    return ops, device, line, arrays(ranks, device)


def choose_gpu(local_rank):
    """Leave this process the GPU of its local rank alone. Called before CUDA starts."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(local_rank)
    elif "," in visible:  # else the launcher has done it, or there is to be none
        names = visible.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = names[local_rank % len(names)]


def threads_each(ranks):
    """CPU threads for this rank: the cores it may use, shared evenly with the ranks that may use the same ones."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    everyone = ranks.exchange([os.uname().nodename, cores])
    return max(1, len(cores) // everyone.count(everyone[ranks.rank]))


def ranks_here(ranks, device):
    """How many ranks the memory of this rank's device is for: main memory for all of a machine, a GPU's for one."""
    if ranks is None or device != "cpu":
        return 1
    nodes = ranks.exchange(os.uname().nodename)
    return nodes.count(nodes[ranks.rank])


def on_rank0(ranks, function):
    """What function() returns on rank 0, where alone it is called; on every rank."""
    if ranks is None:
        return function()
    return ranks.exchange(function() if ranks.rank == 0 else None)[0]


def rank0_first(ranks, function):
    """function() on rank 0, then on the others, which find there what it has prepared."""
    if ranks and ranks.rank:
        ranks.barrier()
    result = function()
    if ranks and ranks.rank == 0:
        ranks.barrier()
    return result


def total(sums, value):
    """The sum of a number over the ranks of an Mpi or Nccl; the number itself for one process, None."""
    return sums.sums([value])[0] if sums else value
