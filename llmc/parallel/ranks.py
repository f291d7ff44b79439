"""A rank's side of the hub (hub.py): how it finds the hub, compares notes with the other ranks, and hears of a death.

Where the hub listens and what its token is reaches the ranks by -pi:

mpi     MPI broadcasts both. The token is random.
fs      Both are in a file of the folder -pf, which rank 0 makes anew, readable by its user alone, and removes once all
        ranks are there. The token is random.
tcp     The place is in the flags or the launcher's variables, and so is what the token is made of: the port, and the
        launcher's name of the run (Slurm's job and step, torchrun's run id). That keeps other runs and port scanners
        out, not somebody who knows the run: fs and mpi do.

The hub listens on 127.0.0.1 alone where all ranks are on one machine: MPI compares the machines, the other launchers
tell, -ps localhost says so too. Else it listens on the addresses that the other machines are told, until all are there.
"""

import contextlib
import hashlib
import ipaddress
import os
import queue
import secrets
import socket
import subprocess
import sys
import threading
import time
from typing import Any, NoReturn

from llmc.errors import UserError
from llmc.parallel.communicators import Communicator, import_mpi
from llmc.parallel.hub import (
    AGAIN,
    BEAT,
    CONNECT,
    LONGEST,
    LONGEST_HELLO,
    REPORT,
    SILENCE,
    pack,
    proof,
    proves,
    start_hub,
    unpack,
)
from llmc.parallel.world import Place, World

LEAVE = 5.0  # seconds for mpirun to end the ranks
GREETING = 5.0  # seconds for a hub to answer
LONGEST_FILE = 1 << 16  # bytes of what write_place writes
Places = list[tuple[str, int]]  # [(address, port)]


class Ranks:
    """This process among the others, over its connection to the hub. rank, size, local_rank: as in World.

    A thread answers the hub meanwhile: when another rank fails, it ends this process, whatever it is waiting for.
    connect, silence: seconds, of rank 0 for the hub as well.
    """

    def __init__(self, who: World, place: Place, connect: float = CONNECT, silence: float = SILENCE):
        self.rank, self.size, self.local_rank = who.rank, who.size, who.local_rank
        self.communicator: Communicator | None = None  # what moves arrays; launch.py makes it
        self.replies: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self.lock, self.closed = threading.Lock(), threading.Event()
        token, places, self.hub = open_hub(who, place, connect, silence)
        try:
            self.sock = find_hub(who, place, token, places, connect)
            self.sock.settimeout(silence)
            for work in (self._listen, self._beat):
                threading.Thread(target=work, daemon=True, name="llmc.ranks").start()
            self.barrier()
        finally:
            if place.method == "fs" and who.rank == 0:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(place.path)

    def _send(self, message: dict[str, Any]) -> None:
        line = pack(message)
        assert len(line) <= LONGEST, (len(line), LONGEST)
        with self.lock:
            self.sock.sendall(line)

    def _beat(self) -> None:
        while not self.closed.wait(BEAT):
            with contextlib.suppress(OSError):  # _listen will see it
                self._send({"beat": 1})

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError), self.sock.makefile("rb") as lines:
            while line := lines.readline(LONGEST * self.size):
                message = unpack(line)
                if "values" in message:
                    self.replies.put(message["values"])
                elif "stop" in message:
                    leave(message["stop"])
        if not self.closed.is_set():
            text = f"rank {self.rank} lost its connection to the machine of rank 0"
            print(f"llmc.train: error: {text}. HINT: {AGAIN}", file=sys.stderr, flush=True)
            leave(1)

    def exchange(self, value: Any) -> list[Any]:
        """[the value of every rank], which JSON must be able to hold. All ranks call it; it waits for them."""
        self._send({"value": value})
        return self.replies.get()

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.exchange(None)

    def fail(self, text: str, code: int) -> NoReturn:
        """End this process and the others; the hub prints the text, once if it is the same on all ranks."""
        with contextlib.suppress(OSError):
            self._send({"error": text[:4000], "code": code})
            time.sleep(2 * REPORT)  # the hub's answer ends this process
        leave(code)

    def close(self) -> None:
        """The end of a run that went well, on all ranks."""
        self.barrier()
        if self.communicator:
            self.communicator.close()
        self.closed.set()
        with contextlib.suppress(OSError):
            self._send({"bye": 1})


