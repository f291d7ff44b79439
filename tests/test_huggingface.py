"""Hugging Face's GPT-2 read without torch: against transformers' logits and losses; other models are refused."""

import http.server
import json
import os
import re
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from llmc import cpu, generate, gpt2, loading, train
from llmc.data.shards import write_shard
from llmc.errors import UserError
from llmc.files import huggingface, io
from llmc.gpt2 import config_from_header
from llmc.model import AdamW, Model

V, B, T = 500, 4, 32
SIZES = dict(max_seq_len=64, vocab_size=V, num_layers=2, num_heads=4, channels=64, padded_vocab_size=512)


@pytest.fixture(scope="module")
def theirs():
    """transformers' GPT-2 with weights, biases and layernorms that all differ."""
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(path)
    return path


def build(folder, training=False):
    model = Model(gpt2, cpu, config_from_header(huggingface.read_hf_header(folder)), B, T, training=training)
    loading.read_weights(model, f"hf:{folder}")
    return model


def their_logits(model, inputs):
    with torch.no_grad():
        return model(torch.from_numpy(inputs).long()).logits.float().numpy()


def tokens(seed, shape=(B, T)):
    return np.random.default_rng(seed).integers(0, V, shape, np.int32)


def raw_safetensors(path, tensors):
    """Written by hand from the documented layout: {name: (dtype name, array)}."""
    at, entries, body = 0, {}, b""
    for name, (kind, array) in tensors.items():
        data = array.tobytes()
        entries[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + len(data)]}
        at, body = at + len(data), body + data
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


# ----------------------------------------------------------------------------
# the same function


def test_logits_are_those_of_transformers(theirs, folder):
    model, inputs = build(folder), tokens(0)
    assert huggingface.read_hf_header(folder) == SIZES
    logits = model.forward(inputs).output
    np.testing.assert_allclose(logits[..., :V], their_logits(theirs, inputs), atol=2e-5)  # logits of about 3
    assert not logits[..., V:].any() and not model.params.wte[V:].any()


def test_ten_steps_are_those_of_transformers(theirs, folder):
    """AdamW with decay on matrices alone, clipping at 1, fp32: the losses to 1e-4."""
    model, other = build(folder, training=True), transformers.GPT2LMHeadModel(theirs.config)
    other.load_state_dict(theirs.state_dict())
    decay = [p for p in other.parameters() if p.dim() >= 2]
    rest = [p for p in other.parameters() if p.dim() < 2]
    groups = [dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    inputs, targets = tokens(1), tokens(2)
    losses, expected = [], []
    for step in range(10):
        model.forward(inputs)
        model.backward(inputs, targets)
        model.update(AdamW(1e-3, weight_decay=0.1), step + 1)
        losses.append(model.mean_loss())
        logits = other(torch.from_numpy(inputs).long()).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), torch.from_numpy(targets).long().reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    np.testing.assert_allclose(losses, expected, atol=1e-4, rtol=0)
    assert expected[-1] < expected[0] - 0.5


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("prefix", ("transformer.", ""))
def test_dtypes_names_and_pieces(theirs, tmp_path, dtype, prefix):
    """Each precision of the file, with and without the prefix, in one file or several: the values, exactly."""
    model = transformers.GPT2LMHeadModel(theirs.config)
    model.load_state_dict(theirs.state_dict())
    model = model.to(dtype)
    (model if prefix else model.transformer).save_pretrained(tmp_path, max_shard_size="100KB")
    assert os.path.exists(tmp_path / "model.safetensors.index.json")
    names = {n for path in huggingface.weight_files(tmp_path) for n in huggingface.read_safetensors(path)}
    assert "wte.weight" in {n.removeprefix("transformer.") for n in names} and len(names) == 28
    assert ("transformer.wte.weight" in names) == bool(prefix)
    ours = build(tmp_path)
    wte = model.transformer.wte.weight.detach().float().numpy()
    assert np.array_equal(ours.params.wte[:V], wte)
    qkvw = model.transformer.h[1].attn.c_attn.weight.detach().float().numpy()
    assert np.array_equal(ours.params.h[1].qkvw, qkvw.T)
    bits = np.empty(ours.params_flat.size, np.uint16)
    huggingface.read_hf(tmp_path, bits)
    assert np.array_equal(bits, io.fp32_to_bf16(ours.params_flat))


