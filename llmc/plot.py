"""Loss curves of runs as a PNG: `python -m llmc.plot runs/a runs/b -o loss.png` (pip install matplotlib)."""

import math
import os
import re
import sys
from typing import Any

from llmc.command import Parser, command, named
from llmc.errors import UserError

Streams = dict[str, dict[int, float]]


def parse_log(path: str | os.PathLike[str]) -> Streams:
    """{stream: {step: value}} of a main.log; streams are trl, tel and eval. Of several lines of a step the last wins.

    What C and Python write for NaN and infinities is NaN here, which makes a gap in a curve.
    Errors: UserError for a file that cannot be read, has no such line, or has one whose value is no number.
    """
    from llmc.files import io, parse

    streams: Streams = {"trl": {}, "tel": {}, "eval": {}}
    try:
        with io.open_regular(path) as file:
            for number, line in enumerate(file, 1):
                match = re.match(rb"s:(\d{1,18}) (trl|tel|eval):(\S+)", line)
                if match:
                    stream, text = match[2].decode(), match[3].decode(errors="replace")
                    finite = not re.fullmatch(r"[-+]?(nan|inf)", text)
                    what = f"{path}, line {number}: {stream}"
                    value = parse.decimal(text, what, "HINT: remove the line") if finite else math.nan
                    streams[stream][int(match[1])] = value
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}. HINT: name the output folder (-o) of a run.") from error
    if not any(streams.values()):
        raise UserError(f"{path}: no line of a main.log in it. HINT: name the output folder (-o) of a run.")
    return streams


def draw(logs: dict[str, Streams]) -> Any:
    """A matplotlib figure of {run: its streams}, whatever backend the environment asks for."""
    os.environ.pop("MPLBACKEND", None)  # one set by a notebook is unknown here, and matplotlib's import would fail
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("llmc.plot draws with matplotlib. HINT: pip install matplotlib") from error

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for i, (run, streams) in enumerate(logs.items()):
        name = os.path.basename(os.path.normpath(run)) or run
        name = name.replace("$", r"\$")  # a plain $ would begin a formula
        if streams["trl"]:
            axes.plot(*zip(*sorted(streams["trl"].items()), strict=True), color=f"C{i}", alpha=0.35, lw=1)
        if streams["tel"]:
            steps, losses = zip(*sorted(streams["tel"].items()), strict=True)
            last = f"{losses[-1]:.4f}" if math.isfinite(losses[-1]) else "was not finite at the end"
            label = f"{name}: validation {last}"
            axes.plot(steps, losses, color=f"C{i}", marker="o", ms=4, lw=1.8, label=label)
        elif streams["trl"]:
            axes.plot([], [], color=f"C{i}", label=f"{name}: training")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="training (thin) and validation (dots) loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def parser() -> Parser:
    p = Parser(prog="llmc.plot", description="Draw the loss curves of runs.", allow_abbrev=False)
    p.add_argument(
        "runs", type=named, nargs="+", metavar="RUN", help="output folders of runs, or main.log files of llm.c"
    )
    p.add_argument("-o", "--output", type=named, default="loss.png", help="the picture to write (loss.png)")
    return p


@command("llmc.plot")
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    logs = {run: parse_log(os.path.join(run, "main.log") if os.path.isdir(run) else run) for run in args.runs}
    figure = draw(logs)
    try:
        figure.savefig(args.output, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"-o {args.output}: {error}. HINT: name a .png in a folder you can write to.") from error
    for run, streams in logs.items():
        gaps = sum(not math.isfinite(value) for values in streams.values() for value in values.values())
        if gaps:
            print(f"{run}: {gaps} values are not finite; its curves have gaps there")
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
