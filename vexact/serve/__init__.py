"""An HTTP server with OpenAI's interface in front of one engine: text or token ids in, text, token ids and exact
log-probabilities out."""
