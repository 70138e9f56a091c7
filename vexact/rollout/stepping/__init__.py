"""The engine's loop body: one step of the model, and what its tokens do to the requests."""
