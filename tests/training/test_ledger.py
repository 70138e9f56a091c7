"""What the loss reads is what was computed for the sample: every way to mix samples up stops the update."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_support import assert_same_bits, random_sequences, tiny_actor, weights_of

from vexact.training import Ledger, LedgerError
from vexact.training import actor as actor_module
from vexact.training.batches.batch import PolicyTargets
from vexact.training.batches.ledger import checksums
from vexact.training.batches.mini_batches import mini_batches
from vexact.types import TrainSequence


def _of_one_length(count, length=6):
    """Random sequences whose advantages fit each other."""
    sequences = []
    for i, sequence in enumerate(random_sequences(40, ref_logprobs=True)):
        if len(sequence.sample.token_ids) >= length:
            sample = replace(
                sequence.sample,
                token_ids=sequence.sample.token_ids[:length],
                logprobs=sequence.sample.logprobs[:length],
                min_logits=sequence.sample.min_logits[:length],
            )
            advantages = np.full(length, np.float32(i + 1) / 7 * (-1) ** i, np.float32)
            sequences.append(TrainSequence(sample, advantages, sequence.ref_logprobs[:length]))
    return sequences[:count]


def _with(sequences, at, **changes):
    return [replace(s, **changes) if i == at else s for i, s in enumerate(sequences)]


def _swap_advantages(sequences):
    first, second = sequences[1].advantages, sequences[2].advantages
    return _with(_with(sequences, 1, advantages=second), 2, advantages=first)


def _flip(sequences):
    return _with(sequences, 3, advantages=-sequences[3].advantages)


def _flip_one_token(sequences):
    advantages = sequences[0].advantages.copy()
    advantages[4] *= -1
    return _with(sequences, 0, advantages=advantages)


def _flip_all(sequences):
    return [replace(s, advantages=-s.advantages) for s in sequences]


def _one_ulp(sequences):
    return _with(sequences, 2, advantages=np.nextafter(sequences[2].advantages, np.float32(9)))


def _rotate_references(sequences):
    given = [s.ref_logprobs for s in sequences]
    return [replace(s, ref_logprobs=r) for s, r in zip(sequences, given[1:] + given[:1], strict=True)]


def _swap_old(sequences):
    first, second = sequences[0].sample, sequences[1].sample
    swapped = replace(first, logprobs=second.logprobs), replace(second, logprobs=first.logprobs)
    return _with(_with(sequences, 0, sample=swapped[0]), 1, sample=swapped[1])


def _recompute_for_another(sequences):
    return _with(sequences, 0, recomputed_logprobs=sequences[1].sample.logprobs)


def _other_tokens(sequences):
    sample = sequences[2].sample
    return _with(sequences, 2, sample=replace(sample, token_ids=sample.token_ids[::-1]))


MIXED_UP = {
    "advantages of two samples swapped": (_swap_advantages, r"request-\d+: the advantages .*those of request request-"),
    "sign of one sample": (_flip, r"request-\d+: the advantages .*of no other sample"),
    "sign of one token": (_flip_one_token, r"request-\d+: the advantages"),
    "sign of all": (_flip_all, r"request-\d+: the advantages"),
    "one unit in the last place": (_one_ulp, r"request-\d+: the advantages"),
    "references rotated": (_rotate_references, r"the reference log-probabilities .*those of request request-"),
    "old log-probabilities swapped": (_swap_old, r"the old log-probabilities .*those of request request-"),
    "recomputed for another": (_recompute_for_another, r"the old log-probabilities .*those of request request-"),
    "response reversed": (_other_tokens, r"the response tokens .*of no other sample"),
    "a sample dropped": (lambda s: s[:3] + s[4:], r"computed for 8 samples and 7 came .*request-\d+ is only on one"),
    "a sample twice": (lambda s: [*s, s[0]], r"computed for 8 samples and 9 came"),
    "order rotated": (lambda s: s[1:] + s[:1], r"came out of order"),
}


@pytest.mark.parametrize(("change", "message"), MIXED_UP.values(), ids=MIXED_UP.keys())
@pytest.mark.parametrize("config", [{}, {"ppo_mini_batch_size": 3, "ppo_max_token_len_per_gpu": 20, "shuffle": True}])
def test_samples_mixed_up_on_the_way_to_the_actor_stop_it(change, message, config):
    sequences = _of_one_length(8)
    actor = tiny_actor(use_kl_loss=True, **config)
    before, updates = weights_of(actor), actor.num_updates
    with pytest.raises(LedgerError, match=message):
        actor.update(change(sequences), ledger=Ledger(sequences))
    assert actor.num_updates == updates
    if not config:  # one mini-batch
        assert_same_bits(weights_of(actor), before)


@pytest.mark.parametrize("config", [{}, {"ppo_max_token_len_per_gpu": 24}, {"ppo_mini_batch_size": 4, "shuffle": True}])
@pytest.mark.parametrize("change", [_swap_advantages, _flip, _flip_one_token, _rotate_references, _other_tokens])
def test_samples_mixed_up_while_packing_stop_it_too(monkeypatch, change, config):
    """Behind the check of what came to the actor: in the tensors that the loss reads."""
    packed = actor_module.policy_targets
    if change is _other_tokens:
        pack = actor_module.group_batch

        def group_batch(tokens, group, device):
            return pack([replace(t, response=t.response[::-1]) for t in tokens], group, device)

        monkeypatch.setattr(actor_module, "group_batch", group_batch)
    else:
        monkeypatch.setattr(
            actor_module,
            "policy_targets",
            lambda chosen, *rest: packed(change(chosen) if len(chosen) > 3 else chosen[1:] + chosen[:1], *rest),
        )
    with pytest.raises(LedgerError, match="no optimizer step has used them"):
        tiny_actor(use_kl_loss=True, **config).update(_of_one_length(8))


def _lost(batches):
    return [batches[0][:-1], *batches[1:]]


def _doubled(batches):
    return [batches[0][:-1] + batches[0][:1], *batches[1:]]


@pytest.mark.parametrize(("change", "word"), [(_lost, "missing from"), (_doubled, "(missing from|repeated in)")])
@pytest.mark.parametrize("where", ["mini-batches", "micro-batches"])
def test_a_sample_that_batching_loses_or_repeats_is_named(monkeypatch, where, change, word):
    actor = tiny_actor(ppo_mini_batch_size=4, ppo_max_token_len_per_gpu=40)
    if where == "mini-batches":
        monkeypatch.setattr(actor_module, "mini_batches", lambda *a: change(mini_batches(*a)))
    else:
        pack = actor_module.pack
        monkeypatch.setattr(actor_module, "pack", lambda *a, **k: change(pack(*a, **k)))
    with pytest.raises(LedgerError, match=rf"request request-\d+ is {word} its batches"):
        actor.update(_of_one_length(8))


def test_a_ledger_changes_nothing():
    sequences = random_sequences(12, ref_logprobs=True)
    config = {"ppo_mini_batch_size": 5, "ppo_max_token_len_per_gpu": 30, "shuffle": True, "ppo_epochs": 2}
    with_ledger, without = tiny_actor(**config), tiny_actor(**config)
    assert with_ledger.update(sequences, ledger=Ledger(sequences)) == without.update(sequences)
    assert_same_bits(weights_of(with_ledger), weights_of(without))


def test_a_checksum_is_of_one_sample_wherever_it_is_packed():
    rng = np.random.default_rng(0)
    lengths = [3, 1, 5, 2]
    columns = [torch.from_numpy(rng.normal(size=11).astype(np.float32)) for _ in range(3)]
    tokens = torch.from_numpy(rng.integers(0, 50, 11))
    whole = checksums(tokens, PolicyTargets(*columns), torch.tensor(lengths))
    assert whole.shape == (4, 4)
    assert len(set(whole.flatten().tolist())) == 16
    parts = [column.split(lengths) for column in (tokens, *columns)]
    for at, length in enumerate(lengths):
        own = [part[at] for part in parts]
        alone = checksums(own[0], PolicyTargets(*own[1:]), torch.tensor([length]))
        assert torch.equal(alone[:, 0], whole[:, at])


def test_constant_advantages_of_any_length_change_with_their_sign():
    for length in (1, 2, 4, 7, 64, 1024, 4096):
        value = torch.full((length,), 0.75)
        zero = torch.zeros(length)
        tokens = torch.arange(length)
        sums = [checksums(tokens, PolicyTargets(zero, a, None), torch.tensor([length])) for a in (value, -value, zero)]
        assert len({int(s[2, 0]) for s in sums}) == 3
        half = value.clone()
        half[: length // 2] *= -1
        other = value.clone()
        other[length // 2 :] *= -1
        if length > 1:
            halves = [PolicyTargets(zero, a, None) for a in (half, other)]
            left, right = (checksums(tokens, targets, torch.tensor([length])) for targets in halves)
            assert int(left[2, 0]) != int(right[2, 0])
