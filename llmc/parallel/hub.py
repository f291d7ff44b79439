"""The hub: how the processes of a run find each other, compare notes, and learn which of them died.

A small process beside rank 0 to which every rank has a TCP connection. It carries what is not an array: flags to
compare, barriers, errors, and a sign of life every two seconds. It is a process of its own because a launcher may kill
all ranks within a millisecond of the first death: the hub is left to say which one it was.
"""

import contextlib
import json
import os
import queue
import selectors
import socket
import sys
import threading
import time

from llmc.errors import UserError

BEAT = 2.0  # seconds between signs of life
SILENCE = 20.0  # seconds without one after which a rank counts as dead
CONNECT = 120.0  # seconds for all ranks to find the hub
REPORT = 5.0  # seconds for the other ranks to report an error too
LEAVE = 5.0  # seconds for mpirun to end the ranks
AGAIN = "-y 1 continues from the last checkpoint in -o, with any number of processes"


def hub(fd, size, token, connect=CONNECT, silence=SILENCE):
    """Serve the `size` ranks on the listening socket fd until all have said bye or one has failed.

    A message is a JSON object in a line. From a rank: its rank, size and token; value, error, beat, bye. To the ranks:
    welcome; values, once every rank has sent its own; stop, an exit code; beat. What has another token is dropped. A
    token alone is answered too: is_alive asks.
    stdin is a pipe that nothing is written to: its end tells that rank 0 is gone before it could connect.
    """
    listener = socket.socket(fileno=fd)
    ranks, unread, heard, values, errors, left = {}, {}, {}, {}, {}, set()  # ranks: of each socket, None before hello
    start = beat = time.monotonic()

    def send(message, sockets=None):
        for sock in sockets or [s for s, r in ranks.items() if r is not None and r not in left]:
            with contextlib.suppress(OSError):
                sock.sendall(json.dumps(message).encode() + b"\n")

    def stop(texts, code):
        for text in [texts] if isinstance(texts, str) else texts[:8]:
            with contextlib.suppress(OSError):
                print(f"llmc.train: error: {text}", file=sys.stderr, flush=True)
        send({"stop": code})
        sys.exit(0)

    def receive(sock, message):
        rank = ranks[sock]
        if rank is None:
            if not isinstance(message, dict) or message.get("token") != token:
                raise OSError("not of this run")
            if "rank" not in message:
                send({"welcome": None}, [sock])
            rank, theirs = message["rank"], message["size"]
            if rank in ranks.values():
                stop(f"two processes say that they are rank {rank}. HINT: give each its own -pr", 2)
            if theirs != size or not 0 <= rank < size:
                stop(f"rank {rank} was started as one of {theirs} processes, rank 0 as one of {size}", 2)
            ranks[sock] = rank
            send({"welcome": rank}, [sock])
        elif "value" in message:
            values[rank] = message["value"]
            if len(values) == size:
                everything = [values[r] for r in range(size)]
                values.clear()
                send({"values": everything})
        elif "error" in message:
            errors.setdefault(rank, (time.monotonic(), message["error"], message["code"]))
        elif "bye" in message:
            left.add(rank)

    ready = selectors.DefaultSelector()  # epoll: of several that have died since the last look, the first comes first
    ready.register(listener, selectors.EVENT_READ)
    ready.register(sys.stdin, selectors.EVENT_READ)
    while len(left) < size:
        for sock in [key.fileobj for key, _ in ready.select(0.2)]:
            if sock is sys.stdin:
                ready.unregister(sock)
                if 0 not in ranks.values():
                    return
                continue
            if sock is listener:
                sock = listener.accept()[0]
                sock.settimeout(silence)
                ready.register(sock, selectors.EVENT_READ)
                ranks[sock], unread[sock], heard[sock] = None, b"", time.monotonic()
                continue
            try:
                data = sock.recv(1 << 16)
                *lines, unread[sock] = (unread[sock] + data).split(b"\n")
                heard[sock] = time.monotonic()
                for line in lines:
                    receive(sock, json.loads(line))
                if not data:
                    raise OSError("closed")
            except (OSError, ValueError, KeyError):
                rank = ranks.pop(sock)
                ready.unregister(sock)
                sock.close()
                if rank is not None and rank not in left and rank not in errors:
                    stop(f"rank {rank} died, the other ranks stop. HINT: {AGAIN}", 1)
        now = time.monotonic()
        busy = size - len(errors.keys() | values.keys())  # ranks that may be about to report an error too
        if errors and (not busy or now - min(errors.values())[0] > REPORT):
            texts = {}  # what all say is said once
            for rank in sorted(errors):
                texts.setdefault(errors[rank][1], f"rank {rank}: " * (rank > 0))
            stop([prefix + text for text, prefix in texts.items()], errors[min(errors)][2])
        missing = sorted(set(range(size)) - set(ranks.values()) - left)
        if missing and now - start > connect:
            who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:8]))}"
            stop(f"{who} of {size} did not connect within {connect:.0f} s. HINT: start {size} processes, see -pn", 2)
        for sock, rank in ranks.items():
            if rank is not None and rank not in left and now - heard[sock] > silence:
                stop(f"rank {rank} has not been heard of for {silence:.0f} s, the other ranks stop. HINT: {AGAIN}", 1)
        if now - beat > BEAT:
            beat = now
            send({"beat": 1})


