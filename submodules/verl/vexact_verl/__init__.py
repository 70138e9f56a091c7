"""vexact inside verl 0.9: ``rollout.name=vexact`` and ``actor.strategy=vexact``, found by entry point."""
