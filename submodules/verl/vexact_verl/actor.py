"""For ``actor_rollout_ref.model.external_lib=vexact_verl.actor``, which every worker imports that builds a model."""

from vexact_verl.registration import register_engine

register_engine()