def leave(code: int) -> NoReturn:
    """End this process now: its main thread may be waiting in MPI or NCCL for a rank that is no more.

    Where mpirun waits for the ranks, rank 0 has it end them all with this code. Were they to leave by themselves, it
    would kill those that come second, and that would be the exit code of the run. srun waits for all of them.
    """
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    MPI = getattr(sys.modules.get("mpi4py"), "MPI", None)
    if MPI and MPI.Is_initialized() and not MPI.Is_finalized():
        threading.Timer(LEAVE, os._exit, [code]).start()
        if "PMI_JOBID" in os.environ:  # srun --mpi=pmi2
            os._exit(code)
        if MPI.COMM_WORLD.rank == 0:
            time.sleep(0.2)  # mpirun may end before it has passed on what was printed
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the hub has said why, MPI need not say that
            MPI.COMM_WORLD.Abort(code)
        time.sleep(LEAVE)
    os._exit(code)


# ----------------------------------------------------------------------------------------------------------------------
# meeting


def open_hub(
    who: World, place: Place, connect: float, silence: float
) -> "tuple[str, Places, subprocess.Popen[bytes] | None]":
    """(token, where the hub is, its process on rank 0, which starts it). With -pi fs the others read the first two."""
    comm = import_mpi(who.size).COMM_WORLD if place.method == "mpi" else None
    machines = comm.allgather(machine()) if comm else []
    here = who.one_machine or (comm is not None and machines.count(machines[0]) == who.size)
    token = secrets.token_hex(16) if who.rank == 0 else ""
    if place.method == "tcp":
        token = hashlib.sha256(f"llmc {place.run} {place.port}".encode()).hexdigest()
    process = None
    places: Places = [("127.0.0.1" if here else place.host, place.port)]
    if who.rank == 0:
        listen = ["127.0.0.1"] if here else addresses(place.host)
        found, process = start_hub(who.size, token, [(address, place.port) for address in listen], connect, silence)
        named = [[(address, port)] if address else every_address(port) for address, port in found]
        places = [one for several in named for one in several]
    if comm:
        token, places = comm.bcast((token, places))
    elif place.method == "fs" and who.rank == 0:
        write_place(place.path, token, places)
    return token, places, process


def find_hub(who: World, place: Place, token: str, places: Places, connect: float = CONNECT) -> socket.socket:
    """The connection to the hub, which has welcomed this rank. Errors: UserError where there is none after `connect` s.

    A file that an earlier run left leads to a closed port, or to a hub that has another token: it is read again until
    rank 0 has replaced it.
    """
    deadline = time.monotonic() + connect
    while True:
        if place.method == "fs" and who.rank:
            token, places = read_place(place.path)
        for at in places:
            with contextlib.suppress(OSError, ValueError):
                sock = greet(at, token, who.rank, who.size)
                if isinstance(sock, int):
                    leave(sock)
                return sock
        if time.monotonic() > deadline:
            where = " or ".join(f"{host} port {port}" for host, port in places)
            where = place.path if place.method == "fs" else where
            text = f"rank {who.rank} did not find rank 0 within {connect:.0f} s: {where}"
            raise UserError(f"{text}. HINT: is rank 0 running?")
        time.sleep(0.2)


