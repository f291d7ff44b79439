"""scripts/download_starter_pack.py against a local server: resumed, checked, renamed, or one line."""

import http.server
import importlib.util
import os
import re
import struct
import threading
from pathlib import Path

import pytest

from llmc.data import tokenizer

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "download_starter_pack.py"
spec = importlib.util.spec_from_file_location("download_starter_pack", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

PAYLOAD = struct.pack("<2i", 20240326, 3) + os.urandom(300_000)
OTHER = struct.pack("<2i", 20240522, 1) + b"examples"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` with byte ranges; cuts the next `cuts` answers after 50,000 bytes; records what was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cuts, self.ranges, self.asked = {}, 0, True, []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range")))
        data, start = self.server.files.get(self.path[1:]), 0
        if data is None:
            return self.send_error(404)
        if self.headers.get("Range") and self.server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.server.cuts:
            self.server.cuts -= 1
            self.wfile.write(data[start : start + 50_000])
            self.close_connection = True
        else:
            self.wfile.write(data[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = Server()
    server.files.update({"gpt2.bin": PAYLOAD, "eval.bin": OTHER})
    files = {"gpt2.bin": (len(PAYLOAD), (20240326, 3)), "dev/data/eval/eval.bin": (None, (20240522, 1))}
    monkeypatch.setattr(script, "FILES", files)
    monkeypatch.setattr(script, "PAUSE", 0)
    yield server
    server.shutdown()
    server.server_close()


def run(server, folder, code=0):
    assert script.main([str(folder), "--url", f"http://127.0.0.1:{server.server_port}"]) == code


def test_all_files_once(server, tmp_path, capsys):
    run(server, tmp_path)
    assert (tmp_path / "gpt2.bin").read_bytes() == PAYLOAD
    assert (tmp_path / "dev" / "data" / "eval" / "eval.bin").read_bytes() == OTHER
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["eval.bin", "gpt2.bin"]
    asked = len(server.asked)
    run(server, tmp_path)
    assert len(server.asked) == asked == 2 and capsys.readouterr().out.count("have ") == 2


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path):
    server.cuts = 3
    run(server, tmp_path)
    assert (tmp_path / "gpt2.bin").read_bytes() == PAYLOAD
    ranges = [None, "bytes=50000-", "bytes=100000-", "bytes=150000-"]
    assert [r for path, r in server.asked if path == "/gpt2.bin"] == ranges


def test_a_part_of_an_earlier_run(server, tmp_path):
    """Some of it, all of it, too much of it, and a server that knows no ranges."""
    for part, ranges in ((PAYLOAD[:1000], True), (PAYLOAD, True), (PAYLOAD + b"x", True), (PAYLOAD[:1000], False)):
        server.ranges = ranges
        (tmp_path / "gpt2.bin.part").write_bytes(part)
        run(server, tmp_path)
        assert (tmp_path / "gpt2.bin").read_bytes() == PAYLOAD
        assert not (tmp_path / "gpt2.bin.part").exists()
        (tmp_path / "gpt2.bin").unlink()


def test_errors_are_one_line_and_leave_no_file(server, tmp_path, capsys):
    def refuses(message):
        run(server, tmp_path, code=2)
        err = capsys.readouterr().err
        assert re.search(message, err) and "HINT: " in err and err.count("\n") == 1, err
        assert not (tmp_path / "gpt2.bin").exists()

    server.files["gpt2.bin"] = PAYLOAD[:50_000]
    refuses("has 50000 bytes, expected 300008")
    server.files["gpt2.bin"] = b"<html> no <" + PAYLOAD[11:]
    refuses("is not what it was: it starts with 3c68746d6c3e206e")
    assert not (tmp_path / "gpt2.bin.part").exists()
    del server.files["gpt2.bin"]
    refuses("cannot download .*404")
    server.files["gpt2.bin"] = PAYLOAD
    (tmp_path / "dev").write_text("a file where a folder should be")
    run(server, tmp_path, code=2)
    assert "cannot download" in capsys.readouterr().err
    (tmp_path / "gpt2.bin").write_bytes(b"mine")
    run(server, tmp_path, code=2)
    assert "gpt2.bin is not of the starter pack: it has 4 bytes" in capsys.readouterr().err
    assert (tmp_path / "gpt2.bin").read_bytes() == b"mine"


def test_no_server_is_one_line(server, tmp_path, capsys):
    assert script.main([str(tmp_path), "--url", "http://127.0.0.1:9"]) == 2
    err = capsys.readouterr().err
    assert "Connection refused" in err and err.count("\n") == 1 and not list(tmp_path.rglob("*.*"))


def test_sizes_are_those_of_the_formats():
    """Of what llm.c's formats fix: the models and the debug state of GPT-2 124M, the tokenizer."""
    N, V, B, T = 124_475_904, 50257, 4, 64
    gpt2 = tokenizer.get("gpt2")
    sizes = {name: size for name, (size, _) in script.FILES.items()}
    assert sizes["gpt2_124M.bin"] == 1024 + 4 * N and sizes["gpt2_124M_bf16.bin"] == 1024 + 2 * N
    assert sizes["gpt2_124M_debug_state.bin"] == 1024 + 4 * (2 * B * T + B * T * V + 1 + N)
    assert sizes["gpt2_tokenizer.bin"] == 1024 + sum(1 + len(piece) for piece in gpt2.pieces)
