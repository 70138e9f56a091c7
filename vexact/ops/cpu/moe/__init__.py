"""CPU twins of the mixture of experts."""
