"""What verl imports in every process. verl hides the errors of plug-ins, so this one tells them itself."""

import os
import sys
import traceback

from vexact_verl.registration import register

try:
    register()
except Exception:
    sys.stderr.write(
        f"vexact-verl could not register itself with verl in process {os.getpid()}; neither rollout.name=vexact nor "
        f"VERL_PLATFORM=cpu works in it. `python -m vexact_verl` checks the installation.\n{traceback.format_exc()}"
    )
    raise
