"""The trainer from the command line: main(argv) in this process, and real processes where signals and memory matter.

Models and shards are tiny: tiny:d1 (64 channels), 2 rows of 32 tokens, three shards of unequal length, 12 batches an
epoch. Every test runs in an empty folder of its own, with a cache folder of its own.
"""

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llmc import cpu, gpt2, train
from llmc.data.loader import DataLoader
from llmc.data.shards import read_shard, read_shard_header, vocabulary_of, write_shard
from llmc.files import checkpoints, io, model_file, state_file
from llmc.model import AdamW, Model
from llmc.training import flags, loop, mfu, setup
from llmc.training.outlier_detector import OutlierDetector
from llmc.training.settings import Settings, settings_from
from llmc.training.step import StepResult, train_step

ROOT = Path(__file__).resolve().parents[1]
B, T, V = 2, 32, 257
BASE = ["-i", "train_*.bin", "-j", "val.bin", "-e", "tiny:d1", "-b", str(B), "-t", str(T), "-v", "0", "-s", "0"]
BASE += ["--device", "cpu"]
DEFAULT = [] if importlib.util.find_spec("cupy") is None else ["--device", "cpu"]  # the default job, here on a CPU
EPOCH = 12  # batches in the three training shards
TIMINGS = ("dt_ms", "tokens_per_second", "mfu")
STEP_LINE = re.compile(  # llm.c train_gpt2.cu; where there is no peak to compare with, MFU is n/a
    r"step +(\d+)/(\d+) \| loss (\d+\.\d{6}) \(([+-]\d+\.\d\d|[+-]nan)z\)"
    r"\| norm (\d+\.\d{4}) \(([+-]\d+\.\d\d|[+-]nan)z\)"
    r"\| lr (\d\.\d\de[+-]\d\d) \| (\d+\.\d\d) ms \| (?:-?\d+\.\d%|n/a) bf16 MFU \| (\d+) tok/s"
)


@pytest.fixture(autouse=True)
def folder(tmp_path):
    """An empty current folder with training and validation shards. The trainer's thread count is put back."""
    threads = cpu.device.threads()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where pytest runs in the background
    with pytest.MonkeyPatch.context() as patch:  # not the test's own, which some tests undo
        patch.chdir(tmp_path)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for i, batches in enumerate((5, 3, 4)):
            write_tokens(f"train_{i}.bin", batches * B * T + 1 + 10 * i, seed=i)
        write_tokens("val.bin", 6 * B * T + 1, seed=9)
        yield tmp_path
    signal.signal(signal.SIGINT, handler)
    cpu.device.threads(threads)


def write_tokens(path, count, seed=0, vocab_size=V):
    """A shard of letters with some structure to learn: each is drawn near the one before it."""
    steps = np.random.default_rng(seed).integers(-2, 4, count)
    write_shard(str(path), (97 + np.cumsum(steps) % 26).astype(np.uint16), vocab_size)


def run(*argv, base=BASE):
    """Exit code of the trainer with these flags; later ones override the tiny model's and data's."""
    try:
        return train.main([*base, *map(str, argv)])
    except SystemExit as end:
        return end.code


def environment(**more):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1", **more}


def start(*argv, base=BASE, **env):
    """The trainer as a real process."""
    command = [sys.executable, "-m", "llmc.train", *base, "--threads", "1", *map(str, argv)]
    return subprocess.Popen(command, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    """(exit code, stdout, stderr) of a process that ends by itself."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out.decode(), err.decode()


def python(code):
    """stdout of a Python program in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines_of(text, *starts):
    return [line for line in text.splitlines() if line.startswith(starts)]


def metrics(folder="out"):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def without_timings(folder):
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in metrics(folder)]


def files(folder="."):
    """{path: hash} of every file below a folder."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def weights_and_state(folder, step):
    """The bytes of the model and state files of a step, which is finished."""
    assert step in checkpoints.checkpoint_steps(str(folder))
    return [
        Path(path).read_bytes()
        for path in (checkpoints.model_path(folder, step), checkpoints.state_path(folder, step, 0))
    ]


def assert_same_run(folder, reference, step):
    """Both runs ended at `step` with the same bits in model, state and logs, but for the timings."""
    assert weights_and_state(folder, step) == weights_and_state(reference, step)
    assert Path(folder, "main.log").read_text() == Path(reference, "main.log").read_text()
    assert without_timings(folder) == without_timings(reference)


def stopped_at(step, reference, folder):
    """A copy of a run that stopped after the checkpoint of `step` and some more steps: its logs are longer."""
    os.makedirs(folder)
    for name in os.listdir(reference):
        if f"_{step:08d}" in name or name in ("main.log", "metrics.jsonl"):
            shutil.copy(os.path.join(reference, name), folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# what it prints and writes


def test_lines_and_logs(capsys):
    """The step lines and main.log to the letter, metrics.jsonl, and that the three agree."""
    assert run("-x", 10, "-v", 5, "-m", 2, "-u", 2, "-l", 1e-3, "-o", "out") == 0
    out = capsys.readouterr().out
    steps = [STEP_LINE.fullmatch(line) for line in lines_of(out, "step ")]
    assert len(steps) == 10 and all(steps), out
    logged = metrics()
    trained = [line for line in logged if "train_loss" in line]
    validated = [line for line in logged if "val_loss" in line]
    assert [line["step"] for line in trained] == list(range(10))
    assert [line["step"] for line in validated] == [0, 5, 10]
    for i, (match, line) in enumerate(zip(steps, trained, strict=True)):
        assert set(line) == {"step", "train_loss", "lr", "grad_norm", "dt_ms", "tokens_per_second", "mfu"}
        shown = [match[1], match[2], match[3], match[5], match[7], match[8]]
        assert shown[:2] == [str(i + 1), "10"]
        assert shown[2:4] == [f"{line['train_loss']:.6f}", f"{line['grad_norm']:.4f}"]
        assert shown[4:] == [f"{line['lr']:.2e}", f"{line['dt_ms']:.2f}"]
        assert line["tokens_per_second"] == pytest.approx(B * T / line["dt_ms"] * 1000)
    assert [line["lr"] for line in trained[:2]] == [pytest.approx(5e-4), pytest.approx(1e-3)]
    assert lines_of(out, "val loss") == [f"val loss {line['val_loss']:.6f}" for line in validated]

    average = float(re.search(r"^total average iteration time: (\d+\.\d{6}) ms$", out, re.M)[1])
    assert average == pytest.approx(np.mean([line["dt_ms"] for line in trained[1:]]), abs=1e-5)

    # llm.c's CI reads ten lines from the first that has "step    1/10", the loss in columns 20 to 28
    first = next(line for line in out.splitlines() if "step    1/10" in line)
    assert float(first[20:28]) == pytest.approx(trained[0]["train_loss"], abs=1e-6)

    expected = []
    for line in logged:
        if "val_loss" in line:
            expected.append(f"s:{line['step']} tel:{line['val_loss']:.4f}")
        else:
            numbers = f"trl:{line['train_loss']:.4f} lr:{line['lr']:.6f} norm:{line['grad_norm']:.2f}"
            expected.append(f"s:{line['step']} {numbers}")
    text = Path("out", "main.log").read_text()
    assert text == "\n".join(expected) + "\n"
    llm_c = re.compile(r"s:\d+ (tel:\d+\.\d{4}|trl:\d+\.\d{4} lr:\d\.\d{6} norm:\d+\.\d\d)")
    assert all(llm_c.fullmatch(line) for line in text.splitlines())


def test_order_of_events(capsys):
    """Validate, sample, checkpoint, step; validation at step 0, and all of it at the end."""
    assert run("-x", 3, "-v", 2, "-s", 2, "-g", 5, "-n", 2, "-o", "out") == 0
    events = ("val loss", "generating:", "wrote checkpoint", "step ", "total average")
    seen = [line[:32] for line in lines_of(capsys.readouterr().out, *events)]
    expected = ["val loss", "step    1/3", "step    2/3", "val loss", "generating:", "wrote checkpoint of step 2"]
    expected += ["step    3/3", "val loss", "generating:", "wrote checkpoint of step 3", "total average iteration time"]
    assert len(seen) == len(expected) and all(a.startswith(b) for a, b in zip(seen, expected, strict=True)), seen


def test_sample_frame(capsys):
    """llm.c's frame; 5 positions are 4 new tokens; two samples of the same weights are the same."""
    assert run("-x", 2, "-s", 1, "-g", 5, "-l", 0) == 0
    blocks = re.findall(r"^generating:\n---\n(.*?)\n---$", capsys.readouterr().out, re.S | re.M)
    assert len(blocks) == 2 and blocks[0] == blocks[1] and 1 <= len(blocks[0].replace("<|endoftext|>", "x")) <= 4


def test_off_is_off(capsys):
    """-v 0 and -s 0 are off, also at the end (llm.c divides by zero); without -o nothing is written."""
    before = files()
    assert run("-x", 2, "-n", 1) == 0
    out = capsys.readouterr().out
    assert len(lines_of(out, "step ")) == 2 and not lines_of(out, "val loss", "generating", "wrote")
    assert files() == before


def rows_of(out):
    return dict(re.findall(r"^\| (.{21}) \| (.{50,}) \|$", out, re.M))


