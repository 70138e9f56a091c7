"""Linear layers, the LM head and embeddings on our operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vexact.ops import embedding, linear


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class Head(nn.Linear):
    """Logits in fp32, never rounded to the model's dtype: what log-probabilities are defined over."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, out_dtype=torch.float32)


class Embedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        rows = embedding(input.reshape(-1), self.weight, self.padding_idx)
        return rows.view(*input.shape, self.embedding_dim)
