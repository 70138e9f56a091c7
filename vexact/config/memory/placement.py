"""Which GPUs train and which sample."""

from __future__ import annotations

from dataclasses import dataclass

from vexact.config.fields import ConfigError
from vexact.config.schema import Config


@dataclass(frozen=True, slots=True)
class Placement:
    """Numbers of GPUs, or of processes on a CPU; colocated, every one of them does both."""

    trainers: int
    replicas: int  # of the rollout engine
    is_colocated: bool

    @classmethod
    def of(cls, config: Config, visible: int = 1) -> Placement:
        """As configured, with ``visible`` GPUs per machine where ``trainer.n_gpus_per_node`` is null.

        Raises:
            ConfigError: ``trainer.rollout_gpus`` leaves none to train.
        """
        total = config.trainer.nnodes * (config.trainer.n_gpus_per_node or visible)
        apart = config.trainer.rollout_gpus
        if apart is None:
            return cls(total, total, True)
        require_trainers(apart, total)
        return cls(total - apart, apart, False)

    @property
    def total(self) -> int:
        return self.trainers if self.is_colocated else self.trainers + self.replicas

    def text(self, device: str) -> str:
        """
        >>> Placement(6, 2, False).text("cuda")
        '6 GPUs train, 2 sample'
        >>> Placement(1, 1, False).text("cpu")
        '1 process trains, 1 samples'
        """
        noun = "GPU" if device == "cuda" else "process"
        plural = noun + ("es" if noun == "process" else "s")
        if not self.is_colocated:
            train = f"{self.trainers} {plural} train" if self.trainers > 1 else f"1 {noun} trains"
            return f"{train}, {self.replicas} sample{'' if self.replicas > 1 else 's'}"
        return f"1 {noun} trains and samples" if self.trainers == 1 else f"{self.trainers} {plural} train and sample"


def require_trainers(apart: int, total: int) -> None:
    """Raises ConfigError when ``apart`` processes that sample leave none of ``total`` to train."""
    if apart >= total:
        raise ConfigError(
            f"trainer.rollout_gpus={apart} of {total} process{'es' if total > 1 else ''} leaves none to train; lower "
            "it, raise trainer.n_gpus_per_node or trainer.nnodes, or leave it null to train and generate on the same "
            "GPUs"
        )
