"""How a request is sampled, and the tokens of a step."""
