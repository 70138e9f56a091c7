"""Matrix products on the CPU whose rows depend neither on each other, nor on their number, nor on the thread count.

A BLAS picks its kernels by shape: one row, a narrow matrix, the last one to three rows of a tile and the columns past a
full vector go through other loops than the rest, and with several threads a lone product may be cut along its inner
axis. None of that is left to chance here:

* rows come in blocks of ``FEW_ROWS`` or ``ROWS``, multiples of the 4, 6, 8 or 12 rows that a kernel takes at a time,
* columns are a multiple of ``COLUMN_STEP`` and the inner axis of ``INNER_STEP``, by zeros, which add nothing,
* a product has at most ``PANEL`` columns, so that which kernel runs is a function of the weight's shape alone,
* a matrix is one thread's work: a batch of at least as many matrices as threads is handed out whole, a smaller one runs
  on the calling thread.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, FEW_ROWS = 48, 24
COLUMN_STEP, INNER_STEP = 16, 8
PANEL = 1024


def product(x: Tensor, weight: Tensor) -> Tensor:
    """(M, K) x (K, N) -> (M, N), all fp32; ``weight`` may be a transposed view."""
    num_rows, (inner, width) = x.shape[0], weight.shape
    if num_rows == 0:
        return x.new_empty(0, width)
    rows = FEW_ROWS if num_rows <= FEW_ROWS else ROWS
    num_blocks = -(-num_rows // rows)
    if num_blocks > 1:
        num_blocks = max(num_blocks, torch.get_num_threads())  # idle threads take blocks of zeros: none is cut in two
    fill = -inner % INNER_STEP
    blocks = F.pad(x, (0, fill, 0, num_blocks * rows - num_rows)).view(num_blocks, rows, inner + fill)
    if fill:
        weight = F.pad(weight, (0, 0, 0, fill))
    if width <= PANEL and width % COLUMN_STEP == 0:
        return _blocks(blocks, weight).view(-1, width)[:num_rows]
    out = torch.empty(num_blocks, rows, width)
    together = width // PANEL * PANEL if num_blocks == 1 and width // PANEL >= torch.get_num_threads() > 1 else 0
    if together:
        panels = weight[:, :together].unflatten(1, (-1, PANEL)).movedim(1, 0)
        out[0, :, :together] = _bmm(blocks.expand(len(panels), -1, -1), panels).movedim(0, 1).flatten(1)
    for start in range(together, width, PANEL):
        _fill(out[:, :, start : start + PANEL], blocks, weight[:, start : start + PANEL])
    return out.view(-1, width)[:num_rows]


def batched(a: Tensor, b: Tensor) -> Tensor:
    """(n, M, K) x (n, K, N) -> (n, M, N), all fp32; the caller keeps M at one size that :func:`even_rows` allows."""
    width = b.shape[2]
    fill, columns = -a.shape[2] % INNER_STEP, -width % COLUMN_STEP
    if fill:
        a = F.pad(a, (0, fill))
    if fill or columns:
        b = F.pad(b, (0, columns, 0, fill))
    return _bmm(a, b)[..., :width]


def even_rows(step: int) -> int:
    """The fewest rows, a multiple of ``step`` and at least four of it, that a product computes alike in every row.

    >>> [even_rows(step) for step in (1, 2, 3, 4, 5, 6, 7, 8)]
    [12, 12, 12, 16, 40, 24, 28, 40]
    """
    rows = max(4 * step, -(-12 // step) * step)
    while rows % 12 not in (0, 4):  # four rows left over have a loop that agrees with the others; one to three have not
        rows += step
    return rows


def _fill(out: Tensor, blocks: Tensor, panel: Tensor) -> None:
    """Up to ``PANEL`` columns; those past the last multiple of ``COLUMN_STEP`` are a padded product of their own."""
    whole = panel.shape[1] // COLUMN_STEP * COLUMN_STEP
    if whole:
        out[:, :, :whole] = _blocks(blocks, panel[:, :whole])
    rest = panel.shape[1] - whole
    if rest:
        out[:, :, whole:] = _blocks(blocks, F.pad(panel[:, whole:], (0, COLUMN_STEP - rest)))[:, :, :rest]


def _blocks(blocks: Tensor, weight: Tensor) -> Tensor:
    return _bmm(blocks, weight.unsqueeze(0).expand(len(blocks), -1, -1))


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    threads = torch.get_num_threads()
    if threads == 1 or (len(a) >= threads and torch.backends.mkl.is_available()):
        return torch.bmm(a, b)
    torch.set_num_threads(1)  # of this thread; takes a tenth of a microsecond
    try:
        return torch.bmm(a, b)
    finally:
        torch.set_num_threads(threads)
