"""Keys that messages name are keys that a user can set."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from vexact.config.checks.verl import REFUSED, UNUSED, moved_keys
from vexact.config.fields import leaves
from vexact.config.schema import Keys

PACKAGE = Path(__file__).resolve().parents[2] / "vexact"
OURS = [leaf.key for leaf in leaves(Keys)]
KNOWN = {*OURS, *moved_keys(OURS), *(entry.key for entry in (*REFUSED, *UNUSED))}
SECTIONS = {key.rsplit(".", depth)[0] for key in KNOWN for depth in (1, 2, 3, 4)}
FULL = re.compile(
    r"(?<![\w./{}-])((?:data|trainer|algorithm|reward|custom_reward_function|reward_model|actor_rollout_ref)"
    r"(?:\.[a-z_0-9]+)+)(?![\w.(/])"
)
COLUMN = ": reward_model.ground_truth"  # of a dataset
SWITCHES = {"data.apply_chat_template"}  # of PromptFormat, for callers in Python


def texts(path: Path) -> Iterator[str]:
    """String constants and the constant parts of f-strings; no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and _has_doc(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def _has_doc(node: ast.AST) -> bool:
    return ast.get_docstring(node, clean=False) is not None  # type: ignore[arg-type]


def test_every_key_in_a_message_is_one() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {key}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "verl"  # verl's own names
        for text in texts(path)
        for key in FULL.findall(text)
        if key not in KNOWN | SECTIONS | SWITCHES or key.startswith(("custom_reward_function", "reward_model."))
    }
    assert {name for name in found if not name.endswith(COLUMN)} == set()
