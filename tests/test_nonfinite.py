"""The non-finite guard: every op in each direction is made to write one NaN or Inf, which has to be found and named.

The expected names are written down by hand, from the order of calls in llmc/gpt2.py: the nth call of an op in a step of
a model of two layers.
"""

import functools
import inspect
import json
import re
from pathlib import Path

import linear_model
import numpy as np
import pytest
from conftest import op_set, to_host
from reference import OPS, assert_bits
from test_gpt2 import LLMC, batches, weights
from test_gpt2_cuda import CONFIG, B, T, build

import llmc.model
from llmc import cpu, simt, train
from llmc.data.loader import DataLoader
from llmc.data.shards import write_shard
from llmc.files import checkpoints, model_file
from llmc.model import Model
from llmc.training import loop, nonfinite

PLACE = 37  # element that is poisoned, of arrays that have as many


def poison(monkeypatch, ops, op, argument, nth=None, value=np.nan, when=lambda arguments: True):
    """From now on the nth call of an op (None: every one), counted from 0, writes `value` into one of its arrays."""
    function, calls = getattr(ops, op), []
    signature = inspect.signature(function)

    @functools.wraps(function)
    def poisoned(*args, **kwargs):
        function(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        calls.append(op)
        if nth in (None, len(calls) - 1) and when(arguments):
            array = arguments[argument].reshape(-1)
            array[PLACE % array.size] = value

    monkeypatch.setattr(ops, op, poisoned)


def traced(model, micro_steps=2):
    inputs, targets = zip(*batches(CONFIG, B, T, micro_steps), strict=True)
    before, state = to_host(model.params_flat).copy(), (model.rng_state, model.ops, model.graphs)
    found = nonfinite.trace(model, np.array(inputs), np.array(targets), rng_state=13371337)
    assert_bits("trace", "weights", to_host(model.params_flat), before)
    assert (model.rng_state, model.ops, model.graphs) == state
    return found


def expected(name, op, argument, where, value, shape):
    at = PLACE % int(np.prod(shape))
    kinds = "1 NaN, 0 Inf" if np.isnan(value) else "0 NaN, 1 Inf"
    first = tuple(int(i) for i in np.unravel_index(at, shape))
    return (
        f"the first non-finite value is in {name}, written by {op} as {argument} ({where}): "
        f"{kinds} of {int(np.prod(shape))}, first at {first}"
    )


C, V = CONFIG.channels, CONFIG.padded_vocab_size
ACTS, FORWARD, BACKWARD = (B, T, C), "forward, {}micro-step {}", "backward, {}micro-step {}"
IN = [f"layer {layer}, " for layer in range(2)]
#    op, its nth call in a step, argument, tensor, where, shape
CASES = [
    ("encoder_forward", 0, "out", "encoded", FORWARD.format("", 0), ACTS),
    ("encoder_forward", 1, "out", "encoded", FORWARD.format("", 1), ACTS),
    ("layernorm_forward", 0, "out", "h[0].ln1", FORWARD.format(IN[0], 0), ACTS),
    ("layernorm_forward", 1, "rstd", "h[0].ln1_rstd", FORWARD.format(IN[0], 1), (B, T)),
    ("matmul_forward", 0, "out", "h[0].qkvr", FORWARD.format(IN[0], 0), (B, T, 3 * C)),
    ("matmul_forward", 5, "out", "scratch_btc", FORWARD.format(IN[1], 0), ACTS),  # attention's projection
    ("matmul_forward", 6, "pre_gelu", "h[1].fch", FORWARD.format(IN[1], 0), (B, T, 4 * C)),
    ("matmul_forward", 6, "out", "h[1].fch_gelu", FORWARD.format(IN[1], 0), (B, T, 4 * C)),  # one for all layers
    ("matmul_forward", 12, "out", "scratch_btc", FORWARD.format(IN[0], 1), ACTS),  # of the MLP
    ("matmul_forward", 8, "out", "output", FORWARD.format("", 0), (B, T, V)),
    ("attention_forward", 0, "att", "h[0].att", FORWARD.format(IN[0], 0), (B, 2, T)),
    ("attention_forward", 3, "out", "h[1].atty", FORWARD.format(IN[1], 1), ACTS),
    ("fused_residual_forward", 0, "residual", "h[0].residual2", FORWARD.format(IN[0], 0), ACTS),
    ("fused_residual_forward", 2, "normed", "h[1].ln2", FORWARD.format(IN[1], 0), ACTS),
    ("fused_residual_forward", 1, "residual", "h[0].residual3", FORWARD.format(IN[0], 0), ACTS),
    ("fused_residual_forward", 1, "normed", "h[1].ln1", FORWARD.format(IN[1], 0), ACTS),  # the next layer's
    ("fused_residual_forward", 1, "mean", "h[1].ln1_mean", FORWARD.format(IN[1], 0), (B, T)),
    ("fused_residual_forward", 3, "residual", "h[1].residual3", FORWARD.format(IN[1], 0), ACTS),
    ("fused_residual_forward", 3, "normed", "lnf", FORWARD.format("", 0), ACTS),
    ("fused_classifier", 0, "losses", "losses", BACKWARD.format("", 0), (B, T)),
    ("fused_classifier", 1, "logits", "output", BACKWARD.format("", 1), (B, T, V)),
    ("matmul_backward", 0, "dinp", "dlnf", BACKWARD.format("", 0), ACTS),
    ("matmul_backward", 9, "dweight", "grads.wte", BACKWARD.format("", 1), (V, C)),
    ("matmul_backward", 1, "dinp", "dfch", BACKWARD.format(IN[1], 0), (B, T, 4 * C)),
    ("matmul_backward", 5, "dbias", "grads.h[0].fcprojb", BACKWARD.format(IN[0], 0), (C,)),
    ("matmul_backward", 6, "dinp", "dl_btc", BACKWARD.format(IN[0], 0), ACTS),
    ("matmul_backward", 7, "dinp", "dl_btc", BACKWARD.format(IN[0], 0), ACTS),
    ("matmul_backward", 4, "dweight", "grads.h[1].qkvw", BACKWARD.format(IN[1], 0), (3 * C, C)),
    ("layernorm_backward", 0, "dinp", "dresidual", BACKWARD.format("", 0), ACTS),
    ("layernorm_backward", 0, "dweight", "grads.lnfw", BACKWARD.format("", 0), (C,)),
    ("layernorm_backward", 4, "dinp", "dresidual", BACKWARD.format(IN[0], 0), ACTS),
    ("layernorm_backward", 6, "dbias", "grads.h[1].ln2b", BACKWARD.format(IN[1], 1), (C,)),
    ("attention_backward", 1, "dqkvr", "dqkvr", BACKWARD.format(IN[0], 0), (B, T, 3 * C)),
    ("matmul_backward", 1, "inp", "h[1].fch_gelu", BACKWARD.format(IN[1], 0), (B, T, 4 * C)),  # recomputed
    ("encoder_backward", 0, "dwte", "grads.wte", BACKWARD.format("", 0), (V, C)),
    ("encoder_backward", 1, "dwpe", "grads.wpe", BACKWARD.format("", 1), (CONFIG.max_seq_len, C)),
    ("global_norm_squared", 0, "out", "norm_squared of the gradients", "update", (1,)),
    ("global_norm_squared", 1, "out", "norm_squared of the losses", "update", (1,)),
]
RECOMPUTED = [  # with -r 2
    ("layernorm_forward", 2, "out", "h[1].ln1", BACKWARD.format(IN[1], 0), ACTS),
    ("layernorm_forward", 3, "out", "h[0].ln2", BACKWARD.format(IN[0], 0), ACTS),
    ("fused_residual_forward", 1, "normed", "h[1].ln1", FORWARD.format(IN[1], 0), ACTS),  # one for all layers
]


def test_the_cases_are_every_op_of_a_step_in_each_direction():
    table = {op: set(arguments) for file in OPS.values() for op, arguments in file.items()}
    table = {op: arguments for op, arguments in table.items() if op not in ("adamw_update", "init_from_master")}
    table["matmul_backward"].add("inp")  # with recompute
    assert {op: set(arguments) for op, arguments in nonfinite.WRITES.items()} == table
    in_a_step = set(table) - {"residual_forward", "gelu_forward", "gelu_backward_inplace"}  # fused with others
    directions = {(case[0], case[4].split(",")[0]) for case in CASES + RECOMPUTED}
    assert {op for op, _ in directions} == in_a_step and ("layernorm_forward", "backward") in directions


@pytest.mark.parametrize("recompute, case", [*((1, c) for c in CASES), *((2, c) for c in RECOMPUTED)], ids=str)
def test_the_first_bad_value_is_named(monkeypatch, recompute, case):
    op, nth, argument, name, where, shape = case
    model = build(cpu, recompute=recompute)
    value = (np.nan, np.inf, -np.inf)[nth % 3]
    with np.errstate(all="ignore"), monkeypatch.context() as patch:
        poison(patch, cpu, op, argument, nth, value)
        assert traced(model) == expected(name, op, argument, where, value, shape)
    assert traced(model) is None


def test_pieces_of_a_large_batch_are_named(monkeypatch):
    """34 positions, the logits of 15 at a time: three pieces."""
    monkeypatch.setattr(llmc.model, "HEAD_ROWS", 15)
    model = build(cpu)
    cases = [
        ("matmul_backward", 0, "dinp", "dlnf", BACKWARD.format("", 0), (1, 15, C)),
        ("fused_classifier", 4, "losses", "losses from position 15 on", BACKWARD.format("", 1), (1, 15)),
        ("matmul_backward", 2, "dinp", "dlnf from position 30 on", BACKWARD.format("", 0), (1, 4, C)),
        ("matmul_forward", 10, "out", "output", BACKWARD.format("", 0), (1, 4, V)),
        ("matmul_backward", 1, "dweight", "grads.wte", BACKWARD.format("", 0), (V, C)),
    ]
    for op, nth, argument, name, where, shape in cases:
        with np.errstate(all="ignore"), monkeypatch.context() as patch:
            poison(patch, cpu, op, argument, nth)
            assert traced(model) == expected(name, op, argument, where, np.nan, shape)
    assert traced(model) is None


@pytest.mark.parametrize("dtype", ("fp16", "bf16"))
def test_on_the_executor(monkeypatch, dtype):
    ops = op_set("executor", monkeypatch)
    with simt.mode(orders=("forward",), fast=True):
        model = build(ops, dtype)
        model.graphs = {("forward_pass", (B, T)): pytest.fail}  # a replay launches
        for op, nth, argument, name, where, shape in (CASES[5], CASES[25], CASES[33], CASES[36]):
            with monkeypatch.context() as patch:
                poison(patch, ops, op, argument, nth)
                assert traced(model) == expected(name, op, argument, where, np.nan, shape)
        assert traced(model, micro_steps=1) is None


def test_weights_that_were_bad_before(ops):
    params, dtype = weights(CONFIG), "fp32" if ops is cpu else "fp16"
    params["fcw"][1, 3, 5] = -np.inf
    params["fcb"][1, 7] = np.nan  # comes later
    text = f"the weights were not finite before the step: params.h[1].fcw: 0 NaN, 1 Inf of {4 * C * C}, first at (3, 5)"
    assert traced(build(ops, dtype, params=params)) == text
    params["wpe"][2, 1] = np.nan
    assert "params.wpe: 1 NaN, 0 Inf" in traced(build(ops, dtype, params=params))


def test_an_architecture_of_another_shape(monkeypatch):
    config = linear_model.Config(max_seq_len=12, vocab_size=40, num_layers=3, channels=16)
    model = Model(linear_model, cpu, config, 2, 9)
    model.init_weights(1)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 1, 2, 9), dtype=np.int32)
    cases = [  # the nth call of an op: the head's is the first in backward, then the layers from the last on
        ("matmul_forward", 1, "out", "h[1].lin, written by matmul_forward as out (forward, layer 1, micro-step 0)"),
        ("matmul_backward", 0, "dinp", "dlin, written by matmul_backward as dinp (backward, micro-step 0)"),
        ("matmul_backward", 1, "dinp", "dinp, written by matmul_backward as dinp (backward, layer 2, micro-step 0)"),
        ("matmul_backward", 3, "dbias", "grads.h[0].linb, written by matmul_backward as dbias (backward, layer 0, "),
    ]
    for op, nth, argument, text in cases:
        with np.errstate(all="ignore"), monkeypatch.context() as patch:
            poison(patch, cpu, op, argument, nth)
            assert text in nonfinite.trace(model, *tokens, rng_state=1)
    assert nonfinite.trace(model, *tokens, rng_state=1) is None
    model.params.headw[3, 2] = np.nan
    assert "params.headw: 1 NaN" in nonfinite.trace(model, *tokens, rng_state=1)
    model.params.h[2].linb[1] = np.inf
    assert "params.h[2].linb: 0 NaN, 1 Inf" in nonfinite.trace(model, *tokens, rng_state=1)


