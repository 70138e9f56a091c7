"""Rotary position embeddings, alone and together with what stands beside them in a layer."""