def start_hub(size, token, host="", port=0, connect=CONNECT, silence=SILENCE):
    """Start the hub beside this process, rank 0; returns its port. It outlives this process only to name the dead."""
    import subprocess

    try:
        listener = socket.create_server((host, port), backlog=size)
    except OSError as error:
        raise UserError(f"port {port} of this machine: {error.strerror}. HINT: is another run using it?") from error
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    code = "import sys; sys.path.insert(0, sys.argv[1]); from llmc.parallel.hub import hub; "
    code += "hub(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5]), float(sys.argv[6]))"
    argv = [here, listener.fileno(), size, token, connect, silence]
    start_hub.process = subprocess.Popen(  # kept: it holds our end of the pipe
        [sys.executable, "-I", "-S", "-c", code, *map(str, argv)],
        pass_fds=[listener.fileno()], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    port = listener.getsockname()[1]
    listener.close()
    return port


class Ranks:
    """This process among the others, over its connection to the hub. rank, size, local_rank.

    A thread answers the hub meanwhile: when another rank fails, it ends this process, whatever it is waiting for.
    """

    def __init__(self, who, place, connect=CONNECT, silence=SILENCE):
        self.rank, self.size, self.local_rank, *_ = who
        self.communicator = None  # an Mpi or Nccl, which launch.py makes
        self.replies, self.lock, self.closed = queue.SimpleQueue(), threading.Lock(), threading.Event()
        self.sock, self.lines = find_hub(who.rank, who.size, place, connect, silence)
        self.sock.settimeout(silence)
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True, name="llmc.ranks").start()
        self.barrier()
        if place.method == "fs" and who.rank == 0:
            os.remove(place.path)

    def _send(self, message):
        with self.lock:
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def _beat(self):
        while not self.closed.wait(BEAT):
            with contextlib.suppress(OSError):  # _listen will see it
                self._send({"beat": 1})

    def _listen(self):
        with contextlib.suppress(OSError, ValueError):
            for message in map(json.loads, self.lines):
                if "values" in message:
                    self.replies.put(message["values"])
                elif "stop" in message:
                    leave(message["stop"])
        if not self.closed.is_set():
            text = f"rank {self.rank} lost its connection to the machine of rank 0"
            print(f"llmc.train: error: {text}. HINT: {AGAIN}", file=sys.stderr, flush=True)
            leave(1)

    def exchange(self, value):
        """[the value of every rank], which JSON must be able to hold. All ranks call it; it waits for them."""
        self._send({"value": value})
        return self.replies.get()

    def barrier(self):
        """Returns when every rank has called it."""
        self.exchange(None)

    def fail(self, text, code):
        """End this process and the others; the hub prints the text, once if it is the same on all ranks."""
        with contextlib.suppress(OSError):
            self._send({"error": text, "code": code})
            time.sleep(2 * REPORT)  # the hub's answer ends this process
        leave(code)

    def close(self):
        """The end of a run that went well, on all ranks."""
        self.barrier()
        if self.communicator:
            self.communicator.close()
        self.closed.set()
        with contextlib.suppress(OSError):
            self._send({"bye": 1})


