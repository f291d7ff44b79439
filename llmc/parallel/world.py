"""Who is who: the rank of this process among the processes of a run, and where they meet.

A launcher (mpirun, torchrun, srun) tells in the environment; without one the flags -pn and -pr do. Nothing here talks
to another process: hub.py does, communicators.py moves arrays, launch.py is what a command calls.

Source: llm.c llmc/zero.cuh multi_gpu_config_init.
"""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from llmc.errors import UserError

PORT = 12345  # of -pi tcp, as in llm.c
GPUS = 8  # of a machine, where neither a launcher nor -pg tells

# rank, number of ranks, rank and number of ranks on this machine
MPI_VARIABLES = [
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
]
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SRUN_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "")


class World(NamedTuple):
    """This process among the `size` processes of its run."""

    rank: int
    size: int
    local_rank: int  # among the processes of this machine
    launcher: str | None  # "mpi", "torchrun", "srun" or None
    one_machine: bool = False  # the launcher says that all ranks are on this machine


class Place(NamedTuple):
    """Where the ranks of a run meet. method: "mpi"; "tcp", at a host and port; or "fs", through a file."""

    method: str
    host: str = ""
    port: int = 0
    path: str = ""
    run: str = ""  # "tcp": the launcher's name of the run, of which the hub's token is made


def world(
    process_count: int | None = None,
    process_rank: int | None = None,
    gpus_per_node: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> World:
    """The World of this process: from what a launcher put into the environment, else from -pn and -pr.

    The local rank is rank mod -pg where -pg is given or no launcher tells it. srun may start the daemons of mpirun and
    not the ranks: MPI's variables go before its own. Errors: UserError for values that are impossible or contradict
    each other.
    """
    found = {}
    for launcher, names in [*(("mpi", n) for n in MPI_VARIABLES), ("torchrun", TORCHRUN_VARIABLES)]:
        if launcher not in found and names[0] in environ and names[1] in environ:
            found[launcher] = names
    if not found and SRUN_VARIABLES[0] in environ and SRUN_VARIABLES[1] in environ:
        found["srun"] = SRUN_VARIABLES
    told = [told_by(launcher, names, environ) for launcher, names in found.items()]
    for (rank, size, *_), names in zip(told, found.values(), strict=True):
        if process_count not in (None, size):
            raise UserError(f"-pn {process_count} contradicts {names[1]}={size}. HINT: leave -pn out.")
        if process_rank not in (None, rank):
            raise UserError(f"-pr {process_rank} contradicts {names[0]}={rank}. HINT: leave -pr out.")
    if len(told) == 2 and told[0][:2] != told[1][:2]:
        one, other = (f"{n[0]}={w.rank}, {n[1]}={w.size}" for w, n in zip(told, found.values(), strict=True))
        raise UserError(f"{one} contradicts {other}. HINT: one launcher only; unset what another one left.")
    if not told:
        if process_rank is not None and process_rank >= (process_count or 1):
            alone = f"with {process_count or 1} processes (-pn) the ranks are 0 to {(process_count or 1) - 1}"
            raise UserError(f"-pr {process_rank}: {alone}. HINT: give -pn, or start with mpirun, which tells both.")
        if process_rank is None and (process_count or 1) > 1:
            text = f"-pn {process_count} needs -pr, the rank of this process"
            raise UserError(f"{text}. HINT: mpirun -n {process_count} tells both.")
        told = [World(process_rank or 0, process_count or 1, -1, None)]
    if told[0].local_rank < 0 or gpus_per_node is not None:
        return told[0]._replace(local_rank=told[0].rank % (gpus_per_node or GPUS))
    return told[0]


def told_by(launcher: str, names: tuple[str, str, str, str], environ: Mapping[str, str]) -> World:
    """What one launcher's variables say; the local rank is -1 where none of them tells it."""
    try:
        rank, size = int(environ[names[0]]), int(environ[names[1]])
    except ValueError:
        rank, size = -1, -1
    if not 0 <= rank < size:
        text = f"{names[0]}={environ[names[0]]} with {names[1]}={environ[names[1]]}: no such rank"
        raise UserError(f"{text}. HINT: unset them, or start all processes with one launcher.")
    local, one_machine = environ.get(names[2], ""), environ.get(names[3]) == str(size)
    if launcher == "srun" or environ.get("SLURM_PROCID") == str(rank):  # the latter: srun --mpi=pmi2
        local = local or environ.get("SLURM_LOCALID", "")
        one_machine = one_machine or environ.get("SLURM_STEP_NUM_NODES") == "1"
    return World(rank, size, int(local) if local.isdecimal() else -1, launcher, one_machine)


def meeting_place(
    who: World,
    method: str | None = None,
    server_ip: str = "",
    fs_path: str = "",
    environ: Mapping[str, str] = os.environ,
) -> Place | None:
    """Where the ranks meet, None for a process on its own: -pi decides, else the launcher, else -ps or -pf.

    torchrun keeps MASTER_PORT for itself, so the hub has the port after it. Errors: UserError where nothing tells.
    """
    if who.size == 1:
        return None
    method = method or {"mpi": "mpi", "torchrun": "tcp", "srun": "tcp"}.get(who.launcher or "")
    method = method or ("tcp" if server_ip else "fs" if fs_path else None)
    job = environ.get("SLURM_JOB_ID", "run")
    if who.launcher == "srun":  # else the ranks may have been started in steps of their own
        job += f".{environ.get('SLURM_STEP_ID', 0)}"
    if method == "fs":
        return Place("fs", path=os.path.join(fs_path, f"llmc-{job}-{who.size}.json"))
    run = environ.get("TORCHELASTIC_RUN_ID", "run") if who.launcher == "torchrun" else job
    if method == "tcp" and server_ip:
        return Place("tcp", server_ip, PORT, run=run)
    if method == "tcp" and who.launcher == "torchrun" and "MASTER_ADDR" in environ:
        return Place("tcp", environ["MASTER_ADDR"], number(environ, "MASTER_PORT", PORT - 1) + 1, run=run)
    if method == "tcp" and who.launcher == "srun":
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "localhost")
        return Place("tcp", first_host(nodes), 20000 + number(environ, "SLURM_JOB_ID", 0) % 20000, run=run)
    if method == "mpi" and who.launcher == "mpi":
        return Place("mpi")
    if method == "mpi":
        raise UserError("-pi mpi: this process was not started by mpirun. HINT: mpirun -n P, or -pi tcp, or -pi fs.")
    text = f"rank {who.rank} of {who.size} cannot find the others"
    raise UserError(f"{text}. HINT: start with mpirun, torchrun or srun, or give -pi tcp -ps HOST or -pi fs -pf DIR.")


def first_host(nodelist: str) -> str:
    """The first machine of a Slurm list: node[03-05,7],other -> node03."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodelist)
    return match[1] + (match[2] or "") if match else nodelist


def number(environ: Mapping[str, str], name: str, default: int) -> int:
    """A variable that a launcher sets to a number. Errors: UserError for anything else."""
    value = environ.get(name, str(default))
    if not (value.isdecimal() and len(value) < 19):
        raise UserError(
            f"{name}={value[:40]} is not a number. HINT: unset it, or start all processes with one launcher."
        )
    return int(value)