@pytest.mark.gpu
@pytest.mark.parametrize("ops", ("gpu",), indirect=True)
def test_on_a_gpu(monkeypatch, ops, tmp_path):
    """What lies in device memory, large arrays (summed there first) and small ones; and the file."""
    monkeypatch.setattr(nonfinite, "SMALL", 2000)
    model = build(ops, "bf16")
    inputs, targets = (np.array(tokens) for tokens in zip(*batches(CONFIG, B, T, 1), strict=True))
    for op, argument, name in (("attention_forward", "out", "h[0].atty"), ("attention_forward", "att", "h[0].att")):
        with monkeypatch.context() as patch:
            poison(patch, ops, op, argument, 0)
            assert f"{name}, written by {op} as {argument}" in traced(model)
    assert traced(model) is None
    nonfinite.save(tmp_path / "step.npz", model, inputs, targets, rng_state=1, found="nothing")
    assert nonfinite.replay(tmp_path / "step.npz", ops)[1] is None
    assert_bits("the file", "weights", nonfinite.load(tmp_path / "step.npz")[1], to_host(model.master))


class Ranks:
    """Rank 0 of two, whose other one has a NaN in its gradients."""

    def all_reduce(self, arrays):
        for array in arrays:
            array[0] = np.nan

    def wait(self):
        pass

    def sums(self, values):
        return [values[0], 1.0]