def test_tied_head_is_accepted_and_another_one_is_not(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = dict(huggingface.read_safetensors(folder / "model.safetensors"))
    head = np.array(tensors["transformer.wte.weight"][1])
    extra = {"h.0.attn.bias": ("BOOL", np.ones((4, 4), np.uint8))}  # of old files; not a parameter
    raw_safetensors(tmp_path / "model.safetensors", {**tensors, **extra, "lm_head.weight": ("F32", head)})
    build(tmp_path)
    head[3, 3] += 1
    raw_safetensors(tmp_path / "model.safetensors", {**tensors, "lm_head.weight": ("F32", head)})
    with pytest.raises(UserError, match="lm_head.weight is not wte.weight.*HINT"):
        build(tmp_path)


# ----------------------------------------------------------------------------
# the commands


def test_train_generate_and_evaluate_take_it(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.bin", "val.bin"):
        write_shard(name, tokens(3, 2 * B * T + 1).astype(np.uint16))
    where = ("-i", "train.bin", "-j", "val.bin", "--device", "cpu", "-b", str(B), "-t", str(T))
    model = f"hf:{folder}"
    assert train.main(["-e", model, *where, "-x", "1", "-o", "run", "-n", "1", "-v", "1", "-s", "0", "-l", "0"]) == 0
    out = capsys.readouterr().out
    assert f"| weight init method    | {model}" in out
    written = np.fromfile("run/model_00000001.bin", "<f4", offset=1024)
    assert np.array_equal(written, build(folder).params_flat)
    from llmc import evaluate

    assert evaluate.main([model, "-j", "val.bin", "-b", str(B), "-t", str(T), "--device", "cpu"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("val loss"))
    assert line.split()[2] == out.split("val loss ")[1].split()[0]
    assert generate.main([str(folder), "--device", "cpu"]) == 2  # found without "hf:", but it has no tokenizer
    assert "no tokenizer has 500 tokens" in capsys.readouterr().err


# ----------------------------------------------------------------------------
# where it is


def test_hub_cache(folder, tmp_path, monkeypatch):
    """HF_HUB_CACHE, HF_HOME/hub, ~/.cache/huggingface/hub; the snapshot that refs/main names; gpt2's two names."""
    snapshot = tmp_path / "hub" / "models--openai-community--gpt2" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder)
    (tmp_path / "hub" / "models--openai-community--gpt2" / "refs").mkdir()
    (tmp_path / "hub" / "models--openai-community--gpt2" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface, "download", lambda name: f"downloaded {name}")
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert huggingface.find("gpt2") == "downloaded openai-community/gpt2"
    (tmp_path / "home" / ".cache").mkdir(parents=True)
    (tmp_path / "home" / ".cache" / "huggingface").symlink_to(tmp_path)
    assert os.path.samefile(huggingface.find("gpt2"), folder)
    assert os.path.samefile(huggingface.find("openai-community/gpt2"), folder)
    assert huggingface.find("gpt2-xl") == "downloaded openai-community/gpt2-xl"
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert os.path.samefile(huggingface.find("gpt2"), folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
    assert huggingface.find("gpt2") == "downloaded openai-community/gpt2"
    for name in ("./gpt2", "", "/gpt2", "a/b/c", "a b", "../models--gpt2", "~/gpt2"):
        with pytest.raises(UserError, match=f"hf:{re.escape(name)} is not a folder.*HINT"):
            huggingface.find(name)


def test_no_network_is_one_line(monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("Network is\nunreachable")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=refused))
    with pytest.raises(UserError, match="cannot download .*gpt2.*Network is unreachable.*HINT.*hf:DIR") as info:
        huggingface.download("openai-community/gpt2")
    assert "\n" not in str(info.value)


def test_no_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="cannot download me/tiny: huggingface_hub is not .*HINT: pip install hugging"):
        huggingface.find("me/tiny")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: the model me/tiny, and me/gated, which is refused. folder is set."""

    COMMIT = "0123456789" * 4

    def do_GET(self):
        path = self.path.partition("?")[0]
        names = sorted(os.listdir(self.folder))
        if path.startswith(("/api/models/me/gated", "/me/gated")):
            self.answer(
                401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model me/gated is restricted."}
            )
        elif path == "/api/models/me/tiny/revision/main":
            self.answer_json({"id": "me/tiny", "sha": self.COMMIT, "siblings": [{"rfilename": n} for n in names]})
        elif path == f"/api/models/me/tiny/tree/{self.COMMIT}":
            sizes = {name: os.path.getsize(self.folder / name) for name in names}
            self.answer_json([{"type": "file", "path": n, "size": sizes[n], "oid": "1" * 40} for n in names])
        elif path.startswith("/me/tiny/resolve/") and path.rpartition("/")[2] in names:
            body = (self.folder / path.rpartition("/")[2]).read_bytes()
            self.answer(200, {"ETag": f'"{zlib.crc32(body):040x}"', "X-Repo-Commit": self.COMMIT}, body)
        else:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer_json(self, value):
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(folder, monkeypatch):
    """The address of a Hub that runs on this machine."""
    monkeypatch.setattr(Hub, "folder", folder, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


REFUSALS = (
    ("me/nothing", r"cannot download \S*me/nothing\S*: the hub does not have it \(HTTP 404\)\. HINT: check the name"),
    (
        "me/gated",
        r"cannot download \S*me/gated\S*: access denied \(HTTP 401\)\. HINT: check the name; what is gated .*HF_TOKEN",
    ),
)


def test_download_with_the_library(folder, hub, tmp_path):
    """huggingface_hub itself, in processes of their own as it reads its settings when it is imported."""
    pytest.importorskip("huggingface_hub")
    for name in ("train.bin", "val.bin"):
        write_shard(tmp_path / name, tokens(3, 2 * B * T + 1).astype(np.uint16))
    settings = {
        "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(Path(loading.__file__).parents[1]),
    }
    flags = "-i train.bin -j val.bin --device cpu --threads 1 -x 1 -o out -n 1 -v 0 -s 0 -l 0".split()
    flags += ["-b", str(B), "-t", str(T)]

    def run(name, endpoint):
        environ = (
            {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | settings | {"HF_ENDPOINT": endpoint}
        )
        command = [sys.executable, "-m", "llmc.train", "-e", f"hf:{name}", *flags]
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)

    refused = "http://127.0.0.1:9"
    for endpoint, name, reason in [
        *((hub, *r) for r in REFUSALS),
        (refused, "me/tiny", "me/tiny: .*HINT: connect to the"),
    ]:
        done = run(name, endpoint)
        assert done.returncode == 2 and re.match("llmc.train: error: .*" + reason, done.stderr), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    done = run("me/tiny", hub)
    assert done.returncode == 0, done.stderr
    written = np.fromfile(tmp_path / "out" / "model_00000001.bin", "<f4", offset=1024)
    assert np.array_equal(written, build(folder).params_flat)
    cached = tmp_path / "home" / "hub" / "models--me--tiny" / "snapshots" / Hub.COMMIT
    assert sorted(os.listdir(cached)) == ["config.json", "model.safetensors"]


# ----------------------------------------------------------------------------
# what is no such model


BAD_CONFIGS = {
    "another architecture": (dict(model_type="llama"), "model_type is 'llama', expected 'gpt2'"),
    "activation": (dict(activation_function="relu"), "activation_function is 'relu'"),
    "exact gelu": (dict(activation_function="gelu"), "activation_function is 'gelu'"),
    "scale by layer": (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    "no scale": (dict(scale_attn_weights=False), "scale_attn_weights is False"),
    "inner size": (dict(n_inner=128), "n_inner is 128"),
    "epsilon": (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
    "untied": (dict(tie_word_embeddings=False), "tie_word_embeddings is False"),
    "cross attention": (dict(add_cross_attention=True), "add_cross_attention is True"),
    "large": (dict(n_layer=2**31), "n_layer is 2147483648, not a whole number from 1 to 65536"),
    "a digit too many": (dict(vocab_size=5000), r"wte.weight is \(500, 64\), config.json asks for \(5000, 64\)"),
    "positions": (dict(n_positions=1 << 24), r"wpe.weight is \(64, 64\), config.json asks for \(16777216, 64\)"),
    "a size in words": (dict(n_embd="\x1b[31m"), r"n_embd is '\\x1b\[31m', not a whole number"),
    "true": (dict(n_embd=True), "n_embd is True, not a whole number"),
    "heads": (dict(n_head=5), "n_embd 64 is not a multiple of n_head 5"),
    "no size": (dict(n_layer=None), "n_layer is None, not a whole number from 1"),
    "other size": (dict(n_layer=1, n_embd=32), r"wte.weight is \(500, 64\), config.json asks for \(500, 32\)"),
    "more layers": (dict(n_layer=3), "lack h.2.ln_1.weight"),
}


@pytest.mark.parametrize("changes, message", BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_unsupported_model(folder, tmp_path, changes, message):
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{message}.*HINT") as info:
        build(tmp_path)
    assert "\n" not in str(info.value)


def test_damaged_files(folder, tmp_path):
    config, good = (folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes()

    def refuses(message):
        with pytest.raises(UserError, match=f"{message}.*HINT") as info:
            build(tmp_path)
        assert "\n" not in str(info.value)

    refuses("cannot read .*config.json: No such file")
    (tmp_path / "config.json").write_bytes(config[:-20])
    refuses("config.json is not JSON")
    (tmp_path / "config.json").write_bytes(b"[]")
    refuses(r"config.json is \[\], not a JSON object")
    (tmp_path / "config.json").write_bytes(config)
    refuses("has no model.safetensors")
    weights = tmp_path / "model.safetensors"
    for data in (good[:-4], good[:100], good[:4], b"", b"\xff" * 400, good[:9] + b"!" + good[10:], good + b"\0"):
        weights.write_bytes(data)
        refuses("model.safetensors is not a whole .safetensors file")
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    names = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    first, second = names[:2]
    (start, end), after = header[first]["data_offsets"], header[second]["data_offsets"]
    for moved in ([start, end], [after[0] + 4, after[1] + 4]):  # two tensors on one place; a hole between them
        text = json.dumps(header | {second: header[second] | dict(data_offsets=moved)}).encode()
        weights.write_bytes(struct.pack("<Q", len(text)) + text + good[8 + length :])
        refuses("model.safetensors is not a whole .safetensors file: .*invalid")
    text = json.dumps(header)
    entry = f'"{second}": {json.dumps(header[second])}'
    text = text.replace(entry, f'{entry}, "{first}": {json.dumps(header[second])}').encode()  # one name, two tensors
    weights.write_bytes(struct.pack("<Q", len(text)) + text + good[8 + length :])
    refuses("model.safetensors is not a whole .safetensors file: .*invalid")
    tensors = dict(huggingface.read_safetensors(folder / "model.safetensors"))
    text = json.dumps(header | {first: header[first] | dict(shape=[1] * 99 + header[first]["shape"])}).encode()
    weights.write_bytes(struct.pack("<Q", len(text)) + text + good[8 + length :])  # more dimensions than NumPy has
    with pytest.raises(UserError, match=f"{first.removeprefix('transformer.')} is of type F32 of 100 dimensions.*HINT"):
        huggingface.read_hf(tmp_path, np.empty(build(folder).params_flat.size, np.float32))
    tensors["transformer.wpe.weight"] = ("I64", np.zeros((64, 64), np.int64))
    raw_safetensors(weights, tensors)
    refuses("wpe.weight is of type I64, known are F32, F16, BF16")
    weights.unlink()
    index = {"weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses("has no model.safetensors, or not all files of its index")


def test_index_cannot_name_a_file_elsewhere(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "secret").write_bytes(b"")
    (tmp_path / "a" / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "../secret"}}')
    assert huggingface.weight_files(tmp_path / "a") == []
    (tmp_path / "a" / "model.safetensors.index.json").write_text('{"weight_map": ["wte.weight"]}')
    with pytest.raises(UserError, match="index.json: weight_map is .*not a JSON object.*HINT"):
        huggingface.weight_files(tmp_path / "a")
