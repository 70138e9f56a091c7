"""One module per subcommand: `add_parser` declares its arguments, `run` does it and returns the exit code."""