def leave(code):
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


def find_hub(rank, size, place, connect=CONNECT, silence=SILENCE):
    """(socket to the hub, the lines it sends). On rank 0 the hub is started first. place: where they meet.

    A file that an earlier run left leads to a closed port, or to a hub that wants another token: it is read again
    until rank 0 has replaced it.
    """
    import secrets

    token, hosts, port = "", [], 0
    if place.method == "tcp":
        hosts, port = [place.host], place.port
    if place.method == "mpi":
        from llmc.parallel.communicators import import_mpi

        comm = import_mpi(size).COMM_WORLD
    if rank == 0:
        token = "" if place.method == "tcp" else secrets.token_hex(8)
        hosts, port = addresses(), start_hub(size, token, port=port, connect=connect, silence=silence)
    if place.method == "mpi":
        token, hosts, port = comm.bcast((token, hosts, port))
    elif place.method == "fs" and rank == 0:
        write_place(place.path, token, hosts, port)
    deadline = time.monotonic() + connect
    while True:
        if place.method == "fs" and rank:
            token, hosts, port = read_place(place.path)
        for host in hosts:
            with contextlib.suppress(OSError, ValueError):
                sock = socket.create_connection((host, port), timeout=10)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.sendall(json.dumps(dict(rank=rank, size=size, token=token)).encode() + b"\n")
                lines = sock.makefile("rb")
                answer = json.loads(lines.readline())  # nothing, if this is the hub of another run
                if "stop" in answer:
                    leave(answer["stop"])
                return sock, lines
        if time.monotonic() > deadline:
            at = place.path if place.method == "fs" else f"{hosts[0]} port {port}"
            raise UserError(f"rank {rank} did not find rank 0 within {connect:.0f} s: {at}. HINT: is rank 0 running?")
        time.sleep(0.2)


def write_place(path, token, hosts, port):
    """Tell the others where the hub is, in a file that all machines see. One that an earlier run left is replaced.

    Errors: UserError if the file is something else, or of a run that goes on: two would take each other's ranks.
    """
    while True:
        with contextlib.suppress(FileExistsError), open(path, "x") as file:  # of two runs one succeeds
            file.write(json.dumps({"llmc": [token, hosts, port]}))
            return
        theirs = read_place(path)
        if is_alive(*theirs):
            raise UserError(f"{path} is of another run that starts now. HINT: give each run its own folder -pf.")
        if theirs[0] == "" and os.path.exists(path):
            raise UserError(f"{path} is not a file of a run. HINT: -pf needs a folder for this alone.")
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def is_alive(token, hosts, port):
    """Whether a hub that knows this token listens there."""
    for host in hosts:
        with contextlib.suppress(OSError, ValueError), socket.create_connection((host, port), timeout=5) as sock:
            sock.sendall(json.dumps(dict(token=token)).encode() + b"\n")
            if "welcome" in json.loads(sock.makefile("rb").readline()):
                return True
    return False


def read_place(path):
    """What write_place wrote, or nothing: ("", [], 0)."""
    try:
        with open(path, "rb") as file:
            token, hosts, port = json.load(file)["llmc"]
        return str(token), list(hosts), int(port)
    except (OSError, ValueError, KeyError, TypeError):
        return "", [], 0


def addresses():
    """Names and addresses under which other machines may reach this one; this machine's own first."""
    found = ["127.0.0.1"]
    with contextlib.suppress(OSError):
        probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only looks up the way out
        found.append(probe.getsockname()[0])
        probe.close()
    return [*found, socket.gethostname()]
