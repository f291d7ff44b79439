"""The hub: a small process beside rank 0 that tells the ranks of a run which of them died, and what each has to say.

Every rank has a TCP connection to it. It carries what is not an array: flags to compare, barriers, errors, and a sign
of life every two seconds. It is a process of its own because a launcher may kill all ranks within a millisecond of the
first death: the hub is left to say which one it was. The ranks' side of it is ranks.py.

A message is a line with one JSON object. Each side first shows that it knows the run's token, without sending it:
    rank: {"rank": r, "size": P, "nonce": n, "proof": HMAC(token, "rank" r P n)}
    hub:  {"welcome": r, "proof": HMAC(token, "hub" n)}
From a rank then: value, error, beat, bye. To the ranks: values, once every rank has sent its own; stop, an exit code;
beat. A hello with rank null asks whether the hub lives, and gets its welcome.

What strangers may do: connect. The hub answers nothing to who does not know the token, reads 1 KiB of it, waits 5 s for
it, and keeps 64 such connections, of which it closes the oldest where files are scarce. Once all ranks are there it
stops listening.
"""

import contextlib
import errno
import hashlib
import hmac
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from typing import Any, NoReturn, cast

from llmc.errors import UserError

BEAT = 2.0  # seconds between signs of life
SILENCE = 20.0  # seconds without one after which a rank counts as dead
CONNECT = 120.0  # seconds for all ranks to find the hub
REPORT = 5.0  # seconds for the other ranks to report an error too
HELLO = 5.0  # seconds for a connection to say who it is
LONGEST_HELLO = 1 << 10  # bytes of that
LONGEST = 1 << 20  # bytes of a rank's message
STRANGERS = 64  # connections that have not said who they are
AGAIN = "-y 1 continues from the last checkpoint in -o, with any number of processes"

# ----------------------------------------------------------------------------------------------------------------------
# messages


def pack(message: dict[str, Any]) -> bytes:
    """The line that carries a message."""
    return json.dumps(message).encode() + b"\n"


def unpack(line: bytes) -> dict[str, Any]:
    """The message in a line. Errors: ValueError for anything but a JSON object, however it is nested."""
    try:
        message = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def proof(token: str, *about: Any) -> str:
    """What only who knows the token can say about this."""
    return hmac.new(token.encode(), json.dumps(about).encode(), hashlib.sha256).hexdigest()


def proves(message: dict[str, Any], token: str, *about: Any) -> bool:
    """Whether the message's proof is that of who knows the token."""
    theirs = message.get("proof")
    return isinstance(theirs, str) and hmac.compare_digest(theirs.encode(), proof(token, *about).encode())


# ----------------------------------------------------------------------------------------------------------------------
# the process


class Connection:
    """A socket, the rank at its other end (None before its hello), what it has said of a line, and when."""

    def __init__(self, sock: socket.socket):
        self.sock, self.unread, self.heard = sock, b"", time.monotonic()
        self.rank: int | None = None


