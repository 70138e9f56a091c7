"""VeOmni's text trainer with an exact model."""

from __future__ import annotations

from pathlib import Path

from veomni.arguments import VeOmniArguments
from veomni.trainer.text_trainer import TextTrainer

from vexact_veomni.convert import convert
from vexact_veomni.slots import model_type_of, ops_implementation


class ExactTextTrainer(TextTrainer):
    """``TextTrainer(args)`` on our operators, whatever ``model.ops_implementation`` says.

    The attention is that of ``VEOMNI_ATTN_IMPLEMENTATION``, and anything but ``triton-invariant`` is refused.
    """

    def __init__(self, args: VeOmniArguments) -> None:
        args.model.ops_implementation = ops_implementation(model_type=model_type_of(Path(args.model.config_path)))
        super().__init__(args)

    def _build_model_assets(self) -> None:
        """The step between the model (and its adapters) and its sharding."""
        convert(self.base.model)
        super()._build_model_assets()
