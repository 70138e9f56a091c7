"""Where numbers go: a sink each for the terminal, JSON lines, TensorBoard and W&B."""
