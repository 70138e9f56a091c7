"""The server and the adapter that feeds it: aborts, versions, the key-value cache, weights proven, requests refused."""

import asyncio
import dataclasses
import itertools
import threading

import numpy as np
import pytest
import torch
from verl.workers.config import HFModelConfig, PrometheusConfig, SamplingConfig
from verl.workers.config.model import MtpConfig
from verl.workers.rollout.replica import RolloutMode
from vexact_verl.adapter import VexactAdapter
from vexact_verl.parcels import Parcel
from vexact_verl.server import VexactServer
from worker_support import LONGEST, Rollout, make_prompts, make_worker, rollout_config

from vexact.models import load_model
from vexact.models.hf_names import to_hf

TRAINING = {"temperature": 0.8, "top_p": 1.0, "top_k": -1}


@pytest.fixture
def rollout(model_path):
    return Rollout(model_path, "fp32")


def weights_of(model_path, factor=1.0):
    model = load_model(model_path)
    with torch.no_grad():
        return [(name, tensor * factor) for name, tensor in to_hf(model.config, model.named_parameters())]


def test_an_aborted_response_goes_on_where_it_was_with_new_weights(model_path, rollout, monkeypatch):
    """What verl's client for partial rollouts does: it sends the prompt again with what there is of the response."""
    server, prompt = rollout.server, make_prompts()[0]
    runner, steps = server._engine._engine._runner, itertools.count()
    execute, is_half_way, may_go_on = runner.execute, threading.Event(), threading.Event()

    def held(inputs):
        if next(steps) == LONGEST // 2:
            is_half_way.set()
            may_go_on.wait()
        return execute(inputs)

    monkeypatch.setattr(runner, "execute", held)

    async def scenario():
        running = asyncio.create_task(server.generate(prompt, dict(TRAINING), "first"))
        await asyncio.to_thread(is_half_way.wait)
        ending = asyncio.create_task(server.abort_all_requests())
        await asyncio.sleep(0)  # it asks for the end
        may_go_on.set()
        ended, part = await ending, await running
        late = asyncio.create_task(server.generate(prompt, dict(TRAINING), "late"))
        await asyncio.sleep(0.05)
        assert not late.done(), "requests wait while the weights change"
        await rollout.adapter.release()
        await rollout.adapter.update_weights(iter(weights_of(model_path)), global_steps=7)
        await rollout.adapter.resume(["kv_cache"])
        await server.resume_generation()
        room = LONGEST - len(part.token_ids)
        rest = await server.generate([*prompt, *part.token_ids], TRAINING | {"max_tokens": room}, "second")
        return ended, part, rest, await late

    ended, part, rest, late = asyncio.run(scenario())
    assert ended == {"aborted_count": 1, "request_ids": ["first"]}
    assert part.stop_reason == "aborted"
    assert 0 < len(part.token_ids) < LONGEST
    assert len(part.token_ids) == len(part.log_probs) == len(part.extra_fields["vexact"]["weights_versions"])
    assert set(part.extra_fields["vexact"]["weights_versions"]) <= {0}
    assert rest.extra_fields["vexact"]["weights_versions"] == [7] * (LONGEST - len(part.token_ids))
    assert (rest.stop_reason, rest.extra_fields["global_steps"], late.extra_fields["global_steps"]) == (
        "completed",
        7,
        7,
    )


def test_a_server_that_leaves_the_rotation_sends_requests_away(rollout):
    async def scenario():
        await rollout.server.abort_all_requests(reject_request=True)
        away = await rollout.server.generate([1, 2], dict(TRAINING), "a")
        await rollout.server.resume_generation()
        return away, await rollout.server.generate([1, 2], dict(TRAINING), "b")

    away, served = asyncio.run(scenario())
    assert (away.token_ids, away.stop_reason) == ([], "aborted")
    assert len(served.token_ids) == LONGEST


@pytest.mark.parametrize("asleep", [False, True])
def test_a_request_that_waits_is_aborted_like_one_that_runs(model_path, rollout, asleep):
    """By its id; with all that wait, once nothing comes back soon; and by who has sent it and goes away."""
    server = rollout.server

    def ask(name):
        return asyncio.create_task(server.generate([1, 2], dict(TRAINING), name))

    async def scenario():
        await server.abort_all_requests()
        if asleep:
            await server.sleep()
        waiting = [ask(name) for name in ("named", "gone", "sent away", "sent away, too")]
        await asyncio.sleep(0)
        assert len(server._held) == 4
        assert await server.abort_request("named") == {"aborted": True, "request_id": "named"}
        assert await server.abort_request("named") == {"aborted": False, "request_id": "named"}
        ended = [await asyncio.wait_for(waiting[0], 60)]
        waiting[1].cancel()
        await asyncio.wait(waiting[1:2])
        left = ["sent away", "sent away, too"]
        assert await server.abort_all_requests(reject_request=True) == {"aborted_count": 2, "request_ids": left}
        ended += [await asyncio.wait_for(task, 60) for task in waiting[2:]]
        assert not server._held
        if asleep:
            await rollout.adapter.resume(["weights"])
            await rollout.adapter.update_weights(iter(weights_of(model_path)), global_steps=0)
            await server.wake_up(["kv_cache"])
        await server.abort_all_requests()
        last = ask("last")
        await asyncio.sleep(0)
        await server.resume_generation()
        return ended, await last

    ended, served = asyncio.run(scenario())
    assert [(each.token_ids, each.stop_reason) for each in ended] == [([], "aborted")] * 3
    assert len(served.token_ids) == LONGEST


