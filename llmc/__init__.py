"""llm.c as a Python package: GPT-2 training in plain Python over hand-written CUDA kernels.

The names below are the public API, and llmc/api.py is where they are made. They are imported on first use, so that
`import llmc` and the commands' --help take no time.
"""

from typing import TYPE_CHECKING, Any

from llmc.errors import UserError as UserError

if TYPE_CHECKING:
    from llmc.api import GPT2, AdamW, DataLoader, GPT2Config, dataset, device, load

__version__ = "0.2.0"
__all__ = ["AdamW", "DataLoader", "GPT2", "GPT2Config", "UserError", "dataset", "device", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    from llmc import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
