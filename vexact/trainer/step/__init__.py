"""The stages of a step, from prompts to the validation after it."""
