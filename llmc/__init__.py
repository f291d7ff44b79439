"""llmc: GPT-2 training in plain Python over hand-written kernels (a port of llm.c)."""

from llmc.errors import UserError as UserError

__version__ = "0.2.0"