class Hub:
    """Serves the `size` ranks that connect to the listeners, until all have said bye or one has failed.

    connect, silence: seconds, as CONNECT and SILENCE.
    """

    def __init__(self, listeners: list[socket.socket], size: int, token: str, connect: float, silence: float):
        self.listeners, self.size, self.token, self.connect, self.silence = listeners, size, token, connect, silence
        self.strangers: list[Connection] = []  # the oldest first
        self.ranks: dict[int, Connection] = {}
        self.left: set[int] = set()  # ranks that have said bye
        self.values: dict[int, Any] = {}  # of the exchange that is under way
        self.errors: dict[int, tuple[float, str, int]] = {}  # rank: when, text, exit code
        self.start = self.beat = time.monotonic()
        self.ready = selectors.DefaultSelector()  # epoll: of several deaths since the last look, the first comes first
        for listener in listeners:
            listener.setblocking(False)
            self.ready.register(listener, selectors.EVENT_READ, "listener")

    def serve(self) -> None:
        """The loop. stdin is a pipe: its end tells that rank 0 is gone before it could connect."""
        self.ready.register(sys.stdin, selectors.EVENT_READ, "stdin")
        while len(self.left) < self.size:
            for key, _ in self.ready.select(0.2):
                if key.data == "listener":
                    self.accept(cast(socket.socket, key.fileobj))
                elif key.data == "stdin":
                    self.ready.unregister(sys.stdin)
                    if 0 not in self.ranks and 0 not in self.left:
                        return
                elif key.data.sock.fileno() >= 0:  # not closed meanwhile
                    self.read(key.data)
            self.look(time.monotonic())

    def accept(self, listener: socket.socket) -> None:
        """Take a connection in. Where no file is left for it, a stranger's is closed, and it is taken next time."""
        try:
            sock = listener.accept()[0]
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.drop(self.strangers[0]) if self.strangers else time.sleep(0.05)
            return
        sock.settimeout(self.silence)
        connection = Connection(sock)
        self.strangers.append(connection)
        self.ready.register(sock, selectors.EVENT_READ, connection)
        if len(self.strangers) > STRANGERS:
            self.drop(self.strangers[0])

    def drop(self, connection: Connection) -> None:
        """Close a connection; if a rank's, that rank has died, and the run ends."""
        self.ready.unregister(connection.sock)
        connection.sock.close()
        rank = connection.rank
        if rank is None:
            self.strangers.remove(connection)
            return
        del self.ranks[rank]
        if rank not in self.left and rank not in self.errors:
            self.stop([f"rank {rank} died, the other ranks stop. HINT: {AGAIN}"], 1)

    def read(self, connection: Connection) -> None:
        """Take what a connection has sent, line by line; one that says what it must not is dropped."""
        try:
            data = connection.sock.recv(1 << 16)
            connection.unread += data
            connection.heard = connection.heard if connection.rank is None else time.monotonic()
            while True:
                limit = LONGEST_HELLO if connection.rank is None else LONGEST
                end = connection.unread.find(b"\n", 0, limit)
                if end < 0 and len(connection.unread) >= limit:
                    raise ValueError("too long")
                if end < 0:
                    break
                line, connection.unread = connection.unread[:end], connection.unread[end + 1 :]
                if connection.rank is None:
                    self.hello(connection, unpack(line))
                else:
                    self.take(connection.rank, unpack(line))
            if not data:
                raise OSError("closed")
        except (OSError, ValueError, KeyError, TypeError):
            self.drop(connection)

    def hello(self, connection: Connection, message: dict[str, Any]) -> None:
        """Who is there? Errors: KeyError, ValueError for who is not of this run."""
        rank, size, nonce = message["rank"], message["size"], message["nonce"]
        if not proves(message, self.token, "rank", rank, size, nonce):
            raise ValueError("not of this run")
        answer = {"proof": proof(self.token, "hub", nonce)}
        if rank is None:
            self.send({"welcome": None, **answer}, [connection])
            raise ValueError("no rank")
        if type(rank) is not int or type(size) is not int:
            raise ValueError("no rank")
        wrong = None
        if rank in self.ranks or rank in self.left:
            wrong = f"two processes say that they are rank {rank}. HINT: give each its own -pr"
        if size != self.size or not 0 <= rank < size:
            wrong = f"rank {rank} was started as one of {size} processes, rank 0 as one of {self.size}"
        if wrong:
            self.send({"stop": 2, **answer}, [connection])
            self.stop([wrong], 2)
        self.strangers.remove(connection)
        connection.rank, connection.heard = rank, time.monotonic()
        self.ranks[rank] = connection
        self.send({"welcome": rank, **answer}, [connection])
        if len(self.ranks) == self.size:
            self.close_doors()

    def close_doors(self) -> None:
        """All ranks are there: nobody else is waited for."""
        for listener in self.listeners:
            self.ready.unregister(listener)
            listener.close()
        for stranger in list(self.strangers):
            self.drop(stranger)

    def take(self, rank: int, message: dict[str, Any]) -> None:
        """A message of a rank."""
        if "value" in message:
            self.values[rank] = message["value"]
            if len(self.values) == self.size:
                values, self.values = [self.values[r] for r in range(self.size)], {}
                self.send({"values": values})
        elif "error" in message:
            self.errors.setdefault(rank, (time.monotonic(), str(message["error"]), int(message["code"])))
        elif "bye" in message:
            self.left.add(rank)

    def look(self, now: float) -> None:
        """What time brings: errors that all had time to report, ranks that are missing or silent, a sign of life."""
        quiet = self.size - len(self.errors.keys() | self.values.keys())  # ranks that may be about to report one too
        if self.errors and (not quiet or now - min(self.errors.values())[0] > REPORT):
            texts: dict[str, str] = {}  # what all say is said once
            for rank in sorted(self.errors):
                texts.setdefault(self.errors[rank][1], f"rank {rank}: " * (rank > 0))
            self.stop([prefix + text for text, prefix in texts.items()][:8], self.errors[min(self.errors)][2])
        missing = sorted(set(range(self.size)) - self.ranks.keys() - self.left - self.errors.keys())
        if missing and now - self.start > self.connect:
            who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:8]))}"
            text = f"{who} of {self.size} did not connect within {self.connect:.0f} s"
            self.stop([f"{text}. HINT: start {self.size} processes, see -pn"], 2)
        for rank, connection in self.ranks.items():
            if rank not in self.left and now - connection.heard > self.silence:
                text = f"rank {rank} has not been heard of for {self.silence:.0f} s, the other ranks stop"
                self.stop([f"{text}. HINT: {AGAIN}"], 1)
        for stranger in list(self.strangers):
            if now - stranger.heard > min(HELLO, self.silence):
                self.drop(stranger)
        if now - self.beat > BEAT:
            self.beat = now
            self.send({"beat": 1})

    def send(self, message: dict[str, Any], connections: list[Connection] | None = None) -> None:
        """A message to these connections, else to all ranks that have not left."""
        for connection in connections or [c for r, c in self.ranks.items() if r not in self.left]:
            with contextlib.suppress(OSError):
                connection.sock.sendall(pack(message))

    def stop(self, texts: list[str], code: int) -> NoReturn:
        """End the run: each text is a line on stderr, every rank leaves with this exit code."""
        for text in texts:
            with contextlib.suppress(OSError):
                print(f"llmc.train: error: {text}", file=sys.stderr, flush=True)
        self.send({"stop": code})
        sys.exit(0)


