"""One rank of VeOmni's own trainer under FSDP2; before every step its model is held against the rollout's.

Usage: torchrun --nproc-per-node 2 train_ranks.py CHECKPOINT DATA.jsonl OUT_DIR
"""

import random
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from veomni.arguments import DataArguments, ModelArguments, TrainingArguments, VeOmniArguments
from veomni.arguments.arguments_types import CheckpointConfig, DataloaderConfig
from vexact_veomni.side import VeomniSide
from vexact_veomni.trainer import ExactTextTrainer

from vexact.models import load_model
from vexact.models.hf_names import stored_sources
from vexact.training.batches.batch import TokenSequence, pack_tokens

STEPS = 4


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def whole(parameter):
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().to(torch.bfloat16)


class Watched(ExactTextTrainer):
    def on_step_begin(self, micro_batches=None):
        model = self.base.model
        mixed = self.base.args.train.accelerator.fsdp_config.mixed_precision
        assert isinstance(model, FSDPModule)
        assert isinstance(model.model.layers[0], FSDPModule)
        assert mixed.cast_forward_inputs, "every floating input of a layer is cast to bfloat16"
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        full = {name: whole(p) for name, p in model.named_parameters()} | dict(model.named_buffers())
        rollout = load_model(self.base.args.model.model_path, dtype=torch.bfloat16)
        with torch.no_grad():
            for name, parameter in rollout.named_parameters():
                parameter.copy_(torch.cat([full[source] for source in stored_sources(rollout.config, name, full)]))
            batch = pack_tokens(sequences(rollout.config.vocab_size))
            trained = VeomniSide(model).logprobs(batch)
            sampled = rollout(batch.input_ids, batch.positions, batch.attention, targets=batch.targets).logprobs
        different = int((trained.view(torch.int32) != sampled.view(torch.int32)).sum())
        if dist.get_rank() == 0:
            say(f"step {self.base.state.global_step}: {different} of {len(sampled)} differ")

    def on_step_end(self, loss=None, loss_dict=None, grad_norm=None, aux_metrics=None):
        """Without VeOmni's callbacks, which ask a GPU for its name."""
        if dist.get_rank() == 0:
            say(f"loss {loss:.6f} gradient norm {float(grad_norm):.6f}")

    def on_epoch_end(self):
        """Nor its checkpoints, which empty a GPU's cache."""

    on_train_end = on_epoch_end


def sequences(vocabulary):
    rng = random.Random(0)
    lengths = [(5, 9), (33, 20), (1, 3), (64, 17), (100, 30)]
    return [
        TokenSequence([rng.randrange(vocabulary) for _ in range(p)], [rng.randrange(vocabulary) for _ in range(r)])
        for p, r in lengths
    ]


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    checkpoint, data, out = sys.argv[1:]
    arguments = VeOmniArguments(
        model=ModelArguments(config_path=checkpoint, model_path=checkpoint, tokenizer_path=checkpoint),
        data=DataArguments(
            train_path=data,
            data_type="plaintext",
            datasets_type="mapping",
            text_keys="text",
            max_seq_len=64,
            train_size=1 << 16,
            dataloader=DataloaderConfig(num_workers=0, prefetch_factor=None),
        ),
        train=TrainingArguments(
            init_device="meta",
            global_batch_size=2,
            max_steps=STEPS,
            checkpoint=CheckpointConfig(output_dir=out),
        ),
    )
    arguments.train.optimizer.lr = 1e-3
    Watched(arguments).train()


main()
