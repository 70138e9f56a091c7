"""A state that is not like the optimizer's own is refused by name, and changes nothing."""

import pytest
import torch
from training_support import assert_same_bits, random_sequences, tiny_actor, weights_of

NAME = "norm.weight"


@pytest.fixture(scope="module")
def trained():
    actor = tiny_actor()
    actor.update(random_sequences(4))
    return actor


def _without(key):
    return lambda state: state.pop(key)


def _with(key, value):
    return lambda state: state.update({key: value(state[key]) if callable(value) else value})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("exp_avg"), rf"state of {NAME} .*: missing exp_avg; unexpected nothing"),
        (_without("exp_avg_sq"), rf"state of {NAME} .*: missing exp_avg_sq;"),
        (_without("num_steps"), rf"state of {NAME} .*: missing num_steps;"),
        (_without("weight"), rf"state of {NAME} .*: missing weight;"),
        (
            lambda state: [state.pop(k) for k in ("exp_avg", "exp_avg_sq", "num_steps")],
            rf"{NAME} .*: missing exp_avg, exp",
        ),
        (_with("max_exp_avg_sq", torch.zeros(1)), rf"state of {NAME} .*: missing nothing; unexpected max_exp_avg_sq"),
        (_with("exp_avg", None), rf"exp_avg of {NAME} is no plain tensor but NoneType"),
        (_with("exp_avg_sq", [0.0]), rf"exp_avg_sq of {NAME} is no plain tensor but list"),
        (_with("exp_avg", lambda t: t.to_sparse()), rf"exp_avg of {NAME} is no plain tensor but a sparse"),
        (_with("exp_avg", lambda t: t.to("meta")), rf"exp_avg of {NAME} is no plain tensor but one on the meta"),
        (_with("exp_avg", lambda t: t[:-1]), rf"exp_avg of {NAME} has shape \(\d+,\), the model has \(\d+,\)"),
        (_with("exp_avg_sq", lambda t: t[None]), rf"exp_avg_sq of {NAME} has shape \(1, \d+\), the model has"),
        (_with("exp_avg", lambda t: t.half()), rf"exp_avg of {NAME} is torch\.float16, the model has torch\.float32"),
        (_with("weight", lambda t: t.double()), rf"weight of {NAME} is torch\.float64, the model has torch\.float32"),
        (_with("exp_avg_sq", lambda t: t.long()), rf"exp_avg_sq of {NAME} is torch\.int64"),
        (_with("exp_avg_sq", lambda t: t - 1), rf"exp_avg_sq of {NAME} has negative values"),
        (_with("exp_avg", lambda t: t / 0), rf"exp_avg of {NAME} holds 32 non-finite numbers of 32"),
        (_with("num_steps", -1.0), rf"num_steps of {NAME} is -1\.0"),
        (_with("num_steps", float("nan")), rf"num_steps of {NAME} is nan"),
        (_with("num_steps", "1"), rf"num_steps of {NAME} is '1'"),
    ],
)
def test_a_parameter_whose_state_is_unlike_it(trained, spoil, message):
    state = trained.state_dict()
    spoil(state["parameters"][NAME])
    actor = tiny_actor(seed=99)
    before = weights_of(actor)
    with pytest.raises(ValueError, match=message):
        actor.load_state_dict(state)
    assert_same_bits(weights_of(actor), before)


def test_a_parameter_that_never_had_a_gradient_keeps_its_place(trained):
    """AdamW begins its state with the first gradient; saved as zeros it goes on the same way."""
    batches = [random_sequences(4, seed=seed) for seed in (1, 2)]
    actors = tiny_actor(), tiny_actor()
    for actor in actors:
        frozen = dict(actor.model.named_parameters())[NAME]
        frozen.requires_grad_(False)
        actor.update(batches[0])
        frozen.requires_grad_(True)
    state = actors[0].state_dict()
    assert state["parameters"][NAME]["num_steps"] == 0
    actors[0].load_state_dict(state)
    for actor in actors:
        actor.update(batches[1])
    assert_same_bits(weights_of(actors[0]), weights_of(actors[1]))
