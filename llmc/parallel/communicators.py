"""Sums and gathers of arrays over all ranks: Mpi for the CPU op set, Nccl for GPUs, with the same methods.

All ranks make the same calls in the same order. Calls only start the work: wait() puts what follows behind it.

Source: llm.c llmc/zero.cuh, train_gpt2.cu. Its ncclAvg is a sum here: 1/P is part of the loss's gradient.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from llmc.buffers import Array
from llmc.errors import UserError

NCCL_TYPES = {"float16": 6, "float32": 7, "float64": 8, "bfloat16": 9}  # ncclDataType_t
NCCL_SUM = 0  # ncclRedOp_t


def import_mpi(size: int) -> Any:
    """mpi4py's MPI, if this process is one of `size` to it, else UserError."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        hint = "pip install mpi4py mpich; on GPUs -pi tcp or -pi fs work without them"
        raise UserError(f"{size} processes need mpi4py ({error}). HINT: {hint}.") from error
    if MPI.COMM_WORLD.size != size:
        text = f"this process is one of {size}, but MPI sees {MPI.COMM_WORLD.size}"
        hint = f"the CPU op set needs mpirun -n {size} python -m llmc.train ..., of the MPI that mpi4py uses"
        hint += "; with srun, --mpi=pmi2 for MPICH" if "SLURM_PROCID" in os.environ else ""
        raise UserError(f"{text}. HINT: {hint}.")
    return MPI


def import_nccl() -> tuple[Any, Any]:
    """(cupy, cupy.cuda.nccl), or UserError where NCCL cannot be loaded."""
    import cupy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy's own text about it takes ten lines
        from cupy.cuda import nccl
    if not nccl.available:
        major = cupy.cuda.runtime.runtimeGetVersion() // 1000
        raise UserError(f"several GPUs need NCCL, which is not installed. HINT: pip install nvidia-nccl-cu{major}.")
    return cupy, nccl


class Mpi:
    """Sums and gathers of NumPy arrays. wait() returns when all that was started has finished.

    The sum has the same bits on every rank.
    """

    def __init__(self, rank: int, size: int):
        self.mpi = import_mpi(size)
        self.comm, self.rank, self.size = self.mpi.COMM_WORLD, rank, size
        self.requests: list[Any] = []

    def _start(self, requests: list[Any]) -> None:
        self.requests += requests
        self.mpi.Request.Testall(self.requests)  # MPI moves data while it is called

    def all_reduce(self, arrays: Sequence[Array]) -> None:
        """Each array = its sum over the ranks."""
        self._start([self.comm.Iallreduce(self.mpi.IN_PLACE, array) for array in arrays])

    def reduce_scatter(self, shares: Sequence[Array], arrays: Sequence[Array]) -> None:
        """share (n/P,) = this rank's part of the sum of array (n,): the r-th of P equal parts on rank r."""
        self._start([self.comm.Ireduce_scatter_block(a, s) for s, a in zip(shares, arrays, strict=True)])

    def all_gather(self, arrays: Sequence[Array], shares: Sequence[Array]) -> None:
        """array (n,) = the shares (n/P,) of all ranks, in order."""
        self._start([self.comm.Iallgather(s, a) for a, s in zip(arrays, shares, strict=True)])

    def wait(self) -> None:
        """What follows reads what was started before."""
        self.mpi.Request.Waitall(self.requests)
        self.requests = []

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum over the ranks of each number, as floats, on every rank."""
        import numpy as np

        array = np.array(values, np.float64)
        self.comm.Allreduce(self.mpi.IN_PLACE, array)
        return array.tolist()

    def close(self) -> None:
        """Nothing: mpi4py ends MPI with the interpreter."""


class Nccl:
    """The same for arrays on GPUs, one for each rank. Calls queue work on a stream of their own and return at once.

    That stream first waits for the work queued before the call on the current one; wait() makes the current stream wait
    for it in turn. With both the calls can be captured into a CUDA graph.
    """

    def __init__(self, rank: int, size: int, unique_id: bytes | None = None):
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
    def _queued(self) -> Iterator[Any]:
        self.before.record(self.cuda.get_current_stream())
        self.stream.wait_event(self.before)
        self.nccl.groupStart()  # one launch for all calls of a group
        try:
            yield self.comm
        finally:
            self.nccl.groupEnd()

    def all_reduce(self, arrays: Sequence[Array]) -> None:
        """Each array = its sum over the ranks."""
        with self._queued() as comm:
            for array in arrays:
                at, kind = array.data.ptr, NCCL_TYPES[array.dtype.name]
                comm.allReduce(at, at, array.size, kind, NCCL_SUM, self.stream.ptr)

    def reduce_scatter(self, shares: Sequence[Array], arrays: Sequence[Array]) -> None:
        """share (n/P,) = this rank's part of the sum of array (n,): the r-th of P equal parts on rank r."""
        with self._queued() as comm:
            for share, array in zip(shares, arrays, strict=True):
                assert share.size * self.size == array.size and share.dtype == array.dtype, (share.shape, array.shape)
                kind = NCCL_TYPES[array.dtype.name]
                comm.reduceScatter(array.data.ptr, share.data.ptr, share.size, kind, NCCL_SUM, self.stream.ptr)

    def all_gather(self, arrays: Sequence[Array], shares: Sequence[Array]) -> None:
        """array (n,) = the shares (n/P,) of all ranks, in order."""
        with self._queued() as comm:
            for array, share in zip(arrays, shares, strict=True):
                assert share.size * self.size == array.size and share.dtype == array.dtype, (share.shape, array.shape)
                kind = NCCL_TYPES[array.dtype.name]
                comm.allGather(share.data.ptr, array.data.ptr, share.size, kind, self.stream.ptr)

    def wait(self) -> None:
        """What is queued from now on reads what was queued before."""
        self.after.record(self.stream)
        self.cuda.get_current_stream().wait_event(self.after)

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum over the ranks of each number (at most 16), as floats, on every rank."""
        import numpy as np

        part = self.scalars[: len(values)]
        part.set(np.array(values, np.float64))
        self.all_reduce([part])
        self.wait()
        return part.get().tolist()

    def close(self) -> None:
        """Give NCCL's memory back."""
        self.comm.destroy()


Communicator = Mpi | Nccl


def total(communicator: Communicator | None, value: float) -> float:
    """The sum of a number over the ranks; the number itself for a process on its own, which has no communicator."""
    return communicator.sums([value])[0] if communicator else value