def test_samples_do_not_depend_on_sleeping_or_on_company(model_path, rollout):
    prompts = make_prompts()
    together = rollout.generate(prompts, 0)
    asyncio.run(rollout.server.sleep())
    with pytest.raises(RuntimeError, match="the rollout's weights are given back"):
        asyncio.run(rollout.server.generate(prompts[0], dict(TRAINING), "asleep"))
    asyncio.run(rollout.adapter.resume(["weights"]))
    asyncio.run(rollout.adapter.update_weights(iter(weights_of(model_path)), global_steps=0))
    with pytest.raises(RuntimeError, match="KV cache is released"):
        asyncio.run(rollout.server.generate(prompts[0], dict(TRAINING), "half asleep"))
    asyncio.run(rollout.server.wake_up(["kv_cache"]))
    for index, prompt in enumerate(prompts[:3]):
        alone = asyncio.run(rollout.server.generate(prompt, dict(TRAINING), f"0-{index}"))
        assert (alone.token_ids, alone.log_probs) == (together[index].token_ids, together[index].log_probs)


@pytest.mark.parametrize(
    ("mode", "changes", "weights_go"),
    [
        (RolloutMode.HYBRID, {}, True),
        (RolloutMode.HYBRID, {"enable_sleep_mode": False}, False),
        (RolloutMode.HYBRID, {"free_cache_engine": False}, False),
        (RolloutMode.COLOCATED, {}, False),
        (RolloutMode.STANDALONE, {}, False),
    ],
)
def test_only_weights_that_the_trainer_brings_again_go_away(model_path, mode, changes, weights_go):
    config = rollout_config("fp32", **changes)
    server = VexactServer(config, {"path": str(model_path)}, "cpu", mode)

    async def scenario():
        await server.sleep()
        return await server._engine.run(lambda engine: (engine.weights.released, engine.kv_cache_released))

    cache_goes = mode != RolloutMode.STANDALONE and config.free_cache_engine
    assert asyncio.run(scenario()) == (weights_go, cache_goes)


def test_log_probabilities_survive_the_way_as_python_floats(rollout):
    values = np.array(rollout.generate(make_prompts(count=1), 0)[0].log_probs)
    assert np.array_equal(values.astype(np.float32).astype(np.float64), values)


@pytest.mark.parametrize("megabytes", [0, 1, 2048])
def test_weights_arrive_in_buckets_of_any_size(model_path, megabytes):
    rollout = Rollout(model_path, "bf16")
    rollout.config.checkpoint_engine.__dict__["update_weights_bucket_megabytes"] = megabytes
    asyncio.run(rollout.adapter.update_weights(iter(weights_of(model_path, 0.5)), global_steps=3))
    sent = dict(weights_of(model_path, 0.5))

    def held(engine):
        return engine.weights_version, dict(to_hf(engine.model.config, engine.model.named_parameters()))

    version, found = asyncio.run(rollout.server._engine.run(held))
    assert version == 3
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in sent.items())


def _without(weights):
    return weights[:-1]


def _doubled(weights):
    return [*weights, weights[0]]


def _renamed(weights):
    return [("model.layers.9.mlp.down_proj.weight", weights[0][1]), *weights[1:]]


def _reshaped(weights):
    return [(weights[0][0], weights[0][1][:-1]), *weights[1:]]


def _other_head(weights):
    return [*weights, ("lm_head.weight", dict(weights)["model.embed_tokens.weight"] + 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, "version 4 lacks 1 tensors, the first model.norm.weight"),
        (_doubled, "was sent twice"),
        (_renamed, r"has no model\.layers\.9"),
        (_reshaped, r"was sent as .*31, 128.*has .*32, 128"),
        (_other_head, "differs from model.embed_tokens.weight"),
    ],
)
def test_an_update_that_is_not_whole_leaves_an_engine_that_refuses(model_path, rollout, change, message):
    with pytest.raises(ValueError, match=message):
        asyncio.run(rollout.adapter.update_weights(iter(change(weights_of(model_path))), global_steps=4))
    with pytest.raises(RuntimeError, match="update failed half way"):
        asyncio.run(rollout.server.generate([1, 2], dict(TRAINING), "after"))
    asyncio.run(rollout.adapter.update_weights(iter(weights_of(model_path)), global_steps=4))
    assert asyncio.run(rollout.server.generate([1, 2], dict(TRAINING), "mended")).extra_fields["global_steps"] == 4


