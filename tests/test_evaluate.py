"""Multiple-choice scoring against PyTorch in float64, and HellaSwag from its jsonl into the training loop."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from conftest import op_set
from reference import GPT2_TENSORS, cross_entropy, gpt2_logits, to_torch

from llmc import cpu, evaluate, generate, gpt2, train
from llmc.data import __main__ as prepare_command
from llmc.data import tokenizer
from llmc.data.eval_sets import read_eval_set, write_eval_set
from llmc.data.shards import write_shard
from llmc.errors import UserError
from llmc.gpt2 import GPT2Config
from llmc.model import Model
from llmc.training import multiple_choice

V, T = 61, 80
CONFIG = GPT2Config(T, V, 128, 2, 2, 16)


def build(B, t=T):
    """A model whose predictions are far from uniform: the same weights at every call."""
    model = Model(gpt2, cpu, CONFIG, B, t, recompute=2, training=False)
    model.init_weights(3)
    model.params.wte *= 20
    model.params.wpe *= 20
    return model


def example(rng, context, lengths):
    """(label, context, completions) of random tokens."""
    label = int(rng.integers(4))
    return label, rng.integers(0, V, context).tolist(), [rng.integers(0, V, n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def examples():
    """Rows of 2 to 81 tokens: shorter and longer than a block of positions, and as long as T + 1 allows."""
    rng = np.random.default_rng(5)
    extremes = [(1, (1, 2, 1, 9)), (75, (6, 1, 3, 2)), (40, (3, 24, 25, 30)), (3, (7, 7, 7, 7))]
    others = [(int(rng.integers(1, 60)), rng.integers(1, 20, 4)) for _ in range(20)]
    return [example(rng, *sizes) for sizes in extremes + others]


def torch_losses(model, examples):
    """Summed and mean loss of each completion, a row at a time, in float64 with the weights of the model."""
    params = {name: to_torch(getattr(model.params, name), torch.float64) for name in GPT2_TENSORS}
    sums, means = np.zeros((2, len(examples), 4))
    for i, (_, context, completions) in enumerate(examples):
        for c, completion in enumerate(completions):
            row = torch.tensor([[*context, *completion]])
            losses = cross_entropy(gpt2_logits(params, row[:, :-1], 2, V), row[:, 1:])[0, len(context) - 1 :]
            assert len(losses) == len(completion)
            sums[i, c], means[i, c] = losses.sum(), losses.mean()
    return sums, means


@pytest.mark.parametrize("B", (1, 3, 7))
def test_losses_and_accuracies_are_those_of_pytorch(B, examples):
    model = build(B)
    expected_sums, expected_means = torch_losses(model, examples)
    sums, lengths = multiple_choice.completion_losses(model, examples)
    np.testing.assert_allclose(sums, expected_sums, rtol=2e-5)
    np.testing.assert_allclose(sums / lengths, expected_means, rtol=2e-5)
    labels = [label for label, *_ in examples]
    score = multiple_choice.score(model, examples)
    assert score.correct == (expected_means.argmin(1) == labels).sum()
    assert score.correct_sum == (expected_sums.argmin(1) == labels).sum() != score.correct
    assert score.total == len(examples) == 24
    assert 0 < score.correct < 24


def test_an_answer_that_the_model_prefers_is_found(examples):
    """Labels of the lowest mean loss give 100 %, others 0: the label is compared, nothing else."""
    model = build(4)
    sums, lengths = multiple_choice.completion_losses(model, examples)
    best = (sums / lengths).argmin(1)
    right = [(int(b), *rest) for b, (_, *rest) in zip(best, examples, strict=True)]
    wrong = [((label + 1) % 4, *rest) for label, *rest in right]
    assert multiple_choice.score(model, right).correct == 24 and multiple_choice.score(model, wrong).correct == 0


def test_results_do_not_depend_on_company_or_order(examples):
    """Each example alone, all in another order, and the parts that ranks take: the same losses and sums of counts."""
    model = build(5)
    sums, _ = multiple_choice.completion_losses(model, examples)
    alone = np.concatenate([multiple_choice.completion_losses(model, [e])[0] for e in examples])
    np.testing.assert_allclose(alone, sums, rtol=1e-5)
    np.testing.assert_allclose(multiple_choice.completion_losses(model, examples[::-1])[0][::-1], sums, rtol=1e-5)
    parts = [multiple_choice.score(model, examples[rank::5]) for rank in range(5)]
    assert tuple(map(sum, zip(*parts, strict=True))) == multiple_choice.score(model, examples)
    assert multiple_choice.score(model, []) == (0, 0, 0)


def test_ties_go_to_the_first(examples):
    same = [(2, context, [completions[0]] * 4) for _, context, completions in examples[:2]]
    assert multiple_choice.score(build(2), same).correct == 0
    assert multiple_choice.score(build(2), [(0, *rest) for _, *rest in same]).correct == 2


def test_batches_are_full_and_rows_short(examples, monkeypatch):
    """As many rows as B*T tokens hold, of no more blocks of positions than their longest needs."""
    model, shapes, token_losses = build(4), [], Model.token_losses
    monkeypatch.setattr(Model, "token_losses", lambda self, i, t: (shapes.append(i.shape), token_losses(self, i, t))[1])
    done = []
    multiple_choice.score(model, examples, done.append)
    assert sum(b for b, _ in shapes) == sum(done) == 4 * len(examples)
    assert shapes[0] == (4, T) and all(b == 4 * T // t for b, t in shapes[:-1]) and shapes[-1][1] == 64


def test_long_contexts_lose_their_beginning(examples):
    """At T = 32 an example scores as one whose context starts later; all four completions keep the same context."""
    model, t = build(2, 32), 32
    cut = [(label, context[-(t + 1 - max(map(len, cs))) :], cs) for label, context, cs in examples]
    changed = sum(len(a[1]) != len(b[1]) for a, b in zip(cut, examples, strict=True))
    assert multiple_choice.cut_contexts(t, examples) == changed > 5 and multiple_choice.cut_contexts(T, examples) == 0
    np.testing.assert_allclose(
        multiple_choice.completion_losses(model, examples)[0], torch_losses(model, cut)[0], rtol=2e-5
    )
    assert multiple_choice.score(build(2, 30), examples).total == 24  # one token of context is left
    with pytest.raises(UserError, match=r"-t 29: a completion .* has 30 tokens. HINT: -t 30 or more"):
        multiple_choice.score(build(2, 29), examples)


# ---------------------------------------------------------------------------------------------------------------------
# from HellaSwag's jsonl to the number in main.log

LINES = [
    {"ctx": f"{who} goes to the {where}. {who}", "label": (i * 3) % 4, "endings": [f"{what} it.", "runs.", "", "sings"]}
    for i, (who, where, what) in enumerate([("Anna", "shop", "buys"), ("Émile", "lake", "sees"), ("A cat", "roof", "")])
]
for line in LINES:
    line["endings"][2] = "is"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with HellaSwag's jsonl and training data of bytes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLMC_DATA_DIR", raising=False)
    tmp_path.joinpath("hellaswag_val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    tokens = np.random.default_rng(0).integers(97, 123, 2000).astype(np.uint16)
    for name in ("train.bin", "val.bin"):
        write_shard(name, tokens, 257)
    return tmp_path


def run(command, capsys, *argv):
    """(exit code, stdout, stderr)"""
    capsys.readouterr()
    try:
        code = command.main([str(a) for a in argv])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def prepare(capsys, *argv):
    return run(prepare_command, capsys, "prepare", "hellaswag", "hellaswag_val.jsonl", *argv)


@pytest.mark.parametrize("name", ("bytes", "gpt2"))
def test_prepare(name, folder, capsys):
    """Tokens are those of the context, and of each ending behind a space."""
    code, out, _ = prepare(capsys, "--tokenizer", name)
    assert code == 0 and "hellaswag_val.bin: 3 examples" in out and "llmc.evaluate MODEL --hellaswag" in out
    decode = tokenizer.get(name).decode
    for line, (label, context, completions) in zip(LINES, read_eval_set("hellaswag_val.bin"), strict=True):
        assert (label, decode(context)) == (line["label"], line["ctx"])
        assert [decode(c) for c in completions] == [" " + ending for ending in line["endings"]]
    if name == "gpt2":
        assert completions[1] == tokenizer.get("gpt2").encode(" runs.").tolist()
    before = folder.joinpath("hellaswag_val.bin").read_bytes()
    assert prepare(capsys, "--tokenizer", name)[0] == 0  # the same again is nothing to complain about
    folder.joinpath("hellaswag_val.jsonl").write_text(json.dumps(LINES[1]))
    code, _, err = prepare(capsys, "--tokenizer", name)
    assert code == 2 and "exists with other content" in err and "--overwrite" in err
    assert prepare(capsys, "--tokenizer", name, "--overwrite")[0] == 0
    assert folder.joinpath("hellaswag_val.bin").read_bytes() != before


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is not JSON: "),
        ('{"ctx": "a", "label": 1}', "line 2: no 'endings'"),
        ('{"ctx": "a", "label": 4, "endings": ["a", "b", "c", "d"]}', "label 4 of 4 endings, expected 0..3 of 4"),
        ('{"ctx": "a", "label": 1, "endings": ["a", "b", "c"]}', "label 1 of 3 endings"),
        ('{"ctx": "a", "label": 1e999, "endings": ["a", "b", "c", "d"]}', "line 2 is not JSON: 1e999"),
        ('{"ctx": "a", "label": true, "endings": ["a", "b", "c", "d"]}', "label True of 4 endings"),
        ("[" * 100_000, "line 2: JSON within JSON, deeper than 32 levels"),
        ('{"ctx": 7, "label": 1, "endings": ["a", "b", "c", "d"]}', "ctx is text"),
        ("[1]", "line 2 is [1], not a JSON object"),
        ("", "line 2 is not JSON: "),
    ],
)
def test_prepare_bad_lines(line, message, folder, capsys):
    folder.joinpath("hellaswag_val.jsonl").write_text(json.dumps(LINES[0]) + "\n" + line + "\n")
    code, _, err = prepare(capsys, "--tokenizer", "bytes")
    assert code == 2 and message in err and "HINT: " in err and err.count("\n") == 1
    assert not folder.joinpath("hellaswag_val.bin").exists()


TRAIN = "-i train.bin -j val.bin -e tiny:d1 -b 2 -t 48 -x 4 -v 2 -m 2 -s 0 -n 4 -o out --device cpu -h 1".split()


def test_in_the_loop_and_as_a_command(folder, capsys):
    """-h 1 prints and logs llm.c's lines every -v steps but the first, and the command gives the last of them again."""
    assert prepare(capsys, "--tokenizer", "bytes")[0] == 0
    code, out, err = run(train, capsys, *TRAIN)
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("HellaSwag: ")]
    assert len(lines) == 2 and "| run hellaswag         | yes" in out and "contexts lose their beginning" not in out
    log = [line for line in folder.joinpath("out", "main.log").read_text().splitlines() if "eval:" in line]
    accuracies = [
        re.fullmatch(r"HellaSwag: ([0-3])/3 = (0\.\d{6}|1\.0{6}) \(by summed loss: [01]\.\d+\)", x) for x in lines
    ]
    assert log == [f"s:{s} eval:{int(m[1]) / 3:.4f}" for s, m in zip((2, 4), accuracies, strict=True)]
    assert [m[2] for m in accuracies] == [f"{int(m[1]) / 3:f}" for m in accuracies]

    flags = ["--hellaswag", "hellaswag_val.bin", "-j", "val.bin", "-m", 2, "-b", 2, "-t", 48, "--device", "cpu"]
    code, again, err = run(evaluate, capsys, "out", *flags)
    assert code == 0, err
    assert again.splitlines()[1:] == [[x for x in out.splitlines() if x.startswith("val loss")][-1], lines[-1]]
    code, again, _ = run(evaluate, capsys, "out", *flags[:2], "-t", 12, "--device", "cpu")
    assert "3 of 3 contexts lose their beginning: -t 12 is too short" in again


