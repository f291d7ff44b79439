import argparse

import pytest

from llmc import flags


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (flags.positive, {"1": 1, "007": 7, " 3 ": 3}, ["0", "-1", "1.0", "1e3", "x", "", "nan", "inf", "0x10"]),
        (flags.natural, {"0": 0, "5": 5}, ["-1", "0.5", "one", "nan"]),
        (flags.count, {"-1": -1, "1": 1, "20": 20}, ["0", "-2", "1.5", "all", "nan"]),
        (flags.number, {"0": 0.0, "3e-4": 3e-4, "2": 2.0}, ["-1e-9", "nan", "inf", "-inf", "1e999", "3,5", ""]),
        (flags.above_zero, {"1e-8": 1e-8}, ["0", "-1", "nan", "inf", "x"]),
        (flags.fraction, {"0": 0.0, "0.1": 0.1, "1": 1.0}, ["1.01", "-0.1", "nan", "inf", "half"]),
        (flags.below_one, {"0": 0.0, "0.999": 0.999}, ["1", "-0.1", "nan", "2", "b"]),
        (flags.thread_count, {"1": 1, "1024": 1024}, ["0", "1025", "-1", "1.5", "all"]),
    ],
)
def test_values(kind, good, bad):
    for text, value in good.items():
        parsed = kind(text)
        assert parsed == value and type(parsed) is type(value), text
    for text in [*bad, "9" * 400 + "e", "-" + "9" * 400]:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a (whole )?number") as error:
            kind(text)
        assert str(error.value).startswith(f"{text} is not ")  # the value, and after it the limit


def test_numbers_too_large_for_a_float():
    assert flags.positive("9" * 30) == 10**30 - 1
    for kind in (flags.positive, flags.number):
        with pytest.raises(argparse.ArgumentTypeError):
            kind("9" * 400)


def parser():
    p = flags.Parser(prog="llmc.prog", allow_abbrev=False)
    p.add_argument("-n", "--number", type=flags.number)
    p.add_argument("-x", "--count", type=flags.count)
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
