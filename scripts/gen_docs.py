"""Write configs/*.yaml and docs/configuration.md from the schema. `--check` only reports what is out of date."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path

import yaml

from vexact.config.checks.verl import MOVED, REFUSED, UNUSED
from vexact.config.fields import UNSET, Leaf, describe_range, leaves, type_name
from vexact.config.schema import ActorRolloutRef, Keys

ROOT = Path(__file__).resolve().parents[1]

INTRO = """\
# Configuration

<!-- Written by scripts/gen_docs.py from vexact/config; edit there. -->

Every key below can be given on the command line of `vexact train` (or of the getting-started script) as
`section.key=value`, later ones win: **defaults < recipe < environment < command line**. A leading `+` or `++` is
accepted and means nothing. `recipe=NAME` picks a file of `configs/recipe/`, `recipe=FILE.yaml` one of yours, with
nested keys, dotted keys, or both; one key in two places is an error.

Text stays text: a key of the type *text* takes what stands behind `=` as it is (`2024_10_05`, `1e-3`, `true`, a path
with commas, a template), less one pair of quotes around all of it; in a recipe it is what is written there. Where the
type has *or null*, `null` and nothing at all are null. Lists are written `'key=[a,b]'`, an item with a comma in quotes;
`${section.key}` in a value stands for another key's. Everything else has Hydra's grammar.

A number outside its range stops the run, and so does one that is not finite in float32; a whole number is at most
2^31 - 1 unless its row says otherwise. `vexact train --dry_run …` checks everything that needs no training, reads every
weight and the first 64 rows of each dataset, grades 8 of each `data_source`, prints the resolved configuration and the
plan, and stops.

Names, nesting and defaults are verl's wherever the meaning is the same; where our default differs, verl's is named.
An unknown key stops the run and names the nearest valid one. Scripts of verl's are taken as they are, and so is a whole
configuration file of verl's as a recipe: what has no effect here is dropped with a notice, what cannot be honoured is
refused by name ([both](#verl-keys-that-work-differently)).

## Environment variables

| variable | effect |
|---|---|
| `INFER_FA_IMPL` | `actor_rollout_ref.rollout.attn_impl` |
| `VEOMNI_ATTN_IMPLEMENTATION` | `actor_rollout_ref.actor.attn_implementation`; `VEOMNI_ATTN_IMPL` and `ATTN_IMPL` are \
the same variable and must not disagree |
| `model_dir`, `train_path`, `test_path` | model and data of `examples/getting_started/run_qwen3_1b7.sh` |
| `WANDB_MODE`, `WANDB_API_KEY` | where W&B writes: offline without a key, or when the server does not answer or \
refuses the key within seconds; never a prompt |
| `VEXACT_CACHE` | where `vexact prepare` writes by default |
| `VEXACT_VENV` | virtual environment `scripts/setup.sh` uses instead of `.venv` |
| `VEXACT_API_KEY` | the key that `vexact serve` asks of requests, kept out of the list of processes |
| `VEXACT_DEBUG` | `1` shows the traceback of a user error |

A variable that is empty counts as unset.
"""


def sections() -> Iterator[tuple[str, type, str]]:
    """(dotted name, class, one-line help) of every section that has a file of its own."""
    for parent, prefix in ((Keys, ""), (ActorRolloutRef, "actor_rollout_ref.")):
        hints = typing.get_type_hints(parent)
        for item in dataclasses.fields(parent):
            if hints[item.name] is not ActorRolloutRef:
                yield f"{prefix}{item.name}", hints[item.name], item.metadata["help"]


def default_yaml(name: str, kind: type) -> str:
    """The YAML file of one section: every key with its default and a comment."""
    lines = [
        f"# @package {name}",
        "# Written by scripts/gen_docs.py from vexact/config; a recipe or the command line overrides it.",
    ]
    lines += _yaml_keys(kind, indent=0)
    return "\n".join(lines) + "\n"


def _yaml_keys(kind: type, indent: int) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    pad = "  " * indent
    for item in dataclasses.fields(kind):
        comment = textwrap.wrap(item.metadata["help"], width=110 - len(pad))
        if dataclasses.is_dataclass(hints[item.name]):
            yield f"{pad}{item.name}:"
            yield from _yaml_keys(typing.cast(type, hints[item.name]), indent + 1)
            continue
        yield from (f"{pad}# {line}" for line in comment)
        leaf = next(leaf for leaf in leaves(kind) if leaf.key == item.name)
        yield f"{pad}{item.name}: {_value(leaf.default)}"


def _value(default: object) -> str:
    plain = list(default) if isinstance(default, tuple) else default
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n...\n").strip()


def configuration_page() -> str:
    """docs/configuration.md."""
    parts = [INTRO]
    for name, kind, help in sections():
        parts.append(
            f"## {name}\n\n{help}\n\n| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(_rows(kind))
        )
    parts.append(_verl_page())
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _rows(kind: type) -> Iterator[str]:
    for leaf in leaves(kind):
        cells = (
            f"`{leaf.key}`",
            type_name(leaf.hint) + _range(leaf),
            f"`{_value(leaf.default)}`" + _verl_default(leaf),
            leaf.metadata["help"],
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _range(leaf: Leaf) -> str:
    text = describe_range(leaf.metadata["range"])
    return f", {text}" if text else ""


def _verl_default(leaf: Leaf) -> str:
    verl = leaf.metadata["verl"]
    return "" if verl is UNSET else f" (verl: `{str(verl).lower() if isinstance(verl, bool) else verl}`)"


def _verl_page() -> str:
    lines = [
        "## verl keys that work differently",
        "",
        "Accepted at the harmless value only; anything else stops the run with the reason.",
        "",
    ]
    lines += ["| key | harmless | why |", "|---|---|---|"]
    for refused in REFUSED:
        harmless = (
            ", ".join(f"`{'null' if item is None else str(item).lower()}`" for item in refused.harmless) or "none"
        )
        lines.append(f"| `{refused.key}` | {harmless} | {refused.reason} |")
    lines += ["", "Accepted and dropped, with a notice:", "", "| key | why it has no effect |", "|---|---|"]
    lines += [f"| `{unused.key}` | {unused.reason} |" for unused in UNUSED]
    lines += ["", "Accepted under verl's other spelling:", "", "| verl | here |", "|---|---|"]
    lines += [f"| `{theirs}` | `{ours}` |" for theirs, ours in MOVED.items()]
    return "\n".join(lines)


def outputs() -> dict[Path, str]:
    """Every generated file and its text."""
    files = {
        ROOT / "configs" / f"{name.rsplit('.', 1)[-1]}.yaml": default_yaml(name, kind) for name, kind, _ in sections()
    }
    files[ROOT / "docs" / "configuration.md"] = configuration_page()
    return files


def stale() -> list[Path]:
    """Generated files whose text is not what the schema gives."""
    return [path for path, text in outputs().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]


def main(arguments: list[str]) -> int:
    changed = stale()
    if arguments == ["--check"]:
        sys.stdout.writelines(f"out of date: {path.relative_to(ROOT)}\n" for path in changed)
        return 1 if changed else 0
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(outputs()[path], encoding="utf-8")
        sys.stdout.write(f"wrote {path.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
