"""The hub, with real processes: how ranks meet, how they learn who has died, and what it takes from strangers."""

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmc.errors import UserError
from llmc.parallel import hub, ranks
from llmc.parallel.world import Place, World

ROOT = Path(__file__).resolve().parents[1]

RANK = """
import os, sys, time
from llmc.parallel.ranks import Ranks
from llmc.parallel.launch import on_rank0
from llmc.parallel.world import Place, World
rank, size, place, does = int(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3]), sys.argv[4]
ranks = Ranks(World(rank, size, rank, None), place, connect=float(sys.argv[5]), silence=float(sys.argv[6]))
print(ranks.exchange({"rank": rank}), on_rank0(ranks, lambda: list(range(-64, 64))), flush=True)
if does == "die" and rank == 1: os._exit(0)
if does == "hang" and rank == 2: os.kill(os.getpid(), 19)
if does == "fail" and rank == 1: ranks.fail("disk full", 2)
ranks.barrier()
ranks.close()
"""


def meet(place, does="nothing", started=3, size=3, connect=60, silence=60, late=0):
    """[(exit code, stdout, stderr)] of the ranks; `late` seconds pass before rank 0 is started."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = {}
    for rank in reversed(range(started)):
        if rank == 0 and late:
            threading.Event().wait(late)
        settings = (rank, size, place, does, connect if rank == 0 else 60, silence)  # of rank 0: the hub's patience
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


@pytest.fixture(params=["tcp", "name", "fs"])
def place(request, tmp_path):
    if request.param == "tcp":
        return Place("tcp", "127.0.0.1", free_port())
    if request.param == "name":  # this machine's, as -ps has it where there are several
        try:
            socket.getaddrinfo(socket.gethostname(), None)
        except OSError:
            pytest.skip("this machine does not know its own name")
        return Place("tcp", socket.gethostname(), free_port())
    return Place("fs", path=str(tmp_path / "llmc-run-3.json"))


def test_ranks_meet(place):
    """128 numbers, as the unique id of NCCL, and a value of each, reach all ranks, also where rank 0 comes last."""
    if place.method == "fs":  # an earlier run left a file: a port that nothing, or that another run listens on
        other = socket.create_server(("127.0.0.1", 0))
        Path(place.path).write_text(json.dumps({"llmc": ["old", [other.getsockname()]]}))
        threading.Thread(target=hang_up, args=(other,), daemon=True).start()
    expected = f"{[{'rank': r} for r in range(3)]} {list(range(-64, 64))}\n"
    assert meet(place, late=0.5) == [(0, expected, "")] * 3
    assert not os.path.exists(place.path)


@pytest.mark.parametrize(
    "does, code, text",
    [
        ("die", 1, "rank 1 died, the other ranks stop. HINT: -y 1"),
        ("hang", 1, "rank 2 has not been heard of for 4 s, the other ranks stop. HINT: -y 1"),
        ("fail", 2, "rank 1: disk full"),
    ],
)
def test_the_hub_names_who_failed(tmp_path, does, code, text):
    results = meet(Place("fs", path=str(tmp_path / "llmc-run-3.json")), does, silence=4)
    assert results[0][0] == code
    assert results[0][2].startswith(f"llmc.train: error: {text}") and results[0][2].count("\n") == 1, results
    for rank, (theirs, _, stderr) in enumerate(results[1:], 1):  # the hub's words go to rank 0's stderr, once
        assert stderr == "" and (theirs == code or (does, rank) in (("die", 1), ("hang", 2)))


def test_missing_rank(tmp_path):
    results = meet(Place("fs", path=str(tmp_path / "llmc-run-3.json")), started=2, connect=3, late=1)
    assert [code for code, *_ in results] == [2, 2]
    text = "llmc.train: error: rank 2 of 3 did not connect within 3 s. HINT: start 3 processes, see -pn\n"
    assert results[0][2] == text


def started(size=1, token="secret", **patience):
    """A hub on 127.0.0.1: (its address and port, its process)."""
    (at,), process = hub.start_hub(size, token, [("127.0.0.1", 0)], **patience)
    return at, process


def says(at, said):
    """What the hub answers to a connection that says this, until it closes it."""
    with socket.create_connection(at, timeout=30) as stranger:
        with contextlib.suppress(ConnectionError):  # it may be closed before all is said
            stranger.sendall(said)
            return stranger.recv(100)
    return b""


def bye(at, process, token="secret"):
    """The only rank comes and goes; the hub ends."""
    with ranks.greet(at, token, 0, 1) as rank:
        rank.sendall(hub.pack({"bye": 1}))
        assert process.wait(timeout=30) == 0


def hello(rank, size, token="secret", **changed):
    message = dict(rank=rank, size=size, nonce="n")
    return hub.pack(message | dict(proof=hub.proof(token, "rank", *message.values())) | changed)


STRANGE = {
    "guess": hello(0, 1, "guess"),
    "proof of another hello": hello(0, 1, nonce="m"),
    "no proof": hello(0, 1, proof=None),
    "number as proof": hello(0, 1, proof=7),
    "text outside ASCII as proof": hello(0, 1, proof="\u00e9\ud800"),
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "list": b"[]\n",
    "number": b"1e999\n",
    "latin": b"\xff\xfe\n",
    "brackets": b"[" * 1010 + b"\n",
    "many brackets": b"[" * 100_000 + b"\n",
    "braces": b'{"a":' * 200 + b"\n",
    "list as rank": hello([0], 1),
    "true as rank": hello(True, 1),
    "text as size": hello(0, "1"),
    "no rank": hello(None, 1),
}


@pytest.mark.parametrize("said", STRANGE.values(), ids=STRANGE)
def test_strangers_are_dropped(said, capfd):
    """Who does not know the token, or does not speak as a rank does, is not answered; the hub goes on."""
    at, process = started()
    answer = says(at, said)
    assert answer == b"" or json.loads(answer)["welcome"] is None  # the latter: who knows the token may ask
    bye(at, process)
    assert capfd.readouterr().err == ""


def mutated(line, draw):
    """The line with some bytes replaced, taken out, doubled or cut off."""
    data = bytearray(line)
    for _ in range(draw.randrange(1, 6)):
        at = draw.randrange(len(data) or 1)
        piece = draw.choice([b"", b"[", b"}", b'"', b"1e999", b"null", b"-1", b"\\ud800", bytes([draw.randrange(256)])])
        data[at : at + draw.choice([0, 1, 1, 8])] = piece + data[at : at + draw.choice([0, 0, 0, 40])]
    return bytes(data[: draw.choice([len(data), len(data), draw.randrange(len(data) + 1)])]) + b"\n"


def test_mutated_hellos_do_not_end_the_hub(capfd):
    (at, process), draw = started(), random.Random(0)
    for _ in range(400):
        line = mutated(hello(0, 1, "guess"), draw)
        with socket.create_connection(at, timeout=30) as stranger, contextlib.suppress(ConnectionError):
            stranger.sendall(line)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(100) == b"", line
    bye(at, process)
    assert capfd.readouterr().err == ""


def test_mutated_places_are_read_or_not(tmp_path):
    path, draw = tmp_path / "llmc-run-2.json", random.Random(0)
    for _ in range(400):
        path.write_bytes(mutated(hub.pack({"llmc": ["t" * 32, [["127.0.0.1", 4711], ["node", 4712]]]}), draw))
        token, places = ranks.read_place(str(path))
        assert type(token) is str and all(type(h) is str and type(p) is int and 0 < p < 65536 for h, p in places)


@pytest.mark.parametrize("rank, longest", [(None, hub.LONGEST_HELLO), (0, hub.LONGEST)])
def test_a_message_has_a_bounded_length(rank, longest, monkeypatch):
    """What is longer is given up at once, not when its sender has been silent for too long."""
    ours, theirs = socket.socketpair()
    here, there = hub.Hub([], 2, "secret", 60, 60), hub.Connection(ours)
    there.rank, there.unread = rank, b"x" * (longest - 1)
    here.ready.register(ours, hub.selectors.EVENT_READ, there)
    monkeypatch.setattr(hub.Hub, "drop", lambda self, connection: connection.sock.close())
    theirs.sendall(b"x")
    here.read(there)
    assert ours.fileno() == -1
    theirs.close()


def test_a_rank_that_says_nonsense_has_died(capfd):
    at, process = started()
    with ranks.greet(at, "secret", 0, 1) as rank:
        rank.sendall(b'{"error": "x", "code": [[]]}\n')
        assert process.wait(timeout=30) == 0
    assert capfd.readouterr().err.startswith("llmc.train: error: rank 0 died, the other ranks stop. HINT: -y 1")


@pytest.mark.parametrize(
    "rank, size, text",
    [(0, 2, "two processes say that they are rank 0. HINT: "), (1, 3, "rank 1 was started as one of 3 processes, "),
     (2, 2, "rank 2 was started as one of 2 processes, ")],
)  # fmt: skip
def test_ranks_that_contradict(rank, size, text, capfd):
    """The one that comes second is told to stop too, and does not wait until it gives up."""
    at, process = started(size=2)
    with ranks.greet(at, "secret", 0, 2):
        assert ranks.greet(at, "secret", rank, size) == 2
        assert process.wait(timeout=30) == 0
    assert capfd.readouterr().err.startswith(f"llmc.train: error: {text}")


def test_a_hub_of_another_run_is_left(monkeypatch):
    """A rank does not believe who listens at its hub's place: neither a stop, nor brackets, nor silence."""
    monkeypatch.setattr(ranks, "GREETING", 0.2)
    for answer in (b'{"stop": 1, "proof": "x"}\n', b"[" * 900 + b"\n", b"{" * 2000, b"7\n", b""):
        server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=lambda s=server, a=answer: s.accept()[0].sendall(a), daemon=True).start()
        with pytest.raises((OSError, ValueError)):
            ranks.greet(server.getsockname(), "secret", 0, 1)
        server.close()