def test_without_the_file_one_line_says_so(folder, capsys, monkeypatch):
    monkeypatch.setenv("LLMC_DATA_DIR", "somewhere")
    code, out, _ = run(train, capsys, *TRAIN)
    said = [line for line in out.splitlines() if line.startswith("-h 1: ")]
    assert code == 0 and len(said) == 1 and "| run hellaswag         | no" in out and "HellaSwag: " not in out
    where = ("dev/data/hellaswag/", "", "somewhere/hellaswag/")
    assert all(place + "hellaswag_val.bin" in said[0] for place in where) and "HINT: llmc.data prepare" in said[0]
    assert "eval:" not in folder.joinpath("out", "main.log").read_text()


@pytest.mark.parametrize("place", ("dev/data/hellaswag", "data/hellaswag", "shards"))
def test_places(place, folder, monkeypatch):
    monkeypatch.setenv("LLMC_DATA_DIR", "data")
    assert multiple_choice.find_hellaswag("shards/train_*.bin")[0] is None
    folder.joinpath(place).mkdir(parents=True)
    folder.joinpath(place, "hellaswag_val.bin").touch()
    assert multiple_choice.find_hellaswag("shards/train_*.bin") == (f"{place}/hellaswag_val.bin", None)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["out"], "nothing to evaluate on"),
        (["out", "--hellaswag", "none.bin"], "none.bin"),
        (["out", "--hellaswag", "val.bin"], "val.bin"),
        (["out", "--hellaswag", "gpt2.bin"], "has a token 50000, the model's vocabulary ends at 256"),
        (["out", "-j", "val.bin", "-t", "64"], "-t 64: the model has positions for 1 to 48"),
        (["none.bin", "-j", "val.bin"], "none.bin"),
        (["out", "-j", "val.bin", "--dtype", "bf16", "--device", "cpu"], "the CPU op set has fp32 only"),
    ],
)
def test_bad_input(argv, message, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    code, _, err = run(evaluate, capsys, *argv)
    assert code == 2 and err.startswith("llmc.evaluate: error: ") and message in err and "HINT: " in err
    assert err.count("\n") == 1, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run in "out", its data, and an eval set of another tokenizer's."""
    folder = tmp_path_factory.mktemp("trained")
    write_shard(str(folder / "val.bin"), np.full(2000, 97, np.uint16), 257)
    write_eval_set(str(folder / "gpt2.bin"), [(0, [1, 2], [[3], [4], [50000], [5]])])
    write_shard(str(folder / "train.bin"), np.full(2000, 97, np.uint16), 257)
    paths = {"-i": folder / "train.bin", "-j": folder / "val.bin", "-o": folder / "out"}
    flags = [*TRAIN[4:-2], "-x", "1", "-n", "1"]
    assert train.main([*map(str, itertools.chain(*paths.items())), *[f for f in flags if f not in ("-o", "out")]]) == 0
    return folder


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_evaluated_and_continued_there(folder, capsys, monkeypatch):
    """A bf16 checkpoint: losses of all precisions agree to theirs, and text comes out."""
    op_set("gpu", monkeypatch)
    assert prepare(capsys, "--tokenizer", "bytes")[0] == 0
    assert run(train, capsys, *TRAIN, "--device", "cuda", "-x", 20, "-l", 1e-2)[0] == 0
    losses = {}
    for device, dtype in (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "fp16"), ("cuda", "bf16"), ("auto", None)):
        flags = ["--device", device, *(["--dtype", dtype] if dtype else [])]
        code, out, err = run(
            evaluate, capsys, "out", "--hellaswag", "hellaswag_val.bin", "-j", "val.bin", "-t", 48, *flags
        )
        assert code == 0 and "HellaSwag: " in out, err
        losses[device, dtype] = float(re.search(r"val loss ([\d.]+)", out)[1])
    exact = losses["cpu", "fp32"]
    assert losses["auto", None] == losses["cuda", "bf16"]  # which is the default there
    for (_, dtype), loss in losses.items():
        assert abs(loss - exact) <= {"fp32": 1e-5, "fp16": 2e-3}.get(dtype, 1e-2) * exact, losses
    code, out, err = run(generate, capsys, "out", "-p", "abc", "-g", 30, "--device", "cuda")
    assert code == 0 and out.startswith("abc") and len(out) > 20, err
