"""The actor on one GPU: bf16 compute over a sharded fp32 master copy, against the engine's bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from moe_configs import MOONLIGHT, QWEN3_MOE
from ranks_support import digest, without_times
from training_support import CORRECTIONS, assert_same_bits, weights_of

from vexact.models import ModelConfig, random_model
from vexact.rollout import Engine, NonFiniteLogprobError, SamplingParams
from vexact.training import Actor, ActorConfig, Ledger, LedgerError, OptimConfig
from vexact.types import TrainSequence
from vexact.weights import sync_weights

pytestmark = pytest.mark.gpu
SIZES = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


EXPERTS = SIZES | {
    **{key: QWEN3_MOE[key] for key in ("architectures", "model_type", "norm_topk_prob")},
    **{"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128},
}
LATENT = MOONLIGHT | {
    **{key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")},
    **{"kv_lora_rank": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128},
}


def gpu_actor(seed, shape=SIZES, **config):
    model = random_model(ModelConfig.from_hf_dict(shape), seed, device="cuda")
    defaults = {"dtype": "bfloat16", "ppo_max_token_len_per_gpu": 300, "optim": OptimConfig(lr=1e-3)}
    return Actor(model, ActorConfig(**(defaults | config)), "cuda")


BALANCED = {"router_bias_update_rate": 0.01, "router_aux_loss_coef": 0.01}


@pytest.mark.parametrize(
    ("shape", "config"),
    [(SIZES, {}), (EXPERTS, {"router_aux_loss_coef": 0.01}), (LATENT, BALANCED)],
    ids=["dense", "experts", "latent attention and experts"],
)
def test_updates_are_exactly_on_policy_and_resume_bit_for_bit(shape, config):
    actor = gpu_actor(0, shape, enable_gradient_checkpointing=True, **config)
    rollout = random_model(ModelConfig.from_hf_dict(shape), 1, torch.bfloat16, "cuda")
    engine = Engine(model=rollout, dtype="bfloat16", device="cuda", max_model_len=256, num_pages=512)
    params = SamplingParams(n=4, max_tokens=40, temperature=0.8, top_p=0.95, ignore_eos=True)
    rng, kept = np.random.default_rng(0), []
    state = actor.state_dict()
    for version in (1, 2):
        sync_weights(actor, engine, version)
        samples = engine.generate([rng.integers(0, 1024, length).tolist() for length in (3, 17, 90)], params)
        sequences = [TrainSequence(s, rng.normal(size=len(s.token_ids)).astype(np.float32)) for s in samples]
        different = []

        def audit(indices, logprobs, routes, samples=samples, different=different):
            for index, training in zip(indices, logprobs, strict=True):
                different.append(int((training.view(np.int32) != samples[index].logprobs.view(np.int32)).sum()))
            assert (routes is None) is (shape is SIZES)
            for index, digests in zip(indices if routes else (), routes or (), strict=True):
                assert digests.tolist() == samples[index].route_digests.tolist()

        metrics = actor.update(sequences, audit)
        assert different == [0] * 12
        assert metrics["actor/ppo_kl"] == 0.0
        assert metrics["actor/grad_norm"] > 0
        kept.append((sequences, metrics))
    assert engine.stats()["rollout/graph_ratio"] > 0.5
    resumed = gpu_actor(7, shape, **config)  # no gradient checkpointing: same bits
    resumed.load_state_dict(state)
    for sequences, metrics in kept:
        assert without_times(resumed.update(sequences)) == without_times(metrics)
    assert_same_bits(weights_of(resumed), weights_of(actor))


@pytest.mark.parametrize("loss_mode", ["vanilla", "reinforce", "gspo"])
def test_every_correction_of_an_exact_rollout_changes_no_bit(loss_mode):
    actor = gpu_actor(1, loss_mode=loss_mode)
    rollout = random_model(ModelConfig.from_hf_dict(SIZES), 1, torch.bfloat16, "cuda")
    engine = Engine(model=rollout, dtype="bfloat16", device="cuda", max_model_len=256, num_pages=512)
    sync_weights(actor, engine, 1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 1024, length).tolist() for length in (3, 17, 90)]
    samples = engine.generate(prompts, SamplingParams(n=4, max_tokens=40, temperature=0.8, ignore_eos=True))
    sequences = [TrainSequence(s, rng.normal(size=len(s.token_ids)).astype(np.float32)) for s in samples]
    actor.update(sequences)
    plain = digest(actor.state_dict())
    for name, correction in CORRECTIONS.items():
        for bypass in (True, False):
            corrected = gpu_actor(1, loss_mode=loss_mode, correction=replace(correction, bypass=bypass))
            metrics = corrected.update(sequences)
            seen = {value for key, value in metrics.items() if key.startswith("rollout_corr/")}
            assert seen
            assert seen <= {0, 1}
            assert digest(corrected.state_dict()) == plain, (name, bypass)


@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.0}])
def test_numbers_that_are_none_are_refused_in_prefill_and_in_replayed_graphs(params):
    model = random_model(ModelConfig.from_hf_dict(SIZES), 1, torch.bfloat16, "cuda")
    engine = Engine(model=model, device="cuda", max_model_len=256, num_pages=512)
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, **params)
    engine.generate([[1, 2, 3], [4]], sampling)  # captures the graph of two sequences
    engine.add_request([1, 2, 3], sampling, "a")
    engine.add_request([4], sampling, "b")
    engine.step()
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
    engine.step()  # launches the first step with that weight, and reads the tokens of the one before
    with pytest.raises(
        NonFiniteLogprobError, match=r"request a, response position 1: .*norm\.weight holds 1"
    ) as caught:
        engine.step()
    assert caught.value.request_ids == ["a", "b"]
    engine.check_idle()
    with pytest.raises(NonFiniteLogprobError, match="response position 0"):
        engine.generate([[1, 2, 3]], sampling)


def test_the_checksums_of_device_and_host_agree_and_find_a_swap():
    rng = np.random.default_rng(0)
    model = random_model(ModelConfig.from_hf_dict(SIZES), 1, torch.bfloat16, "cuda")
    engine = Engine(model=model, device="cuda", max_model_len=256, num_pages=512)
    prompts = [rng.integers(0, 1024, 9).tolist() for _ in range(4)]
    samples = engine.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    sequences = [TrainSequence(s, rng.normal(size=20).astype(np.float32)) for s in samples]
    actor, ledger = gpu_actor(1), Ledger(sequences)
    actor.update(sequences, ledger=ledger)
    swapped = [replace(s, advantages=o.advantages) for s, o in zip(sequences, sequences[::-1], strict=True)]
    with pytest.raises(LedgerError, match=r"request 0: the advantages .*those of request 3"):
        actor.update(swapped, ledger=ledger)
