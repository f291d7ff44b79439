"""Op set 1: every op of the model as hand-written CUDA kernels, launched through CuPy. Same names as llmc.cpu."""

from . import device, module

__all__ = ["device", "module"]
