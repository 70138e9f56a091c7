"""The dataset the driver reads: tokenised prompts by row index."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vexact.data.rows import ColumnNames, Row
from vexact.data.sources import load_rows
from vexact.data.template import (
    PromptFormat,
    plain_row,
    tokenize,
    truncate,
    warn_of_ended_prompts,
    warn_of_unknown_text,
)
from vexact.types import Prompt

log = logging.getLogger(__name__)


class PromptDataset:
    """Tokenised prompts, all checked at construction: ``dataset[i].row == i``.

    ``num_filtered`` counts the prompts that ``filter_overlong_prompts`` removed.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Any, form: PromptFormat | None = None) -> None:
        """Tokenise and apply the length limit.

        Args:
            rows: parsed rows.
            tokenizer: a ``transformers`` tokenizer.
            form: template and length settings.

        Raises:
            ValueError: a prompt is too long (``truncation="error"``), every prompt is, or one cannot be formatted.
        """
        if not rows:
            raise ValueError("the dataset has no rows; set data.train_files and data.val_files to files with rows")
        form = form or PromptFormat()
        rows = [plain_row(row, number) for number, row in enumerate(rows)]
        all_ids = tokenize(rows, tokenizer, form)
        warn_of_unknown_text(rows, all_ids, tokenizer)
        warn_of_ended_prompts(rows, all_ids, tokenizer)
        self._prompts: list[Prompt] = []
        cut: list[Row] = []
        for row, ids in zip(rows, all_ids):
            limited = _limit(row.where, ids, form)
            if limited is not None:
                self._prompts.append(_prompt(len(self._prompts), row, limited))
                cut += [row] if len(limited) < len(ids) else []
        self.num_filtered = len(rows) - len(self._prompts)
        _report_filter(self.num_filtered, len(rows), form, all_ids)
        _report_cut(cut, len(rows), form)

    @classmethod
    def from_files(
        cls,
        files: str | Path | Sequence[str | Path],
        tokenizer: Any,
        *,
        columns: ColumnNames | None = None,
        form: PromptFormat | None = None,
        max_samples: int = -1,
        custom_reward: bool = False,
    ) -> PromptDataset:
        """Read ``files`` (see ``load_rows``) and tokenise them. Raises ValueError as both parts do."""
        return cls(load_rows(files, columns, max_samples, custom_reward=custom_reward), tokenizer, form)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, row: int) -> Prompt:
        return self._prompts[row]


def _prompt(index: int, row: Row, ids: list[int]) -> Prompt:
    return Prompt(index, tuple(ids), row.text, row.data_source, row.ground_truth, row.extra_info)


def _limit(where: str, ids: list[int], form: PromptFormat) -> list[int] | None:
    """``ids`` within the limit, or None for a prompt to leave out."""
    if len(ids) <= form.max_prompt_length:
        return ids
    if form.filter_overlong_prompts:
        return None
    if form.truncation == "error":
        raise ValueError(
            f"{where}: the prompt has {len(ids)} tokens, more than "
            f"data.max_prompt_length={form.max_prompt_length}; "
            "raise data.max_prompt_length, or set data.filter_overlong_prompts=true to leave such rows out, "
            "or data.truncation=left|right|middle to cut them"
        )
    return truncate(ids, form.max_prompt_length, form.truncation)


def _report_filter(dropped: int, total: int, form: PromptFormat, all_ids: list[list[int]]) -> None:
    if dropped == total:
        shortest = min(map(len, all_ids))
        raise ValueError(
            f"all {total} prompts are longer than data.max_prompt_length={form.max_prompt_length} "
            f"(the shortest has {shortest} tokens); raise data.max_prompt_length"
        )
    if dropped:
        log.warning("left out %d of %d prompts longer than %d tokens", dropped, total, form.max_prompt_length)


def _report_cut(cut: Sequence[Row], total: int, form: PromptFormat) -> None:
    if cut:
        log.warning(
            "cut %d of %d prompts to data.max_prompt_length=%d tokens (data.truncation=%s), the first of them %s",
            *(len(cut), total, form.max_prompt_length, form.truncation, cut[0].where),
        )
