"""Policy losses, one per file, and how those of tokens are added up."""
