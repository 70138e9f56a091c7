"""Attention for sm_90 in Gluon: warp-specialised kernels with the bits of the Triton kernels.

A program keeps one multiprocessor. Its producer warp draws tiles of 128 query rows from a counter and loads queries,
keys and values, the latter two from packed rows or from pages, through the tensor memory accelerator into rings in
shared memory; two warp groups of 64 rows each consume them, so that one computes weights while the tensor cores
multiply for the other. The arithmetic is that of `attention/step.py`, and so is its order.
"""
