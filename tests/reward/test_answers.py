"""Model-written answers are read, not executed, whatever the task's scorer does with text."""

import builtins
import colorsys
import importlib
import os
import pickle
import time

import pytest

from vexact.data import load_rows
from vexact.data.task_answers import ANSWER_KINDS, answer_kind
from vexact.reward.graders import compute_score, procedural
from vexact.reward.graders.answer_text import UNREADABLE, readable
from vexact.reward.graders.gate import RefusedEvaluation, evaluation_gate
from vexact.reward.pool import RewardPool
from vexact.reward.spec import GradeRequest, RewardError

EVALUATED = sorted(name for name, kind in ANSWER_KINDS.items() if kind in ("literal", "arithmetic", "expression"))
MARK = "vexact_test_was_executed"
SET_MARK = f"__import__('builtins').__dict__.update({MARK}=1)"
ATTACKS = [
    SET_MARK,
    f"[{SET_MARK}]",
    f"[1, {SET_MARK}, 2]",
    f"1+{SET_MARK}",
    f"sin({SET_MARK})",
    f"[x for x in [{SET_MARK}]]",
    f"(lambda: {SET_MARK})()",
    f"x if {SET_MARK} else x",
    f'f"{{{SET_MARK}}}"',
    f"().__class__.__base__.__subclasses__() or {SET_MARK}",
    f'S("{SET_MARK}")',
    f"sympify('{SET_MARK.replace(chr(39), chr(34))}')",
    f"N('{SET_MARK.replace(chr(39), chr(34))}')",
    f"Symbol('x').__class__.__init__.__globals__['__builtins__']['{MARK}']",
    f'exec("import builtins; builtins.{MARK} = 1")',
    f"(y := {SET_MARK})",
    f"*[{SET_MARK}],",
    f"Integer(1)\n{SET_MARK}",
    f'𝓮xec("{SET_MARK}")',  # Python reads it as exec
]


def row_of(task):
    return load_rows(f"reasoning_gym:{task}?size=1&seed=4")[0]


def score_of(row, answer):
    return compute_score(row.data_source, f"<answer>{answer}</answer>", row.ground_truth, row.extra_info)["score"]


@pytest.mark.parametrize("task", [*EVALUATED, "number_sorting", "bitwise_arithmetic", "coin_flip", "jugs", "codeio"])
def test_nothing_in_an_answer_is_executed(task):
    row = row_of(task)
    for attack in ATTACKS:
        assert score_of(row, attack) <= 0.05
        assert not hasattr(builtins, MARK), attack


@pytest.mark.parametrize("task", EVALUATED)
@pytest.mark.parametrize("attack", [SET_MARK, f"[{SET_MARK}]", f"sin({SET_MARK})"])
def test_the_gate_alone_keeps_it_out(task, attack, monkeypatch):
    """As if a newer release of the library evaluated what the table says it only compares."""
    monkeypatch.setattr(procedural, "readable", lambda kind, answer, entry: answer)
    assert score_of(row_of(task), attack) <= 0.05
    assert not hasattr(builtins, MARK)


def test_gate_refuses_code_processes_and_pickles_and_passes_formulas_and_imports():
    class Payload:
        def __reduce__(self):
            return os.getcwd, ()

    data = pickle.dumps(Payload())
    refused = [
        lambda: eval("__import__('os')"),
        lambda: exec("x = open"),
        lambda: eval(compile("(lambda: 1)()", "a file.py", "eval")),
        lambda: os.system("true"),
        lambda: os.posix_spawn("/bin/true", ["true"], {}),
        lambda: pickle.loads(data),
    ]
    for attempt in refused:
        with pytest.raises(RefusedEvaluation), evaluation_gate():
            attempt()
        attempt()  # free again outside
    with evaluation_gate():
        assert eval("[1, 2*3]") == [1, 6]
        importlib.reload(colorsys)


@pytest.mark.parametrize(
    ("kind", "answer", "is_read"),
    [
        ("literal", "[['0', '1'], ['1', '0']]", True),
        ("literal", "1, 2, 3", True),
        ("literal", "[" * 500 + "]" * 500, False),
        ("literal", "[9**9**9]", False),
        ("literal", "['a'] * 10**9", False),
        ("literal", "[" + "9" * 5000 + "]", False),
        ("arithmetic", "(3 + 4) * 7 / -2.5", True),
        ("arithmetic", "9**9**9", False),
        ("arithmetic", "9" * 40, False),
        ("arithmetic", "5!", False),
        ("expression", "-3*x**2*sin(2*x)/4 + exp(-x) + sqrt(x + 1) + C", True),
        ("expression", "x**(3/2) + 2**x + (x + 1)**-2", True),
        ("expression", "9**9**9", False),
        ("expression", "((9**99)**99)*x", False),
        ("expression", "x**(10**9)", False),
        ("expression", "x**1000000", False),
        ("expression", "factorial(1000000)", False),
        ("expression", "Integral(x)", False),
        ("expression", "x.free_symbols", False),
        ("expression", "(" * 100 + "x" + ")" * 100, False),
        ("number", "-3/8", True),
        ("number", "1,234.5e2", True),
        ("number", "1e999999999", False),
        ("number", "1/3e9", False),
        ("complex", "(3.5 - 2i)", True),
        ("complex", "nan+nanj", False),
        ("complex", "inf", False),
        ("moves", "R U2 F'", True),
        ("moves", "R999999999", False),
        ("finite", "['1', '2']", True),
        ("finite", "[NaN, NaN]", False),
        ("finite", "[-Infinity]", False),
        ("text", "anything __import__('os')", True),
    ],
)
def test_what_each_kind_reads(kind, answer, is_read):
    read = readable(kind, answer, {"answer": "7", "metadata": {}})
    assert (read != UNREADABLE) == is_read


