"""Rows from files or procedural tasks, tokenised into prompts, in an order that depends on (seed, cursor) alone."""

from vexact.data.dataset import PromptDataset
from vexact.data.order import DataOrder
from vexact.data.rows import ColumnNames, Row
from vexact.data.sources import load_rows
from vexact.data.template import PromptFormat

__all__ = ["ColumnNames", "DataOrder", "PromptDataset", "PromptFormat", "Row", "load_rows"]
