"""llmc: GPT-2 training in plain Python over hand-written kernels (a port of llm.c)."""

__version__ = "0.1.0"


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, value, limit, HINT.

    Every command turns it into that line on stderr and exit code 2, without a traceback.
    """
