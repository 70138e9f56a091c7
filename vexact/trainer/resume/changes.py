"""What differs between the run that saved a checkpoint and the one that would go on from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vexact.config.fields import flatten
from vexact.trainer.resume.settings import COVERED, is_one_of

Identity = dict[str, Any]
_ABSENT = "absent"


def breaking_changes(saved: Identity, now: Identity) -> list[str]:
    """What makes the next steps other ones than an uninterrupted run's, one line each. Sections that only one of the
    two has are not compared."""
    return [
        *_settings(saved, now),
        *_data(saved, now),
        *_model(saved, now),
        *_tokenizer(saved, now),
        *_reward(saved, now),
    ]


def environment_changes(saved: Identity, now: Identity) -> list[str]:
    """Versions and devices that differ; whether they compute other bits is not known."""
    return list(_differences(_part(saved, "environment"), _part(now, "environment")))


def _settings(saved: Identity, now: Identity) -> Iterator[str]:
    """A key that only one side states was added by a version or belongs to one that is switched off."""
    before, after = _part(saved, "settings"), _part(now, "settings")
    common = [key for key in after if key in before]
    yield from _differences({key: before[key] for key in common}, {key: after[key] for key in common})


def _data(saved: Identity, now: Identity) -> Iterator[str]:
    before, after = _part(saved, "data"), _part(now, "data")
    if not before or not after:
        return
    if before.get("rows") != after["rows"]:
        if before.get("num_rows") != after["num_rows"]:
            what = f"{after['num_rows']} (were {before.get('num_rows')})"
        elif before.get("rows_in_any_order") == after["rows_in_any_order"]:
            what = "in another order"
        else:
            what = "as many, with other content"
        files = [name for name, digest in after["files"].items() if before.get("files", {}).get(name, digest) != digest]
        yield f"training rows: {what}{f'; changed on disk: {_list(files)}' if files else ''}{_keys(saved, now, 'rows')}"
    elif before.get("token_ids") != after["token_ids"]:
        keys = _keys(saved, now, "rows") + _keys(saved, now, "tokenizer")
        yield f"training prompts: the same rows have other token ids{keys}"


def _model(saved: Identity, now: Identity) -> Iterator[str]:
    before, after = _part(saved, "model"), _part(now, "model")
    if not before or not after:
        return
    for line in _differences(before.get("config", {}), after["config"]):
        yield f"model: config.json {line}"
    if "weights" in after and before.get("weights", after["weights"]) != after["weights"]:
        yield f"model: the weights that training began from are others{_keys(saved, now, 'model')}"


def _tokenizer(saved: Identity, now: Identity) -> Iterator[str]:
    before, after = _part(saved, "tokenizer"), _part(now, "tokenizer")
    if not before or not after:
        return
    names = {"files": "its files", "chat_template": "the chat template", "vocabulary": "the vocabulary"}
    changed = [names.get(key, "the special tokens") for key in after if before.get(key) != after[key]]
    if changed:
        yield f"tokenizer: {_list(changed)} changed{_keys(saved, now, 'tokenizer')}"


def _reward(saved: Identity, now: Identity) -> Iterator[str]:
    before, after = _part(saved, "reward"), _part(now, "reward")
    if before and after and before != after:
        names = {"file": "its file", "kwargs": "its reward_kwargs", "function": "the function"}
        changed = [names[key] for key in names if before.get(key) != after.get(key)]
        yield f"reward: {_list(changed)} changed{_keys(saved, now, 'reward')}"


def _keys(saved: Identity, now: Identity, topic: str) -> str:
    """The keys that changed among those that decide ``topic``, in brackets."""
    before, after = flatten(_part(saved, "config")), flatten(_part(now, "config"))
    every = [key for key in {**before, **after} if is_one_of(key, COVERED[topic])]
    lines = list(_differences({k: before.get(k) for k in every}, {k: after.get(k) for k in every}))
    return f" [{_list(lines)}]" if lines else ""


def _differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """``key=value (was value)`` of every key that differs."""
    old, new = flatten(before), flatten(after)
    for key in {**old, **new}:
        was, is_now = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if was != is_now:
            yield f"{key}={_short(is_now)} (was {_short(was)})"


def _part(identity: Identity, name: str) -> dict[str, Any]:
    part = identity.get(name)
    return part if isinstance(part, dict) else {}


def _list(parts: list[str]) -> str:
    return ", ".join(parts)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