def test_start_up_report(capsys):
    assert run("-x", 2, "-d", 3 * B * T, "-o", "out", "-k", "wsd", "-r", 2) == 0
    out = capsys.readouterr().out
    assert out.startswith("cpu (")
    rows = {label.strip(): value.strip() for label, value in rows_of(out).items()}
    llm_c = "train data pattern|val data pattern|output log dir|checkpoint_every|resume|micro batch size B"
    llm_c += "|sequence length T|total batch size|LR scheduler|learning rate (LR)|warmup iterations|final LR fraction"
    llm_c += "|weight decay|skip update lossz|skip update gradz|max_steps|val_loss_every|val_max_steps|sample_every"
    llm_c += "|genT|overfit_single_batch|use_master_weights|gelu_fusion|recompute|device|peak TFlops"
    llm_c += "|precision|weight init method|max_sequence_length T|vocab_size V|padded_vocab_size Vp|num_layers L"
    llm_c += "|num_heads NH|channels C|num_parameters|train_num_batches|val_num_batches|run hellaswag|num_processes"
    llm_c += "|zero_stage"
    assert [label for label in rows if label in llm_c.split("|")] == llm_c.split("|")
    assert rows["total batch size"] == str(3 * B * T) and rows["LR scheduler"] == "wsd" and rows["recompute"] == "2"
    assert rows["learning rate (LR)"] == "3.000000e-04" and rows["vocab_size V"] == "257"
    assert rows["padded_vocab_size Vp"] == "384" and rows["train_num_batches"] == "2" and rows["precision"] == "FP32"
    assert rows["num_parameters"] == str(384 * 64 + T * 64 + 12 * 64 * 64 + 13 * 64 + 2 * 64)
    assert f"batch B * T = {B} * {T} = {B * T} tokens; total batch {3 * B * T} => 3 micro-steps" in out


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_memory_plan(recompute, capsys, monkeypatch):
    """The plan is printed before anything is allocated, and its total is what is then allocated, byte for byte."""
    allocated, alloc = [], cpu.device.alloc

    def spy(nbytes):
        assert not allocated or len(allocated) < 6, "allocated after the model was built"
        if not allocated:
            allocated.append(capsys.readouterr().out)  # all that was printed before the first allocation
        allocated.append(nbytes)
        return alloc(nbytes)

    cpu.device.threads()
    monkeypatch.setattr(cpu.device, "alloc", spy)
    assert run("-x", 2, "-v", 1, "-s", 1, "-g", 3, "-r", recompute) == 0
    printed, *sizes = allocated
    monkeypatch.undo()
    total = int(re.search(r"^  total +([\d,]+) bytes", printed, re.M)[1].replace(",", ""))
    assert total == sum(sizes)
    row = r"^  (\w+)(?: \([^)]*\))? +(?:(\d[\dx ]*) +(float32|int32|uint32))? +([\d,]+) bytes$"
    table = re.findall(row, printed, re.M)
    buffers = {name: int(size.replace(",", "")) for name, shape, _, size in table if not shape and name != "total"}
    assert list(buffers) == ["parameters", "gradients", "optimizer", "activations", "scratch"]
    assert sum(buffers.values()) == total
    for name, shape, _, size in table:
        if shape:
            assert np.prod([int(n) for n in shape.split(" x ")]) * 4 == int(size.replace(",", "")), name
    kept = {0: 1, 1: 1, 2: 1}[recompute]  # one layer: nothing to save
    assert dict((name, shape.strip()) for name, shape, *_ in table)["fch_gelu"] == f"{kept} x {B} x {T} x 256"


def test_z_scores_and_the_detector_across_resume(capsys):
    """nan for 128 steps, then those of a detector fed with the logged values; a resumed run prints the same lines."""
    assert run("-x", 132, "-n", 130, "-o", "out") == 0
    lines = lines_of(capsys.readouterr().out, "step ")
    loss, norm = OutlierDetector(), OutlierDetector()
    for line, logged in zip(lines, metrics(), strict=True):
        z = f"{loss.update(logged['train_loss']):+.2f}", f"{norm.update(logged['grad_norm']):+.2f}"
        assert STEP_LINE.fullmatch(line).group(4, 6) == z, line
    assert ["nan" in line for line in lines] == [True] * 128 + [False] * 4
    stopped_at(130, "out", "again")
    assert run("-x", 132, "-n", 130, "-o", "again", "-y", 1) == 0
    out = capsys.readouterr().out
    resumed = lines_of(out, "step ")
    assert [line.split("| lr")[0] for line in resumed] == [line.split("| lr")[0] for line in lines[130:]]
    # of the steps after the first one here (llm.c divides by those of the whole run)
    assert f"total average iteration time: {metrics('again')[-1]['dt_ms']:f} ms" in out
    assert_same_run("again", "out", 132)


def test_text_that_the_terminal_cannot_show():
    """Samples hold any character; where stdout is ASCII or cp1252 they are replaced, not a traceback."""
    argv = ("-x", 1, "-s", 1, "-g", 40, "--temperature", 3)
    code, out, err = finish(start(*argv, PYTHONIOENCODING="ascii", PYTHONUTF8="0"))
    assert code == 0 and "generating:" in out and not err


def test_reader_that_goes_away():
    process = start("-x", 2000)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 1 and b"Traceback" not in process.stderr.read()
    process.stderr.close()


# ---------------------------------------------------------------------------------------------------------------------
# flags

FLAGS = [  # letter, long name, a value, what it becomes
    ("-i", "--input-bin", "train_*.bin", "train_*.bin"),
    ("-j", "--input-val-bin", "val.bin", "val.bin"),
    ("-e", "--model", "tiny:d2", "tiny:d2"),
    ("-o", "--output-dir", "out", "out"),
    ("-n", "--checkpoint-every", "2", 2),
    ("-nk", "--checkpoints-keep", "3", 3),
    ("-nm", "--major-checkpoint-every", "4", 4),
    ("-y", "--resume", "1", 1),
    ("-b", "--batch-size", "1", 1),
    ("-t", "--sequence-length", "16", 16),
    ("-d", "--total-batch-size", "32", 32),
    ("-a", "--overfit-single-batch", "1", 1),
    ("-r", "--recompute", "2", 2),
    ("-ge", "--gelu-fusion", "2", 2),
    ("-f", "--tf32", "0", 0),
    ("-w", "--use-master-weights", "0", 0),
    (None, "--grad-dtype", "fp32", "fp32"),
    ("-x", "--max-steps", "2", 2),
    ("-k", "--lr-scheduler", "linear", "linear"),
    ("-l", "--learning-rate", "1e-3", 1e-3),
    ("-u", "--warmup-iterations", "1", 1),
    ("-q", "--final-learning-rate-frac", "0.5", 0.5),
    ("-c", "--weight-decay", "0.1", 0.1),
    ("-sl", "--skip-update-loss-z", "7", 7.0),
    ("-sg", "--skip-update-grad-z", "6.5", 6.5),
    ("-v", "--val-loss-every", "1", 1),
    ("-m", "--val-max-steps", "-1", -1),
    ("-s", "--sample-every", "1", 1),
    ("-g", "--sample-length", "3", 3),
    ("-h", "--hellaswag", "0", 0),
    ("-lg", "--log-gpu-every", "-1", 0),
    ("-z", "--zero-stage", "0", 0),
    ("-pn", "--process-count", "1", 1),
    ("-pr", "--process-rank", "0", 0),
    ("-pg", "--gpus-per-node", "4", 4),
    ("-pi", "--nccl-init-method", "fs", "fs"),
    ("-ps", "--server-ip", "10.0.0.1", "10.0.0.1"),
    ("-pf", "--fs-path", "shared", "shared"),
    (None, "--beta1", "0.8", 0.8),
    (None, "--beta2", "0.98", 0.98),
    (None, "--eps", "1e-6", 1e-6),
    (None, "--grad-clip", "0", 0.0),
    (None, "--seed", "7", 7),
    (None, "--temperature", "0.5", 0.5),
    (None, "--tokenizer", "bytes", "bytes"),
    (None, "--device", "cpu", "cpu"),
    (None, "--dtype", "fp32", "fp32"),
    (None, "--threads", "1", 1),
    (None, "--on-nonfinite", "skip", "skip"),
]


def test_every_flag_has_its_letter_and_its_long_name(capsys):
    """Both names are accepted and mean the same; a run with all letters and one with all long names end alike."""
    parse, argv = flags.parser().parse_args, {True: [], False: []}
    for letter, name, text, value in FLAGS:
        attribute = name[2:].replace("-", "_")
        for flag in filter(None, (letter, name)):
            assert getattr(parse([flag, text]), attribute) == value, flag
        argv[True] += [letter or name, text]
        argv[False] += [name, text]
    known = {string for action in flags.parser()._actions for string in action.option_strings}
    listed = {flag for letter, name, *_ in FLAGS for flag in (letter, name) if flag}
    assert known == listed | {"--help", "--no-graph", "--check", "--kernel", "--plan", "--memory", "--replay"}
    assert run(*argv[True], "--no-graph", base=[]) == 0
    os.rename("out", "letters")
    assert run(*argv[False], base=[]) == 0
    assert "generating:" in capsys.readouterr().out
    assert_same_run("out", "letters", 2)


