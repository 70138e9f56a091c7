"""Some ranks of a process group, as a group of their own."""

from __future__ import annotations

import torch.distributed as dist


def subgroup(group: dist.ProcessGroup | None, ranks: slice) -> dist.ProcessGroup:
    """The group of ``ranks`` of ``group`` (None: the default group), which call this together and are among them.

    Its collectives wait as long as those of ``group``. torch names it after its ranks and the number of groups that a
    process is in: where these numbers differ among the ranks, they wait for each other in vain.
    """
    group = dist.group.WORLD if group is None else group
    assert group is not None, "only ranks of a group share"
    members = dist.get_process_group_ranks(group)[ranks]
    limit = group._get_backend(group._device_types[0]).options._timeout  # which a new group does not take over
    return dist.new_group(members, limit, use_local_synchronization=True)
