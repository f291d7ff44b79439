import argparse
import shlex

import pytest

from llmc import command, gpt2
from llmc.__main__ import main as llmc_command
from llmc.errors import UserError
from llmc.training import flags
from llmc.training.settings import settings_from


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (command.positive, {"1": 1, "007": 7, " 3 ": 3}, ["0", "-1", "1.0", "1e3", "x", "", "nan", "inf", "0x10"]),
        (command.period, {"0": 0, "-1": 0, "10": 10}, ["-2", "0.5", "x"]),
        (command.natural, {"0": 0, "5": 5}, ["-1", "0.5", "one", "nan"]),
        (command.count, {"-1": -1, "1": 1, "20": 20}, ["0", "-2", "1.5", "all", "nan"]),
        (command.number, {"0": 0.0, "3e-4": 3e-4, "2": 2.0}, ["-1e-9", "nan", "inf", "-inf", "1e999", "3,5", ""]),
        (command.above_zero, {"1e-8": 1e-8}, ["0", "-1", "nan", "inf", "x"]),
        (command.fraction, {"0": 0.0, "0.1": 0.1, "1": 1.0}, ["1.01", "-0.1", "nan", "inf", "half"]),
        (command.below_one, {"0": 0.0, "0.999": 0.999}, ["1", "-0.1", "nan", "2", "b"]),
        (command.thread_count, {"1": 1, "1024": 1024}, ["0", "1025", "-1", "1.5", "all"]),
    ],
)
def test_values(kind, good, bad):
    for text, value in good.items():
        parsed = kind(text)
        assert parsed == value and type(parsed) is type(value), text
    for text in [*bad, "9" * 400 + "e", "-" + "9" * 400]:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a (whole )?number") as error:
            kind(text)
        assert str(error.value).startswith(f"{text or repr(text)} is not ")  # the value, and after it the limit


def test_numbers_too_large_for_a_float():
    for kind in (command.positive, command.number):
        with pytest.raises(argparse.ArgumentTypeError):
            kind("9" * 400)


