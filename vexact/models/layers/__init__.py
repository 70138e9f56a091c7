"""The parts of a decoder layer: attention and feed-forward, each in the kinds that a configuration can ask for."""

from vexact.models.layers.attention import Attention
from vexact.models.layers.balance import Balance
from vexact.models.layers.context import KVCache, Metadata, Routing, Tokens
from vexact.models.layers.latent_attention import LatentAttention
from vexact.models.layers.mlp import MLP
from vexact.models.layers.moe import MoE
from vexact.models.layers.norm import RMSNorm

__all__ = [
    "MLP",
    "Attention",
    "Balance",
    "KVCache",
    "LatentAttention",
    "Metadata",
    "MoE",
    "RMSNorm",
    "Routing",
    "Tokens",
]