def test_silent_connections_under_a_small_limit_of_files(monkeypatch):
    """200 connections say nothing while the hub may open 20 files: the ranks come in all the same."""
    resource = pytest.importorskip("resource")
    popen, limits = subprocess.Popen, (20, 20)
    few = functools.partial(popen, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits))
    monkeypatch.setattr(hub.subprocess, "Popen", few)
    at, process = started(size=4)
    silent = [socket.create_connection(at, timeout=30) for _ in range(200)]
    with contextlib.ExitStack() as stack:
        there = [
            stack.enter_context(ranks.find_hub(World(r, 4, r, None), Place("mpi"), "secret", [at])) for r in range(4)
        ]
        for rank in there:
            rank.sendall(hub.pack({"bye": 1}))
        assert process.wait(timeout=30) == 0
    for sock in silent:
        sock.close()


def test_a_silent_connection_is_closed():
    at, process = started(silence=1)
    with socket.create_connection(at, timeout=30) as silent:
        assert silent.recv(1) == b""
    bye(at, process)


def test_the_hub_stops_listening_once_all_are_there():
    at, process = started(size=1)
    with ranks.greet(at, "secret", 0, 1) as rank:
        with pytest.raises(OSError):
            for _ in range(100):  # until it has been seen
                socket.create_connection(at, timeout=30).close()
                threading.Event().wait(0.05)
        assert process.poll() is None
        rank.sendall(hub.pack({"bye": 1}))
        assert process.wait(timeout=30) == 0


