"""``python -m vexact_verl``: whether verl finds vexact, and if not, why."""

import sys
from importlib.metadata import version

from vexact_verl.registration import EXTERNAL_LIB, problems


def main() -> int:
    found = problems()
    if found:
        sys.stderr.write("".join(f"vexact_verl: {problem}\n" for problem in found))
        return 1
    from verl.utils.device import get_device_name

    sys.stdout.write(
        f"verl {version('verl')} knows actor_rollout_ref.rollout.name=vexact and, with "
        f"actor_rollout_ref.model.external_lib={EXTERNAL_LIB}, actor_rollout_ref.actor.strategy=vexact "
        f"(platform {get_device_name()})\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
