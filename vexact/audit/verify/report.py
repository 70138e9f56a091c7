"""What verify found: an aligned table for people, JSON for programs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vexact.audit.verify.bits import BitTally
from vexact.audit.verify.native import LEAST_ARGMAX, LEAST_COSINE, Native, NativeComparisons
from vexact.audit.verify.native_table import native_lines, percent, problems

if TYPE_CHECKING:
    from vexact.audit.verify.run import VerifyOptions


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of one verification."""

    options: VerifyOptions
    architecture: str
    rollout: Literal["engine", "model"]  # ours, or the converted model with its own key cache
    num_parameters: int
    environment: dict[str, object]
    bits: BitTally
    scheduling: dict[str, float]
    native: NativeComparisons
    seconds: float

    @property
    def passed(self) -> bool:
        """Every bit equal, every number finite, every parameter with a gradient. Closeness has no threshold."""
        return self.bits.exact and self.native.same.gradients.usable

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        tally = {f.name: getattr(self.bits, f.name) for f in dataclasses.fields(self.bits)}
        unmatched = sorted(tally.pop("unmatched"))
        for name in ("first_logprob", "first_logit", "first_draw", "first_route"):
            tally[name] = dataclasses.asdict(tally[name]) if tally[name] is not None else None
        return {
            "passed": self.passed,
            "options": dataclasses.asdict(self.options) | {"model_path": str(self.options.model_path)},
            "architecture": self.architecture,
            "rollout": self.rollout,
            "num_parameters": self.num_parameters,
            "environment": self.environment,
            "seconds": self.seconds,
            "bits": tally | {"exact": self.bits.exact, "tokens_matched": self.bits.tokens - len(unmatched)},
            "scheduling": self.scheduling,
            "agrees_with_transformers": {
                "agrees": self.native.agrees,
                "argmax": self.native.argmax,
                "argmax_at_least": LEAST_ARGMAX,
                "gradient_cosine": self.native.cosine,
                "gradient_cosine_at_least": LEAST_COSINE,
            },
            "native": _native_dict(self.native.same),
            "native_float32": _native_dict(self.native.float32),
            "yardstick": _native_dict(self.native.yardstick),
        }

    def table(self) -> str:
        """Aligned lines, the verdict last."""
        rows = [*self._head(), *self._bit_rows()]
        width = max(len(name) for name, value in rows if value)
        lines = [f"{name:<{width}}  {value}".rstrip() for name, value in rows]
        return "\n".join([*lines, *native_lines(self.native, self.options.dtype), self.verdict()])

    def _head(self) -> list[tuple[str, str]]:
        o = self.options
        return [
            ("model", f"{o.model_path}: {self.architecture}, {self.num_parameters / 1e6:.4g} M parameters"),
            ("run on", f"{self.environment['device']}, {o.dtype}, {self.seconds:.0f} s, seed {o.seed}"),
            ("training side", f"{o.model_backend}, {o.attn_impl}, {self._layout()}, {self._head_kind()}"),
            ("rollout", self._rollout()),
        ]

    def _rollout(self) -> str:
        rounds = f"{self.scheduling['rounds']:.0f}"
        if self.rollout == "model":
            return f"the same model from its key cache, {rounds} lengths of prompt pieces (our engine does not run it)"
        return (
            f"{rounds} engines with random settings, {self.scheduling['preemptions']:.0f} preemptions, "
            f"{self.scheduling['rounds_with_prefix_hits']:.0f} with prefix cache hits"
        )

    def _layout(self) -> str:
        return "packed" if self.options.use_remove_padding else "padded"

    def _head_kind(self) -> str:
        return "fused head" if self.options.use_fused_lce else "plain head"

    def _bit_rows(self) -> list[tuple[str, str]]:
        b = self.bits
        matched = b.tokens - len(b.unmatched)
        rows = [
            ("", ""),
            ("(a) rollout = training, bit for bit", ""),
            ("    tokens matched", f"{matched} / {b.tokens} ({percent(matched, b.tokens)})"),
            (
                "    log-probs different",
                f"{b.logprobs_different} / {b.logprobs_compared}, max |diff| {b.max_abs_logprob_diff:.3g}, "
                f"{b.max_ulp} ulp",
            ),
            (
                "    logits different",
                f"{b.logits_different} / {b.logits_compared}, max |diff| {b.max_abs_logit_diff:.3g}",
            ),
        ]
        rows.append(
            ("    draws different", f"{b.draws_different} / {b.draws_repeated} drawn again from training logits")
        )
        if b.routes_compared or b.routes_missing:
            rows.append(("    routes different", _routes(b)))
        if b.non_finite:
            rows.append(("    non-finite log-probs", str(b.non_finite)))
        for name, first in (("log-prob", b.first_logprob), ("logit", b.first_logit)):
            if first is not None:
                where = f"request {first.request_id}, response position {first.position}, token {first.token_id}"
                values = f"rollout {first.rollout!r}, training {first.trainer!r}"
                rows.append((f"    first different {name}", f"{where}: {values}"))
        if b.first_draw is not None:
            first_draw = b.first_draw
            where = f"request {first_draw.request_id}, response position {first_draw.position}"
            rows.append(
                ("    first different draw", f"{where}: sampled {first_draw.sampled}, drawn again {first_draw.redrawn}")
            )
        if b.first_route is not None:
            rows.append(("    first different route", b.first_route.describe()))
        return rows

    def verdict(self) -> str:
        """One line: what was proven, or what was not."""
        if self.passed:
            return f"EXACT: all {self.bits.tokens} tokens have the same bits on both sides"
        if not self.bits.exact:
            hint = ""
            if self.options.attn_impl != "triton-invariant":
                hint = " (expected: only triton-invariant is the attention of the rollout)"
            return f"NOT EXACT: {len(self.bits.unmatched)} of {self.bits.tokens} tokens differ{hint}"
        return f"EXACT, but the gradients are unusable: {problems(self.native.same.gradients)}"


def _routes(b: BitTally) -> str:
    """Of a model with experts."""
    if not b.routes_compared:
        return "not compared: the training side does not say which experts it chose"
    missing = f", {b.routes_missing} not compared" if b.routes_missing else ""
    return f"{b.routes_different} / {b.routes_compared} rows went to other experts in some layer{missing}"


def _native_dict(native: Native | None) -> dict[str, Any] | None:
    if native is None:
        return None
    closeness = dataclasses.asdict(native.closeness) | {"argmax_agreement": native.closeness.argmax_agreement}
    return {"closeness": closeness, "gradients": dataclasses.asdict(native.gradients)}
