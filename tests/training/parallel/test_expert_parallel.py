"""Groups of ranks that share the experts, as Gloo processes: the bits of one process and of FSDP alone."""

import re

import pytest
import torch
import torch.distributed as dist
from moe_configs import MIXTRAL, QWEN3_MOE
from ranks import process_group, spawn
from ranks_support import SHARED_CASES, actor_of, batch_of, digest, outcome, train
from training_support import TINY, tiny_model

from vexact.models import ModelConfig, load_model, save_hf
from vexact.models.layers import MoE
from vexact.training import Actor, ActorConfig, Ranks, Reference, load_sharded_model
from vexact.training.parallel.expert_parallel import DistributedExperts, ExpertRanks, check_expert_size, roomy
from vexact.training.parallel.ordered_sum import OrderedSum
from vexact.training.parallel.ranks import local

WORLD = 4
STEPS = 2
ONE_BATCH = {"ppo_max_token_len_per_gpu": 4096}  # one micro-batch: three of four ranks compute fillers
PLAIN = {"enable_gradient_checkpointing": False}
RUNS = {  # ranks, case, groups of ranks, settings
    "one rank a group": (4, "eight", 4, {}),
    "recomputed": (4, "eight", 4, {"enable_gradient_checkpointing": True}),
    "one layer recomputed": (4, "eight", 4, {"enable_gradient_checkpointing": True, "recompute_num_layers": 1}),
    "two ranks a group": (4, "eight", 2, {}),
    "latent": (4, "eight latent", 4, {}),
    "latent, not recomputed": (4, "eight latent", 2, PLAIN),
    "fewer experts for the last": (4, "six latent", 2, {}),
    "fillers": (4, "eight latent", 4, ONE_BATCH),
    "fillers, two ranks a group": (4, "eight", 2, ONE_BATCH),
    "all tokens to one rank": (4, "lopsided", 4, {}),
    "two ranks": (2, "eight", 2, {}),
    "two ranks, latent": (2, "six latent", 2, PLAIN),
}
ULYSSES = {"sharing, one rank a group": 4, "sharing, two ranks a group": 2, "sharing": 1}


def trained(case, group=None, **settings):
    """Digest, metrics, log-probabilities and routes after some updates."""
    lopsided = case == "lopsided"
    case = "eight latent" if lopsided else case
    actor = actor_of(case, group, **settings)
    if lopsided:
        send_all_to_the_first(actor)
    metrics = train(actor, case, range(STEPS), group)
    scored = actor.rescore(batch_of(case, 9, group))
    return digest(actor.state_dict()), metrics, [values.tobytes() for values in (*scored.logprobs, *scored.routes)]


def send_all_to_the_first(actor):
    """Every token to the first two experts, and a third one that a group must choose: most ranks get no row."""
    bias = torch.linspace(8.0, -8.0, 8)
    for module in actor.model.modules():
        if isinstance(module, MoE):
            first = 0 if actor.ranks.mesh is None else actor.ranks.rank * len(local(module.router.bias))
            local(module.router.bias).copy_(bias[first : first + len(local(module.router.bias))])


def run(rank, directory, results):
    """Everything that needs several processes, in one start of four."""
    found = {}
    with process_group(rank, WORLD, directory):
        for name, (world, case, size, settings) in RUNS.items():
            if world == WORLD:
                found[name] = trained(case, expert_parallel_size=size, **settings)
        for name, size in ULYSSES.items():
            sharing = {"ulysses_sequence_parallel_size": 2, "ppo_max_token_len_per_gpu": 16}
            found[name] = trained("eight", expert_parallel_size=size, **sharing)
        found["stopped"] = stopped(rank)
        found["moved"] = moved()
        found["read"] = read(rank, directory)
        found["other order"] = [other_order(size) for size in (2, 4)]
        found["reference"] = reference(2)
        found["journeys"] = [journeys(recomputed) for recomputed in (False, True)]
        found["pieces"] = {size: pieces(size) for size in (2, 4)}
        pair = dist.new_group([0, 1])
        for name, (world, case, size, settings) in RUNS.items():
            if rank < world == 2:
                found[name] = trained(case, pair, expert_parallel_size=size, **settings)
    torch.save(found, f"{results}/{rank}.pt")


def stopped(rank):
    """What ranks say when one of them stops before a step, and the digest after a step that is taken later."""

    def audit(indices, logprobs, routes):
        if rank == WORLD - 1:
            raise ArithmeticError("the bits differ")

    actor = actor_of("eight", expert_parallel_size=2)
    said = outcome(actor.update, batch_of("eight", 0), audit)
    train(actor, "eight", range(STEPS))
    return said, digest(actor.state_dict())