def main() -> None:
    """The process. stdin has a line of JSON, {files of the listeners, size, token, connect, silence}, and stays open.

    Signals are for the ranks, who decide together what comes of them; a launcher may send them to every process.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    with contextlib.suppress(ImportError, OSError, ValueError):  # a file for every rank, as far as the system lets it
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    options = json.loads(sys.stdin.buffer.readline())
    listeners = [socket.socket(fileno=fd) for fd in options.pop("files")]
    Hub(listeners, **options).serve()


def start_hub(
    size: int, token: str, places: list[tuple[str, int]], connect: float = CONNECT, silence: float = SILENCE
) -> tuple[list[tuple[str, int]], subprocess.Popen[bytes]]:
    """Start the hub beside this process, rank 0, listening at places [(address, port or 0)].

    Returns ([(address, port)], the process): it outlives this one only to name the dead, and holds the end of a pipe
    whose other end must be kept. Errors: UserError where nothing can listen.
    """
    listeners = []
    try:
        for host, port in places:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listeners.append(socket.create_server((host, port), family=family, backlog=max(128, size)))
        at = [(host, listener.getsockname()[1]) for (host, _), listener in zip(places, listeners, strict=True)]
        here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        code = "import sys; sys.path.insert(0, sys.argv[1]); from llmc.parallel.hub import main; main()"
        files = [listener.fileno() for listener in listeners]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code, here],
            pass_fds=files, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        text = f"the ranks cannot meet at {host or 'any address'} port {port}: {error.strerror}"
        raise UserError(f"{text}. HINT: is another run using it?") from error
    finally:
        for listener in listeners:
            listener.close()
    options = dict(files=files, size=size, token=token, connect=connect, silence=silence)
    assert process.stdin
    process.stdin.write(pack(options))  # not in the command line, which everybody on the machine can read
    process.stdin.flush()
    return at, process