@pytest.mark.parametrize("task", EVALUATED)
def test_right_answers_keep_full_marks(task):
    for row in load_rows(f"reasoning_gym:{task}?size=5&seed=9"):
        answer = procedural._decode(row.extra_info["entry"])["answer"] or row.ground_truth
        assert score_of(row, answer) == 1.0


def test_an_integral_that_the_library_left_as_it_is_keeps_full_marks():
    rows = load_rows("reasoning_gym:intermediate_integration?size=20&seed=7")
    row = next(row for row in rows if "Integral" in row.ground_truth)
    assert score_of(row, row.ground_truth) == 1.0
    assert score_of(row, row.ground_truth + " + Integral(x, x)") == 0.0, "only as the library wrote it"


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        (r"\int_0^1 x dx", r"\boxed{1/2}"),
        ("1", r"\boxed{\sin^2 x+\cos^2 x}"),
        (r"1\le x<2", r"\boxed{[1,2)}"),
        (r"\tan x", r"\boxed{\frac{\sin x}{\cos x}}"),
        (r"\frac{1}{x}+\frac1y", r"\boxed{\frac{x+y}{xy}}"),
        ("x^5-x-1=0", r"\boxed{x^5=x+1}"),
    ],
)
def test_equal_mathematics_keeps_full_marks(truth, answer):
    """In a process that never computed with polynomials: sympy writes functions for that, and executes them."""
    from sympy.core.cache import clear_cache

    clear_cache()
    assert compute_score("math", answer, truth)["score"] == 1.0


def test_other_forms_keep_the_librarys_partial_marks():
    row = row_of("spiral_matrix")
    assert score_of(row, str([int(each) for each in row.ground_truth.split()])) == 0.1
    row = row_of("string_insertion")
    assert score_of(row, str(list(row.ground_truth))) == 0.1


def test_not_a_number_earns_nothing():
    row = row_of("complex_arithmetic")
    assert score_of(row, "nan + nani") == 0.0
    row = row_of("number_sorting")
    assert score_of(row, str(["NaN"] * row.ground_truth.count(",")).replace("'", "")) == 0.0


def test_every_task_of_the_library_is_known_or_refused():
    from reasoning_gym.factory import DATASETS

    unknown = []
    for task in DATASETS:
        try:
            answer_kind(task)
        except ValueError:
            unknown.append(task)
    assert "composite" in unknown
    assert set(ANSWER_KINDS) - set(DATASETS) == set(), "a task that is gone"


def test_unread_tasks_are_refused_while_reading_rows_and_while_grading(monkeypatch):
    with pytest.raises(ValueError, match=r"reasoning-gym task 'composite' is refused: it hands answers to scorers of"):
        load_rows("reasoning_gym:composite?size=1")
    row = row_of("gcd")
    monkeypatch.delitem(ANSWER_KINDS, "gcd")
    message = r"task 'gcd' is refused: how its scorer reads answers is not known.*custom_reward_function"
    with pytest.raises(ValueError, match=message):
        load_rows("reasoning_gym:gcd?size=1")
    with pytest.raises(ValueError, match=message):
        score_of(row, "4")


def test_an_answer_at_which_a_scorer_fails_is_a_wrong_answer():
    assert score_of(row_of("prime_factorization"), "no idea") == 0.0
    assert score_of(row_of("boxnet"), "[1]") == 0.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<answer>1</answer> <answer> 2 </answer>", "2"),
        ("<answer>1</answer> </answer>", "1"),
        ("<answer>", "<answer>"),
        ("3", "3"),
        ("</answer><answer>", "</answer><answer>"),
        ("<answer>4</answer><answer>", "4"),
    ],
)
def test_the_last_complete_tag_counts(response, answer):
    assert procedural._answer(response) == answer


def test_many_open_tags_take_no_time():
    started = time.process_time()
    procedural._answer("<answer>" * 200_000)
    assert time.process_time() - started < 1.0


BOMBS = [
    "\\boxed{9^{9^{9^{9}}}}",
    "\\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    "\\boxed{99999999!}",
    "\\boxed{\\frac{" * 400 + "1" + "}{2}}" * 400,
    "The answer is 9**9**9**9**9",
    "$" + "9" * 100_000 + "$",
    f"\\boxed{{{SET_MARK}}}",
    f"The answer is {SET_MARK}",
]


def test_mathematics_that_explodes_costs_its_sample(hopeless):
    def ask(*texts):
        return [GradeRequest("math", text, "7") for text in texts]

    hopeless(*BOMBS)
    with RewardPool(2, timeout_s=1.0) as pool:
        scores = pool.score(ask("\\boxed{7}", *BOMBS, "\\boxed{7}", "\\boxed{8}"))
    assert [score.value for score in scores] == [1.0, *[0.0] * len(BOMBS), 1.0, 0.0]
    assert [scores[0].status, scores[-2].status, scores[-1].status] == ["ok"] * 3


def test_numbers_that_explode_cost_nothing():
    long = "9" * 1_000_000
    for source, text in [
        ("gsm8k", f"#### {long}"),
        ("gsm8k", "#### " + "," * 100_000),
        ("gsm8k", "#" * 100_000 + " " * 100_000),
        ("exact_match", long),
    ]:
        started = time.process_time()
        assert compute_score(source, text, "7")["score"] == 0.0
        assert time.process_time() - started < 1.0


def test_a_run_in_which_every_sample_fails_still_says_why():
    row = row_of("gcd")
    with RewardPool(1) as pool, pytest.raises(RewardError, match="task 'composite' is refused"):
        pool.score([GradeRequest("reasoning_gym/composite", "1", "1", row.extra_info)])
