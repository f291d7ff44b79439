"""The rungs of the linear layers."""

from .. import matmul
from .rung import SIXTEEN_BIT, Rung

RUNGS = (
    Rung("matmul_forward", 1, matmul.matmul_forward1),
    Rung("matmul_forward", 2, matmul.matmul_forward2),
    Rung("matmul_forward", 3, matmul.matmul_forward3, production=True),
    Rung("matmul_forward", 4, matmul.matmul_forward4, SIXTEEN_BIT),
    Rung("matmul_forward", 5, matmul.matmul_forward5, SIXTEEN_BIT, production=True),
    Rung("matmul_forward", 6, matmul.matmul_forward6, SIXTEEN_BIT, arch=90),
    Rung("matmul_forward", 7, matmul.matmul_forward7, SIXTEEN_BIT, arch=90),
    Rung("matmul_forward", 8, matmul.matmul_forward8, SIXTEEN_BIT, arch=90),
    Rung("matmul_forward", 9, matmul.matmul_forward9, SIXTEEN_BIT, arch=90),
    Rung("matmul_forward", 10, matmul.matmul_forward10, SIXTEEN_BIT, arch=90),
    Rung("matmul_forward", 11, matmul.matmul_forward11, SIXTEEN_BIT, arch=90, production=True),
    Rung("matmul_backward", 1, matmul.matmul_backward1),
    Rung("matmul_backward", 2, matmul.matmul_backward2),
    Rung("matmul_backward", 3, matmul.matmul_backward3, production=True),
    Rung("matmul_backward", 4, matmul.matmul_backward4, SIXTEEN_BIT),
    Rung("matmul_backward", 5, matmul.matmul_backward5, SIXTEEN_BIT, production=True),
    Rung("matmul_backward", 6, matmul.matmul_backward6, SIXTEEN_BIT, arch=90),
    Rung("matmul_backward", 7, matmul.matmul_backward7, SIXTEEN_BIT, arch=90),
    Rung("matmul_backward", 8, matmul.matmul_backward8, SIXTEEN_BIT, arch=90),
    Rung("matmul_backward", 9, matmul.matmul_backward9, SIXTEEN_BIT, arch=90),
    Rung("matmul_backward", 10, matmul.matmul_backward10, SIXTEEN_BIT, arch=90),
    Rung("matmul_backward", 11, matmul.matmul_backward11, SIXTEEN_BIT, arch=90, production=True),
)
