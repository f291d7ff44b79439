"""The command llmc.test_gpt2 on small models whose debug state comes from PyTorch: what must pass and what must not."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import GPT2_TENSORS, cross_entropy, gpt2_logits, to_torch
from test_gpt2 import batches, one_torch_thread, torch_training, weights  # noqa: F401  (the fixture acts by its name)

from llmc import test_gpt2
from llmc.files import debug_state, model_file
from llmc.gpt2 import GPT2Config
from llmc.model import AdamW

ROOT = Path(__file__).resolve().parents[1]
CONFIG = GPT2Config(16, 61, 128, 2, 2, 16)
B, T = 2, 11
TABLE = ["logits", "loss", *(f"d{name}" for name in GPT2_TENSORS)]


def pytorch_debug_state(params, x, y):
    """One forward and backward pass in float32, as llm.c's train_gpt2.py has it."""
    tensors = {name: to_torch(values).requires_grad_() for name, values in params.items()}
    logits = gpt2_logits(tensors, to_torch(x), CONFIG.num_heads, CONFIG.vocab_size)
    loss = cross_entropy(logits, to_torch(y)).mean()
    loss.backward()
    grads = {name: tensors[name].grad.numpy() for name in GPT2_TENSORS}
    return dict(x=x, y=y, logits=logits.detach().numpy(), loss=np.float32(loss.item()), grads=grads)


def write(folder, params, debug, version=3, names=("model.bin", "debug.bin")):
    header = {name: getattr(CONFIG, name) for name in model_file.MODEL_WORDS}
    flat = np.concatenate([params[name].ravel() for name in GPT2_TENSORS])
    model_path, debug_path = (str(folder / name) for name in names)
    model_file.write_model(model_path, header, flat, version)
    grads = np.concatenate([debug["grads"][name].ravel() for name in GPT2_TENSORS])
    debug_state.write_debug_state(debug_path, debug["x"], debug["y"], debug["logits"], debug["loss"], grads)
    return model_path, debug_path


@pytest.fixture
def made():
    """(parameters, debug state) of a small model."""
    params = weights(CONFIG)
    ((x, y),) = batches(CONFIG, B, T, 1)
    return params, pytorch_debug_state(params, x, y)


