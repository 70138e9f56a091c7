"""Making a directory whole or not at all, and only once."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vexact import __version__, interrupt
from vexact.env import cache_dir

log = logging.getLogger(__name__)
MARKER = "prepared.json"


def build_directory(name: str, out_dir: str | Path | None, write: Callable[..., None], options: dict[str, Any]) -> Path:
    """Call ``write(directory, **options)`` on a temporary directory and rename it to ``out_dir``.

    Raises:
        ValueError: ``out_dir`` holds files that this did not make, was made with other options, or lacks some of what
            was made.
    """
    out = Path(os.path.expanduser(out_dir)) if out_dir is not None else Path(cache_dir()) / _folder(name, options)
    if out.parts[:1] and out.parts[0].startswith("~"):
        raise ValueError(f"--out {out_dir}: nobody's home directory; write the full path of one of that name")
    recipe = {"name": name, "options": options, "vexact": __version__}
    if _is_made(out, recipe):
        return out
    log.info("preparing %s in %s", name, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    interrupt.note(f"{out} is not made; the same command makes it")
    with interrupt.unwinding():
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            write(temporary, **options)
            interrupt.check()
            files = sorted(str(file.relative_to(temporary)) for file in temporary.rglob("*") if file.is_file())
            made = json.dumps(recipe | {"files": files}, indent=2)
            (temporary / MARKER).write_text(made + "\n", encoding="utf-8")
            temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
            if out.exists():
                out.rmdir()  # empty, or _is_made would have refused it
            temporary.rename(out)
            interrupt.note(f"{out} is made")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return out


def require_disk(directory: Path, num_bytes: int) -> None:
    """Raise ValueError unless the disk of ``directory`` has room for ``num_bytes`` and a margin of a tenth."""
    free = shutil.disk_usage(directory).free
    needed = num_bytes + num_bytes // 10
    if free < needed:
        raise ValueError(
            f"{directory.parent} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed; "
            "free some space or choose another --out"
        )


def _folder(name: str, options: dict[str, Any]) -> str:
    kind = str(options.get("arch") or options.get("task") or "")
    safe = "".join(character if character.isalnum() or character in "._-" else "_" for character in kind)
    return f"{name}-{safe}" if safe else name


def _is_made(out: Path, recipe: dict[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    marker = out / MARKER
    if not marker.is_file():
        raise ValueError(f"{out} exists and was not made by vexact prepare; choose another --out or remove it")
    try:
        made = dict(json.loads(marker.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{marker} is damaged ({error}); remove {out} or choose another --out") from error
    wanted = json.loads(json.dumps(recipe))
    if (made.get("name"), made.get("options")) != (wanted["name"], wanted["options"]):
        raise ValueError(
            f"{out} was made by 'vexact prepare {made.get('name')}' with the options {made.get('options')}, "
            f"not by 'vexact prepare {wanted['name']}' with {wanted['options']}; choose another --out or remove it"
        )
    files = made.get("files", [])  # absent from what older versions made
    gone = [name for name in files if not (out / str(name)).is_file()] if isinstance(files, list) else []
    if gone:
        raise ValueError(
            f"{out} lacks {', '.join(map(str, gone))}, which was made there; remove {out} to make it again"
        )
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
