"""scripts/download_starter_pack.py against a hub on this machine: resumed, checked, renamed, or one line."""

import hashlib
import http.server
import importlib.util
import os
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmc.data import tokenizer

pytest.importorskip("huggingface_hub")
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "download_starter_pack.py"
spec = importlib.util.spec_from_file_location("download_starter_pack", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

PAYLOAD = struct.pack("<2i", 20240326, 3) + bytes(range(256)) * 1200
OTHER = struct.pack("<2i", 20240522, 1) + b"examples"
FILES = {"gpt2.bin": (len(PAYLOAD), (20240326, 3)), "dev/data/eval/eval.bin": (None, (20240522, 1))}
RUN = f"import runpy, sys; s = runpy.run_path({str(SCRIPT)!r}); s['FILES'].clear(); s['FILES'].update({FILES}); \
sys.exit(s['main']([sys.argv[1]]))"


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub as a dataset's files ask for; cuts the next `cuts` answers; records what was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cuts, self.asked = {"gpt2.bin": PAYLOAD, "eval.bin": OTHER}, 0, []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        folder, _, name = self.path.partition("?")[0].rpartition("/")
        data, start = self.server.files.get(name), 0
        if folder != f"/datasets/{script.REPOSITORY}/resolve/main" or data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if self.command == "GET":
            self.server.asked.append((name, self.headers.get("Range")))
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0123456789" * 4)
        self.end_headers()
        if self.command == "GET" and self.server.cuts:
            self.server.cuts -= 1
            self.wfile.write(data[start : start + 50_000])
            self.close_connection = True
        elif self.command == "GET":
            self.wfile.write(data[start:])

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    with Hub() as server:
        yield server
        server.shutdown()


def run(folder, endpoint, code=0):
    """The script in a process of its own, as huggingface_hub reads its settings when it is imported."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environ.update(HF_ENDPOINT=endpoint, HF_HOME=str(folder.parent / "home"), NO_PROXY="127.0.0.1")
    command = [sys.executable, "-c", RUN, str(folder)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done


def address(hub):
    return f"http://127.0.0.1:{hub.server_port}"


def test_all_files_once(hub, tmp_path):
    """The first file is cut on the way, which huggingface_hub mends."""
    folder = tmp_path / "pack"
    hub.cuts = 1
    run(folder, address(hub))
    assert (folder / "gpt2.bin").read_bytes() == PAYLOAD
    assert (folder / "dev" / "data" / "eval" / "eval.bin").read_bytes() == OTHER
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["eval.bin", "gpt2.bin"]
    assert [name for name, _ in hub.asked] == ["gpt2.bin", "gpt2.bin", "eval.bin"]
    assert run(folder, address(hub)).stdout.count("have ") == 2 and len(hub.asked) == 3


def test_errors_are_one_line_and_leave_no_file(hub, tmp_path):
    folder = tmp_path / "pack"

    def refuses(message):
        err = run(folder, address(hub), code=2).stderr
        line = err.splitlines()[-1]  # before it huggingface_hub may have drawn its progress
        assert re.search(message, line) and "HINT: " in line and "Traceback" not in err, err

    hub.files["gpt2.bin"] = PAYLOAD[:50_000]
    refuses(f"has 50000 bytes, expected {len(PAYLOAD)}")
    hub.files["gpt2.bin"] = b"<html> no <" + PAYLOAD[11:]
    refuses("is not what it was: it starts with 3c68746d6c3e206e")
    del hub.files["gpt2.bin"]
    refuses(r"cannot download gpt2.bin .*\(HTTP 404\)")
    assert not list(folder.rglob("*.bin"))
    (folder / "gpt2.bin").write_bytes(b"mine")
    refuses("gpt2.bin is not of the starter pack: it has 4 bytes")
    assert (folder / "gpt2.bin").read_bytes() == b"mine"


def test_without_the_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert script.main([str(tmp_path)]) == 2
    assert re.search("not there. HINT: pip install huggingface_hub$", capsys.readouterr().err)


def test_sizes_are_those_of_the_formats():
    """Of what llm.c's formats fix: the models and the debug state of GPT-2 124M, the tokenizer."""
    N, V, B, T = 124_475_904, 50257, 4, 64
    gpt2 = tokenizer.get("gpt2")
    sizes = {name: size for name, (size, _) in script.FILES.items()}
    assert sizes["gpt2_124M.bin"] == 1024 + 4 * N and sizes["gpt2_124M_bf16.bin"] == 1024 + 2 * N
    assert sizes["gpt2_124M_debug_state.bin"] == 1024 + 4 * (2 * B * T + B * T * V + 1 + N)
    assert sizes["gpt2_tokenizer.bin"] == 1024 + sum(1 + len(piece) for piece in gpt2.pieces)
