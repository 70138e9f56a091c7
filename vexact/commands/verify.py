"""`vexact verify`: does training compute the bits that the rollout sampled, on this checkpoint?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vexact.commands.output import check_output
from vexact.config.checks.seed import check_seed

EPILOG = """\
exit code: 0 every compared bit is equal; 1 one is not (or a log-probability or gradient is not finite); 2 wrong usage.
closeness to transformers does not change it. docs/verify.md explains the table.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="prove that rollout and training compute the same bits",
        description="Sample with the rollout engine, rescore with the training forward and compare every bit; "
        "then compare logits and gradients with transformers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model_path", type=Path, help="directory of a Hugging Face checkpoint; with --replay that of its weights")
    add(
        "--model_backend",
        default="vexact",
        help="training side: vexact, hf (stock transformers) or a bridge's (vexact)",
    )
    add("--attn_impl", default="triton-invariant", help="training attention: triton-invariant or sdpa")
    add("--use_remove_padding", type=_flag, default=True, metavar="BOOL", help="pack sequences end to end (true)")
    add("--use_fused_lce", type=_flag, default=True, metavar="BOOL", help="fused head and cross-entropy (true)")
    add("--dtype", default="auto", help="auto (bfloat16 on a GPU, else float32), float32, bfloat16 or float16")
    add("--num_prompts", type=int, default=64, help="(64)")
    add("--max_new_tokens", type=int, default=64, help="tokens sampled per prompt (64)")
    add("--seed", type=int, default=0, help="draws prompts, sampling parameters and engine settings (0)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--out", type=Path, metavar="FILE.json", help="write the result here as well")
    add(
        "--explain",
        type=Path,
        nargs="?",
        const=Path("divergence.pt"),
        metavar="FILE.pt",
        help="name the operator where the first unequal request parts, and write a replay file (divergence.pt)",
    )
    add("--replay", type=Path, metavar="FILE.pt", help="only repeat the comparison recorded in this file")
    return parser


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _check_alone(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options that a repetition, which does what its file recorded, would not look at."""
    defaults = vars(add_parser(argparse.ArgumentParser().add_subparsers()).parse_args([]))
    read = ("replay", "model_path")
    unread = [name for name, value in defaults.items() if name not in read and getattr(arguments, name) != value]
    if unread:
        raise ValueError(
            "--replay repeats what its file recorded and takes no other option than --model_path: "
            f"{', '.join(f'--{name}' for name in unread)}"
        )


def _replay(arguments: argparse.Namespace) -> int:
    from vexact.audit.explain import replay

    found = replay(arguments.replay, model_path=arguments.model_path)
    sys.stdout.write(f"{found.describe()}\n")
    return 1 if found.found else 0


def run(arguments: argparse.Namespace) -> int:
    if arguments.replay is not None:
        _check_alone(arguments)
        return _replay(arguments)
    check_seed("--seed", arguments.seed)
    if arguments.model_path is None:
        raise ValueError("--model_path is missing: the directory of a Hugging Face checkpoint (or give --replay FILE)")
    if arguments.explain is not None:
        from vexact.audit.explain.checkpoint import check_backend

        check_backend(arguments.model_backend)
    return _verify(arguments)


def _verify(arguments: argparse.Namespace) -> int:
    from transformers.utils.logging import disable_progress_bar

    from vexact.audit.verify import VerifyOptions, verify
    from vexact.device import resolve_device
    from vexact.rollout import NonFiniteLogprobError

    device = resolve_device(arguments.device)
    dtype = ("float32" if device == "cpu" else "bfloat16") if arguments.dtype == "auto" else arguments.dtype
    if arguments.out is not None:
        check_output("--out", arguments.out, b'"passed": ', "result of vexact verify")
    if arguments.explain is not None:
        check_output("--explain", arguments.explain, b"PK\x03\x04", "replay file")
        if arguments.out is not None and arguments.out.resolve() == arguments.explain.resolve():
            raise ValueError(f"--out and --explain both write to {arguments.out}; give them two files")
    disable_progress_bar()
    options = VerifyOptions(
        model_path=arguments.model_path,
        model_backend=arguments.model_backend,
        attn_impl=arguments.attn_impl,
        use_remove_padding=arguments.use_remove_padding,
        use_fused_lce=arguments.use_fused_lce,
        dtype=dtype,
        num_prompts=arguments.num_prompts,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        device=device,
    )
    try:
        report = verify(options)
    except NonFiniteLogprobError as error:
        sys.stdout.write(f"NOT EXACT: {error}\n")
        _write(arguments.out, {"passed": False, "error": str(error)})
        return 1
    sys.stdout.write(f"{report.table()}\n")
    _write(arguments.out, report.to_dict())
    if arguments.explain is not None and not report.bits.exact:
        from vexact.audit.explain.checkpoint import explain_report

        found = explain_report(options, report, arguments.explain)
        if found is not None:
            sys.stdout.write(f"\n{found.describe()}\nrepeat it with: vexact verify --replay {arguments.explain}\n")
    return 0 if report.passed else 1


def _write(out: Path | None, result: dict[str, Any]) -> None:
    """After the result is printed, so that a disk that is full does not take it along."""
    if out is not None:
        from vexact.audit.certificate import plain

        out.write_text(json.dumps(plain(result), indent=2, allow_nan=False) + "\n")