@pytest.mark.parametrize("kind", (command.positive, command.natural, command.count, command.period))
def test_counts_have_31_bits(kind):
    """As in llm.c's files: what is larger would wrap there."""
    assert kind("2147483647") == 2**31 - 1
    for text in ("2147483648", "9" * 30):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not .* and at most 2147483647$"):
            kind(text)


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (command.number, ("3.4e38", "1e-50"), ("3.5e38", "1e39", "1e308")),  # infinite in float32
        (command.above_zero, ("1.2e-38",), ("1e-38", "1e-46", "1e39")),  # 0 there, or flushed to it
        (command.below_one, ("0.9999999",), ("0.99999999", "0.9999999999999")),  # 1 there
        (command.seed, ("0", "4294967295"), ("4294967296", "-1")),  # MT19937's is 32 bits
        (command.random_state, ("1", "18446744073709551615"), ("0", "18446744073709551616")),  # 0 gives only zeros
        (command.positive, ("10",), ("1_0", "１０")),
    ],
)
def test_what_wraps_is_refused(kind, good, bad):
    for text in good:
        assert kind(text) == type(kind(text))(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not "):
            kind(text)


@pytest.mark.parametrize("flag", ("-i", "-j", "-e", "-o", "-k", "--replay", "--kernel"))
def test_an_empty_name_is_a_variable_that_was_not_set(flag, capsys):
    """Not a run without that flag."""
    with pytest.raises(SystemExit):
        flags.parse([flag, ""])
    assert "'' names nothing" in capsys.readouterr().err


def parse_many(*argv):
    p = command.Parser(prog="llmc.prog", allow_abbrev=False)
    p.add_argument("files", nargs="+")
    p.add_argument("-n", "--number", type=command.number)
    return p.parse_args(argv)


def test_flags_between_positional_arguments():
    for argv in (["-n", "3", "a", "b"], ["a", "-n", "3", "b"], ["a", "b", "-n", "3"]):
        assert vars(parse_many(*argv)) == dict(files=["a", "b"], number=3.0), argv


@pytest.mark.parametrize(
    "argv, meant",
    [(["--nubmer", "3"], "--number"), (["--Number=3"], "--number"), (["--numbers", "1"], "--number"), (["--zz"], None)],
)
def test_did_you_mean(argv, meant, capsys):
    with pytest.raises(SystemExit):
        parse_many("a", *argv)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and (f". Did you mean {meant}? HINT: " in err if meant else "mean" not in err), err


@pytest.mark.parametrize(
    "name, meant", [("tinyd4", "tiny:d4"), ("gpt2d12", "gpt2:d12"), ("gpt3:768", "gpt3:c768"), ("resnet", None)]
)
def test_models_that_do_not_exist(name, meant):
    with pytest.raises(UserError) as error:
        gpt2.config_from_descriptor(name)
    assert (f"Did you mean {meant}?" in str(error.value)) if meant else "mean" not in str(error.value)
    assert all(gpt2.config_from_descriptor(known) for known in gpt2.every_descriptor())


def test_commands_that_do_not_exist(capsys):
    assert llmc_command(["trian", "-x", "1"]) == 2
    assert capsys.readouterr().err.startswith("llmc: error: unknown command trian. Did you mean train? HINT: one of ")
    assert llmc_command(["xyz"]) == 2 and "mean" not in capsys.readouterr().err


def parser():
    p = command.Parser(prog="llmc.prog", allow_abbrev=False)
    p.add_argument("-n", "--number", type=command.number)
    p.add_argument("-x", "--count", type=command.count)
    p.add_argument("-k", "--kind", choices=("a", "b"))
    p.add_argument("file")
    return p


@pytest.mark.parametrize(
    "argv, fragments",
    [
        (["f", "-n", "-1"], ["-n/--number", "-1 is not a number of at least 0"]),
        (["f", "-n", "-1e-3"], ["-n/--number", "-1e-3 is not a number of at least 0"]),
        (["f", "-n", "-.5"], ["-n/--number", "-.5 is not a number of at least 0"]),
        (["f", "--count", "0"], ["-x/--count", "0 is not a whole number of at least 1, or -1 for all"]),
        (["f", "-k", "c"], ["-k/--kind", "c", "a", "b"]),
        (["f", "-x"], ["-x/--count", "expected one argument"]),
        (["f", "--coun", "1"], ["unrecognized", "--coun"]),
        (["f", "-z", "1"], ["unrecognized", "-z"]),
        (["f", "-nr", "1"], ["unrecognized", "-nr"]),
        (["f", "-n3"], ["unrecognized", "-n3"]),
        (["f", "g"], ["unrecognized", "g"]),
        ([], ["file"]),
    ],
)
def test_an_error_is_one_line(argv, fragments, capsys):
    with pytest.raises(SystemExit) as end:
        parser().parse_args(argv)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith("llmc.prog: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert all(fragment in err for fragment in fragments), err
    assert "HINT: llmc prog --help" in err and "usage" not in err


def test_minus_one_is_a_value():
    args = parser().parse_args(["-x", "-1", "f"])
    assert args.count == -1


# ---------------------------------------------------------------------------------------------------------------------
# the trainer's: llm.c's command lines, as its scripts have them after the program's name

COMMON = "-v 250 -g 144 -h 1 -r 0 -z 1 -c 0.1 -u 700"
NODES = "-s 20000 -b 64 -t 1024 -d 2097152 -l 0.0006 -e d12"
SLURM = "-pn 16 -pr 9 -pg 8"
DATA = {
    name: f'-i "dev/data/{name}/{prefix}_train_*.bin" -j "dev/data/{name}/{prefix}_val_*.bin"'
    for name, prefix in (("fineweb10B", "fineweb"), ("fineweb100B", "fineweb"), ("edu_fineweb100B", "edu_fineweb"))
}
ALL = dict(val_loss_every=250, sample_length=144, hellaswag=1, recompute=0, zero_stage=1, weight_decay=0.1)
ALL.update(warmup_iterations=700, resume=1, sequence_length=1024, lr_scheduler="cosine")
LLM_C = {
    "run_gpt2_124M.sh": (
        f"{DATA['fineweb10B']} -o log {COMMON} -s 20000 -b 64 -t 1024 -d 524288 -l 0.0006 -q 0.0 -n 5000 -y 1 -e d12",
        dict(ALL, model="d12", batch_size=64, total_batch_size=524288, learning_rate=6e-4, checkpoint_every=5000),
    ),
    "run_gpt2_350M.sh": (
        f"{DATA['fineweb100B']} -o log350M {COMMON} -s 100000 -b 64 -t 1024 -d 524288 -l 0.0003 -q 0.0 -n 2000 -y 1 "
        "-x 60000 -e d24",
        dict(ALL, model="d24", learning_rate=3e-4, max_steps=60000, sample_every=100000, checkpoint_every=2000),
    ),
    "run_gpt2_774M.sh": (
        f"{DATA['fineweb100B']} -o log774M {COMMON} -s 300000 -b 32 -t 1024 -d 524288 -l 0.00025 -q 0.0 -n 4000 -y 1 "
        "-x 286102 -e d36",
        dict(ALL, model="d36", batch_size=32, learning_rate=2.5e-4, max_steps=286102, final_learning_rate_frac=0.0),
    ),
    "run_gpt2_1558M.sh": (
        f"{DATA['edu_fineweb100B']} -o log1558M {COMMON.replace('144', '384')} -s 300000 -b 16 -t 1024 -d 1048576 "
        "-k cosine -l 0.0006 -q 0.1 -n 2000 -x 32000 -ge 1 -y 1 -e d48",
        dict(ALL, model="d48", sample_length=384, gelu_fusion=1, final_learning_rate_frac=0.1, max_steps=32000),
    ),
    "run_gpt3_125M.sh": (
        f"{DATA['fineweb100B']} -o log125M {COMMON} -s 20000 -b 32 -t 2048 -d 524288 -l 0.0006 -q 0.1 -n 10000 -nk 5 "
        "-nm 50000 -ge 1 -sl 7.0 -sg 7.0 -y 1 -x 572204 -e gpt3:c768",
        dict(ALL, model="gpt3:c768", sequence_length=2048, checkpoints_keep=5, major_checkpoint_every=50000)
        | dict(skip_update_loss_z=7.0, skip_update_grad_z=7.0, max_steps=572204),
    ),
    "multi_node mpi": (
        f"{DATA['fineweb10B']} -o log {COMMON} {NODES} -q 0.1 -n 1000 -y 0",
        dict(ALL, resume=0, final_learning_rate_frac=0.1, process_count=None, nccl_init_method=None),
    ),
    "multi_node fs": (
        f"{DATA['fineweb10B']} -o log {COMMON} {NODES} -q 0.0 -n 5000 -y 1 {SLURM} -pf /ephemeral/sync -pi fs",
        dict(ALL, process_count=16, process_rank=9, gpus_per_node=8, nccl_init_method="fs")
        | dict(fs_path="/ephemeral/sync", total_batch_size=2097152),
    ),
    "multi_node tcp": (
        f"{DATA['fineweb10B']} -o log {COMMON} {NODES} -q 0.0 -n 5000 -y 1 {SLURM} -ps 10.0.0.1 -pi tcp",
        dict(ALL, process_count=16, process_rank=9, gpus_per_node=8, nccl_init_method="tcp", server_ip="10.0.0.1"),
    ),
    "ci_gpu.yml": (
        "-b 1 -t 64 -d 256 -l 0.0001 -v 200 -s 200 -a 1 -x 10 -r 0 -f 0 -e gpt2_124M.bin",
        dict(batch_size=1, sequence_length=64, total_batch_size=256, overfit_single_batch=1, max_steps=10, tf32=0)
        | dict(model="gpt2_124M.bin", input_bin=None),  # its default data, Tiny Shakespeare, is ours too
    ),
}


@pytest.mark.parametrize("script", LLM_C)
def test_command_lines_of_llm_c(script):
    line, expected = LLM_C[script]
    argv = shlex.split(line)
    args = flags.parse(argv)
    settings, notices = settings_from(args, "cuda", args.process_count or 1)
    assert not notices
    found = {name: getattr(settings if hasattr(settings, name) else args, name) for name in expected}
    assert found == expected
    if "-i" in argv:
        assert settings.input_bin == argv[argv.index("-i") + 1]
        assert settings.input_val_bin == argv[argv.index("-j") + 1]
        assert settings.dtype == "bf16" and settings.use_master_weights and settings.val_max_steps == 20


@pytest.mark.parametrize(
    "argv, fragments",
    [
        ("-pn 2 -pr 2", ["-pr 2", "-pn 2", "0 to 1"]),
        ("-pi fs", ["-pi fs", "-pf"]),
    ],
)
def test_flags_that_do_not_go_together(argv, fragments):
    with pytest.raises(UserError) as error:
        flags.parse(argv.split())
    assert all(text in str(error.value) for text in [*fragments, "HINT: "]), error.value


def test_zero_stages_2_and_3_become_0():
    for stage, lines in ((0, 0), (1, 0), (2, 1), (3, 1)):
        settings, notices = settings_from(flags.parse(["-z", str(stage)]), "cpu")
        assert len(notices) == lines and settings.zero_stage == (stage if stage < 2 else 0)
        assert all(f"-z {stage}" in line for line in notices)


def test_h_is_hellaswag(capsys):
    assert flags.parser().parse_args(["-h", "1"]).hellaswag == 1
    with pytest.raises(SystemExit):
        flags.parser().parse_args(["-h"])
    assert "--help lists all flags" in capsys.readouterr().err
