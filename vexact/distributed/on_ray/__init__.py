"""Workers as Ray actors, one per GPU."""

from vexact.distributed.on_ray.cluster import Cluster, connect
from vexact.distributed.on_ray.start import start_actors

__all__ = ["Cluster", "connect", "start_actors"]
