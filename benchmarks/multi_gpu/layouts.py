"""What the GPUs of a run do: all of them both, or some train while the others sample."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

_TEXT = re.compile(r"(?P<trainers>[1-9]\d*)(\+(?P<rollouts>[1-9]\d*)(?P<ahead>,async)?)?")


@dataclass(frozen=True, slots=True)
class Layout:
    """GPUs, or processes on a CPU."""

    trainers: int
    rollouts: int = 0  # that only sample; 0: those that train do it as well
    ahead: bool = False  # one step off: samples of the next step while this one trains

    @classmethod
    def parse(cls, text: str) -> Layout:
        """``4``: colocated. ``3+1``: three train, one samples. ``2+2,async``: one step off.

        Raises:
            argparse.ArgumentTypeError: anything else.
        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"{text} is no layout: 4 is four colocated GPUs, 3+1 three that train and one that samples, and "
                "2+2,async the same one step off"
            )
        return cls(int(found["trainers"]), int(found["rollouts"] or 0), found["ahead"] is not None)

    @property
    def gpus(self) -> int:
        return self.trainers + self.rollouts

    @property
    def kind(self) -> str:
        if not self.rollouts:
            return "colocated"
        return "one step off" if self.ahead else "disaggregated"

    @property
    def name(self) -> str:
        """
        >>> Layout(4).name, Layout(3, 1).name, Layout(2, 2, True).name
        ('4 colocated', '3+1 disaggregated', '2+2 one step off')
        """
        return f"{self.trainers}+{self.rollouts} {self.kind}" if self.rollouts else f"{self.trainers} {self.kind}"

    @property
    def overrides(self) -> list[str]:
        """Every step of a run that is one step off is compared: the default is one in ten."""
        apart = [f"trainer.rollout_gpus={self.rollouts}"] if self.rollouts else []
        ahead = ["trainer.async_steps=1", "trainer.async_audit_freq=1"] if self.ahead else []
        return [f"trainer.n_gpus_per_node={self.gpus}", *apart, *ahead]
