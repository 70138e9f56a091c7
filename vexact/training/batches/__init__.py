"""What one forward takes: sequences packed by a token budget, and the ledger of what their loss must read."""
