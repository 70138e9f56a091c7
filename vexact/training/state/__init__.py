"""What an actor is between updates: gathered, sharded, of an earlier version, and whether it is all numbers."""