def moved():
    """Digests of runs whose second step has another number of groups than the first."""
    digests = []
    for before, after in ((1, 4), (4, 2), (2, 1)):
        first, second = (actor_of("eight", seed=s, expert_parallel_size=n) for s, n in ((0, before), (99, after)))
        train(first, "eight", [0])
        second.load_sharded_state(first.sharded_state())
        train(second, "eight", [1])
        digests.append(digest(second.state_dict()))
    return digests


def read(rank, directory):
    """Whether shards read from a checkpoint are those of the whole one; what is said of sizes that do not fit."""
    shape, path, ranks = SHARED_CASES["eight"][0], f"{directory}/model", Ranks.of_process(torch.device("cpu"))
    if rank == 0:
        whole = tiny_model(3, **shape)
        save_hf(whole.named_parameters(), whole.config, path)
    dist.barrier()
    model = load_sharded_model(path, ranks, torch.float32, expert_parallel_size=2)
    experts = [module for module in model.modules() if isinstance(module, DistributedExperts)]
    config = ActorConfig(expert_parallel_size=2)
    actors = Actor(model, config), Actor(load_model(path), config)
    for actor in actors:
        actor.update(batch_of("eight", 0))
    same = digest(actors[0].state_dict()) == digest(actors[1].state_dict())
    return {
        "layers": [local(module.gate_up_proj).shape[0] for module in experts],
        "same": same,
        "nowhere": outcome(load_sharded_model, f"{path}{rank or ''}", ranks, torch.float32, expert_parallel_size=2),
        "misfit": outcome(load_sharded_model, path, ranks, torch.float32, expert_parallel_size=3),
        "other": outcome(Actor, model, ActorConfig(expert_parallel_size=4)),
    }


def other_order(size):
    """The digest when the gradients of a round are added to each other before they are added to those before."""
    add, accumulate = OrderedSum.add, OrderedSum.accumulate

    def apart(method):
        def summed(self, *given):
            before, self._total = self._total, None
            round_sum = method(self, *given)
            self._total = round_sum if before is None else before + round_sum
            return self._total

        return summed

    OrderedSum.add, OrderedSum.accumulate = apart(add), apart(accumulate)
    try:
        return trained("eight", expert_parallel_size=size)[0]
    finally:
        OrderedSum.add, OrderedSum.accumulate = add, accumulate


def journeys(recomputed):
    """How often a rank asks the others where rows go."""
    asked, ask = [], ExpertRanks.journey
    ExpertRanks.journey = lambda *given: asked.append(given) or ask(*given)
    try:
        train(
            actor_of("eight", expert_parallel_size=4, enable_gradient_checkpointing=recomputed), "eight", range(STEPS)
        )
    finally:
        ExpertRanks.journey = ask
    return len(asked)


def pieces(size):
    """Whether a rank's gradients lie in one piece each when they travel."""
    in_one, scatter = [], ExpertRanks.scatter
    ExpertRanks.scatter = lambda self, piece, of: in_one.append(piece.is_contiguous()) or scatter(self, piece, of)
    try:
        train(actor_of("eight", expert_parallel_size=size), "eight", range(STEPS))
    finally:
        ExpertRanks.scatter = scatter
    return in_one


