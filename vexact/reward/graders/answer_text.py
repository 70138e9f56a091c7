"""Answers held to what a task's scorer can read without executing anything."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from vexact.data.task_answers import AnswerKind

UNREADABLE = "?"  # every scorer gives it what it gives to an answer it cannot read
FUNCTIONS = frozenset(
    (
        *("exp", "log", "ln", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot"),
        *("sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "Abs"),
    )
)
_MAX_LENGTH, _MAX_EXPONENT, _MAX_DEPTH = 2000, 100, 60
_NUMBER = re.compile(r"[-+]?\d{1,50}(\.\d{0,50})?([eE][-+]?\d{1,3})?(/\d{1,50})?|[-+]?\.\d{1,50}")
_COMPLEX = re.compile(r"[-+0-9.eEijIJ() ]{1,200}")
_ARITHMETIC = re.compile(r"[-+*/(). \t0-9]{1,500}")
_EXPRESSION = re.compile(r"[-+*/(). \tA-Za-z0-9]{1,2000}")
_LONG_NUMBER = re.compile(r"\d{31}")
_LONG_COUNT = re.compile(r"\d{4}")
_NOT_FINITE = re.compile(r"nan|inf", re.IGNORECASE)


def readable(kind: AnswerKind, answer: str, entry: Mapping[str, Any]) -> str:
    """What the scorer gets for ``answer``: the same text, the same value written plainly, or ``UNREADABLE``.

    Args:
        kind: what the task's scorer reads.
        entry: the task's entry; an answer that equals one of its own is let through.
    """
    if answer.strip() == str(entry.get("answer")).strip():
        return answer
    match kind:
        case "text":
            fine = True
        case "finite":
            fine = not _NOT_FINITE.search(answer)
        case "number":
            fine = _NUMBER.fullmatch(answer.replace(",", "").strip()) is not None
        case "complex":
            fine = _COMPLEX.fullmatch(answer) is not None
        case "moves":
            fine = not _LONG_COUNT.search(answer)
        case "literal":
            return answer if answer in entry["metadata"].get("valid_answers", ()) else _literal(answer)
        case "arithmetic":
            fine = _ARITHMETIC.fullmatch(answer) is not None and "**" not in answer and not _LONG_NUMBER.search(answer)
        case "expression":
            fine = _is_expression(answer, frozenset(re.findall("[A-Za-z]+", str(entry.get("answer")))))
    return answer if fine else UNREADABLE


def _literal(answer: str) -> str:
    """The list, string or number that ``answer`` writes out, written by Python."""
    if len(answer) > _MAX_LENGTH:
        return UNREADABLE
    try:
        return repr(ast.literal_eval(answer))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return UNREADABLE


def _is_expression(answer: str, names: frozenset[str]) -> bool:
    """Whether it is a formula of numbers, variables, + - * / ** and known functions, with bounded powers."""
    if not _EXPRESSION.fullmatch(answer) or _LONG_NUMBER.search(answer) or answer.count("(") > _MAX_DEPTH:
        return False
    try:
        return _is_formula(ast.parse(answer.strip(), mode="eval").body, names)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def _is_formula(node: ast.expr, names: frozenset[str]) -> bool:
    match node:
        case ast.Constant(value=int() | float()):
            return not isinstance(node.value, bool)
        case ast.Name(id=name):
            return len(name) == 1 or name == "pi" or name in names - FUNCTIONS
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _is_formula(operand, names)
        case ast.BinOp(op=ast.Pow(), left=left, right=right):
            return _is_formula(left, names) and _is_formula(right, names) and _is_bounded(left, right)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), left=left, right=right):
            return _is_formula(left, names) and _is_formula(right, names)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
            return name in FUNCTIONS and _is_formula(argument, names)
    return False


def _is_bounded(base: ast.expr, exponent: ast.expr) -> bool:
    """A number as exponent is small; a power of numbers is not a tower."""
    if any(isinstance(each, ast.Name) for each in ast.walk(exponent)):
        return True
    if any(isinstance(each, ast.Pow) for each in ast.walk(exponent)):
        return False
    value = _value(exponent)
    return value is not None and abs(value) <= _MAX_EXPONENT and (_has_name(base) or not _has_power(base))


def _has_name(node: ast.expr) -> bool:
    return any(isinstance(each, ast.Name) for each in ast.walk(node))


def _has_power(node: ast.expr) -> bool:
    return any(isinstance(each, ast.Pow) for each in ast.walk(node))


def _value(node: ast.expr) -> Fraction | None:
    match node:
        case ast.Constant(value=int() | float() as value):
            return Fraction(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _value(operand)
            return None if inner is None else -inner
        case ast.BinOp(op=operation, left=left, right=right):
            a, b = _value(left), _value(right)
            if a is None or b is None:
                return None
            match operation:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div() if b:
                    return a / b
    return None
