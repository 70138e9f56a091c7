"""CPU twins of the rotary operators."""
