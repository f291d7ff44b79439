"""What a command calls to run on one process or on many: `with one_voice()` around its flags, `with launched()` around
its run, and in between what is agreed on once for all ranks.

Every process trains on batches of its own; gradients are summed over all ranks as the backward pass makes them final.
With -z 1 (ZeRO-1, zero.py) a rank keeps AdamW's state for a share of every tensor alone, updates that share, and the
shares of all ranks are gathered.

A process on its own has no Ranks (None): it needs none of this, and neither the hub nor a communicator is imported.
"""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from llmc.errors import UserError
from llmc.parallel.world import MPI_VARIABLES, Place, World

if TYPE_CHECKING:
    from llmc.parallel.communicators import Communicator
    from llmc.parallel.ranks import Ranks

T = TypeVar("T")


@contextlib.contextmanager
def one_voice(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Flags are parsed in here: what is wrong with them on all ranks of mpirun is printed once, and so is --help."""
    size = next((int(environ[n]) for _, n, *_ in MPI_VARIABLES if environ.get(n, "").isdecimal()), 1)
    if size == 1:
        yield
        return
    from llmc.parallel.communicators import import_mpi

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
            lines = texts[:1] if same else [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
            print("".join(lines), end="", file=sys.stderr)
        sys.exit(getattr(ended, "code", 2))


@contextlib.contextmanager
def launched(who: World, place: Place | None, device: str = "auto") -> "Iterator[Ranks | None]":
    """Yield the Ranks that this process is one of, or None for a process on its own; device: the one asked for.

    Nothing is printed but on rank 0. An exception on any rank ends all of them with one message.
    """
    if who.size == 1 or place is None:
        yield None
        return
    from llmc.parallel.communicators import import_mpi
    from llmc.parallel.ranks import Ranks

    if device == "cpu":
        import_mpi(who.size)  # if it is missing, the others need not be waited for
    ranks = Ranks(who, place)
    if who.rank:
        sys.stdout = open(os.devnull, "w")
    try:
        yield ranks
        ranks.close()
    except UserError as error:
        ranks.fail(str(error), error.code)
    except KeyboardInterrupt:
        ranks.fail("interrupted", 130)
    except BrokenPipeError:
        ranks.fail("nobody reads stdout any more. HINT: with -o DIR the run goes on without", 1)
    except BaseException as error:
        print(f"rank {who.rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        ranks.fail(f"{type(error).__name__}: {error}", 1)


def same_flags(ranks: "Ranks | None", mine: Mapping[str, Any]) -> None:
    """UserError that names the rank and the first flag that differ, if the ranks were started with different ones.

    mine: {flag's long name, with underscores: value that JSON can hold}, without what a rank has of its own.
    """
    if ranks is None:
        return
    first, *others = ranks.exchange(dict(mine))
    for rank, theirs in enumerate(others, 1):
        for name in first:
            if theirs[name] != first[name]:
                flag = "--" + name.replace("_", "-")
                text = f"rank {rank} was started with {flag} {theirs[name]}, rank 0 with {flag} {first[name]}"
                raise UserError(f"{text}. HINT: the flags of all processes must be the same.")


# ----------------------------------------------------------------------------------------------------------------------
# devices


def pick_device(wanted: str, threads: int | None, ranks: "Ranks | None") -> "tuple[Any, str, str, Communicator | None]":
    """(op set, its name, a line about it, Communicator of the ranks) of this process: see devices.pick_device.

    A process on its own has no communicator, None.
    """
    from llmc import devices

    if ranks is None:
        return *devices.pick_device(wanted, threads), None
    if wanted != "cpu":
        choose_gpu(ranks.local_rank)
    ops, device, line = devices.pick_device(wanted, threads or threads_each(ranks))
    picked = ranks.exchange(device)
    for rank, other in enumerate(picked):
        if other != picked[0]:
            raise UserError(f"rank {rank} would run on {other}, rank 0 on {picked[0]}. HINT: give --device.")
    return ops, device, line, communicator(ranks, device)


def communicator(ranks: "Ranks", device: str) -> "Communicator":
    """The Mpi or Nccl of a run's ranks, on device "cpu" or "cuda"."""
    from llmc.parallel.communicators import Mpi, Nccl, import_nccl

    if device == "cpu":
        ranks.communicator = Mpi(ranks.rank, ranks.size)
        return ranks.communicator
    cupy, nccl = import_nccl()
    gpus = ranks.exchange([os.uname().nodename, cupy.cuda.Device().pci_bus_id])
    if gpus.count(gpus[ranks.rank]) > 1:
        who = [rank for rank, gpu in enumerate(gpus) if gpu == gpus[ranks.rank]]
        raise UserError(f"ranks {who} have the same GPU {gpus[ranks.rank]}. HINT: -pg, or a launcher with local ranks.")
    unique_id = on_rank0(ranks, lambda: nccl.get_unique_id().hex())
    ranks.communicator = Nccl(ranks.rank, ranks.size, bytes.fromhex(unique_id))
    return ranks.communicator


def choose_gpu(local_rank: int) -> None:
    """Leave this process the GPU of its local rank alone. Called before CUDA starts."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(local_rank)
    elif "," in visible:  # else the launcher has done it, or there is to be none
        names = visible.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = names[local_rank % len(names)]


def threads_each(ranks: "Ranks") -> int:
    """CPU threads for this rank: the cores it may use, shared evenly with the ranks that may use the same ones."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    everyone = ranks.exchange([os.uname().nodename, cores])
    return max(1, len(cores) // everyone.count(everyone[ranks.rank]))


def ranks_here(ranks: "Ranks | None", device: str) -> int:
    """How many ranks the memory of this rank's device is for: main memory for all of a machine, a GPU's for one."""
    if ranks is None or device != "cpu":
        return 1
    nodes = ranks.exchange(os.uname().nodename)
    return nodes.count(nodes[ranks.rank])


# ----------------------------------------------------------------------------------------------------------------------
# what is done once for all


def on_rank0(ranks: "Ranks | None", function: Callable[[], T]) -> T:
    """What function() returns on rank 0, where alone it is called; on every rank, so JSON must be able to hold it."""
    if ranks is None:
        return function()
    return ranks.exchange(function() if ranks.rank == 0 else None)[0]


def rank0_first(ranks: "Ranks | None", function: Callable[[], T]) -> T:
    """function() on rank 0, then on the others, which find there what it has prepared."""
    if ranks and ranks.rank:
        ranks.barrier()
    result = function()
    if ranks and ranks.rank == 0:
        ranks.barrier()
    return result
