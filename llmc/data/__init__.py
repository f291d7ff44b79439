"""Token shards, the loaders that serve batches of them, and what makes shards of text.

shards.py     the file format, and the files that a pattern names
loader.py     batches for training in llm.c's order, and every pair of a set once for validation
prepare.py    texts to datasets: `python -m llmc.data prepare`; Tiny Shakespeare; the default data
texts.py      files to text, and text to pieces that encode one by one
eval_sets.py  multiple-choice sets: HellaSwag
tokenizer.py  GPT-2's byte pairs, bytes, and llm.c's tokenizer file
cache.py      the user's cache folder, and downloads that are checked
"""

from typing import Any

_PUBLIC = {  # imported on first use: NumPy is heavy
    "DataLoader": "loader",
    "EveryPair": "loader",
    "dataset": "prepare",
    "read_shard": "shards",
    "write_shard": "shards",
    "main": "__main__",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
