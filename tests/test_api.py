"""The public API: the README's example, every public name, and what a user's mistake leads to."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from reference import assert_bits

import llmc
from llmc import cpu
from llmc.data.prepare import Dataset
from llmc.data.shards import write_shard

B, T = 2, 16


@pytest.fixture
def data(tmp_path):
    """A dataset of 4,000 random bytes."""
    tokens = np.random.default_rng(0).integers(97, 123, 4000).astype(np.uint16)
    for split, part in (("train", tokens[:3500]), ("val", tokens[3500:])):
        write_shard(tmp_path / f"x_{split}.bin", part, 257)
    return Dataset(str(tmp_path / "x_train.bin"), str(tmp_path / "x_val.bin"), "bytes", 257)


def model(**options):
    return llmc.GPT2("tiny:d2", cpu, B, T, vocab_size=257, **options)


def test_the_example_in_the_readme(tmp_path, monkeypatch):
    """It runs as it stands, but for the number of steps and of tokens."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert len(code.strip().splitlines()) <= 10
    for long, short in (("batches(200)", "batches(3)"), ('"ROMEO:"', '"ROMEO:", tokens=3')):
        assert code.count(long) == 1, long
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert 0 < names["loss"] < 6 and names["model"].steps == 3
    assert (tmp_path / "runs" / "nb" / "DONE_00000003").exists()


def test_import_is_light():
    """Neither NumPy nor a submodule is imported before a name is asked for; all names are there."""
    code = "import sys, llmc; assert not {'numpy', 'llmc.api'} & set(sys.modules); llmc.GPT2; print(*dir(llmc))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert set(llmc.__all__) <= set(done.stdout.split()), done.stderr
    with pytest.raises(AttributeError, match="no attribute 'gpt5'"):
        llmc.gpt5  # noqa: B018


def test_step_is_forward_backward_update(data):
    adamw = llmc.AdamW(lr=1e-3, weight_decay=0.1)
    one, other = model(), model()
    batches = list(llmc.DataLoader(data, B, T).batches(4))
    losses = [one.step(x, y, adamw) for x, y in batches]
    for t, ((x, y), loss) in enumerate(zip(batches, losses, strict=True), 1):
        other.forward(x)
        other.backward(x, y)
        assert other.mean_loss() == loss
        other.update(adamw, t)
    assert_bits("step", "parameters", one.params_flat, other.params_flat)
    assert one.steps == 4 and losses[0] == pytest.approx(np.log(257), rel=0.05)
    inputs, targets = (np.stack(arrays) for arrays in zip(*batches, strict=True))
    assert one.step(inputs, targets, adamw) > 0 and one.steps == 5  # micro-batches


def test_tensors_have_names(data):
    m = model()
    ((x, y),) = llmc.DataLoader(data, B, T).batches(1)
    m.step(x, y, llmc.AdamW(lr=1e-3))
    C = m.config.channels
    assert m.grads.h[0].qkvw.shape == (3 * C, C) and m.acts.h[1].atty.shape == (B, T, C)
    assert np.abs(m.grads.h[0].qkvw).max() > 0 and np.shares_memory(m.grads.wte, m.grads_flat)


def test_save_and_load(data, tmp_path):
    """The same logits and the same text; a run's newest step is taken."""
    m, folder = model(), tmp_path / "run"
    loader = llmc.DataLoader(data, B, T)
    for x, y in loader.batches(2):
        m.step(x, y, llmc.AdamW(lr=1e-2))
    path = m.save(folder)
    assert Path(path).name == "model_00000002.bin" and sorted(os.listdir(folder))[0] == "DONE_00000002"
    loaded = llmc.load(folder, cpu, B, T)
    assert_bits("load", "parameters", loaded.params_flat, m.params_flat)
    assert_bits("load", "logits", loaded.forward(x).output, m.forward(x).output)
    text = m.generate("ab", tokens=12)
    assert text == loaded.generate("ab", tokens=12) == "".join(loaded.stream("ab", tokens=12)) and text
    assert text != m.generate("ab", tokens=12, seed=3)
    again = llmc.load(path, cpu, B, T, training=True)
    again.step(x, y, llmc.AdamW(lr=1e-2))
    again.save(tmp_path / "deep" / "run")
    with pytest.raises(llmc.UserError, match="no optimizer state. HINT"):
        loaded.save(folder)


def test_repr_says_what_it_is():
    text = repr(model())
    for part in ("GPT2Config", "num_layers=2", "parameters in float32", "2 x 16", "llmc.cpu"):
        assert part in text, text
    assert "forward passes alone" in repr(llmc.load.__globals__["GPT2"]("tiny:d1", cpu, 1, 8, training=False))


def test_seed_and_config():
    small = llmc.GPT2Config(16, 200, 256, 1, 2, 16)
    one, same, other = (llmc.GPT2(small, cpu, 1, 16, seed=seed) for seed in (1, 1, 2))
    assert_bits("seed", "parameters", one.params_flat, same.params_flat)
    assert not np.array_equal(one.params_flat, other.params_flat)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: llmc.GPT2("d13", cpu, 1, 8), "d13: no such model descriptor"),
        (lambda: llmc.GPT2("tiny:d1", cpu, 1, 300, vocab_size=257, dtype="bf16"), "the CPU op set has fp32 only"),
        (lambda: llmc.GPT2("d12", cpu, 1, 2000), "-t 2000"),
        (lambda: llmc.load("nowhere.bin", cpu), "nowhere.bin"),
        (lambda: llmc.dataset("nowhere.txt", "bytes"), "nowhere.txt"),
        (lambda: llmc.dataset("shakespeare", "words"), "words"),
        (lambda: llmc.GPT2(llmc.GPT2Config(8, 300, 384, 1, 1, 8), cpu, 1, 8).generate(), "300"),
    ],
)
def test_mistakes_are_one_line_with_a_hint(call, text):
    with pytest.raises(llmc.UserError) as caught:
        call()
    assert text in str(caught.value) and "HINT" in str(caught.value) and "\n" not in str(caught.value)


def test_step_refuses_other_shapes_and_ids():
    m, adamw = model(), llmc.AdamW(lr=1e-3)
    ids = np.zeros((B, T), np.int32)
    for inputs, targets in ((ids[:1], ids[:1]), (ids, ids + 257), (ids - 1, ids), (ids, ids[:, :3])):
        with pytest.raises(llmc.UserError, match="step"):
            m.step(inputs, targets, adamw)
    assert m.steps == 0
