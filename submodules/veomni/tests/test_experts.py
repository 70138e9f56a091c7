"""Mixtures of experts: the slot against VeOmni's own loop, what sees routes, and what is refused."""

import copy
import json
import re

import pytest
import torch
import torch.distributed as dist
from veomni.distributed import parallel_state
from veomni.lora.moe_layers import LoraIndependentExperts
from veomni.utils.moe_monitor import MoERouterMonitor, attach_moe_router_monitor, set_active_monitor
from veomni.utils.moe_router_replay import set_active_replay
from vexact_veomni import side
from vexact_veomni.convert import convert
from vexact_veomni.slots import model_type_of, ops_implementation

from vexact import cli
from vexact.models.checkpoint.reader import CheckpointReader

CPU = torch.device("cpu")
IDS = torch.arange(24)[None] * 7 % 500


def build(path, dtype=torch.float32):
    return side.build(path, dtype, CPU, ops_implementation(model_type=model_type_of(path)))


def trained(model):
    """Loss of a forward, and all gradients."""
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_loss_and_gradients_are_those_of_the_model_as_it_was(checkpoints, family):
    """Slots are of the file: the model as it was goes first."""
    as_it_was = side.build(checkpoints / family, torch.float32, CPU, ops_implementation("sdpa", slots=()))
    loss, gradients = trained(as_it_was)
    ours, our_gradients = trained(convert(build(checkpoints / family)))
    torch.testing.assert_close(ours, loss)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        close = torch.nn.functional.cosine_similarity(our_gradients[name].flatten(), gradient.flatten(), dim=0)
        assert close > 0.99999, name


def test_a_load_balancing_loss_is_left_to_veomni(checkpoints):
    """Log-probabilities come without it; a loss comes with it, and its gradient reaches our routers."""
    plain, balanced = (convert(build(checkpoints / "qwen3_moe")) for _ in range(2))
    balanced.config.output_router_logits = True
    balanced.router_aux_loss_coef = 10.0
    (loss, gradients), (more, others) = trained(plain), trained(balanced)
    assert more > loss + 1
    name = "model.layers.0.mlp.gate.weight"
    assert (others[name] - gradients[name]).norm() > 0.01 * gradients[name].norm()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_monitor_of_loads_counts_what_our_routers_choose(checkpoints, family):
    model = convert(build(checkpoints / family))
    monitor = MoERouterMonitor(num_experts=8)
    assert attach_moe_router_monitor(model, monitor) == 1
    set_active_monitor(monitor)
    try:
        model(input_ids=IDS, use_cache=False)
    finally:
        set_active_monitor(None)
    (counts,) = monitor._counts.values()
    assert counts.sum() == 3 * IDS.shape[1]
    assert (counts > 0).sum() > 3


def test_a_correction_bias_keeps_its_bits_or_is_refused(checkpoints):
    path, name = checkpoints / "deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"
    with CheckpointReader(path) as reader:
        bias = reader.tensor(name)
    model = build(path, torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert torch.equal(dict(model.named_buffers())[name], bias)
    convert(copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"e_score_correction_bias of its routers is torch\.bfloat16 and has lost"):
        convert(model.to(torch.bfloat16))


def test_a_replay_of_routes_is_refused(checkpoints):
    model = convert(build(checkpoints / "qwen3_moe"))
    set_active_replay(type("Manager", (), {"on_router_forward": lambda self, module, scores, indices: indices})())
    try:
        with pytest.raises(ValueError, match=r"a router replay is active, .*: set_active_replay\(None\)"):
            model(input_ids=IDS, use_cache=False)
    finally:
        set_active_replay(None)


def test_adapters_on_experts_are_refused_by_name(checkpoints):
    model = build(checkpoints / "qwen3_moe")
    block = model.model.layers[0].mlp
    block.experts = LoraIndependentExperts(block.experts, r=2, lora_alpha=4)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts has adapters on its experts"):
        convert(model)


def test_expert_parallelism_is_refused(checkpoints, monkeypatch):
    model = build(checkpoints / "qwen3_moe")
    before = [type(module) for module in model.modules()]
    monkeypatch.setattr(parallel_state, "_PARALLEL_STATE", None)
    dist.init_process_group("fake", rank=0, world_size=2)
    try:
        parallel_state.init_parallel_state(
            dp_size=2, dp_shard_size=2, extra_parallel_sizes=(2,), device_type="cpu", name=None
        )
        with pytest.raises(ValueError, match="ep_size=2: vexact's experts do not fetch tokens from other ranks"):
            convert(model)
    finally:
        dist.destroy_process_group()
    assert [type(module) for module in model.modules()] == before


def test_a_family_that_veomni_does_not_have_is_refused_by_name(checkpoints, capsys):
    command = ["verify", "--model_path", str(checkpoints / "mixtral"), "--model_backend", "veomni", "--device", "cpu"]
    assert cli.main(command) == 2
    assert re.search(r"VeOmni cannot load .*mixtral: .*No Modeling registered", capsys.readouterr().err)


def test_a_config_that_says_no_type_has_none(tmp_path):
    assert model_type_of(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(["no", "object"]))
    assert model_type_of(tmp_path) is None
