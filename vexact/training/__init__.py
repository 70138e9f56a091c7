"""Training: packing, forward with fused linear cross-entropy, policy loss, optimizer, reference policy."""

from vexact.training.actor import Actor
from vexact.training.batches.ledger import Ledger, LedgerError
from vexact.training.config import ActorConfig, OptimConfig
from vexact.training.parallel.ranks import PeerStopped, Ranks
from vexact.training.parallel.sharding import load_sharded_model
from vexact.training.reference import Reference
from vexact.training.sft import SupervisedConfig, supervised_steps
from vexact.training.state.gathered import ActorState, nonfinite_in

__all__ = [
    "Actor",
    "ActorConfig",
    "ActorState",
    "Ledger",
    "LedgerError",
    "OptimConfig",
    "PeerStopped",
    "Ranks",
    "Reference",
    "SupervisedConfig",
    "load_sharded_model",
    "nonfinite_in",
    "supervised_steps",
]