def test_signals_do_not_end_the_hub():
    """A launcher may send them to every process; it is the ranks who decide."""
    at, process = started()
    with ranks.greet(at, "secret", 0, 1) as rank:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            process.send_signal(signum)
        rank.sendall(hub.pack({"bye": 1}))
        assert process.wait(timeout=30) == 0


def test_the_token_is_in_no_command_line():
    at, process = started(token="f00dbeef")
    assert "f00dbeef" not in " ".join(map(str, process.args))
    bye(at, process, "f00dbeef")


# ----------------------------------------------------------------------------------------------------------------------
# where it listens


def test_addresses(monkeypatch):
    """Loopback for a name that means just that; else an address of this machine, or all where none is known."""
    assert set(ranks.addresses("localhost")) <= {"127.0.0.1", "::1"}
    assert ranks.addresses("127.0.0.5") == ["127.0.0.5"]
    others = [address for address in ranks.addresses("") if address != "127.0.0.1"]
    assert others == [""] or all(ranks.is_own(a) and not ranks.is_loopback(a) for a in others)
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, port: [(0, 0, 0, "", ("127.0.1.1", 0))])
    named = ranks.addresses("node7")  # as Debian has it: ranks here are led to 127.0.1.1, others to what leads out
    assert named == (["127.0.1.1", *ranks.way_out()] if ranks.way_out() else [""])
    monkeypatch.undo()
    assert ranks.addresses("192.0.2.77") == (ranks.way_out() or [""])  # not of this machine: a router's, in front of it


