"""python -m llmc.generate, and the sampling loop that the trainer shares with it."""

import os
import re
import shutil

import numpy as np
import pytest

from llmc import api, cpu, generate, generation, gpt2, train
from llmc.data import tokenizer
from llmc.data.shards import write_shard
from llmc.files import model_file
from llmc.model import Model
from llmc.rand import random_f32
from llmc.sampler import sample_softmax

V = 257
WORDS = "so shall I live, supposing thou art true, like a deceived husband; so love's face may still seem love to me. "


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(output folder, what the trainer printed): tiny:d1 that has learned a line by heart, checkpoints 200 and 300."""
    folder = tmp_path_factory.mktemp("trained")
    tokens = np.frombuffer((WORDS * 40).encode(), np.uint8).astype(np.uint16)
    write_shard(str(folder / "train.bin"), tokens, V)
    write_shard(str(folder / "val.bin"), tokens[:400], V)
    flags = "--device cpu -e tiny:d1 -b 4 -t 32 -x 300 -l 4e-3 -u 20 -q 0.1 -v 0 -s 300 -g 50 -n 200".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        lines = []
        patch.setattr("builtins.print", lambda *a, **k: lines.append(" ".join(map(str, a))))
        out = folder / "out"
        data = ["-i", str(folder / "train.bin"), "-j", str(folder / "val.bin")]
        assert train.main([*data, *flags, "-o", str(out)]) == 0
    return out, "\n".join(lines)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(capsys, *argv, code=0):
    """stdout of the command, or stderr where it is to fail."""
    capsys.readouterr()
    try:
        returned = generate.main([*map(str, argv), "--device", "cpu"])  # where these models were trained
    except SystemExit as end:
        returned = end.code
    out, err = capsys.readouterr()
    assert returned == code, (returned, err)
    if code == 0:
        assert not err
        return out
    assert not out and err.startswith("llmc.generate: error: ") and err.count("\n") == 1 and "HINT: " in err, err
    return err


def fresh_model(T=160, vocab_size=V, seed=3):
    """A model with random weights, large enough that its predictions are far from uniform."""
    config = gpt2.GPT2Config(T, vocab_size, -(-vocab_size // 128) * 128, 2, 4, 32)
    model = Model(gpt2, cpu, config, 1, T, recompute=2, training=False)
    model.init_weights(seed)
    model.params.wte *= 10
    model.params.wpe *= 40
    return model


def exact_logits(model, ids):
    """Logits after the last of the ids, from a forward pass of exactly their number (at most T)."""
    context = np.array([ids[-model.T :]], np.int32)
    return model.forward(context).output[0, -1, : model.config.vocab_size].copy()


# ---------------------------------------------------------------------------------------------------------------------
# the loop


def test_tokens_are_drawn_as_from_exact_rows():
    """Prompt, window and beyond: every token is the one that a pass over exactly the last T tokens would give."""
    model, prompt = fresh_model(T=100), [10, 200, 31]
    for temperature, top_k in ((1.0, 0), (0.5, 20), (0.0, 0)):
        ids, state = list(prompt), 1337
        for drawn in list(generation.generate(model, prompt, 110, 1337, temperature, top_k)):
            coin, state = random_f32(state)
            assert drawn == sample_softmax(exact_logits(model, ids), coin, temperature, top_k), len(ids)
            ids.append(drawn)
        assert len(ids) == 113 > model.T and len(set(ids)) > 1


def test_logits_do_not_depend_on_the_padding():
    """Whatever follows a position does not reach it: the same bits; another length is another sum: equal up to 1e-5."""
    model = fresh_model()
    for length in (1, 2, 63, 64, 65, 128, 150):
        ids = list(np.random.default_rng(length).integers(0, V, length))
        padded = -(-length // 64) * 64 if length <= 128 else 160
        logits = []
        for filler in (0, 200):
            row = np.full((1, padded), filler, np.int32)
            row[0, :length] = ids
            logits.append(model.forward(row).output[0, length - 1, :V].copy())
        assert np.array_equal(logits[0], logits[1]), length
        exact = exact_logits(model, ids)
        assert np.abs(exact).max() > 1
        np.testing.assert_allclose(logits[0], exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


def test_rows_that_are_passed_forward(monkeypatch):
    """Few shapes: multiples of 64, at most T; the row starts with the last T tokens."""
    model, rows = fresh_model(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda row: (rows.append(row.copy()), forward(row))[1])
    ids = list(range(50))
    for token in generation.generate(model, list(ids), 130, 7):
        ids.append(token)
    assert {row.shape for row in rows} == {(1, 64), (1, 128), (1, 160)}
    for i, row in enumerate(rows):
        context = ids[: 50 + i][-160:]
        assert list(row[0, : len(context)]) == context
    assert len(ids) == 180


def test_argmax_and_top_k():
    model = fresh_model()
    greedy = list(generation.generate(model, [65], 40, 1, temperature=0))
    ids = [65]
    for token in greedy:
        logits = exact_logits(model, ids)
        assert token == logits.argmax()
        ids.append(token)
    assert list(generation.generate(model, [65], 40, 2, temperature=0)) == greedy  # the coin does not matter
    assert list(generation.generate(model, [65], 40, 1, temperature=5.0, top_k=1)) == greedy
    ids, other = [65], 0
    for token in generation.generate(model, [65], 60, 5, temperature=3.0, top_k=3):
        best = np.argsort(exact_logits(model, ids))[-3:]
        assert token in best
        other += token != best[-1]
        ids.append(token)
    assert other > 5  # it is not the argmax every time


def test_seeds():
    model = fresh_model()
    draw = lambda seed: list(generation.generate(model, [65], 30, seed))  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_folder_is_its_newest_model_file(trained, capsys):
    out, _ = trained
    newest = run(capsys, out, "-g", 60)
    assert newest == run(capsys, out / "model_00000300.bin", "-g", 60)
    assert newest != run(capsys, out / "model_00000200.bin", "-g", 60)
    assert newest.endswith("\n") and len(newest) == 61


def test_prompt_and_what_was_learned(trained, capsys):
    text = run(capsys, trained[0], "-p", "so shall I live, supp", "-g", 40, "--temperature", 0)
    assert text == "so shall I live, supp" + WORDS[21:61] + "\n"
    prompt = "Héllo, ← wörld"  # more bytes than characters
    assert run(capsys, trained[0], "--prompt", prompt, "-g", 5).startswith(prompt)


def test_flags_reach_the_loop(trained, capsys):
    out = trained[0]
    hot = ("-g", 60, "--temperature", 2)
    assert run(capsys, out, *hot) == run(capsys, out, *hot, "--seed", 1337) != run(capsys, out, *hot, "--seed", 1338)
    greedy = run(capsys, out, "-g", 60, "--temperature", 0)
    assert greedy == run(capsys, out, *hot, "--top-k", 1) == run(capsys, out, "-g", 60, "--temperature", 0, "--seed", 5)
    assert len(run(capsys, out, "-g", 1, "--temperature", 0)) == 2
    assert run(capsys, out, *hot, "--threads", 1) == run(capsys, out, *hot, "--threads", 2)
    assert run(capsys, out, *hot) == run(capsys, out, *hot, "--tokenizer", "bytes")


def test_the_trainers_sample_is_the_same(trained, capsys):
    """-s prints what generate draws from the checkpoint with the trainer's seed and temperature."""
    sample = re.search(r"generating:\n---\n(.*)\n---", trained[1], re.S)[1]
    assert run(capsys, trained[0], "-g", 49, "--temperature", 1) == sample + "\n"


