"""Packed rows, and their order under context parallelism."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.data.packing import cp_index, pack, pack_all, pack_top, padded_lengths
from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.data.top_tokens import TopTokens


def make_sample(prompt: int, spans: list[tuple[int, bool]], seed: int = 0) -> Sample:
    """Makes a sample of spans: (number of tokens, whether the policy generated them)."""
    rng = np.random.default_rng(seed)
    sample = Sample.start(Prompt(f"p{seed}", "", tuple(rng.integers(2, 99, prompt).tolist()), "", ""), 0)
    for version, (tokens, generated) in enumerate(spans, start=1):
        logprobs = (-rng.random(tokens)).tolist() if generated else None
        sample = sample.extend(rng.integers(2, 99, tokens).tolist(), logprobs, weight_version=version)
    return sample


spans = st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=3)
samples = st.builds(make_sample, st.integers(1, 9), spans, st.integers(0, 1000))
micro_batches = st.lists(samples, min_size=1, max_size=5)
degrees = st.sampled_from([1, 2, 3, 4])


@given(micro_batches, degrees, degrees)
def test_labels_and_masks_stand_one_position_before_their_token(batch, cp, tp):
    advantages = [1.5 + i for i in range(len(batch))]
    packed = pack(batch, advantages, cp=cp, tp=tp)
    for i, (sample, advantage) in enumerate(zip(batch, advantages, strict=True)):
        start, n = packed.cu_seqlens[i], len(sample.token_ids)
        row = slice(start, start + n - 1)  # the last token predicts nothing
        assert packed.token_ids[start : start + n].tolist() == sample.token_ids.tolist()
        assert packed.labels[row].tolist() == sample.token_ids[1:].tolist()
        assert packed.loss_mask[row].tolist() == sample.loss_mask[1:].tolist()
        assert packed.rollout_logprobs[row].tolist() == sample.rollout_logprobs[1:].tolist()
        trained = np.flatnonzero(sample.loss_mask)
        versions = [next(span.version for span in sample.versions if span.start <= t < span.end) for t in trained]
        assert packed.versions[row][sample.loss_mask[1:]].tolist() == versions
        assert packed.advantages[row].tolist() == (sample.loss_mask[1:] * np.float32(advantage)).tolist()
        assert packed.valid[start : packed.cu_seqlens[i + 1]].sum() == n
        assert packed.valid[start : start + n].all()


@given(micro_batches, degrees, degrees)
def test_every_response_token_is_trained_on_exactly_once(batch, cp, tp):
    packed = pack(batch, [1.0] * len(batch), cp=cp, tp=tp)
    per_sequence = np.bincount(packed.sequence_ids, weights=packed.loss_mask, minlength=len(batch))
    assert per_sequence.tolist() == [sample.response_tokens for sample in batch]
    assert not packed.loss_mask[~packed.valid].any()
    assert not packed.advantages[~packed.loss_mask].any()
    assert not packed.rollout_logprobs[~packed.loss_mask].any()


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@given(micro_batches)
def test_rows_divide_among_ranks_with_minimal_padding(cp, tp, batch):
    packed = pack(batch, [0.0] * len(batch), cp=cp, tp=tp)
    lengths = np.diff(packed.cu_seqlens)
    multiple = 2 * cp if cp > 1 else 1
    assert packed.tokens == packed.cu_seqlens[-1] == lengths.sum()
    assert packed.tokens % cp == 0
    assert packed.tokens // cp % tp == 0
    assert (lengths % multiple == 0).all()
    shortest = [-(-len(s.token_ids) // multiple) * multiple for s in batch]
    assert lengths[:-1].tolist() == shortest[:-1]
    assert lengths[-1] - shortest[-1] < math.lcm(multiple, cp * tp)
    for i, length in enumerate(lengths):
        here = packed.sequence_ids == i
        assert packed.position_ids[here].tolist() == list(range(length))
        assert packed.sequence_ids[packed.cu_seqlens[i] : packed.cu_seqlens[i + 1]].tolist() == [i] * length


def test_without_parallelism_there_is_no_padding():
    packed = pack([make_sample(3, [(4, True)]), make_sample(1, [])], [1.0, 1.0])
    assert packed.valid.all()
    assert packed.cu_seqlens.tolist() == [0, 7, 8]


@pytest.mark.parametrize(("cp", "tp", "row"), [(1, 1, 1), (1, 4, 4), (2, 1, 4), (2, 3, 12), (4, 4, 16)])
def test_an_empty_row_is_only_padding_and_as_short_as_possible(cp, tp, row):
    packed = pack([], [], cp=cp, tp=tp)
    assert packed.is_empty
    assert packed.tokens == row
    assert packed.cu_seqlens.tolist() == [0, row]
    assert packed.position_ids.tolist() == list(range(row))
    assert not packed.loss_mask.any()
    assert not packed.rollout_logprobs.any()
    assert not packed.advantages.any()
    assert not packed.token_ids.any()
    for rank in range(cp):
        assert len(cp_index(packed.cu_seqlens, cp, rank)) * cp == row


def test_an_empty_row_among_equal_rows_repeats_a_sample():
    sample = make_sample(5, [(4, True)])
    first, empty = pack_all([[(sample, 1.0)], []], cp=2, tp=2, equal=True)
    assert empty.is_empty
    assert not first.is_empty
    assert empty.tokens == first.tokens == 12
    assert empty.token_ids.tolist() == [*sample.token_ids, *sample.token_ids[:3]]
    assert [batch.tokens for batch in pack_all([[(sample, 1.0)], []], cp=2, tp=1, equal=False)] == [12, 4]


def test_padding_repeats_its_sequence_from_the_start():
    sample = make_sample(3, [(2, True)])
    packed = pack([sample], [1.0], total=8)
    first, second, third = sample.token_ids[:3].tolist()
    assert packed.token_ids[5:].tolist() == [first, second, third]
    assert packed.labels[:7].tolist() == packed.token_ids[1:].tolist()


def test_equal_rows_have_the_length_of_the_longest():
    parts = [[(make_sample(5, [(n, True)]), 1.0)] for n in (2, 30, 9)]
    packed = pack_all(parts, cp=2, tp=2, equal=True)
    assert {batch.tokens for batch in packed} == {36}
    assert [int(batch.valid.sum()) for batch in packed] == [7, 35, 14]
    assert [batch.tokens for batch in pack_all(parts, cp=2, tp=2, equal=False)] == [8, 36, 16]


@pytest.mark.parametrize("total", [4, 10])
def test_an_impossible_row_length_is_an_error(total):
    with pytest.raises(ValueError, match=f"a row of {total} positions cannot hold 8 in multiples of 4"):
        padded_lengths([3, 4], cp=2, tp=2, total=total)


def test_a_first_token_in_the_loss_mask_is_an_error():
    sample = Sample.start(Prompt("empty", "", (), "", ""), 2).extend([4, 5], [-1.0, -1.0], 0)
    with pytest.raises(ValueError, match="prompt 'empty' sample 2"):
        pack([sample], [1.0])


def test_zigzag_order_by_hand():
    """Two sequences of 8 and 4 tokens on two ranks: rank 0 gets chunks 0 and 3 of each, rank 1 chunks 1 and 2."""
    cu_seqlens = np.array([0, 8, 12])
    assert cp_index(cu_seqlens, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert cp_index(cu_seqlens, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert cp_index(cu_seqlens, 1, 0).tolist() == list(range(12))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), degrees)
def test_slices_of_all_ranks_cover_every_position_once(chunks, cp):
    cu_seqlens = np.cumsum([0, *(n * 2 * cp if cp > 1 else n for n in chunks)])
    slices = [cp_index(cu_seqlens, cp, rank) for rank in range(cp)]
    assert {len(part) for part in slices} == {cu_seqlens[-1] // cp}
    assert sorted(np.concatenate(slices).tolist()) == list(range(cu_seqlens[-1]))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.sampled_from([2, 3, 4]))
def test_causal_attention_costs_the_same_on_every_rank(chunks, cp):
    cu_seqlens = np.cumsum([0, *(n * 2 * cp for n in chunks)])
    positions = np.concatenate([np.arange(n) for n in np.diff(cu_seqlens)])
    work = {int((positions[cp_index(cu_seqlens, cp, rank)] + 1).sum()) for rank in range(cp)}
    assert len(work) == 1


def test_a_sequence_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"\[4, 6\] are not all multiples of 2 \* cp = 4"):
        cp_index(np.array([0, 4, 10]), 2, 0)


@given(micro_batches, degrees, degrees)
def test_likely_tokens_stand_where_their_labels_stand(batch, cp, tp):
    rng = np.random.default_rng(0)
    tops = []
    for sample in batch:
        n = len(sample.response_ids)
        ids = rng.permuted(np.tile(np.arange(100, 109, dtype=np.int32), (n, 1)), axis=1)[:, :3]
        tops.append(TopTokens(ids, -2 - rng.random((n, 3)).astype(np.float32)))
    packed = pack(batch, [1.0] * len(batch), cp=cp, tp=tp)
    row = pack_top(batch, tops, packed.cu_seqlens)
    assert (row.ids.shape, row.logprobs.shape) == ((packed.tokens, 3),) * 2
    for start, sample, top in zip(packed.cu_seqlens, batch, tops, strict=False):
        first = start + len(sample.prompt.token_ids) - 1
        at = slice(first, first + len(top))
        np.testing.assert_array_equal(packed.labels[at], sample.response_ids)
        np.testing.assert_array_equal(row.ids[at], top.ids)
        np.testing.assert_array_equal(row.logprobs[at], top.logprobs)
