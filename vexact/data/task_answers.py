"""How each reasoning-gym task reads an answer, and so what an answer may be before the task's scorer sees it.

Some scorers hand the answer to ``eval`` or to sympy's parser, which evaluates: whatever the model writes would run.
The table was made by reading every scorer; ``vexact.reward.graders.answer_text`` holds answers to it, and the gate
beside it refuses every evaluation that the table did not foresee: a newer release of the library cannot bring one in.
"""

from __future__ import annotations

from typing import Literal

AnswerKind = Literal["text", "finite", "number", "complex", "moves", "literal", "arithmetic", "expression"]

_KINDS: dict[AnswerKind, str] = {
    "text": """
        ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation
        bitwise_arithmetic boxnet caesar_cipher calendar_arithmetic chain_sum circuit_logic codeio color_cube_rotation
        count_bits count_primes course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery
        family_relationships figlet_font fraction_simplification futoshiki game_of_life game_of_life_halting gcd
        graph_color group_anagrams gsm_symbolic isomorphic_strings jugs kakurasu knight_swap knights_knaves
        largest_island lcm leg_counting letter_counting letter_jumble list_functions mahjong_puzzle manipulate_matrix
        maze mini_sudoku modulo_grid needle_haystack number_filtering number_format number_sequence
        palindrome_generation palindrome_partitioning path_star polynomial_equations pool_matrix power_function
        prime_factorization products propositional_logic quantum_lock ransom_note rearc rectangle_count rotate_matrix
        rotten_oranges self_reference sentence_reordering shortest_path simple_equations simple_geometry sokoban
        spell_backward string_manipulation string_splitting string_synthesis sudoku survo syllogism time_intervals
        tower_of_hanoi tsumego word_ladder word_sequence_reversal word_sorting zebra_puzzles
    """,  # compared, or read by int, float, Decimal, json and the like
    "finite": "number_sorting",  # as text; a NaN in the list compares as if it were any number
    "number": "coin_flip",  # a number or fraction; Fraction("1e999999999") would not end
    "complex": "complex_arithmetic",  # a NaN has the distance NaN, which scores full marks
    "moves": "rubiks_cube rush_hour",  # moves with a count, each of which is carried out
    "literal": "binary_matrix n_queens spiral_matrix string_insertion",  # eval, meant for a list
    "arithmetic": "countdown puzzle24",  # sympy's parser, meant for + - * / and brackets
    "expression": "intermediate_integration polynomial_multiplication simple_integration",  # sympy's parser
}
ANSWER_KINDS: dict[str, AnswerKind] = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_REFUSED = {"composite": "it hands answers to scorers of other tasks; give those tasks as data sources of their own"}


def answer_kind(task: str) -> AnswerKind:
    """What an answer to ``task`` may be.

    Raises:
        ValueError: nobody has read how the task's scorer reads answers, or it cannot be held to anything.
    """
    if task in ANSWER_KINDS:
        return ANSWER_KINDS[task]
    reason = _REFUSED.get(task, "how its scorer reads answers is not known here, and some scorers execute them")
    raise ValueError(
        f"reasoning-gym task {task!r} is refused: {reason}. A reward.custom_reward_function of your own can grade it"
    )
