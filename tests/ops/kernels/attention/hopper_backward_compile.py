"""Compiles the warp-specialised backward for sm_90, without a GPU, and prints one JSON line per binary.

Run as a script in a process without TRITON_INTERPRET: hopper_backward_compile.py [WALK ...]; a walk is a kernel, two
head dimensions and the fields of `backward.Walk`, as in keys,128,128,64,4,1,240,24. Those of the tables if omitted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from hopper_compile import Case, compile_case

from vexact.ops.kernels.attention.hopper.backward import host
from vexact.ops.kernels.attention.hopper.backward.host import KEYS, QUERIES, ROWS, Heads, Walk
from vexact.ops.kernels.attention.launch import key_columns


def case_of(kind: str, heads: Heads, walk: Walk) -> Case:
    dim, value_dim = heads
    first, rest = key_columns(*heads)
    q_height, k_height = (ROWS, walk.block) if kind == "queries" else (walk.block, ROWS)
    boxes = {"q_desc": (q_height, first), "k_desc": (k_height, first)}
    boxes |= {"q_rest_desc": (q_height, rest), "k_rest_desc": (k_height, rest)} if rest else {}
    boxes |= {"v_desc": (k_height, value_dim), "do_desc": (q_height, value_dim)}
    constants = {"GROUP": 2, "D": dim, "DV": value_dim, "CAUSAL": True}
    constants |= {"STEP_Q": dim, "STEP_K": dim, "STEP_V": value_dim, **walk.constants}
    constants |= {} if rest else {"q_rest_desc": None, "k_rest_desc": None}
    constants |= {"NUM_HEADS": 16} if kind == "queries" else {"KV_HEADS": 8}
    return f"{kind} {dim}", getattr(host, f"{kind}_kernel"), boxes, constants


def cases() -> Iterator[Case]:
    for text in sys.argv[1:]:
        kind, *numbers = text.split(",")
        dim, value_dim, block, stages, ahead, *registers = map(int, numbers)
        yield case_of(kind, (dim, value_dim), Walk(block, stages, bool(ahead), *registers))
    if not sys.argv[1:]:
        for kind, table in (("queries", QUERIES), ("keys", KEYS)):
            for heads, walk in table.items():
                yield case_of(kind, heads, walk)


def main() -> None:
    for case in cases():
        sys.stdout.write(json.dumps(compile_case(case)) + "\n")


if __name__ == "__main__":
    main()