def command(folder):
    """Run it in a folder, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "llmc.test_gpt2"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def verdicts(out):
    """{row: "ok" or "NOT OK"} of the table of tensors."""
    rows = re.findall(r"^(\w+) +(\S+) +(\S+)   ([\d, ]*?) +(ok|NOT OK)$", out.split("\n10 steps")[0], re.M)
    return {name: (verdict, where) for name, _, _, where, verdict in rows}


def failing(out):
    assert list(verdicts(out)) == TABLE
    return [name for name, (verdict, _) in verdicts(out).items() if verdict != "ok"]


@pytest.mark.parametrize("version, flags", [(3, []), (3, ["-r", "0"]), (3, ["-r", "2", "--threads", "1"]), (5, [])])
def test_passes(tmp_path, capsys, made, version, flags):
    paths = write(tmp_path, *made, version)
    assert test_gpt2.main([*paths, *flags]) == 0
    out, err = capsys.readouterr()
    assert failing(out) == [] and err == "" and "NOT" not in out
    assert out.endswith("\noverall okay: 1\n")
    assert f"version {version}" in out and f"B = {B}, T = {T}" in out
    assert out.count("10 steps as ") == 2 and out.count("is lower than the first") == 2
    for name, settings, _, _ in test_gpt2.RUNS:
        losses = [float(loss) for loss in re.findall(r"^\d+ +(\d\.\d{6})$", out.split(f"as {name}:")[1], re.M)[:10]]
        pairs, adamw = [(made[1]["x"], made[1]["y"])] * 10, AdamW(lr=1e-4, **settings)
        expected = torch_training(CONFIG, made[0], pairs, torch.float64, adamw)[0]
        np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5 if version == 3 else 0.05)


def test_passes_with_the_default_names_as_a_command(tmp_path, made):
    write(tmp_path, *made, names=("gpt2_124M.bin", "gpt2_124M_debug_state.bin"))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-m", "llmc.test_gpt2"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert failing(run.stdout) == [] and run.stdout.endswith("overall okay: 1\n")


@pytest.mark.parametrize("name", GPT2_TENSORS)
def test_a_wrong_gradient_is_found(tmp_path, capsys, made, name):
    params, debug = made
    gradient = debug["grads"][name]
    at = tuple(int(n) // 2 for n in gradient.shape)
    if name == "wte":
        at = (CONFIG.vocab_size - 1, 3)
    gradient[at] += 0.01 * np.abs(gradient).max()
    assert test_gpt2.main(list(write(tmp_path, params, debug))) == 1
    out = capsys.readouterr().out
    assert failing(out) == [f"d{name}"] and verdicts(out)[f"d{name}"][1] == ", ".join(map(str, at))
    assert out.endswith("overall okay: 0\n")


@pytest.mark.parametrize("value, code", [(0.002, 0), (0.1, 1)])
def test_limits_of_rounded_weights_are_llmcs(tmp_path, capsys, made, value, code):
    """A bf16 model and a debug state of the weights before rounding: 4e-3 + 0.079 |expected| for wpe."""
    params, debug = made
    debug["grads"]["wpe"][13, 5] += value  # a position that was not seen: its gradient is zero
    assert test_gpt2.main(list(write(tmp_path, params, debug, version=5))) == code
    assert failing(capsys.readouterr().out) == ["dwpe"] * code


@pytest.mark.parametrize("value", [1e-2, np.nan, np.inf])
def test_a_wrong_logit_is_found(tmp_path, capsys, made, value):
    params, debug = made
    debug["logits"][1, 4, 60] += value
    assert test_gpt2.main(list(write(tmp_path, params, debug))) == 1
    out = capsys.readouterr().out
    assert failing(out) == ["logits"] and verdicts(out)["logits"][1] == "1, 4, 60"
    assert out.endswith("overall okay: 0\n")


@pytest.mark.parametrize("value", [1e-2, -1e-2, np.nan])
def test_a_wrong_loss_is_found(tmp_path, capsys, made, value):
    params, debug = made
    debug["loss"] += np.float32(value)
    assert test_gpt2.main(list(write(tmp_path, params, debug))) == 1
    out = capsys.readouterr().out
    assert failing(out) == ["loss"] and out.endswith("overall okay: 0\n")


@pytest.mark.parametrize("name", ["wte", "wpe", "ln1w", "qkvw", "attprojb", "fcprojw", "lnfb"])
def test_a_wrong_weight_is_found(tmp_path, capsys, made, name):
    params, debug = made
    params[name].reshape(-1)[5] += 0.05
    assert test_gpt2.main(list(write(tmp_path, params, debug))) == 1
    out = capsys.readouterr().out
    assert "logits" in failing(out) and out.endswith("overall okay: 0\n")


def test_a_weight_that_is_not_finite_is_found(tmp_path, capsys, made):
    params, debug = made
    params["fcw"][1, 2, 3] = 12345.0
    paths = write(tmp_path, params, debug)
    content = Path(paths[0]).read_bytes()  # of another program: ours writes no such file
    assert content.count(struct.pack("<f", 12345.0)) == 1
    Path(paths[0]).write_bytes(content.replace(struct.pack("<f", 12345.0), struct.pack("<f", np.nan)))
    assert test_gpt2.main(list(paths)) == 1
    out = capsys.readouterr().out
    assert "logits" in failing(out) and "loss" in failing(out) and out.endswith("overall okay: 0\n")


def test_losses_that_do_not_fall_are_found(tmp_path, capsys, made, monkeypatch):
    paths = write(tmp_path, *made)
    monkeypatch.setattr(test_gpt2, "LEARNING_RATE", -1e-4)
    assert test_gpt2.main(list(paths)) == 1
    out = capsys.readouterr().out
    assert failing(out) == [] and out.count("NOT lower than the first   NOT OK") == 2


# ----------------------------------------------------------------------------------------------------------------------
# the published losses


def test_published_numbers():
    """llm.c's, test_gpt2.cu and test_gpt2.c."""
    (cu, cu_settings, cu_losses, _), (c, c_settings, c_losses, _) = test_gpt2.RUNS
    assert (cu, c, test_gpt2.LEARNING_RATE) == ("test_gpt2.cu", "test_gpt2.c", 1e-4)
    assert cu_settings == dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, grad_clip=1.0)
    assert c_settings == dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, grad_clip=0.0)
    published_cu = "5.270009 4.060681 3.320085 2.717550 2.181066 1.653923 1.168050 0.736873 0.401021 0.187493"
    published_c = (
        "5.270007133 4.059706688 3.375123024 2.800782681 2.315382242 "
        "1.849028587 1.394656420 0.999146521 0.624080420 0.376510978"
    )
    assert list(cu_losses) == [float(x) for x in published_cu.split()]
    np.testing.assert_allclose(c_losses, [float(x) for x in published_c.split()], rtol=0, atol=5e-7)
    assert test_gpt2.PUBLISHED_FOR == dict(num_parameters=124_475_904, B=4, T=64, loss=5.27)