@pytest.mark.parametrize("who, place, expected", [
    (World(0, 2, 0, "torchrun", one_machine=True), Place("tcp", "example.org", 0), ["127.0.0.1"]),
    (World(0, 2, 0, "srun", one_machine=True), Place("fs"), ["127.0.0.1"]),
    (World(0, 2, 0, None), Place("tcp", "localhost", 0), ["127.0.0.1", "::1"]),
])  # fmt: skip
def test_one_machine_needs_loopback_alone(who, place, expected, tmp_path):
    place = place._replace(path=str(tmp_path / "place.json"))
    token, places, process = ranks.open_hub(who, place, 60, 60)
    assert places and {host for host, _ in places} <= set(expected)
    if place.method == "fs":
        assert os.stat(place.path).st_mode & 0o777 == 0o600
    process.kill()
    process.wait()


def test_tokens_of_tcp_are_of_the_run(monkeypatch):
    """Another job at the same port has another token; all ranks of a run have the same."""
    one, other = Place("tcp", "h", 7, run="1.0"), Place("tcp", "h", 7, run="2.0")
    tokens = [ranks.open_hub(World(r, 3, r, None), p, 1, 1)[0] for r, p in ((1, one), (2, one), (1, other))]
    assert tokens[0] == tokens[1] != tokens[2]


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = Place("tcp", "127.0.0.1", other.getsockname()[1])
        with pytest.raises(UserError, match=rf"cannot meet at 127.0.0.1 port {place.port}: .* HINT: is another run"):
            ranks.open_hub(World(0, 2, 0, None), place, 60, 60)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="none/x.json: No such file or directory. HINT: -pf names a folder"):
        ranks.write_place(str(tmp_path / "none" / "x.json"), "t", [("h", 1)])


def test_foreign_file(tmp_path):
    path = tmp_path / "llmc-run-2.json"
    path.write_text("my notes")
    with pytest.raises(UserError, match="not a file of a run. HINT: "):
        ranks.write_place(str(path), "t", [("h", 1)])
    assert path.read_text() == "my notes"


@pytest.mark.parametrize("content", [
    b"", b"[" * 100_000, b'{"llmc": 1}', b'{"llmc": ["t", [["h"]]]}', b'{"llmc": ["t", [["h", "1"]]]}',
    b'{"llmc": [1, [["h", 1]]]}', b'{"llmc": ["t", [["h", 70000]]]}', b'{"llmc": ["t", 5]}', b"x" * 200_000,
])  # fmt: skip
def test_places_that_are_none(tmp_path, content):
    path = tmp_path / "llmc-run-2.json"
    path.write_bytes(content)
    assert ranks.read_place(str(path)) == ("", [])


def test_a_fifo_is_no_place(tmp_path):
    os.mkfifo(tmp_path / "llmc-run-2.json")
    assert ranks.read_place(str(tmp_path / "llmc-run-2.json")) == ("", [])


def test_two_runs_in_one_folder(tmp_path):
    """The second to start is told so while the first one's hub is there; what a dead one left is replaced."""
    path, (at, process) = str(tmp_path / "llmc-run-2.json"), started(size=2, token="first")
    ranks.write_place(path, "first", [at])
    assert os.stat(path).st_mode & 0o777 == 0o600
    with pytest.raises(UserError, match="llmc-run-2.json is of another run that starts now. HINT: "):
        ranks.write_place(path, "second", [("127.0.0.1", 1)])
    assert ranks.read_place(path)[0] == "first"
    process.kill()
    process.wait()
    ranks.write_place(path, "second", [("127.0.0.1", 1)])
    assert ranks.read_place(path)[0] == "second"
