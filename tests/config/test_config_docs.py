"""Generated files say what the schema says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_docs", ROOT / "scripts" / "gen_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_defaults_and_documentation_are_up_to_date() -> None:
    stale = [str(path.relative_to(ROOT)) for path in generator().stale()]
    assert stale == [], "run scripts/gen_docs.py"


def test_documents_name_only_keys_that_exist() -> None:
    import re

    from vexact.config.fields import leaves
    from vexact.config.schema import Keys

    keys = {leaf.key for leaf in leaves(Keys)}
    pattern = re.compile(r"`(?:\+\+)?((?:data|actor_rollout_ref|algorithm|reward|trainer)\.[\w.]+)(?:=[^`]*)?`")
    names = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/numerics.md", "docs/troubleshooting.md")
    for name in names:
        for key in pattern.findall((ROOT / name).read_text(encoding="utf-8")):
            known = key in keys or key.startswith("reward/") or any(other.startswith(f"{key}.") for other in keys)
            assert known, f"{name} names {key}"
