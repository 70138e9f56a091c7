"""Several ranks, one result: who has which rows and tokens, and gradients added in an order that knows no ranks."""
