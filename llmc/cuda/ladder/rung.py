"""What the tables of the ladder are made of: a rung is one way to compute an op."""

from collections.abc import Callable
from typing import NamedTuple

SIXTEEN_BIT = ("bf16", "fp16")
ALL = ("fp32", *SIXTEEN_BIT)


class Rung(NamedTuple):
    """One rung of an op's ladder: its place, the function that launches it, and what it is limited to."""

    op: str
    "The public function that this rung can stand for, such as matmul_forward."
    number: int
    "Its place on the ladder of the op, from the naive rung 1 upwards. Numbers of rungs that are gone stay free."
    call: Callable[..., None]
    "The launcher, with the signature and the contract of the public function."
    dtypes: tuple[str, ...] = ALL
    "The dtypes of a model that it can compute in."
    arch: int | None = None
    "90 where its instructions are those of compute capability 9.0 alone, None where any supported GPU has them."
    head_sizes: tuple[int, ...] | None = None
    "The head sizes that it is limited to; None if it takes any, or has no heads."
    production: bool = False
    "Whether the public function may choose it. All other rungs are there to be read and to be measured against."
