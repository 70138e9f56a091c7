"""Keys that verl has and we do not: refused with the reason, moved to our key, or dropped with a notice.

A verl script that leaves such a key at a value that means what we do anyway keeps working, and so does a whole
configuration of verl's that leaves all others at verl's defaults.
"""

from vexact.config.checks.verl.moved import MOVED, here, moved_keys
from vexact.config.checks.verl.refused import REFUSED
from vexact.config.checks.verl.translate import named_keys, translate
from vexact.config.checks.verl.unused import UNUSED

__all__ = ["MOVED", "REFUSED", "UNUSED", "here", "moved_keys", "named_keys", "translate"]
