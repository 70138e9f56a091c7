"""What a run keeps in its directory, and what keeps other runs out of it."""
