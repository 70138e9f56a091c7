"""What there is to exchange depends on the installed transformers; the bridges bring older ones."""

from __future__ import annotations

from families import ROUTERS_ARE_MODULES

collect_ignore = [] if ROUTERS_ARE_MODULES else ["test_router_swap.py"]  # it imports these modules
