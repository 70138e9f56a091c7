"""Which function grades, and what its return value means."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vexact.reward.graders import compute_score
from vexact.reward.outcome import Outcome, interpret, sandbox_hint
from vexact.reward.sandbox.policy import SandboxPolicy

ScoreFunction = Callable[..., Any]


class RewardError(RuntimeError):
    """Grading as a whole cannot go on; the message names the cause."""


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """The function to call: the built-in graders, or ``name`` in the Python file ``path``."""

    path: str | None = None  # reward.custom_reward_function.path
    name: str = "compute_score"  # reward.custom_reward_function.name
    kwargs: dict[str, Any] = field(default_factory=dict)  # reward.custom_reward_function.reward_kwargs
    sandbox: SandboxPolicy = field(default_factory=SandboxPolicy)  # reward.sandbox

    @property
    def is_custom(self) -> bool:
        return self.path is not None


class GradeRequest(NamedTuple):
    """What the function is called with."""

    data_source: str
    solution_str: str
    ground_truth: Any
    extra_info: dict[str, Any] | None = None
    key: str = ""  # of the sample; comes back with the outcome


def load_function(spec: RewardSpec) -> ScoreFunction:
    """The function that ``spec`` names, with its file executed under a module name of its own.

    Raises:
        RewardError: no such file, no such function, or the file fails when it is imported.
    """
    if spec.path is None:
        return compute_score
    path = Path(os.path.expanduser(spec.path)).resolve()
    if not path.is_file():
        raise RewardError(f"reward.custom_reward_function.path={spec.path!r} is not a file (looked for {path})")
    module_spec = importlib.util.spec_from_file_location("vexact_custom_reward", path)
    if module_spec is None or module_spec.loader is None:
        raise RewardError(
            f"reward.custom_reward_function.path={spec.path!r} is not a Python file; its name must end in .py"
        )
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        hint = sandbox_hint(error) + _import_hint(error, path)
        raise RewardError(f"importing {path} failed: {type(error).__name__}: {error}{hint}") from error
    function = getattr(module, spec.name, None)
    if not callable(function):
        defined = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise RewardError(
            f"{path} has no function {spec.name!r}; functions there: {', '.join(defined) or 'none'}. "
            "Set reward.custom_reward_function.name"
        )
    return function


def _import_hint(error: BaseException, path: Path) -> str:
    """What to do about a module beside the file: the file is executed alone, its folder is not looked in."""
    if not isinstance(error, ImportError):
        return ""
    name = (error.name or "").split(".")[0]
    beside = name and ((path.parent / f"{name}.py").is_file() or (path.parent / name).is_dir())
    if not beside and "relative import" not in str(error):
        return ""
    return f" (modules beside it are found with PYTHONPATH={path.parent}, by their plain names)"


def call(function: ScoreFunction, request: GradeRequest, kwargs: dict[str, Any]) -> Outcome:
    """Call the function as verl does and interpret what it returns; raises whatever it raises.

    What it changes in its arguments ends with the call: the samples of a prompt share them.
    """
    data_source, solution, truth, extra_info, _ = request
    truth, extra_info, kwargs = deepcopy((truth, extra_info, kwargs))
    result = function(
        data_source=data_source, solution_str=solution, ground_truth=truth, extra_info=extra_info, **kwargs
    )
    if inspect.iscoroutine(result):
        import asyncio  # slow to import, rarely needed

        result = asyncio.run(result)
    return interpret(result)