def test_bf16_file(trained, capsys):
    header = model_file.read_model_header(trained[0] / "model_00000300.bin")
    params = np.empty(model_file.num_parameters(header), np.float32)
    model_file.read_model(trained[0] / "model_00000300.bin", params)
    model_file.write_model("bf16.bin", header, params, 5)
    greedy = ("-p", "so shall I ", "-g", 20, "--temperature", 0)
    assert run(capsys, "bf16.bin", *greedy) == run(capsys, trained[0], *greedy)


def write_model(path, vocab_size):
    model = fresh_model(16, vocab_size)
    header = {field: getattr(model.config, field) for field in model_file.MODEL_WORDS}
    model_file.write_model(path, header, model.params_flat)
    return path


@pytest.mark.skipif(not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="needs GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR")
def test_gpt2_tokens(capsys, monkeypatch):
    """A model of GPT-2's vocabulary writes with GPT-2's tokens, and starts from end-of-text."""
    starts, loop = [], api.generate
    monkeypatch.setattr(api, "generate", lambda model, prompt, *a: starts.append(prompt) or loop(model, prompt, *a))
    text = run(capsys, write_model("gpt2.bin", 50257), "-p", "Hello world", "-g", 20)
    assert text.startswith("Hello world") and len(text) > 12 and starts == [[50256, 15496, 995]]
    encoded = tokenizer.get("gpt2").encode("Hello world")
    assert list(encoded) == [15496, 995]


