"""One, two, three and four ranks over Gloo against one process: the same bits, and they stop together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from moe_configs import with_router_biases
from ranks import process_group, spawn
from ranks_support import CASES, STEPS, actor_of, batch_of, digest, outcome, train
from training_support import tiny_model

from vexact.models import load_model, save_hf
from vexact.training import ActorConfig, load_sharded_model
from vexact.training.actor import Actor
from vexact.training.parallel.ranks import Ranks, first_row, local

WORLDS = (1, 2, 3, 4)
MOVING = "latent"  # the case whose states move between numbers of ranks
SAVED_AFTER = 2


def run(rank, directory, results):
    """Everything that needs several processes, in one start of four; ``results`` gets what the tests look at."""
    found = {}
    with process_group(rank, max(WORLDS), directory):
        groups = {world: dist.new_group(range(world)) for world in WORLDS}
        for world in (w for w in WORLDS if rank < w):
            group = groups[world]
            for case in CASES:
                actor = actor_of(case, group)
                metrics = train(actor, case, range(STEPS), group)
                found[world, case] = digest(actor.state_dict()), metrics, actor.rescore(batch_of(case, 9, group))
            found[world, "no step"] = before_a_step(group)
            found[world, "idle"] = actor_of("plain", group).update(batch_of("plain", 0)).get("perf/idle_share/actor")
        if rank < 2:
            found["moved"] = save_states(groups[2], directory)
            found["by round"] = summed_by_round(groups[2])
            found["read"] = read_shards(groups[2], directory)
        dist.barrier()
        if rank < 3:
            found["resumed"] = resume(groups[3], directory)
        if rank < 1:
            found["resumed alone"] = resume(groups[1], directory)
    torch.save(found, f"{results}/{rank}.pt")


def before_a_step(group):
    """What every rank says when one of them does not want to go on; nothing is left of it."""
    rank, last = group.rank(), group.size() - 1
    actor, untouched = actor_of("plain", group), actor_of("plain", group)
    batch = batch_of("plain", 0)
    seen = []

    def audit(indices, logprobs, routes):
        seen.append((indices, logprobs))
        if rank == last:
            raise ArithmeticError("the bits differ")

    poisoned = [replace(s, advantages=s.advantages * np.float32(np.nan)) for s in batch]
    said = {
        "audit": outcome(actor.update, batch, audit),
        "numbers": outcome(actor.update, poisoned if rank == last else batch),
        "nothing": outcome(actor.update, [] if rank == last else batch),
        "sequences": outcome(actor.update, batch[:-1] if rank == last else batch),
        "logprobs": outcome(actor.logprobs, batch[:-1] if rank == last else batch),
        "state": outcome(actor.load_state_dict, {"num_updates": 0, "parameters": {}}),
        "shards": outcome(actor.load_sharded_state, {} if rank == last else actor.sharded_state()),
    }
    train(actor, "plain", [0])
    train(untouched, "plain", [0])
    return {"said": said, "audited": seen, "same": digest(actor.state_dict()) == digest(untouched.state_dict())}


def save_states(group, directory):
    actor = actor_of(MOVING, group)
    train(actor, MOVING, range(SAVED_AFTER), group)
    state = actor.state_dict()
    if group.rank() == 0:
        torch.save(state, f"{directory}/whole.pt")
    dcp.save(actor.sharded_state(), checkpoint_id=f"{directory}/sharded", process_group=group)
    shards = [(name, rows, shape) for name, rows, shape in actor.named_shards()]
    return shards, dict(actor.named_weights())


def resume(group, directory):
    """Digests of runs that go on from both kinds of state, with moments on the device and on the host."""
    whole = torch.load(f"{directory}/whole.pt") if group.rank() == 0 else {"num_updates": 0, "parameters": {}}
    digests = []
    for offload in (False, True):
        for sharded in (False, True):
            actor = actor_of(MOVING, group, seed=99, param_offload=offload, optimizer_offload=offload)
            if sharded:
                state = actor.blank_state(moments=True)
                dcp.load(state, checkpoint_id=f"{directory}/sharded", process_group=group)
                actor.load_sharded_state(state)
            else:
                actor.load_state_dict(whole)
            train(actor, MOVING, range(SAVED_AFTER, STEPS), group)
            digests.append(digest(actor.state_dict()))
    return digests


def summed_by_round(group):
    """The digest when the gradients of a round are added to each other before they are added to those before."""
    ordered = dist.all_to_all_single

    def summed(received, sent, group):
        ordered(received, sent, group=group)
        received[0] += received[1]
        received[1] = 0

    dist.all_to_all_single = summed
    try:
        actor = actor_of("plain", group)
        train(actor, "plain", [0])
        return digest(actor.state_dict())
    finally:
        dist.all_to_all_single = ordered


def read_shards(group, directory):
    """Whether a checkpoint read row by row is the one read whole, before and after an update; what broken ones say."""
    ranks = Ranks.of_process(torch.device("cpu"), group)
    path, same = f"{directory}/model", True
    for shape in ({"intermediate_size": 49}, CASES["latent"][0]):
        if ranks.is_first:
            whole = with_router_biases(tiny_model(3, **shape))
            save_hf(whole.named_parameters(), whole.config, path)
        dist.barrier(group)
        model = load_sharded_model(path, ranks, torch.float32)
        for (_, ours), theirs in zip(model.named_parameters(), load_model(path).parameters(), strict=True):
            start, rows = first_row(len(theirs), ranks), local(ours)
            same &= torch.equal(rows, theirs[start : start + len(rows)]) and rows.numel() < theirs.numel()
        config = ActorConfig(ppo_max_token_len_per_gpu=22)
        actors = Actor(model, config, group=group), Actor(load_model(path), config, group=group)
        for actor in actors:
            actor.update(batch_of("plain", 0))
        same &= digest(actors[0].state_dict()) == digest(actors[1].state_dict())
        dist.barrier(group)
    missing = f"{directory}/nowhere" if ranks.rank == 1 else path
    return same, outcome(load_sharded_model, missing, ranks, torch.float32)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    _, results = spawn(
        run, max(WORLDS), lambda: tuple(str(tmp_path_factory.mktemp(name)) for name in ("ranks", "results"))
    )
    return [torch.load(f"{results}/{rank}.pt", weights_only=False) for rank in range(max(WORLDS))]


@pytest.fixture(scope="module")
def alone():
    """Digest, metrics and log-probabilities of one process without a process group, by case."""
    found = {}
    for case in CASES:
        actor = actor_of(case)
        metrics = train(actor, case, range(STEPS))
        found[case] = digest(actor.state_dict()), metrics, actor.rescore(batch_of(case, 9))
    return found


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_weights_moments_and_metrics_have_the_bits_of_one_process(ranks, alone, case, world):
    sha, metrics, ours = alone[case]
    assert (ours.routes is None) is ("moe_intermediate_size" not in CASES[case][0])
    assert ranks[0][world, case][0] == sha
    for rank in range(world):
        _, theirs, scored = ranks[rank][world, case]
        assert theirs == metrics
        assert scored.indices == ours.indices
        assert [values.tobytes() for values in scored.logprobs] == [values.tobytes() for values in ours.logprobs]
        assert [values.tobytes() for values in scored.routes or ()] == [
            values.tobytes() for values in ours.routes or ()
        ]


def test_how_much_ranks_wait_for_each_other_is_told_by_all_of_them(ranks):
    assert ranks[0][1, "idle"] is None
    for world in WORLDS[1:]:
        shares = {ranks[rank][world, "idle"] for rank in range(world)}
        assert len(shares) == 1
        assert 0 < shares.pop() < 0.5


def test_offload_and_checkpointing_change_no_bit(alone):
    actor = actor_of("bfloat16", param_offload=False, optimizer_offload=False, enable_gradient_checkpointing=False)
    train(actor, "bfloat16", range(STEPS))
    assert digest(actor.state_dict()) == alone["bfloat16"][0]


def test_another_order_of_additions_is_noticed(ranks):
    actor = actor_of("plain")
    counts = []
    start = actor.gradients.start
    actor.gradients.start = lambda count: counts.append(count) or start(count)
    train(actor, "plain", [0])
    assert counts == [4, 4]
    assert ranks[0]["by round"] != digest(actor.state_dict())


@pytest.mark.parametrize("world", WORLDS[1:])
def test_all_ranks_stop_before_a_step_when_one_does(ranks, world):
    last = world - 1
    for rank in range(world):
        found = ranks[rank][world, "no step"]
        peer = f"PeerStopped {last}: rank {last} stopped before the weights were touched: "
        assert found["same"]
        for what, error in {
            "audit": "ArithmeticError: the bits differ",
            "numbers": "ValueError: request-0: advantages[0] is nan",
            "nothing": "ValueError: update() got no sequences",
            "shards": "ValueError: the checkpoint is of another model",
        }.items():
            assert found["said"][what].startswith(error if rank == last else peer + error), what
        for what in ("sequences", "logprobs"):
            assert f"ranks 0 and {last} of the trainer got different sequences" in found["said"][what]
        assert ("PeerStopped 0" if rank else "ValueError") in found["said"]["state"]


def test_the_ranks_share_out_the_first_mini_batch(ranks):
    for world in WORLDS:
        shares = [ranks[rank][world, "no step"]["audited"] for rank in range(world)]
        assert all(len(calls) == 1 for calls in shares)
        indices = [index for ((seen, _),) in shares for index in seen]
        assert len(indices) == 7
        assert len(set(indices)) == 7
        expected = actor_of("plain").logprobs(batch_of("plain", 0))
        for ((seen, logprobs),) in shares:
            for index, values in zip(seen, logprobs, strict=True):
                assert values.tobytes() == expected[index].tobytes()


def test_states_go_on_with_another_number_of_ranks(ranks, alone):
    assert ranks[0]["resumed"] == [alone[MOVING][0]] * 4
    assert ranks[0]["resumed alone"] == [alone[MOVING][0]] * 4


def test_shards_are_the_rows_of_the_weights(ranks):
    (first, weights), (second, _) = ranks[0]["moved"], ranks[1]["moved"]
    assert [name for name, *_ in first] == list(weights)
    for (name, upper, shape), (_, lower, _) in zip(first, second, strict=True):
        assert weights[name].shape == shape
        assert torch.equal(torch.cat([upper, lower]).to(weights[name].dtype), weights[name])


def test_a_checkpoint_is_read_row_by_row(ranks):
    for rank in (0, 1):
        same, error = ranks[rank]["read"]
        assert same
        assert error.startswith("FileNotFoundError" if rank else "PeerStopped 1: ")
