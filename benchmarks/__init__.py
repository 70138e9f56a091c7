"""What is claimed of speed, memory and bits, measured: from the repository root, ``python -m benchmarks.ROOM.NAME``."""