def greet(at: tuple[str, int], token: str, rank: int | None, size: int = 0) -> socket.socket | int:
    """A connection on which a hub with this token has welcomed this rank, or the exit code with which it stops it.

    Errors: OSError, ValueError where no hub or one of another run answers.
    """
    sock, nonce = socket.create_connection(at, timeout=GREETING), secrets.token_hex(16)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        about = dict(rank=rank, size=size, nonce=nonce)
        sock.sendall(pack({**about, "proof": proof(token, "rank", *about.values())}))
        line, deadline = b"", time.monotonic() + GREETING
        while not line.endswith(b"\n"):  # byte by byte: what follows is another message
            byte = sock.recv(1)
            if not byte or len(line) == LONGEST_HELLO or time.monotonic() > deadline:
                raise OSError("no hub")
            line += byte
        answer = unpack(line)
        if not proves(answer, token, "hub", nonce):
            raise ValueError("the hub of another run")
        if "stop" in answer:
            sock.close()
            return answer["stop"]
        return sock
    except BaseException:
        sock.close()
        raise


def write_place(path: str, token: str, places: Places) -> None:
    """Tell the others where the hub is, in a file that all machines see. One that an earlier run left is replaced.

    Errors: UserError if the file is something else, or of a run that goes on: two would take each other's ranks.
    """
    for _ in range(20):
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)  # of two runs one succeeds
            with open(fd, "wb") as file:
                file.write(pack({"llmc": [token, places]}))
            return
        except FileExistsError:
            theirs = read_place(path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}. HINT: -pf names a folder that all processes share.") from error
        if is_alive(*theirs):
            raise UserError(f"{path} is of another run that starts now. HINT: give each run its own folder -pf.")
        if theirs[0]:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        else:  # being written, or not ours
            time.sleep(0.1)
    raise UserError(f"{path} is not a file of a run. HINT: -pf needs a folder for this alone.")


def is_alive(token: str, places: Places) -> bool:
    """Whether a hub that knows this token listens at one of the places."""
    for at in places:
        with contextlib.suppress(OSError, ValueError):
            sock = greet(at, token, None)
            if not isinstance(sock, int):
                sock.close()
            return True
    return False


def read_place(path: str) -> tuple[str, Places]:
    """What write_place wrote, or nothing: ("", [])."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a FIFO has nothing to read
        with open(fd, "rb") as file:
            token, places = unpack(file.read(LONGEST_FILE))["llmc"]
        if not (isinstance(token, str) and all(0 < port < 65536 for _, port in places)):
            return "", []
        return token, [(str(host), int(port)) for host, port in places]
    except (OSError, ValueError, KeyError, TypeError):
        return "", []


# ----------------------------------------------------------------------------------------------------------------------
# addresses


def addresses(host: str) -> list[str]:
    """This machine's addresses under which the others may reach it, "" (every one) if none is known.

    host: the name that the others were given, as -ps, or "": they are told the addresses, the machine's own first.
    """
    try:
        named = [str(info[4][0]) for info in socket.getaddrinfo(host or socket.gethostname(), None)]
    except OSError:
        named = []
    found = [address for address in (named if host else ["127.0.0.1", *named]) if is_own(address)]
    if host and found and is_loopback(host):
        return list(dict.fromkeys(found))
    if not host or all(
        map(is_loopback, found)
    ):  # elsewhere the name leads to another address than here, or to a router
        found += [address for address in way_out() if is_own(address)]
    return [""] if all(map(is_loopback, found)) else list(dict.fromkeys(found))


def every_address(port: int) -> Places:
    """What the ranks are told of a hub that listens on every address."""
    return [("127.0.0.1", port), (socket.gethostname(), port)]


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's for itself."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def is_own(address: str) -> bool:
    """Whether a socket of this machine can have the address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return True
    return False


def way_out() -> list[str]:
    """The address that this machine has towards others."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only looks up the way
        return [probe.getsockname()[0]]
    return []


def machine() -> list[str]:
    """What two processes have in common if 127.0.0.1 is the same place to them: machine, and network namespace."""
    about = [socket.gethostname()]
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            about.append(file.read().strip())
        about.append(os.readlink("/proc/self/ns/net"))
    return about