def reference(size):
    """Log-probabilities of the frozen policy, in bf16."""
    model = tiny_model(5, torch.bfloat16, **SHARED_CASES["eight"][0])
    config = ActorConfig(dtype="bfloat16", expert_parallel_size=size)
    return [values.tobytes() for values in Reference(model, config).logprobs(batch_of("eight", 0))]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    _, results = spawn(run, WORLD, lambda: tuple(str(tmp_path_factory.mktemp(name)) for name in ("ranks", "results")))
    return [torch.load(f"{results}/{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone():
    """The results of one process, which no checkpointing changes."""
    found = {}
    for _, case, _, settings in RUNS.values():
        key = case, settings == ONE_BATCH
        if key not in found:
            found[key] = trained(case, **(ONE_BATCH if settings == ONE_BATCH else {}))
    return found


@pytest.mark.parametrize("name", RUNS)
def test_groups_that_share_experts_have_the_bits_of_one_process(ranks, alone, name):
    world, case, _, settings = RUNS[name]
    sha, metrics, values = alone[case, settings == ONE_BATCH]
    assert ranks[0][name][0] == sha
    for rank in range(world):
        assert ranks[rank][name][1:] == (metrics, values)


@pytest.mark.parametrize("name", ULYSSES)
def test_ranks_that_share_tokens_too_have_the_bits_of_sharing_them_alone(ranks, alone, name):
    for rank in range(WORLD):
        assert ranks[rank][name] == ranks[rank]["sharing"]
        assert ranks[rank][name][1]
    assert ranks[0]["sharing"][0] != alone["eight", False][0]  # slices, whose gradients are added as others


def test_all_ranks_stop_before_a_step_when_one_does(ranks, alone):
    said = [found["stopped"][0] for found in ranks]
    assert said[-1] == "ArithmeticError: the bits differ"
    assert all(text.startswith(f"PeerStopped {WORLD - 1}: ") for text in said[:-1])
    assert ranks[0]["stopped"][1] == alone["eight", False][0]


def test_a_run_goes_on_with_another_number_of_groups(ranks, alone):
    assert ranks[0]["moved"] == [alone["eight", False][0]] * 3


def test_every_rank_reads_its_own_experts(ranks):
    for found in ranks:
        assert found["read"]["layers"] == [2, 2]
        assert found["read"]["same"]
        assert "3 groups" in found["read"]["misfit"]
        assert found["read"]["other"].endswith(
            "expert_parallel_size=4, but the model was sharded for 2; pass load_sharded_model the same "
            "expert_parallel_size"
        )
    assert ranks[0]["read"]["nowhere"].startswith("PeerStopped 1: ")
    assert all(found["read"]["nowhere"].startswith("FileNotFoundError") for found in ranks[1:])


def test_few_numbers_of_rows_are_launched_and_none_is_much_larger_than_it_must_be():
    rooms = {count: roomy(count) for count in range(1 << 17)}
    assert all(count <= room <= max(count + 15, count * 17 // 16) for count, room in rooms.items())
    assert len(set(rooms.values())) < 180


def test_a_layer_that_runs_again_asks_nobody_a_second_time(ranks):
    for found in ranks:
        first, again = found["journeys"]
        assert first == again > 0


def test_gradients_travel_in_one_piece_and_only_where_a_group_has_several_ranks(ranks):
    for found in ranks:
        assert len(found["pieces"][2]) > 8
        assert all(found["pieces"][2])
        assert not found["pieces"][4]


def test_another_order_of_additions_is_noticed(ranks, alone):
    assert alone["eight", False][0] not in ranks[0]["other order"]


def test_the_reference_is_shared_alike(ranks):
    assert all(found["reference"] == ranks[0]["reference"] for found in ranks)
    assert ranks[0]["reference"] == reference(1)


@pytest.mark.parametrize(
    ("raw", "size", "num_ranks", "said"),
    [
        (TINY, 2, 4, "Qwen3ForCausalLM has no experts to share; set it to 1"),
        (
            QWEN3_MOE | {"mlp_only_layers": [0, 1, 2]},
            2,
            4,
            "Qwen3MoeForCausalLM with this config.json has no experts to share; set it to 1",
        ),
        (
            QWEN3_MOE,
            3,
            4,
            "4 training ranks cannot be divided into 3 groups; use 1, 2 or 4, or train on",
        ),
        (QWEN3_MOE, 2, 1, "1 training rank cannot be divided into 2 groups; use 1, or train on a multiple of 2 GPUs"),
        (QWEN3_MOE, 3, 6, "the model's 8 experts, kept by 6 training ranks, cannot be divided over 3 groups of them; "),
        (
            MIXTRAL,
            4,
            4,
            "the model's 5 experts, kept by 4 training ranks, cannot be divided over 4 groups of them",
        ),
        (QWEN3_MOE | {"num_experts": 4}, 4, 8, "the model's 4 experts, kept by 8 training ranks, cannot be divided"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(raw, size, num_ranks, said):
    named = f"actor_rollout_ref.actor.fsdp_config.expert_parallel_size={size}: {said}"
    with pytest.raises(ValueError, match=re.escape(named)):
        check_expert_size(size, num_ranks, ModelConfig.from_hf_dict(raw))
    check_expert_size(1, num_ranks, ModelConfig.from_hf_dict(raw))


def test_one_process_has_nobody_to_share_with():
    with pytest.raises(ValueError, match="expert_parallel_size=2: 1 training rank cannot be divided into 2 groups"):
        actor_of("eight", expert_parallel_size=2)
    with pytest.raises(ValueError, match=r"actor\.expert_parallel_size must be at least 1, got 0"):
        ActorConfig(expert_parallel_size=0)