@pytest.mark.parametrize("vocab_size", (50258, 50304))
def test_ids_that_the_tokenizer_does_not_have_are_never_drawn(vocab_size, capsys):
    """A token was added to GPT-2's, or its vocabulary padded; the model likes those ids best."""
    model = fresh_model(16, vocab_size)
    model.params.wte[:] = 0
    model.params.lnfb[:] = 1
    model.params.wte[50257:vocab_size] = 0.1  # their logits: 32 * 0.1; those of all others are 0
    header = {field: getattr(model.config, field) for field in model_file.MODEL_WORDS}
    model_file.write_model("padded.bin", header, model.params_flat)
    assert next(generation.generate(model, [50256], 1, 1, temperature=0)) >= 50257, "left free, the loop draws them"
    for flags in (("--temperature", 0), ("--temperature", 1), ("--temperature", 1, "--top-k", 3)):
        text = run(capsys, "padded.bin", "-g", 8, *flags)
        assert text == run(capsys, "padded.bin", "-g", 8, *flags, "--tokenizer", "gpt2") != "\n"
    assert "has 257 tokens, the model" in run(capsys, "padded.bin", "--tokenizer", "bytes", code=2)


def test_a_reader_sees_text_as_it_comes(trained, capsys, monkeypatch):
    """The text is flushed token by token: what was drawn before Ctrl-C is there."""

    def interrupted(*args):
        yield from b"abc"
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "generate", interrupted)
    assert generate.main([str(trained[0]), "-p", "x"]) == 130
    assert capsys.readouterr() == ("xabc", "llmc.generate: interrupted\n")


# ---------------------------------------------------------------------------------------------------------------------
# errors


def test_folder_without_a_finished_checkpoint(trained, capsys):
    os.mkdir("empty")
    assert "empty" in run(capsys, "empty", code=2)
    shutil.copytree(trained[0], "unfinished")
    for name in os.listdir("unfinished"):
        if name.startswith("DONE"):
            os.remove(os.path.join("unfinished", name))
    assert "unfinished" in run(capsys, "unfinished", code=2)


def test_damaged_files(trained, capsys):
    shutil.copytree(trained[0], "damaged")
    with open("damaged/model_00000300.bin", "ab") as file:
        file.write(b"x")
    for path in ("damaged", "damaged/model_00000300.bin"):
        err = run(capsys, path, code=2)
        assert "model_00000300.bin" in err and "over-long" in err
    assert "step 200 is intact" in run(capsys, "damaged", code=2)
    assert "train.bin" in run(capsys, trained[0].parent / "train.bin", code=2)
    assert "none.bin" in run(capsys, "none.bin", code=2)


def test_wrong_tokenizer(trained, capsys):
    err = run(capsys, write_model("small.bin", 300), code=2)
    assert "300" in err
    err = run(capsys, "small.bin", "--tokenizer", "bytes", code=2)
    assert "--tokenizer bytes" in err and "257" in err and "300" in err
    assert "--tokenizer" in run(capsys, trained[0], "--tokenizer", "words", code=2)


@pytest.mark.parametrize(
    "argv",
    [
        ("-g", "0"),
        ("-g", "x"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-k", "-1"),
        ("--seed", "-1"),
        ("--threads", "0"),
        ("--nothing", "1"),
    ],
)
def test_bad_values(argv, trained, capsys):
    err = run(capsys, trained[0], *argv, code=2)
    assert argv[0] in err and argv[1] in err


def test_no_model(capsys):
    assert "model" in run(capsys, code=2)
