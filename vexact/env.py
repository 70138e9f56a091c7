"""The only reader of environment variables. One that is empty, or blank, counts as unset everywhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from vexact.attention import check_attention


@dataclass(frozen=True, slots=True)
class TorchrunRank:
    """What torchrun says of this process, and where rank 0's rendezvous is."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    attempt: int  # how often torchrun has started the run anew
    has_agent: bool = False  # torchrun itself, not a launcher that sets its variables


# What grader processes get to see of the environment: how to find programs, files and packages, and no secret.
GRADER_VARIABLES = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "PYTHONUTF8", "PYTHONNOUSERSITE", "VIRTUAL_ENV", "CONDA_PREFIX"),
    *("LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "NLTK_DATA", "HF_HOME", "HF_HUB_OFFLINE"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM"),
)
ATTENTION_VARIABLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "actor_rollout_ref.rollout.attn_impl": ("INFER_FA_IMPL",),
        "actor_rollout_ref.actor.attn_implementation": (
            "VEOMNI_ATTN_IMPLEMENTATION",
            "VEOMNI_ATTN_IMPL",
            "ATTN_IMPL",
        ),
    }
)
RAY_AUTH_MODES = ("token", "disabled")
# What a worker on another node gets of the driver's environment: settings of libraries, and nothing of the machine.
WORKER_PREFIXES = ("VEXACT_", "NCCL_", "GLOO_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "CUBLAS_", "OMP_")
WANDB_MODES = ("online", "offline", "disabled", "shared")


def attention_overrides(environ: Mapping[str, str] = os.environ) -> list[str]:
    """INFER_FA_IMPL and VEOMNI_ATTN_IMPLEMENTATION, in any of its spellings, as configuration overrides.

    Raises:
        ValueError: one of them names something unknown or unusable, or two spellings disagree.
    """
    overrides = []
    for key, variables in ATTENTION_VARIABLES.items():
        given = {variable: _get(environ, variable) for variable in variables if _get(environ, variable)}
        if len(set(given.values())) > 1:
            both = " and ".join(f"{variable}={name}" for variable, name in given.items())
            raise ValueError(f"{both} are one setting with two values; unset one of them")
        for variable, name in list(given.items())[:1]:
            check_attention(name, variable)
            overrides.append(f"{key}={name}")
    return overrides


def path_overrides(environ: Mapping[str, str] = os.environ) -> list[str]:
    """model_dir, train_path and test_path, which the getting-started script takes, as configuration overrides.

    Raises:
        ValueError: train_path or test_path is set without model_dir, whose tokenizer and templates they belong to.
    """
    model, train, test = (_get(environ, name, strip=False) for name in ("model_dir", "train_path", "test_path"))
    if not model:
        if train or test:
            raise ValueError(
                "train_path or test_path is set, model_dir is not: set model_dir to a Hugging Face checkpoint directory"
            )
        return []
    keys = {"actor_rollout_ref.model.path": model, "data.train_files": train, "data.val_files": test}
    return [f"{key}={_as_override(value)}" for key, value in keys.items() if value]


def wandb_mode(environ: Mapping[str, str] = os.environ) -> str:
    """WANDB_MODE when set; else online with an API key in the environment and offline without: never a prompt.

    Raises:
        ValueError: WANDB_MODE is not one of W&B's modes.
    """
    mode = _get(environ, "WANDB_MODE")
    if not mode:
        return "online" if _get(environ, "WANDB_API_KEY") else "offline"
    if mode not in WANDB_MODES:
        raise ValueError(f"WANDB_MODE={mode}: must be one of {', '.join(WANDB_MODES)}")
    return mode


def has_wandb_key(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment holds an API key of W&B."""
    return bool(_get(environ, "WANDB_API_KEY"))


def tidy_wandb(environ: MutableMapping[str, str] = os.environ) -> None:
    """Unsets W&B's variables that are blank and trims the others: W&B reads them itself, and stops at an empty one."""
    for name in [name for name in environ if name.startswith("WANDB_")]:
        value = _get(environ, name)
        if not value:
            del environ[name]
        elif value != environ[name]:
            environ[name] = value


def ray_auth_mode(environ: Mapping[str, str] = os.environ) -> str:
    """RAY_AUTH_MODE, empty when unset; Ray reads it itself."""
    return _get(environ, "RAY_AUTH_MODE")


def ray_address(environ: Mapping[str, str] = os.environ) -> str:
    """RAY_ADDRESS, the cluster to join, empty when unset; a job of `ray job submit` has it."""
    return _get(environ, "RAY_ADDRESS")


def set_ray_defaults(environ: MutableMapping[str, str] = os.environ) -> None:
    """What must be in the environment before Ray is imported, unless the user decided otherwise.

    Nothing is reported to Ray's makers, and a process without a GPU of its own does not lose sight of all of them.
    """
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):  # Ray takes an empty one for a value
        if name in environ and not _get(environ, name):
            del environ[name]
    environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def set_ray_token(token: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Gives a Ray cluster of this process a token of its own, unless the user decided otherwise: Ray, which asks for
    one by default, would put it into the home directory."""
    names = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if _get(environ, "RAY_AUTH_MODE") in ("", "token") and not any(_get(environ, name) for name in names):
        environ["RAY_AUTH_TOKEN"] = token


def unset_ray_token(token: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Undoes ``set_ray_token``."""
    if environ.get("RAY_AUTH_TOKEN") == token:
        del environ["RAY_AUTH_TOKEN"]


@contextmanager
def ray_run(mark: str, environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """What is started inside has VEXACT_RAY_RUN in its environment, and is found by it."""
    environ["VEXACT_RAY_RUN"] = mark
    try:
        yield
    finally:
        del environ["VEXACT_RAY_RUN"]


def worker_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of this process that its workers on other nodes need as well."""
    return {name: value for name, value in environ.items() if name.startswith(WORKER_PREFIXES)}


def torchrun_rank(environ: Mapping[str, str] = os.environ) -> TorchrunRank | None:
    """This process among those that torchrun, or a launcher that sets its variables, started; None for a lone one.

    Raises:
        ValueError: RANK and WORLD_SIZE are there and another variable is not, or one is no number.
    """
    if not (_get(environ, "RANK") and _get(environ, "WORLD_SIZE")):
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: _get(environ, name) for name in names}
    missing = [name for name in names if not given[name]]
    if missing:
        raise ValueError(
            f"RANK={given['RANK']} and WORLD_SIZE={given['WORLD_SIZE']} are set as torchrun does, but not "
            f"{', '.join(missing)}; set what is missing, or unset RANK and WORLD_SIZE to start without torchrun"
        )
    wrong = [f"{name}={text}" for name, text in given.items() if name != "MASTER_ADDR" and not text.isdecimal()]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: must be a whole number, as torchrun sets it")
    rank, world_size = int(given["RANK"]), int(given["WORLD_SIZE"])
    if rank >= world_size:
        raise ValueError(f"RANK={rank} must be below WORLD_SIZE={world_size}")
    attempt = _get(environ, "TORCHELASTIC_RESTART_COUNT")
    return TorchrunRank(
        rank,
        world_size,
        int(given["LOCAL_RANK"]),
        given["MASTER_ADDR"],
        int(given["MASTER_PORT"]),
        int(attempt) if attempt.isdecimal() else 0,
        bool(_get(environ, "TORCHELASTIC_RUN_ID")),
    )


def master_addr(environ: Mapping[str, str] = os.environ) -> str:
    """MASTER_ADDR, where torchrun's ranks meet, empty when unset."""
    return _get(environ, "MASTER_ADDR")


def omp_settings(environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """OMP_NUM_THREADS and OMP_WAIT_POLICY, empty when unset."""
    return _get(environ, "OMP_NUM_THREADS"), _get(environ, "OMP_WAIT_POLICY")


def set_process_defaults(environ: MutableMapping[str, str] = os.environ) -> None:
    """What must be in the environment before torch is imported, unless the user decided otherwise.

    OpenMP threads that spin while they wait make a step ten times slower as soon as anything else runs on the machine.
    """
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        if name in environ and not _get(environ, name):
            del environ[name]
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def grader_environment(further: Iterable[str] = (), environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The whole environment of a grader process: ``GRADER_VARIABLES`` and those the user names in addition.

    Raises:
        ValueError: one of the latter is not set.
    """
    for name in further:
        if name not in environ:
            raise ValueError(f"reward.sandbox.env names {name}, which is not set; set it or leave it out")
    names = {*GRADER_VARIABLES, *further}
    return {"OMP_NUM_THREADS": "1", **{name: environ[name] for name in sorted(names) if name in environ}}


def set_scratch(folder: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Make ``folder`` the place of temporary files for this process and all it starts."""
    environ.update(TMPDIR=folder, TEMP=folder, TMP=folder, PYTHONDONTWRITEBYTECODE="1")


def api_key(environ: Mapping[str, str] = os.environ) -> str | None:
    """VEXACT_API_KEY, which requests to a server must show; None when unset."""
    return _get(environ, "VEXACT_API_KEY") or None


def debug(environ: Mapping[str, str] = os.environ) -> bool:
    """VEXACT_DEBUG: show tracebacks of user errors."""
    return _get(environ, "VEXACT_DEBUG") not in ("", "0")


def cache_dir(environ: Mapping[str, str] = os.environ) -> str:
    """Where prepared models and data go by default: VEXACT_CACHE, XDG_CACHE_HOME/vexact or ~/.cache/vexact."""
    base = _get(environ, "XDG_CACHE_HOME", strip=False) or os.path.join(os.path.expanduser("~"), ".cache")
    return _get(environ, "VEXACT_CACHE", strip=False) or os.path.join(base, "vexact")


def _get(environ: Mapping[str, str], name: str, strip: bool = True) -> str:
    """A variable, "" when it is unset or blank; a path keeps its spaces."""
    value = environ.get(name, "")
    return value.strip() if strip or not value.strip() else value


def _as_override(value: str) -> str:
    """The value so that an override gives it back: one that starts with a quote is quoted."""
    if not value.startswith(("'", '"')):
        return value
    escaped = value.replace("'", "\\'")
    return f"'{escaped}'"
