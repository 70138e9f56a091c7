"""Plain-torch twins of the kernels, batch-invariant on CPU.

Three facts carry them: a batched matrix product whose matrices have one fixed shape, each of them one thread's work,
gives each matrix the same bits whatever the batch, and ``product.py`` chooses shapes of which every row is alike;
single additions, products and divisions are correctly rounded; ``torch.exp`` and ``torch.log`` treat every element of a
contiguous tensor alike (``torch.exp2`` and ``torch.sigmoid`` do not).
"""
