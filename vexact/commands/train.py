"""`vexact train`: compose the configuration and run the trainer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from vexact import env
from vexact.config import load_config
from vexact.config.fields import leaves, type_name
from vexact.config.schema import Keys
from vexact.config.spelling import nearest

EPILOG = """\
examples:
  vexact train recipe=tiny_arithmetic trainer.total_training_steps=5
  vexact train actor_rollout_ref.model.path=DIR data.train_files=train.parquet 'trainer.logger=[console,wandb]'

docs/configuration.md lists every key.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="train a model",
        description="Train a model by reinforcement learning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration overrides; later ones win")
    parser.add_argument(
        "--from_env", action="store_true", help="take model and data from model_dir, train_path and test_path"
    )
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="check all that needs no training, weights included, print the resolved configuration and plan, then stop",
    )
    parser.add_argument(
        "--help_config",
        "--help-config",
        nargs="?",
        const="",
        metavar="PART",
        help="list the keys whose name contains PART, with type, default and meaning, then stop",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    if arguments.help_config is not None:
        lines = list(_help_lines(arguments.help_config))
        if not lines:
            near = nearest(arguments.help_config, [leaf.key for leaf in leaves(Keys)])
            raise ValueError(f"no key contains {arguments.help_config!r}; near names: {', '.join(near) or 'none'}")
        sys.stdout.writelines(lines)
        return 0
    from vexact.distributed import dismissing_followers, serve_if_follower

    code = serve_if_follower()
    if code is not None:
        return code
    with dismissing_followers():
        return _train(arguments)


def _train(arguments: argparse.Namespace) -> int:
    overrides = [*env.attention_overrides(), *(env.path_overrides() if arguments.from_env else [])]
    config = load_config([*overrides, *arguments.overrides])
    from vexact.config.plan import build_plan
    from vexact.trainer.preflight.dry_run import check_settings, dry_run
    from vexact.trainer.preflight.machine import layout_of, machine_of

    layout = layout_of(config)
    check_settings(config, layout)
    plan = build_plan(config, machine_of(layout))
    if arguments.dry_run:
        dry_run(config)
        sys.stdout.write(f"{config.to_yaml()}\n{plan.text()}\n")
        return 0
    from vexact.trainer.launch import run as launch

    return launch(config, layout)


def _help_lines(part: str) -> Iterator[str]:
    for leaf in leaves(Keys):
        if part in leaf.key:
            default = list(leaf.default) if isinstance(leaf.default, tuple) else leaf.default
            yield f"{leaf.key}={default}\n    {leaf.metadata['help']} ({type_name(leaf.hint)})\n"
