import ctypes
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmc.errors import UserError
from llmc.training.logger import Display, Logger, step_line

ROOT = Path(__file__).resolve().parents[1]
FLOATS = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([float("inf"), float("nan")]))


def printf(format, *values):
    """The C library's printf."""
    args = [ctypes.c_int(x) if isinstance(x, int) else ctypes.c_double(x) for x in values]
    buffer = ctypes.create_string_buffer(1000)
    ctypes.CDLL(None).snprintf(buffer, ctypes.c_size_t(1000), format.encode(), *args)
    return buffer.value.decode()


def read(folder):
    return (folder / "main.log").read_text(), [
        json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is not strict JSON"))
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def log_step(logger, step):
    """What one step of a run logs: validation every 2 steps, then the training step."""
    if step % 2 == 0:
        logger.val(step, 4.5 - step / 10)
    logger.train(step, 4.25 - step / 10, 3e-4, 1.5, dt_ms=12.5, tokens_per_second=1e4)


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_files(tmp_path):
    logger = Logger(tmp_path / "new" / "out")
    logger.val(0, 4.56789)
    logger.train(0, np.float32(4.25), 3e-4, 12.3456, dt_ms=10.5, tokens_per_second=np.float64(1000), skipped=False)
    logger.eval(250, 0.29544, correct=np.int64(3))
    main_log, metrics = read(tmp_path / "new" / "out")
    assert main_log == "s:0 tel:4.5679\ns:0 trl:4.2500 lr:0.000300 norm:12.35\ns:250 eval:0.2954\n"
    assert metrics == [
        dict(step=0, val_loss=4.56789),
        dict(step=0, train_loss=4.25, lr=3e-4, grad_norm=12.3456, dt_ms=10.5, tokens_per_second=1000.0, skipped=False),
        dict(step=250, eval_accuracy=0.29544, correct=3),
    ]


@given(st.integers(0, 10**6), FLOATS, FLOATS, FLOATS)
def test_main_log_is_printf(tmp_path_factory, step, loss, lr, norm):
    folder = tmp_path_factory.mktemp("log")
    logger = Logger(folder)
    logger.train(step, loss, lr, norm)
    logger.val(step, loss)
    main_log, _ = read(folder)
    train = printf("s:%d trl:%.4f lr:%.6f norm:%.2f\n", step, loss, lr, norm)
    assert main_log == train + printf("s:%d tel:%.4f\n", step, loss)


def test_not_finite_is_null(tmp_path):
    logger = Logger(tmp_path)
    logger.train(3, float("nan"), 1e-4, np.float32("inf"), mfu=None)
    logger.val(3, -float("inf"))
    main_log, metrics = read(tmp_path)
    assert main_log == "s:3 trl:nan lr:0.000100 norm:inf\ns:3 tel:-inf\n"
    assert metrics == [dict(step=3, train_loss=None, lr=1e-4, grad_norm=None, mfu=None), dict(step=3, val_loss=None)]


def test_no_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log_step(Logger(None), 0)
    log_step(Logger(None, resume_step=3), 3)
    assert not os.listdir(tmp_path)


def test_every_line_is_in_the_file_at_once(tmp_path):
    logger = Logger(tmp_path)
    for step in range(3):
        log_step(logger, step)
        main_log, metrics = read(tmp_path)
        assert main_log.endswith("norm:1.50\n") and metrics[-1]["step"] == step


def test_fresh_run_truncates(tmp_path):
    log_step(Logger(tmp_path), 0)
    Logger(tmp_path)
    assert read(tmp_path) == ("", [])


@pytest.mark.parametrize("resume_step", [0, 4, 7])
@pytest.mark.parametrize("torn", ["", "s:3 tr", '{"step": 3, "train_l', "s:99 trl:4.1 lr:0.1 norm:1"])
def test_resumed_run_logs_as_an_undisturbed_one(tmp_path, resume_step, torn):
    """Killed in step 7, after a checkpoint at resume_step, perhaps in the middle of a line."""
    for name, steps in (("undisturbed", 10), ("killed", 7)):
        logger = Logger(tmp_path / name)
        for step in range(steps):
            log_step(logger, step)
    for name in ("main.log", "metrics.jsonl"):
        with open(tmp_path / "killed" / name, "a") as file:
            file.write(torn)
    logger = Logger(tmp_path / "killed", resume_step)
    for step in range(resume_step, 10):
        log_step(logger, step)
    assert sorted(os.listdir(tmp_path / "killed")) == ["main.log", "metrics.jsonl"]
    for name in ("main.log", "metrics.jsonl"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "undisturbed" / name).read_text()


def test_resume_drops_what_is_no_log_line(tmp_path):
    (tmp_path / "main.log").write_bytes(b"s:1 tel:4.0\nhello\n\0\0\xff\ns:2 tel:3.0\ns:x tel\n")
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n[1]\n\0\xff\n{"step": "1"}\n{"loss": 2}\n{"step": 2}\n7\n')
    Logger(tmp_path, resume_step=2)
    assert (tmp_path / "main.log").read_bytes() == b"s:1 tel:4.0\n"
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


def test_resume_without_files(tmp_path):
    log_step(Logger(tmp_path, resume_step=4), 4)
    assert [line["step"] for line in read(tmp_path)[1]] == [4, 4]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/out: .*HINT"):
        Logger(tmp_path / "file" / "out")
    logger = Logger(tmp_path / "out")
    (tmp_path / "out" / "main.log").unlink()
    (tmp_path / "out" / "main.log").mkdir()
    with pytest.raises(UserError, match="main.log: .*HINT"):
        log_step(logger, 0)
    with pytest.raises(UserError, match="main.log: .*HINT"):
        Logger(tmp_path / "out", resume_step=1)


def test_disk_full(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    logger = Logger(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="metrics.jsonl: No space left on device. HINT"):
        log_step(logger, 0)


# ---------------------------------------------------------------------------------------------------------------------
# console


@given(st.integers(0, 10**5), st.integers(1, 10**5), *[FLOATS] * 8)
@example(0, 10, 4.123456789, float("nan"), 1.23456, float("nan"), 3e-4, 12.345, 0.4321, 5188.2)
def test_step_line_is_printf(step, total, loss, loss_z, norm, norm_z, lr, ms, mfu, tokens_per_second):
    format = "step %4d/%d | loss %7.6f (%+.2fz)| norm %6.4f (%+.2fz)| lr %.2e | %.2f ms | %.1f%% bf16 MFU | %.0f tok/s"
    args = (loss, loss_z, norm, norm_z, lr, ms)
    reference = printf(format, step + 1, total, *args, 100 * mfu, tokens_per_second)
    assert step_line(step, total, *args, mfu, tokens_per_second) == reference


def test_step_line():
    line = step_line(0, 10, 4.123456789, float("nan"), 1.23456, -0.126, 3e-4, 12.345, None, 5188.2)
    assert line == (
        "step    1/10 | loss 4.123457 (+nanz)| norm 1.2346 (-0.13z)| lr 3.00e-04 | 12.35 ms | n/a bf16 MFU | 5188 tok/s"
    )
    assert line[20:28] == "4.123457"  # where llm.c's CI reads it


def show(live, first_step=0):
    display = Display(10, live, first_step)
    display.write("val loss 4.500000")
    for step in range(first_step, 10):
        line = step_line(step, 10, 4 - step / 10, 0.0, 1.0, 0.0, 3e-4, 1.0, None, 1000.0)
        display.step(line, loss=4 - step / 10, lr=3e-4, tokens_per_second=1000.0)
    display.write("generating:\n---\nROMEO:\n---")
    display.close()


def test_display_piped(capsys):
    show(live=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "val loss 4.500000" and lines[-4:] == ["generating:", "---", "ROMEO:", "---"]
    assert [line[:28] for line in lines[1:-4]] == [f"step {i + 1:4d}/10 | loss {4 - i / 10:.6f}" for i in range(10)]


def test_display_piped_needs_no_tqdm_and_flushes():
    """A pipe reads each line at once: here the process dies without flushing anything."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for call in ("write('line')", "step('line', 1, 1, 1)"):
        code = f"import os, sys, llmc.training.logger as l; l.Display(3, False).{call}; os._exit('tqdm' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "line\n", "")


@pytest.mark.parametrize("first_step", [0, 4])
def test_display_live(monkeypatch, first_step):
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    show(live=True, first_step=first_step)
    shown = stdout.getvalue()
    assert "step " not in shown
    # as a terminal shows it: a carriage return overwrites the line from its start
    screen = [line.split("\r")[-1] for line in shown.replace("\r\n", "\n").split("\n")]
    assert "val loss 4.500000" in screen and screen[-6:-2] == ["generating:", "---", "ROMEO:", "---"]
    assert f"{first_step}/10 [" in shown.split("val loss")[0]
    assert "100%|" in screen[-2] and "10/10 [" in screen[-2] and screen[-1] == ""
    assert "loss 3.1000 | lr 3.00e-04 | 1000 tok/s]" in screen[-2]


@pytest.mark.parametrize("columns, width", [(100, 100), (0, 80)])
def test_display_on_a_terminal(columns, width):
    """A real pseudo-terminal: the bar keeps to one line, and what is written stays whole. 0 columns: width unknown."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    code = "import sys, test_logger; test_logger.show(sys.stdout.isatty())"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux says EIO once the other end is closed
            break
        if not data:
            break
        shown += data
    assert process.wait() == 0, shown
    screen = [line.split("\r")[-1] for line in shown.decode().replace("\r\n", "\n").split("\n")]
    assert "val loss 4.500000" in screen and "ROMEO:" in screen
    assert "10/10 [" in screen[-2] and width - 5 <= max(map(len, screen)) <= width