@pytest.fixture
def published(monkeypatch, made):
    """As if the small model were GPT-2 124M: the losses that PyTorch gets with the settings of both lists."""
    params, debug = made
    runs = []
    for name, settings, _, limit in test_gpt2.RUNS:
        pairs = [(debug["x"], debug["y"])] * 10
        losses, _, clipped = torch_training(CONFIG, params, pairs, torch.float64, AdamW(lr=1e-4, **settings))
        assert clipped == (10 if settings["grad_clip"] else 0)
        runs.append((name, settings, tuple(losses), min(limit, 1e-3)))
    monkeypatch.setattr(test_gpt2, "RUNS", tuple(runs))
    N = sum(values.size for values in params.values())
    monkeypatch.setattr(test_gpt2, "PUBLISHED_FOR", dict(num_parameters=N, B=B, T=T, loss=float(debug["loss"])))
    return runs


def rows(out, name):
    return re.findall(r"^(\d+) +([\d.]+) +([\d.]+) +(\S+) +(\S+)   (ok|NOT OK)$", out.split(f"as {name}:")[1], re.M)[
        :10
    ]


def test_published_losses_are_compared(tmp_path, capsys, made, published):
    assert test_gpt2.main(list(write(tmp_path, *made))) == 0
    out = capsys.readouterr().out
    assert out.endswith("overall okay: 1\n") and "the last" not in out
    for name, _, losses, limit in published:
        for step, (row, loss) in enumerate(zip(rows(out, name), losses, strict=True), 1):
            assert int(row[0]) == step and row[2] == f"{loss:.6f}" and float(row[4]) == limit and row[5] == "ok"
            assert abs(float(row[1]) - loss) < 1e-5


@pytest.mark.parametrize("run, step", [(0, 1), (0, 10), (1, 5)])
def test_a_loss_that_is_not_the_published_one_is_found(tmp_path, capsys, made, published, monkeypatch, run, step):
    name, settings, losses, limit = published[run]
    changed = list(published)
    changed[run] = (name, settings, (*losses[: step - 1], losses[step - 1] + 2e-3, *losses[step:]), limit)
    monkeypatch.setattr(test_gpt2, "RUNS", tuple(changed))
    assert test_gpt2.main(list(write(tmp_path, *made))) == 1
    out = capsys.readouterr().out
    wrong = [(i, int(row[0])) for i in (0, 1) for row in rows(out, published[i][0]) if row[5] != "ok"]
    assert failing(out) == [] and wrong == [(run, step)] and out.endswith("overall okay: 0\n")


