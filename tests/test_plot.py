"""python -m llmc.plot: parses main.log as llm.c's tools do, and writes a picture."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmc import __main__, __version__, plot

ROOT = Path(__file__).resolve().parents[1]
LOG = "s:0 tel:5.5000\ns:0 trl:5.4900 lr:0.000100 norm:1.00\ns:1 trl:5.3000 lr:0.000200 norm:1.10\ns:2 tel:5.1000\n"


def test_log_of_a_restarted_run_keeps_the_later_values(tmp_path):
    log = tmp_path / "main.log"
    log.write_text(LOG + "not a line of it\ns:1 trl:5.2000 lr:0.000200 norm:1.10\ns:2 eval:0.2500\n")
    assert plot.parse_log(log) == {"trl": {0: 5.49, 1: 5.2}, "tel": {0: 5.5, 2: 5.1}, "eval": {2: 0.25}}


def test_writes_a_png_for_two_runs(tmp_path, capsys):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "main.log").write_text(LOG)
    out = tmp_path / "loss.png"
    assert plot.main([str(tmp_path / "a"), str(tmp_path / "b" / "main.log"), "-o", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and str(out) in capsys.readouterr().out


def test_what_is_not_finite_is_a_gap(tmp_path, capsys):
    """It is said, and no curve goes through it."""
    log = tmp_path / "main.log"
    log.write_text(LOG + "s:3 trl:nan lr:0.000200 norm:inf\ns:4 tel:-inf\ns:5 trl:5.0 lr:0.000200 norm:1.0\n")
    streams = plot.parse_log(log)
    assert math.isnan(streams["trl"][3]) and math.isnan(streams["tel"][4]) and streams["trl"][5] == 5.0
    assert plot.main([str(tmp_path), "-o", str(tmp_path / "x.png")]) == 0
    assert f"{tmp_path}: 2 values are not finite; its curves have gaps there\n" in capsys.readouterr().out


def test_backend_of_a_notebook(tmp_path):
    """A child of a notebook inherits its backend, whose module the child may not have."""
    (tmp_path / "main.log").write_text(LOG)
    env = {**os.environ, "MPLBACKEND": "module://no_such_module.backend", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "llmc.plot", str(tmp_path), "-o", str(tmp_path / "x.png")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_names_that_look_like_formulas(tmp_path):
    for name in ("$x_{$", "a$b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "main.log").write_text(LOG)
    assert plot.main([str(tmp_path / "$x_{$"), str(tmp_path / "a$b"), "-o", str(tmp_path / "x.png")]) == 0


@pytest.mark.parametrize("content", [None, "", "some text\n", "s:3 trl:3.1-oops\n", "s:3 trl:1e999\n"])
def test_no_log_is_one_clear_line(tmp_path, capsys, content):
    log = tmp_path / "main.log"
    if content is not None:
        log.write_text(content)
    assert plot.main([str(log), "-o", str(tmp_path / "x.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llmc.plot: error: ") and "main.log" in line and "HINT:" in line


def test_a_picture_that_cannot_be_written_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "main.log").write_text(LOG)
    assert plot.main([str(tmp_path), "-o", str(tmp_path / "main.log" / "x.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "x.png" in line and "HINT:" in line


def test_llmc_lists_its_commands_and_refuses_others(capsys):
    assert __main__.main([]) == 0
    listing = capsys.readouterr().out
    assert all(f"  {name} " in listing for name in __main__.COMMANDS)
    assert __main__.main(["--version"]) == 0 and __version__ in capsys.readouterr().out
    assert __main__.main(["trian"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "trian" in line and "HINT:" in line


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_each_command_has_its_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main([name, "--help"])
    assert end.value.code == 0 and f"llmc.{name}" in capsys.readouterr().out
