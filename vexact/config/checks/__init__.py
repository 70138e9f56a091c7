"""Rules beyond the type and range of one key, and what is refused of the keys that other frameworks have."""
