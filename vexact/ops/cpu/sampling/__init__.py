"""CPU twin of sampling: the generator, the noise and the draw."""

from vexact.ops.cpu.sampling.draw import sample

__all__ = ["sample"]