def test_values_that_came_from_another_rank(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = build(cpu)
    model.ranks, model.rank, model.num_ranks = Ranks(), 0, 2
    x, y = (np.array(tokens) for tokens in zip(*batches(CONFIG, B, T, 1), strict=True))
    about = dict(step=4, rng_state=1, loss=3.5, grad_norm=np.nan, update={}, output_dir=None, on_nonfinite="skip")
    line = nonfinite.step_failed(model, x, y, **about)
    assert line.startswith(
        "step 5: loss 3.5, gradient norm nan: on rank 0 every tensor is finite (non-finite on rank 1)"
    )
    assert not list(tmp_path.iterdir())  # rank 1 saves it
    with monkeypatch.context() as patch:
        poison(patch, cpu, "encoder_forward", "out")
        line = nonfinite.step_failed(model, x, y, **about)
    assert "on rank 0 the first non-finite value is in encoded" in line and "(non-finite on rank 0, rank 1)" in line
    assert [path.name for path in tmp_path.iterdir()] == ["nonfinite_00000005_00000.npz"]


@pytest.mark.parametrize("kind", ("cpu", "executor"))
@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_a_loss_that_is_not_finite_updates_nothing(monkeypatch, kind, value):
    """By itself: the gradients, and their norm, are finite."""
    model = build(op_set(kind, monkeypatch))
    ((x, y),) = batches(CONFIG, B, T, 1)
    with simt.mode(orders=("forward",), fast=True):
        for t in (1, 2):
            model.forward(x)
            model.backward(x, y)
            if t == 2:
                model.acts.losses[1, 3] = value
                before = [array.copy() for array in (model.params_flat, model.m, model.v)]
            model.update(LLMC, t)
            assert np.isfinite(model.grad_norm())
    for array, was in zip((model.params_flat, model.m, model.v), before, strict=True):
        assert_bits(f"loss {value}", "arena", array, was)


# ---------------------------------------------------------------------------------------------------------------------
# the trainer

FLAGS = "-i train.bin -j val.bin -e tiny:d1 -b 2 -t 32 -d 128 -v 0 -s 0 -x 6 --device cpu".split()  # two micro-steps
BAD = 200  # a token; the shards have letters


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder with shards; one batch of the training data has a token like no other."""
    monkeypatch.chdir(tmp_path)
    for name, count, seed in (("train.bin", 16 * 64 + 1, 1), ("val.bin", 200, 2)):
        steps = np.random.default_rng(seed).integers(-2, 4, count)
        tokens = (97 + np.cumsum(steps) % 26).astype(np.uint16)
        if name == "train.bin":
            tokens[9 * 64 + 10] = BAD
        write_shard(name, tokens, 257)
    return tmp_path


def step_with(token):
    """(0-based step, micro-step) that sees the token, by the loader itself."""
    loader = DataLoader("train.bin", 2, 32, should_shuffle=True, vocab_size=257)
    x, y = np.empty((2, 2, 32), np.int32)
    for i in range(12):
        loader.next_batch(x, y)
        if token in x:
            return divmod(i, 2)


def sees_bad(arguments):
    return BAD in arguments["inp"]


def run(capsys, *argv):
    """(exit code, stdout, stderr) of the trainer."""
    code = train.main([*FLAGS, *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_stop_names_it_and_saves_a_replay(monkeypatch, folder, capsys):
    step, micro_step = step_with(BAD)
    assert run(capsys, "-x", step, "-o", "before", "-n", 1)[0] == 0
    where = f"encoded, written by encoder_forward as out (forward, micro-step {micro_step}): 1 NaN, 0 Inf of 4096"
    with monkeypatch.context() as patch:
        poison(patch, cpu, "encoder_forward", "out", when=sees_bad)
        code, _, err = run(capsys, "-o", "out")
        assert code == 2 and err.count("\n") == 1 and "HINT: " in err
        assert f"step {step + 1}: loss nan, gradient norm nan: the first non-finite value is in {where}" in err
        (file,) = Path("out").glob("nonfinite_*")
        assert file.name == f"nonfinite_{step + 1:08d}_00000.npz" and str(file) in err
        code, out, _ = run(capsys, "--replay", file)
        assert code == 1 and out.count(where) == 2
    code, out, _ = run(capsys, "--replay", file)  # the fault is mended
    assert code == 0 and out.count(where) == 1 and "every tensor is finite" in out

    about, params, inputs, _ = nonfinite.load(file)
    was = np.empty(params.size, np.float32)
    model_file.read_model(checkpoints.model_path("before", step), was)
    assert_bits("the file", "weights before the step", params, was)
    assert BAD in inputs[micro_step] and about["update"]["t"] == step + 1


@pytest.mark.parametrize("more", ([], ["-sg", "9"]), ids=" ".join)
def test_skip_leaves_the_weights_alone(monkeypatch, folder, capsys, more):
    step, states, train_step = step_with(BAD)[0], [], loop.train_step

    def recorded(model, loader, settings, i, steps, inputs, targets, detectors, *rest):
        before = [array.copy() for array in (model.params_flat, model.m, model.v)]
        last_update = model.rng_state_last_update
        result = train_step(model, loader, settings, i, steps, inputs, targets, detectors, *rest)
        counts = [len(detector.values) for detector in detectors.values()]
        same = [np.array_equal(a, b) for a, b in zip(before, (model.params_flat, model.m, model.v), strict=True)]
        states.append((counts, [*same, model.rng_state_last_update == last_update]))
        return result

    monkeypatch.setattr(loop, "train_step", recorded)
    poison(monkeypatch, cpu, "matmul_backward", "dweight", when=lambda a: a["dweight"].shape[0] == 64 and losing())
    seen = {"bad": False}  # the poison is in a gradient of the batch with the token: the loss is finite

    def losing():
        return seen["bad"]

    forward = cpu.encoder_forward

    @functools.wraps(forward)
    def watch(out, inp, wte, wpe):
        seen["bad"] = BAD in inp
        forward(out, inp, wte, wpe)

    monkeypatch.setattr(cpu, "encoder_forward", watch)
    code, out, err = run(capsys, "--on-nonfinite", "skip", "-o", "out", *more)
    assert code == 0 and err == ""
    (line,) = (line for line in out.splitlines() if "non-finite" in line)
    named = r"grads\.h\[0\]\.fcprojw, written by matmul_backward as dweight \(backward, layer 0, micro-step \d\)"
    assert re.match(rf"step {step + 1}: loss \d.*, gradient norm nan: .* is in {named}", line)
    assert line.endswith("Skipped: the weights were not updated.") and len(list(Path("out").glob("*.npz"))) == 1
    for i, (detectors, same) in enumerate(states):
        assert detectors == [i + (i < step)] * 2 and same == [i == step] * 4, i
    lines = [json.loads(line) for line in Path("out", "metrics.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] is None for line in lines] == [i == step for i in range(6)]


def test_skipping_ends(monkeypatch, folder, capsys):
    """Steps in a row count, and a finite one between them begins anew."""
    monkeypatch.setattr(loop, "MOST_SKIPPED", 2)
    steps, train_step = iter([np.nan, 1.0, np.nan, np.nan, 1.0]), loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *args: train_step(*args)._replace(grad_norm=next(steps)))
    code, out, err = run(capsys, "--on-nonfinite", "skip")
    assert code == 2 and "step    4/" in out and "step    5/" not in out
    assert "skip: 2 steps in a row were not finite, up to step 4. HINT: lower -l" in err and err.count("\n") == 1


def test_weights_that_have_gone_bad_stop_a_run_that_skips(folder, capsys):
    """After an update of 1e30, which is finite, a step is not; 3e38 and decay make weights that are not."""
    code, out, err = run(capsys, "--on-nonfinite", "skip", "-l", 1e30, "-o", "large")
    assert code == 0 and out.count("h[0].qkvr, written by matmul_forward") == 5 and err == ""
    assert [path.name for path in Path("large").glob("*.npz")] == ["nonfinite_00000002_00000.npz"]
    assert run(capsys, "--replay", *Path("large").glob("*.npz"))[0] == 1
    with np.errstate(all="ignore"):
        code, _, err = run(capsys, "--on-nonfinite", "skip", "-l", 3e38, "-c", 1e38, "-o", "larger")
    assert code == 2 and err.count("\n") == 1
    assert "step 2: " in err and "the weights were not finite before the step: params.wte: " in err


def test_files_that_are_no_replay(monkeypatch, folder, capsys):
    assert run(capsys, "-l", 1e30)[0] == 2
    (good,) = Path().glob("nonfinite_*")  # with no -o: here
    data = good.read_bytes()
    Path("cut.npz").write_bytes(data[: len(data) // 2])
    Path("empty.npz").write_bytes(b"")
    np.savez("other.npz", x=np.zeros(3))
    about, params, inputs, targets = nonfinite.load(good)
    about["config"] = vars(about["config"])
    files = {"tokens.npz": dict(inputs=inputs + 300), "weights.npz": dict(params=params[1:])}
    for name, changed in files.items():
        np.savez(name, **dict(params=params, inputs=inputs, targets=targets, about=json.dumps(about)) | changed)
    with np.errstate(over="ignore"):
        half = params.astype(np.float16)
    np.savez("bf16.npz", params=half, inputs=inputs, targets=targets, about=json.dumps(about | dict(dtype="float16")))
    for name in ("none.npz", "train.bin", ".", "cut.npz", "empty.npz", "other.npz", *files, "bf16.npz"):
        code, _, err = run(capsys, "--replay", name)
        assert code == 2 and err.count("\n") == 1 and f"--replay {name}: " in err and "HINT: " in err, (name, err)
    assert run(capsys, "--replay", "bf16.npz", "--dtype", "fp32")[0] == 1

    def full(path):
        raise nonfinite.UserError(f"cannot write {path}: disk full. HINT: free space")

    monkeypatch.setattr(nonfinite, "atomic_write", full)  # what was found is told in any case
    code, _, err = run(capsys, "-l", 1e30, "-o", "full")
    assert code == 2 and "h[0].qkvr" in err and "not saved: cannot write" in err and err.count("HINT") == 1
