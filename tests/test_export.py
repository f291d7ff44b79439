"""What llmc.export writes, loaded by transformers: the same logits, the same token ids."""

import json
import os
import re
import struct

import numpy as np
import pytest
import tiktoken.load
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc import cpu, export, gpt2
from llmc.__main__ import main as llmc
from llmc.data import tokenizer
from llmc.files import checkpoints, model_file
from llmc.files.state_file import TrainState
from llmc.gpt2 import GPT2Config
from llmc.model import Model

T = 48
CONFIGS = {
    "gpt2": GPT2Config(64, 50257, 50304, 1, 2, 16),
    "bytes": GPT2Config(64, 257, 384, 2, 4, 64),
    "none": GPT2Config(64, 300, 384, 2, 2, 32),
}
TEXTS = [
    "Hello world", " leading and  double   spaces\t\n\n tabs", "ROMEO:\nIt's 2024, we'll see; don't they've?", "", "a",
    "naïve café — 日本語 🙂 \u00a0\u200b", "def f(x):\n    return x**2  # 12345678\r\n", "\x00\x01\x7f<|endoftext| >",
]  # fmt: skip


def header(config):
    return {name: getattr(config, name) for name in model_file.MODEL_WORDS}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: (.bin file of fresh weights, its model)}"""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for name, config in CONFIGS.items():
        model = Model(gpt2, cpu, config, 2, T, training=False)
        model.init_weights(5)
        rng = np.random.default_rng(1)
        model.params_flat += 0.02 * rng.standard_normal(model.params_flat.size, np.float32)
        model.params.wte[config.vocab_size :] = 0
        model_file.write_model(folder / f"{name}.bin", header(config), model.params_flat)
        found[name] = str(folder / f"{name}.bin"), model
    return found


@pytest.fixture(scope="module", params=["gpt2", "bytes"])
def exported(request, files, tmp_path_factory):
    """(our tokenizer, our model, the folder) of each vocabulary."""
    path, model = files[request.param]
    out = tmp_path_factory.mktemp("out") / "hf"
    assert export.main([path, str(out)]) == 0
    return tokenizer.get(request.param), model, out


def their_logits(folder, inputs, **kwargs):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    with torch.no_grad():
        return model, model(torch.from_numpy(inputs).long()).logits.float().numpy()


def test_transformers_loads_the_model(exported):
    ours, model, folder = exported
    V = model.config.vocab_size
    inputs = np.random.default_rng(0).integers(0, V, (2, T), np.int32)
    theirs, logits = their_logits(folder, inputs)
    np.testing.assert_allclose(model.forward(inputs).output[..., :V], logits, atol=2e-5)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == ours.eot
    assert theirs.dtype == torch.float32 and theirs.lm_head.weight is theirs.transformer.wte.weight
    padding = (model.config.padded_vocab_size - V) * model.config.channels
    assert sum(p.numel() for p in theirs.parameters()) == model.params_flat.size - padding


def test_transformers_loads_the_tokenizer(exported):
    """Ids both ways, through tokenizer.json and, without it, through vocab.json and merges.txt."""
    ours, _, folder = exported
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    (folder / "slow").mkdir(exist_ok=True)
    for name in ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / "slow" / name).write_bytes((folder / name).read_bytes())
    from_merges = transformers.AutoTokenizer.from_pretrained(folder / "slow")
    for theirs in (auto, from_merges):
        assert len(theirs) == ours.n_vocab and theirs.eos_token_id == theirs.bos_token_id == ours.eot
        assert theirs.model_max_length == 64
        for text in TEXTS:
            ids = ours.encode(text).tolist()
            assert theirs.encode(text) == ids, text
            assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
        assert theirs.encode("a<|endoftext|>b") == [*ours.encode("a"), ours.eot, *ours.encode("b")]

    @settings(max_examples=100, deadline=None)
    @given(text=st.text())
    def same(text):
        if "<|endoftext|>" not in text:
            assert auto.encode(text) == ours.encode(text).tolist()

    same()


def test_merges_are_those_of_openai(exported):
    """Line by line those of the published file, which tiktoken keeps in its cache."""
    ours, _, folder = exported
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    published = ["#version: 0.2"]
    if ours.name == "gpt2":
        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
        published = tiktoken.load.read_file_cached(url).decode().splitlines()
        assert len(published) == 50001
    assert lines == published
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocab) == ours.n_vocab and vocab["<|endoftext|>"] == ours.eot
    if ours.name == "gpt2":
        assert vocab == json.loads(tiktoken.load.read_file_cached(url.replace("vocab.bpe", "encoder.json")))


@pytest.mark.parametrize("dtype, kind", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_lower_precisions(files, tmp_path, dtype, kind):
    """Rounded to nearest, as torch does; no tokenizer of this size, which is said."""
    path, model = files["none"]
    assert export.main([path, str(tmp_path / "hf"), "--dtype", dtype]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert theirs.dtype == kind
    qkvw = torch.from_numpy(model.params.h[1].qkvw.T.copy()).to(kind)
    assert torch.equal(theirs.transformer.h[1].attn.c_attn.weight, qkvw)
    assert sorted(os.listdir(tmp_path / "hf")) == ["config.json", "generation_config.json", "model.safetensors"]


def test_there_and_back_is_the_same_file(files, tmp_path, capsys):
    """fp32 and bf16 through Hugging Face's folder to llm.c's file, byte for byte; and between precisions."""
    path, model = files["bytes"]
    for version, dtype in ((3, "fp32"), (5, "bf16")):
        start = tmp_path / f"{dtype}.bin"
        model_file.write_model(start, header(model.config), model.params_flat, version)
        assert export.main([str(start)]) == 0  # beside it, as it is
        assert (
            export.main([f"hf:{tmp_path}/{dtype}-hf", str(tmp_path / "back.bin"), "--format", "bin", "--overwrite"])
            == 0
        )
        assert (tmp_path / "back.bin").read_bytes() == start.read_bytes()
    assert export.main([path, str(tmp_path / "b.bin"), "--dtype", "bf16"]) == 0  # what ends in .bin is a .bin file
    assert (tmp_path / "b.bin").read_bytes() == (tmp_path / "bf16.bin").read_bytes()
    assert (
        f"wrote {tmp_path}/fp32-hf: config.json, model.safetensors (fp32) and the tokenizer" in capsys.readouterr().out
    )


@pytest.mark.parametrize("value, dtype, message", [
    (1e5, "fp16", r"transformer.wte.weight\[1, 12\] is 100000, more than fp16 holds. HINT: --dtype fp32"),
    (-3.4e38, "bf16", r"transformer.wte.weight\[1, 12\] is -inf"),
    (np.nan, "fp32", r"transformer.wte.weight\[1, 12\] is nan. HINT"),
    (np.inf, "bin", r"wte\[1, 12\] is inf. HINT"),
])  # fmt: skip
def test_what_is_not_finite_is_not_exported(files, tmp_path, capsys, value, dtype, message):
    """The tensor and the value are named, and nothing is left behind."""
    path, model = files["none"]
    data = bytearray(open(path, "rb").read())
    struct.pack_into("<f", data, 1024 + 4 * (model.config.channels + 12), value)
    (tmp_path / "bad.bin").write_bytes(data)
    flags = ("--format", "bin") if dtype == "bin" else ("--dtype", dtype)
    assert llmc(["export", str(tmp_path / "bad.bin"), str(tmp_path / "out"), *flags]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1, err
    assert os.listdir(tmp_path) == ["bad.bin"]


def test_the_newest_checkpoint_of_a_run(files, tmp_path):
    path, model = files["none"]
    zeros = np.zeros(model.params_flat.size, np.float32)
    run = str(tmp_path / "run")
    os.mkdir(run)
    state = TrainState(7, rng_state=1, rng_state_last_update=1)
    checkpoints.save_checkpoint(run, header(model.config), model.params_flat, 3, state, (zeros, zeros))
    assert llmc(["export", run]) == 0
    inputs = np.arange(T, dtype=np.int32)[None]
    assert np.allclose(their_logits(run + "-hf", inputs)[1], model.forward(inputs).output[..., :300], atol=2e-5)


def test_bad_input_is_one_line(files, tmp_path, capsys):
    path, _ = files["none"]
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for args, message in (
        ([path, str(tmp_path / "hf")], "config.json exists"),
        ([path, str(tmp_path / "x.bin"), "--format", "bin", "--dtype", "fp16"], "fp32 or bf16"),
        ([path, str(tmp_path / "x.bin"), "--dtype", "fp16"], "fp32 or bf16"),
        ([path, str(tmp_path / "x.bin"), "--format", "hf"], "x.bin with --format hf: that is a folder"),
        ([path, str(tmp_path / "x"), "--tokenizer", "gpt2"], "50257 tokens, the model 300"),
        ([path, str(tmp_path / "file" / "x")], "cannot make the folder"),
        ([path, str(tmp_path / "no" / "x.bin"), "--format", "bin"], "cannot write"),
        ([str(tmp_path)], "holds no finished checkpoint"),
        ([str(tmp_path / "missing.bin")], "No such file"),
        (["hf:" + str(tmp_path / "missing")], "is not a folder"),
        ([str(tmp_path / "hf"), str(tmp_path / "y")], "model_type is None"),
    ):
        assert export.main(args) == 2
        err = capsys.readouterr().err
        assert message in err and "HINT: " in err and err.count("\n") == 1, err
    assert sorted(os.listdir(tmp_path)) == ["file", "hf"]
