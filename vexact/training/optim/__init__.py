"""The optimizer step: norm and clipping, AdamW, moments that wait on the host."""
