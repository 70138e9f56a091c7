"""Whom the warden of a Ray cluster takes for a part of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from processes import until

from vexact.distributed.on_ray.warden import members

MARK = "a mark that no other process has"


def test_members_have_the_mark_or_a_title_of_ray_and_a_file_in_the_folder(tmp_path: Path) -> None:
    folder, beside = tmp_path / "cluster", tmp_path / "cluster-2"
    folder.mkdir()
    beside.mkdir()

    def sleeper(title: str, place: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with (place / "log").open("ab") as file:
            process = subprocess.Popen([title, "999"], executable="/bin/sleep", stdout=file, env=environment)
        # it has become another program before the system shows its new title and environment
        assert until(lambda: Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(title.encode()))
        return process

    wanted = [sleeper("ray::Agent", folder, {}), sleeper("raylet", beside, {"RUN": MARK})]
    others = [sleeper("tail", folder, {}), sleeper("ray::Agent", beside, {})]
    try:
        assert sorted(members(MARK, str(folder))) == sorted(process.pid for process in wanted)
        assert members(MARK, "") == [wanted[1].pid]
    finally:
        for process in wanted + others:
            process.kill()
            process.wait()