def test_bits_that_change_on_the_way_are_found(model_path, rollout):
    name, tensor = weights_of(model_path)[0]
    parcel = Parcel.of(name, tensor)
    content = parcel.content.copy()
    content[5] ^= 1

    async def scenario():
        await rollout.server.begin_update(2)
        await rollout.server.receive([dataclasses.replace(parcel, content=content)])

    with pytest.raises(ValueError, match=f"{name} of version 2 arrived with other bits"):
        asyncio.run(scenario())


def test_narrower_weights_are_not_widened_in_silence(model_path, rollout):
    with pytest.raises(ValueError, match=r"comes in torch\.bfloat16, .*rollout\.dtype=float32; set rollout\.dtype"):
        rollout.sync(make_worker(model_path, "bf16"), 1)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (TRAINING | {"repetition_penalty": 1.1}, "repetition_penalty=1.1 is not supported"),
        (TRAINING | {"top_p": 0.5}, r"asks for .*top_p=0\.5.*the trainer could not score it"),
        (TRAINING | {"min_p": 0.1}, r"asks for .*min_p=0\.1"),
        (TRAINING | {"temperature": 1.0}, "asks for temperature=1,"),
        (TRAINING | {"beam_width": 4}, "unknown sampling parameters beam_width"),
        (TRAINING | {"max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_requests_that_could_not_be_honoured_are_refused(rollout, request_, message):
    with pytest.raises(ValueError, match=message):
        asyncio.run(rollout.server.generate([1, 2], request_, "r"))
    assert len(asyncio.run(rollout.server.generate([1, 2], dict(TRAINING), "r")).token_ids) == LONGEST


def test_images_and_prompts_without_room_are_refused(rollout):
    with pytest.raises(ValueError, match="generates from text"):
        asyncio.run(rollout.server.generate([1, 2], dict(TRAINING), "r", image_data=[object()]))
    with pytest.raises(ValueError, match="a prompt of 56 tokens leaves no room in max_model_len=56"):
        asyncio.run(rollout.server.generate([1] * 56, dict(TRAINING), "r"))


def test_validation_may_sample_in_its_own_way(model_path):
    rollout = Rollout(model_path, "fp32", val_kwargs=SamplingConfig(temperature=0.6, top_p=0.9))
    output = asyncio.run(rollout.server.generate([1, 2], {"temperature": 0.6, "top_p": 0.9, "top_k": -1}, "v"))
    assert len(output.extra_fields["vexact"]["min_logits"]) == LONGEST


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine_kwargs": {"vexact": {"block_size": 4}}}, r"engine_kwargs\.vexact has block_size; the engine takes"),
        ({"engine_kwargs": {"vexact": {"max_num_seqs": 4}}}, r"engine_kwargs\.vexact has max_num_seqs"),
        ({"quantization": "fp8"}, "rollout.quantization=fp8: weights are computed with as the trainer does"),
        ({"qat": {"enable": True}}, "rollout.qat.enable=True"),
        ({"mtp": MtpConfig(enable_rollout=True)}, "rollout.mtp.enable_rollout=True: tokens are not guessed ahead"),
        ({"logprobs_mode": "raw_logprobs"}, "rollout.logprobs_mode=raw_logprobs: .*; use processed_logprobs"),
        ({"repetition_penalty": 1.2}, "rollout.repetition_penalty=1.2"),
        ({"scheduling_policy": "priority", "over_sample_rate": 0.1}, "scheduling_policy=.*; rollout.over_sample_rate"),
        ({"enable_rollout_routing_replay": True}, "nothing to replay"),
        ({"prometheus": PrometheusConfig(enable=True)}, "rollout.prometheus.enable=True"),
        ({"top_p": 0.9}, "do not reach the trainer from a standalone rollout"),
        ({"dtype": "float8"}, "dtype='float8' is unknown"),
    ],
)
def test_settings_that_could_not_be_honoured_stop_the_server(model_path, changes, message):
    config = rollout_config("fp32", **changes)
    with pytest.raises(ValueError, match=message):
        VexactServer(config, {"path": str(model_path)}, "cpu", RolloutMode.STANDALONE)


def test_a_rollout_over_several_gpus_is_refused(model_path):
    config = rollout_config("fp32", tensor_model_parallel_size=2)
    with pytest.raises(ValueError, match=r"rollout\.tensor_model_parallel_size=2: an engine runs on one GPU"):
        VexactAdapter(config, HFModelConfig(path=str(model_path)), None)
