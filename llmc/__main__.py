"""`llmc COMMAND ...`, which is `python -m llmc.COMMAND ...`."""

import importlib
import sys

from llmc import __version__
from llmc.command import command, did_you_mean
from llmc.errors import UserError

COMMANDS = {
    "train": "train GPT-2; with no flags: on Tiny Shakespeare",
    "generate": "continue a text with a trained model",
    "evaluate": "validation loss and HellaSwag accuracy of a model",
    "export": "write a model for Hugging Face's transformers, or as llm.c's file",
    "data": "make token shards of a text: llmc data prepare FILE.txt",
    "plot": "draw the loss curves of runs as a PNG",
    "test_gpt2": "compare this build with llm.c's debug state",
}


@command("llmc")
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        module = "data.__main__" if argv[0] == "data" else argv[0]  # the one command that is a package
        return importlib.import_module(f"llmc.{module}").main(argv[1:])
    if argv == ["--version"]:
        print(f"llmc {__version__}")
        return 0
    usage = "usage: llmc COMMAND [FLAGS]   (or: python -m llmc.COMMAND [FLAGS])"
    if argv in ([], ["-h"], ["--help"]):
        print("\n".join([usage, "", *(f"  {name:<11}{what}" for name, what in COMMANDS.items())]))
        return 0
    like = did_you_mean(argv[0], COMMANDS)
    raise UserError(f"unknown command {argv[0]}.{like} HINT: one of {', '.join(COMMANDS)}.")


if __name__ == "__main__":
    sys.exit(main())
