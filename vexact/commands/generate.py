"""`vexact generate`: ask a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from vexact.config.checks.refused_sampling import REFUSED_SAMPLING, check_refused_sampling
from vexact.config.checks.seed import check_seed


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="print a model's answer to a prompt",
        description="Print a model's answers. The chat template is applied when the tokenizer has one.",
    )
    parser.add_argument("--model_path", required=True, help="directory of a Hugging Face checkpoint")
    parser.add_argument("--prompt", required=True, action="append", help="may be given several times")
    parser.add_argument("--system", help="system message of the chat")
    parser.add_argument("--raw", action="store_true", help="do not apply the chat template")
    parser.add_argument("--n", type=int, default=1, help="answers per prompt (1)")
    parser.add_argument("--max_tokens", type=int, default=128, help="longest answer in tokens (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus mass (1)")
    parser.add_argument("--top_k", type=int, default=-1, help="keep the k largest logits (-1: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampler (0)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    for name in REFUSED_SAMPLING:
        parser.add_argument(f"--{name}", type=_value, help=argparse.SUPPRESS)
    return parser


def _value(text: str) -> Any:
    """A number or list as in JSON; any other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def run(arguments: argparse.Namespace) -> int:
    check_refused_sampling({name: getattr(arguments, name) for name in REFUSED_SAMPLING})
    check_seed("--seed", arguments.seed)
    from vexact.data.chat_template import Fixes
    from vexact.data.rows import Row
    from vexact.data.template import PromptFormat, tokenize, warn_of_unknown_text
    from vexact.device import resolve_device
    from vexact.rollout import Engine, SamplingParams

    device = resolve_device(arguments.device)
    dtype = ("float32" if device == "cpu" else "bfloat16") if arguments.dtype == "auto" else arguments.dtype
    parameters = SamplingParams(
        n=arguments.n,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    engine = Engine(arguments.model_path, dtype=dtype, device=device)
    if engine.tokenizer is None:
        raise ValueError(
            f"{arguments.model_path} has no tokenizer files; copy tokenizer.json and tokenizer_config.json there"
        )
    rows = [
        Row(_messages(prompt, arguments.system), "", "", where=f"--prompt {prompt!r:.40}")
        for prompt in arguments.prompt
    ]
    fixes = Fixes(
        refused="change --prompt or --system, or give --raw",
        formatted="take it out. If the prompt is formatted already, give --raw",
        no_template="leave out --system, or put a chat_template.jinja into the model's directory",
        switched_off="--raw (leave out --system, or --raw)",
    )
    prompts = tokenize(rows, engine.tokenizer, PromptFormat(apply_chat_template=not arguments.raw, fixes=fixes))
    warn_of_unknown_text(rows, prompts, engine.tokenizer)
    samples = engine.generate(prompts, parameters)
    sys.stdout.writelines(f"{sample.text}\n" for sample in samples)
    return 0


def _messages(prompt: str, system: str | None) -> str | tuple[dict[str, str], ...]:
    if system is None:
        return prompt
    return ({"role": "system", "content": system}, {"role": "user", "content": prompt})
