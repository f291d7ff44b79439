"""The hub, with real processes: how ranks meet, who has died, and what it takes from strangers."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmc.errors import UserError
from llmc.parallel import hub
from llmc.parallel.world import Place

ROOT = Path(__file__).resolve().parents[1]

RANK = """
import os, sys, time
from llmc.parallel import hub
from llmc.parallel.launch import on_rank0
from llmc.parallel.world import Place, World
rank, size, place, does = int(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3]), sys.argv[4]
ranks = hub.Ranks(World(rank, size, rank, None), place, connect=float(sys.argv[5]), silence=float(sys.argv[6]))
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


@pytest.fixture(params=["tcp", "fs"])
def place(request, tmp_path):
    if request.param == "tcp":
        return Place("tcp", "127.0.0.1", free_port())
    return Place("fs", path=str(tmp_path / "llmc-run-3.json"))


def test_ranks_meet(place):
    """128 numbers, as the unique id of NCCL, and a value of each, reach all ranks, also where rank 0 comes last."""
    if place.method == "fs":  # an earlier run left a file: a port that nothing, or that another run listens on
        other = socket.create_server(("127.0.0.1", 0))
        Path(place.path).write_text(json.dumps({"llmc": ["old", ["127.0.0.1"], other.getsockname()[1]]}))
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
    results = meet(Place("fs", path=str(tmp_path / "llmc-run-3.json")), started=2, connect=3, late=1)
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