@pytest.mark.parametrize("other", [dict(num_parameters=1), dict(B=B + 1), dict(T=T - 1), dict(loss=9.0)])
def test_published_losses_are_for_their_files_only(tmp_path, capsys, made, published, monkeypatch, other):
    monkeypatch.setattr(test_gpt2, "PUBLISHED_FOR", test_gpt2.PUBLISHED_FOR | other)
    monkeypatch.setattr(test_gpt2, "RUNS", [(*run[:2], (0.0,) * 10, 0.0) for run in published])
    assert test_gpt2.main(list(write(tmp_path, *made))) == 0
    assert capsys.readouterr().out.count("is lower than the first") == 2


# ----------------------------------------------------------------------------------------------------------------------
# files that cannot be used


def patch(path, offset, value):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack("<i", value))


def too_long_for_the_model(paths, made):
    """T = 17 of 16 positions: all sizes are right, and only the positions are missing."""
    x = np.zeros((1, 17), np.int32)
    N = sum(values.size for values in made[0].values())
    debug_state.write_debug_state(paths[1], x, x, np.zeros((1, 17, 61), np.float32), 0.0, np.zeros(N, np.float32))
    return paths


def other_model(paths, made):
    """A debug state whose vocabulary is not the model's: found by the file's size."""
    x, N = np.zeros((1, 4), np.int32), sum(values.size for values in made[0].values())
    debug_state.write_debug_state(paths[1], x, x, np.zeros((1, 4, 60), np.float32), 0.0, np.zeros(N, np.float32))
    return paths


def damage(offset, value, which):
    def apply(paths, made):
        patch(paths[which], offset, value)
        return paths

    return apply


def cut(which, size):
    def apply(paths, made):
        os.truncate(paths[which], size)
        return paths

    return apply


BAD = {
    "no model": (lambda paths, made: ("nowhere.bin", paths[1]), "nowhere.bin does not exist.*starter pack"),
    "no debug state": (lambda paths, made: (paths[0], "nowhere.bin"), "nowhere.bin does not exist.*starter pack"),
    "a folder": (lambda paths, made: (os.path.dirname(paths[0]), paths[1]), "cannot read"),
    "exchanged": (lambda paths, made: paths[::-1], "debug.bin is a debug state, expected a GPT-2 model"),
    "the model twice": (lambda paths, made: (paths[0],) * 2, "model.bin is a GPT-2 model, expected a debug state"),
    "empty": (cut(1, 0), "debug.bin is empty"),
    "truncated": (cut(1, 5000), "debug.bin is truncated"),
    "truncated model": (cut(0, 5000), "model.bin is truncated"),
    "version": (damage(4, 1, 1), "debug.bin .* version 1"),
    "model version": (damage(4, 1, 0), "model.bin .* version 1"),
    "batch": (damage(8, 0, 1), "debug.bin .* B = 0"),
    "another model": (other_model, "debug.bin is truncated"),
    "too long": (too_long_for_the_model, r"debug.bin has T = 17 positions, .*model.bin has 16\."),
    "token": (damage(1024 + 4 * 5, 61, 1), r"debug.bin has a token 61, .*model.bin has 0 to 60\."),
    "target": (damage(1024 + 4 * (B * T + 3), -1, 1), r"debug.bin has a token -1, .*model.bin has 0 to 60\."),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, capsys, made, case):
    change, message = BAD[case]
    paths = change(write(tmp_path, *made), made)
    assert test_gpt2.main(list(paths)) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.search(message, err), err
    assert err.startswith("llmc.test_gpt2: error: ") and err.count("\n") == 1 and "HINT: " in err


@pytest.mark.parametrize("argv", [["a", "b", "c"], ["-r", "3"], ["--threads", "0"], ["--no-such-flag"]])
def test_bad_flags(capsys, argv):
    with pytest.raises(SystemExit) as exit:
        test_gpt2.main(argv)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and err.count("\n") == 1 and "HINT: " in err


def test_no_files_as_a_command(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-m", "llmc.test_gpt2"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("llmc.test_gpt2: error: gpt2_124M.bin does not exist. HINT: ")
    assert run.stderr.count("\n") == 1