def test_defaults_are_those_of_llm_c():
    settings, notices = settings_from(flags.parser().parse_args(["-i", "x"]), "cpu")
    assert not settings.default_job and not notices
    assert (settings.model_name, settings.dtype) == ("tiny:d4", "fp32")  # llm.c's default is gpt2_124M_bf16.bin
    expected = dict(batch_size=4, max_steps=-1, lr_scheduler="cosine", learning_rate=3e-4, warmup_iterations=0)
    expected.update(final_learning_rate_frac=1.0, weight_decay=0.0, beta1=0.9, beta2=0.95, eps=1e-8, grad_clip=1.0)
    expected.update(val_loss_every=20, val_max_steps=20, sample_every=20, sample_length=64, recompute=1, seed=42)
    expected.update(checkpoint_every=0, checkpoints_keep=0, major_checkpoint_every=0, resume=0, overfit_single_batch=0)
    expected.update(total_batch_size=None, sequence_length=None, output_dir=None)
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings == Settings(input_bin="x")  # a run without flags: the same defaults


def test_help_is_fast():
    """It imports nothing heavy: no NumPy, and of ours only what reads flags and the launcher's variables."""
    command = [sys.executable, "-X", "importtime", "-m", "llmc.train", "--help"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert done.returncode == 0 and "argparse" in imported
    heavy = [n for n in imported if n.split(".")[0] in ("numpy", "tiktoken", "tqdm", "threadpoolctl", "cupy", "torch")]
    light = {"llmc.errors", "llmc.command", "llmc.training", "llmc.training.flags", "llmc.parallel"}
    light |= {"llmc.parallel.launch", "llmc.parallel.world"}
    assert not heavy and {n for n in imported if n.startswith("llmc.")} <= light, imported
    assert all(flag in done.stdout for letter, name, *_ in FLAGS for flag in (letter, name) if flag)


def test_one_epoch(capsys):
    """-x -1: as many steps as the training tokens have total batches."""
    tokens = sum(read_shard_header(f"train_{i}.bin").num_tokens for i in range(3))
    assert run("-x", -1, "-d", 2 * B * T) == 0
    steps = tokens // (2 * B * T)
    assert steps == 6
    assert [line[:11] for line in lines_of(capsys.readouterr().out, "step ")] == [
        f"step {i:4d}/{steps}" for i in range(1, steps + 1)
    ]


def val_loss_by_hand(batches, params=None, seed=42):
    """Mean loss over the first validation batches of a fresh model, or of one with these parameters."""
    model = Model(gpt2, cpu, gpt2.config_from_descriptor("tiny:d1", V, T), B, T)
    if params is None:
        model.init_weights(seed)
    else:
        model.params_flat[:] = params
    loader, x, y = DataLoader("val.bin", B, T), np.empty((B, T), np.int32), np.empty((B, T), np.int32)
    losses = []
    for _ in range(batches):
        loader.next_batch(x, y)
        losses.append(model.validate(x, y))
    return np.mean(losses)


@pytest.mark.parametrize("flag, batches", [(1, 1), (4, 4), (-1, 6)])
def test_validation_batches(flag, batches, capsys):
    assert run("-x", 1, "-v", 1, "-m", flag, "-l", 0, "-o", "out") == 0
    assert rows_of(capsys.readouterr().out)["val_num_batches      "].split() == [str(batches)]
    losses = [line["val_loss"] for line in metrics() if "val_loss" in line]
    assert losses == [pytest.approx(val_loss_by_hand(batches), rel=1e-12)] * 2  # learning rate 0: also at the end


def test_seed():
    for seed, name in ((42, "one"), (42, "same"), (43, "other")):
        assert run("-x", 1, "-v", 1, "-m", 1, "--seed", seed, "-o", name) == 0
    assert without_timings("one") == without_timings("same") != without_timings("other")
    assert metrics("other")[0]["val_loss"] == pytest.approx(val_loss_by_hand(1, seed=43), rel=1e-12)


def test_overfit_single_batch(monkeypatch):
    """-a 1: every step trains on the first validation batch, and the loss falls as it never does on fresh data."""
    inputs, forward = [], Model.forward
    monkeypatch.setattr(Model, "forward", lambda self, x: (inputs.append(x.copy()), forward(self, x))[1])
    assert run("-x", 30, "-a", 1, "-l", 3e-3, "-o", "out") == 0
    first, targets = np.empty((B, T), np.int32), np.empty((B, T), np.int32)
    DataLoader("val.bin", B, T).next_batch(first, targets)
    assert len(inputs) == 30 and all(np.array_equal(x, first) for x in inputs)
    losses = [line["train_loss"] for line in metrics()]
    assert losses[0] > 5 and losses[-1] < 2.5


def test_training_batches_are_the_loaders(monkeypatch):
    """Without -a: the batches of a shuffling loader, two epochs long, micro-step by micro-step."""
    inputs, forward = [], Model.forward
    monkeypatch.setattr(Model, "forward", lambda self, x: (inputs.append(x.copy()), forward(self, x))[1])
    assert run("-x", EPOCH, "-d", 2 * B * T) == 0
    loader = DataLoader("train_*.bin", B, T, should_shuffle=True)
    x, y = np.empty((B, T), np.int32), np.empty((B, T), np.int32)
    assert len(inputs) == 2 * EPOCH
    for seen in inputs:
        loader.next_batch(x, y)
        assert np.array_equal(seen, x)


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_accumulation_equals_a_large_batch(recompute):
    """-b 4 in one go and 4 micro-steps of -b 1, on the same tokens: equal up to the rounding of fp32 sums."""
    for rows in (4, 2, 1):
        flags = ("-x", 6, "-a", 1, "-l", 1e-3, "-r", recompute, "-o", f"out{rows}")
        assert run(*flags, "-b", rows, "-d", 4 * T) == 0
    for rows in (2, 1):
        for large, small in zip(metrics("out4"), metrics(f"out{rows}"), strict=True):
            # sums of 128 terms in another order: 1e-7 relative, which Adam's first steps, lr * sign(g), magnify
            assert small["train_loss"] == pytest.approx(large["train_loss"], rel=3e-6)
            assert small["grad_norm"] == pytest.approx(large["grad_norm"], rel=1e-4)


def test_grad_clip_and_weight_decay_reach_the_update(monkeypatch):
    seen, update = [], Model.update
    monkeypatch.setattr(Model, "update", lambda self, *a: (seen.append(a), update(self, *a))[1])
    flags = "-x 3 -k constant -l 0.01 -c 0.25 --beta1 0.8 --beta2 0.98 --eps 1e-6 --grad-clip 0.5".split()
    assert run(*flags) == 0
    assert seen == [(AdamW(pytest.approx(0.01), 0.8, 0.98, 1e-6, 0.25, 0.5), t) for t in (1, 2, 3)]


def test_a_loss_that_is_not_finite_ends_the_run(capfd):
    assert run("-x", 50, "-l", 1e30, "-o", "out", "-n", 1) == 2
    err = lines_of(capfd.readouterr().err, "llmc.train: error:")
    assert len(err) == 1 and re.search(r"step \d+: loss .*nan.*not updated. HINT: lower -l", err[0])
    params = np.fromfile(checkpoints.model_path("out", 1), np.float32, offset=1024)
    assert np.isfinite(params).all()


# ---------------------------------------------------------------------------------------------------------------------
# models from files


def trained_model(path="model.bin", version=3, steps=2, **changes):
    """A model file after a few steps; changes: words of its header."""
    if not os.path.exists("trained"):
        assert run("-x", steps, "-n", steps, "-o", "trained", "-v", steps, "-m", 2) == 0
    header = model_file.read_model_header(checkpoints.model_path("trained", steps))
    params = np.empty(model_file.num_parameters(header), np.float32)
    model_file.read_model(checkpoints.model_path("trained", steps), params)
    model_file.write_model(path, {**header, **changes}, params, version)
    return path, params


def test_a_model_brings_its_own_tokenizer(tmp_path, monkeypatch, capsys):
    """A byte-level model that is named trains on bytes where no data is named: its file, its run's folder, a resume."""
    trained_model()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    quick = ["-x", "1", "-b", str(B), "-t", str(T), "-v", "0", "-s", "0", "--device", "cpu"]
    on = ["-o", "out", "-n", "1"]
    for argv in (["-e", "model.bin"], ["-e", "trained", *on], [*on, "-y", "1", "-x", "2"]):
        capsys.readouterr()
        assert run(*argv, base=quick) == 0, capsys.readouterr()
        out = capsys.readouterr().out
        assert "tinyshakespeare-bytes" in out and rows_of(out)["vocab_size V         "].strip() == "257"
    os.mkdir("tiny:d1")  # a folder called like a descriptor
    assert run("-e", "tiny:d1", base=quick) == 0
    os.mkdir("empty")
    assert run("-e", "empty", base=quick) == 2
    assert_one_line(capsys.readouterr().err, "empty holds no finished checkpoint", "HINT: ")
    trained_model("other.bin", vocab_size=300)
    assert run("-e", "other.bin", base=quick) == 2
    assert_one_line(capsys.readouterr().err, "other.bin: no tokenizer has 300 tokens", "HINT: give it -i and -j")


@pytest.mark.parametrize("version", [3, 5])
def test_start_from_a_model_file(version, capsys):
    """-e file.bin: its weights and sizes, bf16 ones exactly as fp32; Adam's moments start from zero."""
    path, params = trained_model(version=version)
    if version == 5:
        params = io.bf16_to_fp32(io.fp32_to_bf16(params))
    capsys.readouterr()
    assert run("-e", path, "-x", 2, "-v", 2, "-m", 2, "-o", "out", "-n", 2) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["weight init method   "].strip() == path and rows["max_sequence_length T"].strip() == str(T)
    last, first = metrics("trained")[-1]["val_loss"], metrics("out")[0]["val_loss"]
    assert first == pytest.approx(val_loss_by_hand(2, params), rel=1e-12)
    assert first == last if version == 3 else first == pytest.approx(last, rel=1e-3) and first != last
    assert metrics("out")[-1]["val_loss"] < first
    header = model_file.read_model_header(checkpoints.model_path("out", 2))
    assert header["version"] == 3 and header["vocab_size"] == V


def test_start_from_the_folder_of_a_run(capsys):
    """-e DIR is its newest checkpoint, as for the other commands; data that the run prepares has the model's tokens."""
    _, params = trained_model()
    capsys.readouterr()
    assert run("-e", "trained", "-x", 1, "-v", 1, "-m", 2, "-o", "out") == 0
    assert rows_of(capsys.readouterr().out)["weight init method   "].strip() == checkpoints.model_path("trained", 2)
    assert metrics("out")[0]["val_loss"] == pytest.approx(val_loss_by_hand(2, params), rel=1e-12)
    assert run("-e", "trained", "-x", 1, "-v", 0, "-s", 0, "-b", 1, base=DEFAULT) == 0  # bytes, as the model
    assert rows_of(capsys.readouterr().out)["vocab_size V         "].split() == [str(V)]
    trained_model("other.bin", vocab_size=300)
    capsys.readouterr()
    assert run("-e", "other.bin", "-x", 1, base=DEFAULT) == 2
    assert_one_line(capsys.readouterr().err, "no tokenizer has 300 tokens", "HINT: ", "-i and -j")


def test_llama3_shards_train_where_the_vocabulary_fits(capsys):
    """uint32 tokens give the same run as uint16 ones; without a stated vocabulary they are Llama-3's 128,256."""
    for name in ("train_0", "train_1", "train_2", "val"):
        write_shard(f"wide_{name}.bin", read_shard(f"{name}.bin").astype(np.uint32), V)
    assert run("-x", 2, "-o", "narrow") == 0
    assert run("-x", 2, "-o", "wide", "-i", "wide_train_*.bin", "-j", "wide_val.bin") == 0
    assert without_timings("narrow") == without_timings("wide")
    write_shard("llama.bin", np.full(200, 128000, np.uint32))
    assert vocabulary_of("llama.bin") == 128256
    trained_model()
    capsys.readouterr()
    assert run("-e", "model.bin", "-i", "llama.bin") == 2
    assert_one_line(capsys.readouterr().err, "llama.bin", "128000", "256", "HINT: ")


def test_a_model_file_sets_the_sequence_length(capsys):
    path, _ = trained_model()
    argv = [a for i, a in enumerate(BASE) if "-t" not in BASE[max(i - 1, 0) : i + 1]]
    assert "-t" not in argv and run("-e", path, "-x", 1, base=argv) == 0
    assert rows_of(capsys.readouterr().out.rpartition("cpu (")[2])["sequence length T    "].split() == [str(T)]


def test_shorter_rows_than_the_model(capsys):
    path, _ = trained_model()
    assert run("-e", path, "-t", T // 2, "-b", 1, "-x", 2, "-n", 2, "-o", "out", "-s", 2) == 0
    assert model_file.read_model_header(checkpoints.model_path("out", 2))["max_seq_len"] == T


def test_retention():
    """-nk keeps the newest, -nm spares its multiples."""
    assert run("-x", 6, "-n", 1, "-nk", 2, "-nm", 3, "-o", "out") == 0
    assert checkpoints.checkpoint_steps("out") == [3, 5, 6]
    names = {f"{kind}_{step:08d}{end}" for step in (3, 5, 6) for kind, end in KINDS}
    assert set(os.listdir("out")) == names | {"main.log", "metrics.jsonl"}


KINDS = (("model", ".bin"), ("state", "_00000.bin"), ("DONE", ""))


def test_retention_without_n_keeps_the_checkpoint_of_ctrl_c(monkeypatch):
    interrupt_in_step(2, monkeypatch)
    assert run("-x", 5, "-nk", 1, "-o", "out") == 130
    assert checkpoints.checkpoint_steps("out") == [3]
    monkeypatch.undo()
    assert run("-x", 5, "-nk", 1, "-o", "out", "-y", 1) == 0
    assert checkpoints.checkpoint_steps("out") == [3]


def test_retention_after_a_kill_before_it(monkeypatch):
    """Killed after the save of step 4 and before the removal of step 2: the run that resumes removes it."""
    assert run("-x", 6, "-n", 2, "-o", "all") == 0
    os.mkdir("out")
    for name in os.listdir("all"):
        if "_00000006" not in name:
            shutil.copy(os.path.join("all", name), "out")
    assert run("-x", 6, "-n", 2, "-nk", 1, "-o", "out", "-y", 1) == 0
    assert checkpoints.checkpoint_steps("out") == [6]
    assert_same_run("out", "all", 6)


# ---------------------------------------------------------------------------------------------------------------------
# the default job


@pytest.mark.slow
def test_default_job(capsys):
    """With no flags but -x: prepares the data, trains, validates on all of it, samples, saves; twice, two folders."""
    code, out, err = finish(start("-x", 3, "-g", 60, base=DEFAULT))
    assert code == 0 and not err, err
    assert re.match(r"cpu \((auto: .+|asked for)\), .+, 1 thread\n", out)
    assert "Tiny Shakespeare in" in out or "Python's own documentation" in out
    assert len([line for line in lines_of(out, "step ") if STEP_LINE.fullmatch(line)]) == 3
    events = ("val loss", "generating:", "wrote checkpoint", "validation loss on all")
    assert [line.split()[0] for line in lines_of(out, *events)] == ["val", "val", "generating:", "wrote", "validation"]
    final = [line["val_loss"] for line in metrics("runs/shakespeare-001") if "val_loss" in line][-1]
    tokens, loss = re.search(r"validation loss on all (\d+) held-out tokens: (\d\.\d{4}) nats", out).groups()
    assert loss == f"{final:.4f}" and final < 5.6
    if "Tiny Shakespeare in" in out:
        assert 111540 - 2048 < int(tokens) <= 111540
    assert checkpoints.latest_checkpoint("runs/shakespeare-001") == 3
    assert 'python -m llmc.generate runs/shakespeare-001 --prompt "ROMEO:"' in out

    # a second one, with everything off: its own folder, nothing validated or sampled
    assert run("-x", 2, "-b", 1, "-t", 32, "-v", 0, "-s", 0, base=DEFAULT) == 0
    out = capsys.readouterr().out
    assert checkpoints.latest_checkpoint("runs/shakespeare-002") == 2
    assert not lines_of(out, "val loss", "validation loss", "generating")


def test_default_job_for_an_epoch_samples_once(capsys, monkeypatch):
    """-x -1 in the default job: the sample comes at the end, not in every step."""
    nan = float("nan")
    monkeypatch.setattr(loop, "train_step", lambda *a: StepResult(1.0, nan, 1.0, nan, 0.0, None))
    assert run("-x", -1, "-b", 32, "-t", 256, "-v", 0, "-n", 0, "-g", 3, base=DEFAULT) == 0
    out = capsys.readouterr().out
    assert len(lines_of(out, "generating:")) == 1 and len(lines_of(out, "step ")) > 40


def test_default_job_resumes_where_it_is_told(capsys):
    assert run("-x", 1, "-b", 1, "-t", 32, "-v", 0, "-s", 0, base=DEFAULT) == 0
    assert run("-x", 2, "-b", 1, "-t", 32, "-v", 0, "-s", 0, "-o", "runs/shakespeare-001", "-y", 1, base=DEFAULT) == 0
    assert os.listdir("runs") == ["shakespeare-001"] and checkpoints.checkpoint_steps("runs/shakespeare-001") == [1, 2]
    capsys.readouterr()
    assert run("-x", 3, "-y", 1, base=DEFAULT) == 2  # not a new folder, where it would start again
    assert "-y 1 resumes from -o" in capsys.readouterr().err and os.listdir("runs") == ["shakespeare-001"]


def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.delenv("LLMC_DATA_DIR", raising=False)


def test_offline_the_default_job_still_trains(monkeypatch, capsys):
    """No network and no data folder: it says so in one line, and trains on text that every Python carries."""
    offline(monkeypatch)
    assert run("-x", 2, "-b", 8, "-t", 64, "-v", 2, "-s", 0, "-l", 1e-2, "-u", 0, "-m", 1, base=DEFAULT) == 0
    out, err = capsys.readouterr()
    said = [line for line in out.splitlines() if "Tiny Shakespeare cannot be had" in line]
    assert len(said) == 1 and "Python's own documentation" in said[0] and "name resolution" in said[0] and not err
    losses = [line["val_loss"] for line in metrics("runs/shakespeare-001") if "val_loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("argv", [["-e", "tiny:d1"], ["--tokenizer", "gpt2"], ["-i", "tinyshakespeare", "-j", "x.bin"]])
def test_what_was_named_is_never_substituted(argv, monkeypatch, capsys):
    """Only the run that names nothing falls back to other text."""
    offline(monkeypatch)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.environ.get("TIKTOKEN_CACHE_DIR") or "no-cache")
    assert run("-x", 1, *argv, base=DEFAULT) == 2
    out, err = capsys.readouterr()
    assert_one_line(err, "HINT:")
    assert "Python's own documentation" not in out + err and not os.path.exists("runs")


# ---------------------------------------------------------------------------------------------------------------------
# the same bits


def test_two_runs_have_the_same_bits():
    for name in ("one", "other"):
        assert run("-x", 14, "-n", 7, "-v", 5, "-s", 5, "-g", 4, "-c", 0.1, "-o", name) == 0
    assert_same_run("one", "other", 7)
    assert_same_run("one", "other", 14)


def test_threads_do_not_change_the_bits(monkeypatch):
    """Whichever thread does what, of the same blocks: some BLAS kernels round differently in blocks of other sizes."""
    monkeypatch.setattr(cpu.device, "shares", lambda: 6)
    for threads in (1, 2, 3):
        flags = ("-e", "tiny:d2", "-b", 3, "-t", 48, "-x", 3, "-n", 3, "-v", 2, "-c", 0.1, "-o", f"out{threads}")
        assert run(*flags, "--threads", threads) == 0
    assert_same_run("out2", "out1", 3)
    assert_same_run("out3", "out1", 3)


def test_resume_at_every_step():
    """A run resumed at any step ends as one that was never stopped: inside shards, at their ends, at the epoch's."""
    steps = EPOCH + 2
    flags = ("-x", steps, "-v", 3, "-m", 1, "-u", 4, "-q", 0.1, "-c", 0.1)
    assert run(*flags, "-n", 1, "-o", "full") == 0
    assert checkpoints.checkpoint_steps("full") == list(range(1, steps + 1))
    for step in range(1, steps + 1):
        out = stopped_at(step, "full", f"at{step}")
        assert run(*flags, "-n", steps, "-o", out, "-y", 1) == 0
        assert_same_run(out, "full", steps)
        assert checkpoints.checkpoint_steps(out) == sorted({step, steps})


@pytest.mark.parametrize(
    "flags", [("-d", 3 * B * T), ("-a", 1), ("-r", 0, "-k", "wsd"), ("-i", "train_0.bin", "-r", 2, "--grad-clip", 0)]
)
def test_resume_with_other_flags(flags):
    flags = ("-x", 8, *flags)
    assert run(*flags, "-n", 3, "-o", "full") == 0
    assert run(*flags, "-n", 8, "-o", stopped_at(3, "full", "again"), "-y", 1) == 0
    assert_same_run("again", "full", 8)


def test_resume_with_another_micro_batch():
    """-b changes and -d does not: the updates see the same tokens, shuffled as before, beyond the end of an epoch."""
    flags = ("-x", 9, "-n", 3, "-d", 4 * B * T)
    assert run(*flags, "-o", "full") == 0
    shutil.copytree("full", "again")
    for step, b in ((3, 2 * B), (6, 1)):  # twice, the second time in a run that another -b began
        for later in range(step + 3, 10, 3):
            checkpoints.delete_checkpoint("again", later)
        assert run(*flags, "-o", "again", "-y", 1, "-b", b) == 0
    losses = [[row["train_loss"] for row in metrics(name) if "train_loss" in row] for name in ("full", "again")]
    assert len(losses[0]) == len(losses[1]) == 9
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_resume_of_two_ranks_of_llm_c_on_one():
    """A state cut into llm.c's ZeRO-1 files of two ranks, without any word of ours, goes on to the same bits."""
    flags = ("-x", 6, "-a", 1)
    assert run(*flags, "-n", 3, "-o", "full") == 0
    stopped_at(3, "full", "again")
    path = Path(checkpoints.state_path("again", 3, 0))
    header, body = bytearray(path.read_bytes()[:1024]), np.fromfile(path, "<f4", offset=1024)
    config = gpt2.config_from_header(model_file.read_model_header(checkpoints.model_path("again", 3)))
    specs = gpt2.parameter_specs(config)
    N, ends = gpt2.num_parameters(config), np.cumsum([spec.size for spec in specs])
    header[8:12], header[256:268] = (2).to_bytes(4, "little"), bytes(12)  # P; m's length, the length of what we add
    for rank in range(2):
        header[12:16] = rank.to_bytes(4, "little")
        parts = [bytes(header)]
        for values in body[:N], body[N : 2 * N]:
            for spec, tensor in zip(specs, np.split(values, ends[:-1]), strict=True):
                parts.append(tensor.reshape(max(spec.layers, 1), 2, -1)[:, rank].tobytes())
        Path(checkpoints.state_path("again", 3, rank)).write_bytes(b"".join(parts))
    Path(checkpoints.done_path("again", 3)).write_bytes(b"")  # as llm.c's
    assert run(*flags, "-n", 6, "-o", "again", "-y", 1) == 0
    full, again = (checkpoints.state_path(folder, 6, 0) for folder in ("full", "again"))
    assert np.array_equal(np.fromfile(full, "<f4", 2 * N, offset=1024), np.fromfile(again, "<f4", 2 * N, offset=1024))
    full, again = (Path(checkpoints.model_path(folder, 6)).read_bytes() for folder in ("full", "again"))
    assert full == again


@pytest.mark.parametrize("model, message", [("d12", "num_layers 12, .*model_00000002.bin 1"), ("tiny:d1", None)])
def test_resume_with_another_model(model, message, capsys):
    assert run("-x", 2, "-n", 2, "-o", "out") == 0
    assert run("-x", 3, "-n", 3, "-o", "out", "-y", 1, "-e", model) == (2 if message else 0)
    if message:
        err = capsys.readouterr().err
        assert re.search(f"-e {model} has {message}.*HINT: ", err) and err.count("\n") == 1, err


def rounded_to_bf16(folder, step, masters):
    """Round the weights of a checkpoint. With masters it becomes a bf16 run's, with the fp32 weights in the state."""
    model = checkpoints.model_path(folder, step)
    N = model_file.num_parameters(model_file.read_model_header(model))
    params, m, v = np.empty((3, N), np.float32)
    header = model_file.read_model(model, params)
    state = state_file.read_state(checkpoints.state_path(folder, step, 0), (m, v))
    bf16 = io.fp32_to_bf16(params)
    rounded = (bf16, 5) if masters else (io.bf16_to_fp32(bf16), 3)
    checkpoints.save_checkpoint(folder, header, *rounded, state, (m, v, params) if masters else (m, v))


def test_a_state_that_cannot_be_resumed_is_found_before_memory_is_taken(capsys, monkeypatch):
    """Here: bf16 weights with a state without masters, which the CPU op set would not make."""
    assert run("-n", 2, "-x", 2, "-o", "out") == 0
    header = model_file.read_model_header("out/model_00000002.bin")
    monkeypatch.setattr(model_file, "read_model_header", lambda path: {**header, "version": 5})
    headers = checkpoints.read_state_headers
    states = lambda *args: [replace(state, use_master_weights=False) for state in headers(*args)]  # noqa: E731
    monkeypatch.setattr(checkpoints, "read_state_headers", states)
    monkeypatch.setattr("llmc.devices.model_dtype", lambda name: "bfloat16")
    monkeypatch.setattr(setup, "Model", None)
    capsys.readouterr()
    assert run("-n", 2, "-x", 4, "-o", "out", "-y", 1) == 2
    out, err = capsys.readouterr()
    assert re.search("error: -w 1: .*state_00000002_00000.bin has no master weights. HINT: .*-w 0", err)
    assert err.count("\n") == 1 and "memory plan" not in out


def test_resume_of_a_bf16_run_in_fp32():
    """-w 1 goes on from the masters in the state, so not a bit is lost; -w 0 from the rounded weights, whatever else
    the state holds (llm.c reads the masters for the loader's state then)."""
    flags = ("-x", 6, "-v", 3, "-m", 1)
    assert run(*flags, "-n", 3, "-o", "full") == 0
    for masters in (1, 0):
        out = stopped_at(3, "full", f"w{masters}")
        rounded_to_bf16(out, 3, masters=True)
        assert run(*flags, "-n", 6, "-o", out, "-y", 1, "-w", masters) == 0
    assert_same_run("w1", "full", 6)
    assert weights_and_state("w0", 6) != weights_and_state("full", 6)
    rounded_to_bf16(stopped_at(3, "full", "rounded"), 3, masters=False)
    assert run(*flags, "-n", 6, "-o", "rounded", "-y", 1) == 0
    assert weights_and_state("w0", 6) == weights_and_state("rounded", 6)


@pytest.mark.parametrize("limits", [dict(loss=0.1, grad=1.5), dict(loss=0.0, grad=1.5)])
def test_skipped_updates(limits, capsys):
    """-sl and -sg against the same loop by hand: one-sided, from step 128 on, the loss first; also across a resume."""
    write_shard("train_noise.bin", np.random.default_rng(0).integers(0, V, B * T + 1).astype(np.uint16), V)
    steps = 128 + 2 * (EPOCH + 1)  # two of them with the batch of noise
    argv = ("-x", steps, "-n", 136, "-l", 3e-3, "-sl", limits["loss"], "-sg", limits["grad"])
    assert run(*argv, "-o", "out") == 0
    out = capsys.readouterr().out

    model = Model(gpt2, cpu, gpt2.config_from_descriptor("tiny:d1", V, T), B, T)
    model.init_weights()
    loader = DataLoader("train_*.bin", B, T, should_shuffle=True)
    x, y = np.empty((2, B, T), np.int32)
    losses, norms, expected = [], [], []
    for step in range(steps):
        loader.next_batch(x, y)
        model.forward(x)
        model.backward(x, y)
        model.measure_norm()
        losses.append(model.mean_loss())
        norms.append(model.grad_norm())
        z = {}
        for name, values in (("loss", losses), ("grad", norms)):
            window = np.array(values[-128:])
            z[name] = (window[-1] - window.mean()) / max(window.std(), 1e-9)
        over = [name for name in ("loss", "grad") if step >= 128 and limits[name] and z[name] > limits[name]]
        if over:
            expected.append((step, over[0], z[over[0]]))
        else:
            model.update(AdamW(3e-3), step + 1)
    lines = lines_of(out, "step ", "skipping")
    notices = [line for line in lines if line.startswith("skipping")]
    assert ("loss" if limits["loss"] else "grad") in [name for _, name, _ in expected] and len(expected) < steps - 128
    for (step, name, z), notice in zip(expected, notices, strict=True):
        match = re.fullmatch(r"skipping update due to (loss|grad) z-score of (\d+\.\d{6})", notice)
        assert match[1] == name and float(match[2]) == pytest.approx(z, abs=2e-6)
        assert lines[lines.index(notice) + 1].startswith(f"step {step + 1:4d}/")
    saved = np.empty_like(model.params_flat)
    model_file.read_model(checkpoints.model_path("out", steps), saved)
    assert np.array_equal(saved, model.params_flat)
    state = state_file.read_state_header(checkpoints.state_path("out", steps, 0), (saved.size,))
    assert state.rng_state == model.rng_state  # no seeds are drawn for an update that is left out

    assert run(*argv, "-o", stopped_at(136, "out", "again"), "-y", 1) == 0
    assert_same_run("again", "out", steps)


def test_mfu_and_gpu_readings(monkeypatch, capsys):
    """MFU is of the step's own time and this process's tokens; -lg prints below each N-th step line, counted from 1."""
    given = []
    monkeypatch.setattr(mfu, "utilisation", lambda *args: given.append(args) or 0.1234)
    monkeypatch.setattr(setup, "open_gpu_stats", lambda *args: SimpleNamespace(line=lambda: "step of the GPU"))
    assert run("-x", 5, "-d", 2 * B * T, "-lg", 2, "-o", "out") == 0
    lines = lines_of(capsys.readouterr().out, "step ")
    assert [i for i, line in enumerate(lines) if line == "step of the GPU"] == [2, 5]
    trained = [STEP_LINE.fullmatch(line) for line in lines if line != "step of the GPU"]
    assert len(trained) == 5 and all(match and "| 12.3% bf16 MFU |" in match[0] for match in trained)
    logged = metrics()
    flops = gpt2.flops_per_token(gpt2.config_from_descriptor("tiny:d1", V, T), T) * 2 * B * T
    assert given == [(flops, line["dt_ms"], None) for line in logged]
    assert all(line["mfu"] == 0.1234 for line in logged)


def test_gpu_readings_of_a_run_without_a_gpu(capsys):
    assert run("-x", 1, "-lg", 1) == 2
    assert_one_line(capsys.readouterr().err, "-lg 1", "CPU", "HINT: ")
    assert run("-x", 1, "-lg", -1) == 0


def test_resume_without_a_checkpoint_starts_afresh(capsys):
    assert run("-x", 2, "-n", 2, "-o", "one") == 0
    os.mkdir("other")
    assert run("-x", 2, "-n", 2, "-o", "other", "-y", 1) == 0
    assert_same_run("one", "other", 2)
    assert "resuming" not in capsys.readouterr().out
    assert run("-x", 2, "-n", 2, "-o", "other", "-y", 1) == 0  # finished already: nothing changes
    assert_same_run("one", "other", 2)
    assert "resuming from step 2" in capsys.readouterr().out


@pytest.mark.full
def test_killed_at_fifty_instants():
    """SIGKILL at 50 random instants, of start-up, steps and checkpoint writes: every run ends in the undisturbed bits.

    A checkpoint is written after every step and old ones are removed, so that kills fall into writes; that some did
    is asserted from what they left behind: temporary files, or a model without its DONE marker.
    """
    steps, rng = 40, random.Random(2024)
    argv = ("-x", steps, "-n", 1, "-nk", 2, "-nm", 16, "-v", 10, "-m", 1, "-y", 1)
    begin = time.monotonic()
    process = start(*argv, "-o", "full")
    read_steps(process, 1)
    start_up = time.monotonic() - begin
    code, _, err = finish(process)
    step_time = (time.monotonic() - begin - start_up) / steps
    assert code == 0, err

    out, kills, runs, torn, in_start_up = "run0", 0, 0, 0, 0
    while kills < 50:
        process = start(*argv, "-o", out)
        early = rng.random() < 0.25
        if early:
            time.sleep(rng.uniform(0, start_up))
        else:
            read_steps(process, rng.randint(1, 6))
            time.sleep(rng.uniform(0, 2 * step_time))
        process.kill()
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err.decode()
        if process.returncode == 0:  # it had ended before the kill
            assert_ended_as("full", out, steps)
            runs += 1
            out = f"run{runs}"
            continue
        kills += 1
        left = os.listdir(out) if os.path.exists(out) else []
        in_start_up += early
        unfinished = [n for n in left if n.startswith("model") and f"DONE_{n[6:14]}" not in left]
        torn += bool(unfinished or [name for name in left if name.endswith(".tmp")])
    code, _, err = finish(start(*argv, "-o", out))
    assert code == 0, err
    assert_ended_as("full", out, steps)
    print(f"{kills} kills in {runs + 1} runs: {in_start_up} in start-up, {torn} in a checkpoint's write or removal")
    assert torn >= 5 and runs >= 1


def read_steps(process, count):
    """Wait until a process has printed this many step lines, or has ended."""
    for line in process.stdout:
        count -= line.startswith(b"step ")
        if count == 0:
            return


def assert_ended_as(reference, folder, step):
    assert_same_run(folder, reference, step)
    aside = re.compile(r"(main\.log|metrics\.jsonl)\.\d+")  # what was logged before the first checkpoint
    assert sorted(n for n in os.listdir(folder) if not aside.fullmatch(n)) == sorted(os.listdir(reference))


# ---------------------------------------------------------------------------------------------------------------------
# memory


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("micro_steps", [1, 2])
def test_a_step_allocates_no_activation(recompute, micro_steps):
    """After the first step, all that a step allocates at its peak is less than one (B, T, C) array."""
    b, t, c = 8, 128, 256
    write_tokens("long.bin", 4 * b * t + 1)
    settings = Settings("long.bin", "val.bin", weight_decay=0.1)
    model = Model(gpt2, cpu, gpt2.GPT2Config(t, V, 384, 2, 4, c), b, t, recompute=recompute)
    model.init_weights()
    loader = DataLoader("long.bin", b, t, should_shuffle=True, vocab_size=V)
    inputs, targets = np.empty((2, micro_steps, b, t), np.int32)
    detectors = {"loss": OutlierDetector(), "grad_norm": OutlierDetector()}

    def step(i):
        train_step(model, loader, settings, i, 9, inputs, targets, detectors)

    step(0)
    tracemalloc.start()
    try:
        step(1)  # what tracemalloc does not know from before is now known
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        step(2)
        _, peak = tracemalloc.get_traced_memory()
        assert peak - before < b * t * c * 4, f"{peak - before} bytes"
        np.empty((b, t, c), np.float32)  # it does see arrays
        assert tracemalloc.get_traced_memory()[1] - before >= b * t * c * 4
    finally:
        tracemalloc.stop()


PEAK = 'next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))'


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
def test_peak_memory_is_the_plan():
    """Training, validation, sampling and a checkpoint: at most 1.1 times the plan, and the interpreter's own memory."""
    rng = np.random.default_rng(0)
    for name in ("long.bin", "long_val.bin"):  # wide logits, and no tokenizer has as many tokens: samples are numbers
        write_shard(name, rng.integers(0, 50000, 3 * 1024 + 1, dtype=np.uint16), 50000)
    modules = "llmc.train, llmc.gpt2, llmc.data.prepare, llmc.files.checkpoints, llmc.training.loop"
    product = "import numpy as np; a = np.ones((512, 512), np.float32); cpu.device.parallel(lambda i: a @ a, 1)"
    pool = f"from llmc import cpu; cpu.device.threads(2); {product}"
    baseline = int(python(f"import {modules}; {pool}; print({PEAK})"))
    argv = "-i long.bin -j long_val.bin -e tiny:d2 -b 16 -t 64 -x 2 -v 2 -m 1 -s 2 -g 3 -n 2 -o out --threads 2".split()
    argv += ["--device", "cpu"]  # not to import CuPy where it is installed
    out = python(f"import llmc.train; assert llmc.train.main({argv}) == 0; print({PEAK})")
    peak = int(out.split()[-1])
    plan = int(re.search(r"^  total +([\d,]+) bytes", out, re.M)[1].replace(",", ""))
    plan += int(re.search(r"^  scratch of the threads +([\d,]+) bytes", out, re.M)[1].replace(",", ""))
    print(f"peak {peak / 2**20:.1f} MiB, plan {plan / 2**20:.1f} MiB, baseline {baseline / 2**20:.1f} MiB")
    assert 250 * 2**20 < plan < 400 * 2**20
    assert peak <= 1.1 * plan + baseline
    assert peak > 0.9 * plan  # and the plan is not padded
    said = re.search(r"^peak memory: (\d+) MiB \(plan (\d+) MiB \+ Python, NumPy and BLAS (\d+) MiB\)$", out, re.M)
    assert abs(int(said[1]) - peak / 2**20) <= 2 and abs(int(said[2]) - plan / 2**20) <= 1
    assert int(said[3]) <= baseline / 2**20 + 5


# ---------------------------------------------------------------------------------------------------------------------
# bad input: one line, exit code 2, nothing lost


def assert_one_line(err, *fragments, prog="llmc.train"):
    assert err.startswith(f"{prog}: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err and all(fragment in err for fragment in fragments), err


def patched(source, path, *changes, cut=None, extra=b""):
    """A copy of a file with some 32-bit words replaced, cut to a length (negative: by that many bytes), or extended."""
    data = bytearray(Path(source).read_bytes())
    for word, value in changes:
        struct.pack_into("<i", data, 4 * word, value)
    Path(path).write_bytes(bytes(data[:cut]) + extra)
    return str(path)


def bad_id():
    """A shard of llm.c's kind, which does not state its vocabulary, with a token that the model lacks."""
    tokens = np.full(4 * B * T + 1, 97, np.uint16)
    tokens[70] = 300
    write_shard("bad_id.bin", tokens)
    return "bad_id.bin"


def other_vocabulary():
    write_tokens("other.bin", 4 * B * T + 1, vocab_size=500)
    return "other.bin"


def model(**changes):
    return trained_model(**changes)[0]


def damaged_checkpoint(kind, **damage):
    """A folder with a checkpoint of step 2, of which one file is then damaged."""
    model()
    shutil.copytree("trained", "damaged")
    path = checkpoints.model_path("damaged", 2) if kind == "model" else checkpoints.state_path("damaged", 2, 0)
    patched(path, path, **damage)
    return "damaged"


SHARD, MODEL, STATE = "20240520", "20240326", "20240527"
FILES = {
    "no-shard": (lambda: ["-i", "none.bin"], ["none.bin", "No such file"]),
    "no-shard-matches": (lambda: ["-i", "none_*.bin"], ["none_*.bin"]),
    "no-val-shard": (lambda: ["-j", "none.bin"], ["none.bin"]),
    "no-val-given": (lambda: ["-i", "train_0.bin"], ["-j"]),
    "no-model": (lambda: ["-e", "none.bin"], ["none.bin", "No such file"]),
    "folder-as-shard": (lambda: ["-i", "."], ["cannot read .", "directory"]),
    "empty-shard": (lambda: ["-i", patched("val.bin", "bad.bin", cut=0)], ["bad.bin", "empty"]),
    "empty-val-shard": (lambda: ["-j", patched("val.bin", "bad.bin", cut=0)], ["bad.bin", "empty"]),
    "empty-model": (lambda: ["-e", patched("val.bin", "bad.bin", cut=0)], ["bad.bin", "empty"]),
    "magic-shard": (lambda: ["-i", patched("val.bin", "bad.bin", (0, 7))], ["bad.bin", "magic", " 7", SHARD]),
    "magic-one-of-shards": (
        lambda: ["-i", patched("val.bin", "train_9.bin", (0, 7)) and "train_*.bin"],
        ["train_9", " 7"],
    ),
    "magic-model": (lambda: ["-e", "val.bin"], ["val.bin", "token shard", MODEL]),
    "magic-of-no-file": (lambda: ["-e", patched("val.bin", "bad.bin", (0, 7))], ["bad.bin", "7", MODEL]),
    "version-shard": (lambda: ["-i", patched("val.bin", "bad.bin", (1, 2))], ["bad.bin", "version 2", "1"]),
    "version-model": (lambda: ["-e", patched(model(), "bad.bin", (1, 4))], ["bad.bin", "version 4", "3 and 5"]),
    "old-version-model": (
        lambda: ["-e", patched(model(), "bad.bin", (1, 1))],
        ["bad.bin", "version 1", "train_gpt2.py"],
    ),
    "cut-header-shard": (lambda: ["-i", patched("val.bin", "bad.bin", cut=100)], ["bad.bin", "100 bytes", "1024"]),
    "cut-header-model": (lambda: ["-e", patched(model(), "bad.bin", cut=100)], ["bad.bin", "100 bytes", "1024"]),
    "truncated-shard": (
        lambda: ["-i", patched("val.bin", "bad.bin", cut=-1)],
        ["bad.bin", "truncated", "1793", "1794"],
    ),
    "over-long-shard": (
        lambda: ["-i", patched("val.bin", "bad.bin", extra=b"x")],
        ["bad.bin", "over-long", "1795", "1794"],
    ),
    "negative-count-shard": (lambda: ["-i", patched("val.bin", "bad.bin", (2, -5))], ["bad.bin", "-5"]),
    "truncated-model": (
        lambda: ["-e", patched(model(), "bad.bin", cut=-1)],
        ["bad.bin", "truncated", "307967", "307968"],
    ),
    "over-long-model": (
        lambda: ["-e", patched(model(), "bad.bin", extra=b"x")],
        ["bad.bin", "over-long", "307969", "307968"],
    ),
    "impossible-model": (lambda: ["-e", patched(model(), "bad.bin", (6, -64))], ["bad.bin", "impossible", "-64"]),
    "truncated-resume-model": (
        lambda: ["-y", "1", "-o", damaged_checkpoint("model", cut=-4)],
        ["model_00000002", "truncated"],
    ),
    "truncated-state": (
        lambda: ["-y", "1", "-o", damaged_checkpoint("state", cut=-1)],
        ["state_00000002", "truncated"],
    ),
    "over-long-state": (
        lambda: ["-y", "1", "-o", damaged_checkpoint("state", extra=b"x")],
        ["state_00000002", "over-long"],
    ),
    "empty-state": (lambda: ["-y", "1", "-o", damaged_checkpoint("state", cut=0)], ["state_00000002", "empty"]),
    "token-id": (lambda: ["-e", model(), "-i", bad_id()], ["bad_id.bin", "token 70", "300", "256"]),
    "token-id-val": (lambda: ["-e", model(), "-j", bad_id(), "-v", "1"], ["bad_id.bin", "token 70", "300", "256"]),
    "vocabulary": (lambda: ["-e", model(), "-i", other_vocabulary()], ["other.bin", "500", "257"]),
    "vocabulary-val": (lambda: ["-j", other_vocabulary()], ["other.bin", "500", "257"]),
    "vocabulary-resume": (
        lambda: ["-o", model() and "trained", "-y", "1", "-i", other_vocabulary()],
        ["other.bin", "500"],
    ),
    "too-long-rows": (lambda: ["-e", model(), "-t", "33"], ["-t 33", "32"]),
    "too-long-rows-gpt2": (
        lambda: ["-e", "d12", "-b", "1", "-t", "1025", "-i", long_shard()],
        ["-t 1025", "1024"],
    ),
    "total-batch": (lambda: ["-d", "100"], ["-d 100", "-b 2", "-t 32", "64"]),
    "short-shard": (lambda: ["-b", "10"], ["train_1.bin", "203", "-b 10", "-t 32", "321"]),
    "trained-and-validated-on": (lambda: ["-j", "train_1.bin"], ["train_1.bin", "-i train_*.bin", "-j train_1.bin"]),
    "no-pair-in-val": (lambda: ["-j", one_token()], ["one.bin", "2 tokens"]),
    "short-for-a-step": (lambda: ["-x", "-1", "-d", "6400"], ["-d 6400", "801"]),
    "resumed-beyond": (lambda: ["-o", model() and "trained", "-y", "1", "-x", "1"], ["-x 1", "trained", "step 2"]),
    "resume-other-shards": (
        lambda: ["-o", model() and "trained", "-y", "1", "-i", "train_0.bin"],
        ["train_0.bin", "3 shards"],
    ),
    "resume-other-shuffling": (lambda: ["-o", model() and "trained", "-y", "1", "-a", "1"], ["-a", "shuffling"]),
    "resume-other-rows": (lambda: ["-o", model() and "trained", "-y", "1", "-t", "16"], ["-t 32", "16"]),
    "holds-a-run": (lambda: ["-o", model() and "trained"], ["-o trained", "step 2", "-y 1"]),
    "not-writable": (lambda: ["-o", "val.bin/out"], ["-o val.bin/out", "Not a directory"]),
    "a-file": (lambda: ["-o", "val.bin"], ["-o val.bin"]),
    "proc": (lambda: ["-o", "/proc/llmc"], ["-o /proc/llmc"]),
    "resume-nothing": (lambda: ["-y", "1"], ["-y 1", "-o"]),
}


def one_token():
    write_tokens("one.bin", 1)
    return "one.bin"


def long_shard():
    write_tokens("long.bin", 3000)
    return "long.bin"


@pytest.mark.parametrize("case", FILES)
def test_bad_files(case, capsys):
    argv, fragments = FILES[case]
    argv = argv()
    base = BASE if case != "no-val-given" else []
    before = files()
    capsys.readouterr()
    assert run("-x", 5, *argv, base=base) == 2
    out, err = capsys.readouterr()
    assert_one_line(err, *fragments, "HINT: ")
    assert "Traceback" not in out and not lines_of(out, "step ")
    after = files()
    lost = [name for name in before if after.get(name) != before[name]]
    assert not lost, lost


VALUES = [
    ("-e", "d13"), ("-e", "gpt2"), ("-e", "tiny:d5"), ("-e", "gpt3:c5140"), ("-e", "no-such-folder/model"),
    ("-k", "step"), ("--tokenizer", "words"), ("--device", "tpu"), ("--dtype", "fp64"), ("--dtype", "bf16"),
    ("-b", "0"), ("-b", "-1"), ("-b", "two"), ("-b", "1.5"), ("-t", "0"), ("-t", "-32"), ("-t", "x"), ("-d", "0"),
    ("-d", "-64"), ("-d", "x"), ("-n", "-1"), ("-n", "x"), ("-nk", "-1"), ("-nk", "x"), ("-nm", "-1"), ("-nm", "x"),
    ("-x", "0"), ("-x", "-2"), ("-x", "x"), ("-x", "1e3"), ("-l", "-1"), ("-l", "-1e-3"), ("-l", "nan"), ("-l", "inf"),
    ("-l", "x"), ("-u", "-1"), ("-u", "x"), ("-q", "-0.1"), ("-q", "1.1"), ("-q", "x"), ("-c", "-0.1"), ("-c", "x"),
    ("--beta1", "1"), ("--beta1", "-0.1"), ("--beta1", "x"), ("--beta2", "1"), ("--beta2", "x"), ("--eps", "-1e-8"),
    ("--eps", "0"), ("--eps", "x"), ("--grad-clip", "-1"), ("--grad-clip", "x"), ("--seed", "-1"), ("--seed", "x"),
    ("-v", "-1"), ("-v", "x"), ("-m", "0"), ("-m", "-2"), ("-m", "x"), ("-s", "-1"), ("-s", "x"), ("-g", "0"),
    ("-g", "x"), ("--temperature", "-1"), ("--temperature", "x"), ("-a", "2"), ("-a", "x"), ("-r", "3"), ("-r", "x"),
    ("-y", "2"), ("-y", "x"), ("-sl", "-1"), ("-sl", "x"), ("-sg", "-7"), ("-sg", "nan"), ("-w", "2"), ("-w", "x"),
    ("-f", "2"), ("-ge", "3"), ("-ge", "x"), ("-h", "2"), ("-lg", "-2"), ("-lg", "x"), ("-z", "4"), ("-z", "-1"),
    ("-pn", "0"), ("-pn", "x"), ("-pr", "-1"), ("-pg", "0"), ("-pi", "udp"), ("-pi", "fs"),
    ("--grad-dtype", "bf16"), ("--threads", "0"), ("--threads", "x"), ("--threads", "1000000"),
]  # fmt: skip


@pytest.mark.parametrize("flag, value", VALUES, ids=map(" ".join, VALUES))
def test_bad_values(flag, value, capsys):
    before = files()
    assert run("-x", 5, "-o", "out", flag, value) == 2
    out, err = capsys.readouterr()
    assert_one_line(err, flag, value, "HINT: ")
    assert not out and files() == before


def test_device_cuda_without_a_gpu(capsys):
    """It is an error, and not the CPU: only auto may choose."""
    with contextlib.suppress(Exception):  # no CuPy, or no driver
        if importlib.import_module("cupy").cuda.runtime.getDeviceCount():
            pytest.skip("there is a GPU")
    assert run("-x", 1, "--device", "cuda") == 2
    out, err = capsys.readouterr()
    assert_one_line(err, "--device cuda", "HINT: ")
    assert not out


@pytest.mark.parametrize("argv", [["-zz", "3"], ["--learning_rate", "1"], ["stray"], ["-x"], ["--max-step", "3"]])
def test_bad_flags(argv, capsys):
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert_one_line(err, argv[0], "HINT: ")
    assert not out


def test_a_plan_larger_than_the_machine(capsys, monkeypatch):
    monkeypatch.setattr(cpu.device, "memory", lambda: (2**20, 2**20))
    assert run("-x", 1) == 2
    assert_one_line(capsys.readouterr().err, "MiB", "-b", "-t", "HINT: ")


def test_a_real_process_says_it_too():
    code, out, err = finish(start("-i", "none.bin", "-x", 1))
    assert code == 2 and not out
    assert_one_line(err, "none.bin", "HINT: ")


# ---------------------------------------------------------------------------------------------------------------------
# a full disk


def resumable_run(steps=4):
    """Undisturbed runs in "full", and one in "out" that stopped at step 2."""
    assert run("-x", steps, "-n", 2, "-o", "full") == 0
    return stopped_at(2, "full", "out")


@pytest.mark.parametrize("victim", ["model_00000004.bin", "state_00000004_00000.bin", "DONE_00000004"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_full_in_a_checkpoint(victim, call, monkeypatch, capsys):
    """Whichever file of a checkpoint cannot be written: one line; the previous checkpoint is intact and resumes."""
    out = resumable_run()
    before, real = files(out), getattr(os, call)

    def full(target, *args):
        path = os.readlink(f"/proc/self/fd/{target}") if call == "fsync" else str(args[0])
        if victim in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(target, *args)

    monkeypatch.setattr(os, call, full)
    capsys.readouterr()
    assert run("-x", 4, "-n", 2, "-nk", 1, "-o", out, "-y", 1) == 2
    assert_one_line(capsys.readouterr().err, victim, "No space left on device", "HINT: ")
    monkeypatch.undo()
    after = files(out)
    assert all(after[name] == before[name] for name in before if "_00000002" in name)
    assert checkpoints.latest_checkpoint(out) == 2 and not [name for name in after if name.endswith(".tmp")]
    assert run("-x", 4, "-n", 2, "-o", out, "-y", 1) == 0
    assert_same_run(out, "full", 4)


def test_disk_full_for_real(capsys):
    """A limit on the size of files that the model's fits and the state's does not."""
    resource = pytest.importorskip("resource")
    out = resumable_run()
    state = os.path.getsize(checkpoints.state_path(out, 2, 0))
    assert os.path.getsize(checkpoints.model_path(out, 2)) < state - 1000
    command = [sys.executable, "-m", "llmc.train", *BASE, "-x", "4", "-n", "2", "-o", out, "-y", "1"]
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({state - 1000}, {resource.RLIM_INFINITY}))"
    code = f"import os, resource, sys; {limit}; os.execv(sys.executable, {command})"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(lines_of(done.stdout, "step ")) == 2
    assert_one_line(done.stderr, "state_00000004_00000.bin", "too large", "HINT: ")
    assert checkpoints.latest_checkpoint(out) == 2
    assert run("-x", 4, "-n", 2, "-o", out, "-y", 1) == 0
    assert_same_run(out, "full", 4)
    assert sorted(os.listdir(out)) == sorted(os.listdir("full"))


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C


def interrupt_in_step(step, monkeypatch, times=1):
    """Ctrl-C comes in the middle of the 0-based step."""
    train_step = loop.train_step

    def interrupted(*args):
        if args[3] == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", interrupted)


@pytest.mark.parametrize("step", [0, 1, 4, 6])
def test_ctrl_c_saves_and_resumes(step, monkeypatch, capsys):
    """The step is finished, a checkpoint written, one line says how to go on; that run ends in the undisturbed bits."""
    handler = signal.getsignal(signal.SIGINT)
    flags = ("-x", 7, "-v", 3, "-m", 1, "-n", 7)
    assert run(*flags, "-o", "full") == 0
    interrupt_in_step(step, monkeypatch)
    code = run(*flags, "-o", "out")
    out, err = capsys.readouterr()
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is handler
    if step == 6:  # the last: nothing is left to interrupt
        assert code == 0 and not err
    else:
        assert code == 130 and checkpoints.latest_checkpoint("out") == step + 1
        assert_one_line(err, f"interrupted by SIGINT after step {step + 1} of 7", "-o out -y 1", "HINT: ")
        assert f"wrote checkpoint of step {step + 1} to out" in out
        assert run(*flags, "-o", "out", "-y", 1) == 0
    assert_same_run("out", "full", 7)


def test_ctrl_c_without_output_folder(monkeypatch, capsys):
    before = files()
    interrupt_in_step(2, monkeypatch)
    assert run("-x", 5) == 130
    out, err = capsys.readouterr()
    assert_one_line(err, "after step 3 of 5", "HINT: ")
    assert len(lines_of(out, "step ")) == 3 and files() == before


def test_second_ctrl_c_ends_at_once(monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGINT)
    interrupt_in_step(2, monkeypatch, times=2)
    assert run("-x", 5, "-o", "out") == 130
    out, err = capsys.readouterr()
    assert err == "llmc.train: interrupted\n" and len(lines_of(out, "step ")) == 2
    assert signal.getsignal(signal.SIGINT) is handler and not checkpoints.checkpoint_steps("out")


def test_ctrl_c_of_a_real_process():
    """SIGINT while it trains; the second run resumes, and a third is the undisturbed one."""
    argv = ("-x", 60, "-n", 60, "-v", 7, "-m", 1, "--threads", 1)
    process = start(*argv, "-o", "out")
    read_steps(process, 3)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert_one_line(err, "interrupted by SIGINT after step", "of 60", "-o out -y 1")
    step = checkpoints.latest_checkpoint("out")
    assert 3 <= step < 60
    assert run(*argv, "-o", "out", "-y", 1) == 0
    assert run(*argv, "-o", "full") == 0
    assert_same_run("out", "full", 60)


def test_second_ctrl_c_of_a_real_process():
    """One step of 100,000 micro-steps, which takes minutes: the first Ctrl-C waits for its end, the second does not."""
    for attempt in range(1, 6):
        process = start("-x", 2, "-d", 100_000 * B * T, "-v", 1, "-m", 1)
        for line in process.stdout:
            if line.startswith(b"val loss"):
                break
        time.sleep(0.3 * attempt)
        signals = 0
        while process.poll() is None and signals < 100:
            process.send_signal(signal.SIGINT)
            signals += 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.3)
        code, out, err = finish(process)
        if "after step 0" not in err:  # else the first came before the step began: rightly, that was enough
            break
    assert code == 130 and not lines_of(out, "step ") and signals >= 2, err
    assert err == "llmc.train: interrupted\n"
