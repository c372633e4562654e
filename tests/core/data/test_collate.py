from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sapt_core.data.collate import IGNORED_LABEL, MEGA_BATCHES, Collator, epoch_batches

X = IGNORED_LABEL
ROWS = [
    {"prompt_ids": [5, 6, 7], "answer_ids": [8, 1], "query_start": 1},
    {"prompt_ids": [5], "answer_ids": [9, 9, 9, 1], "query_start": 0},
]


def test_encoder_decoder_training_batch() -> None:
    batch = Collator(pad_token_id=0, is_encoder_decoder=True)(ROWS)
    assert batch.input_ids.tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.query_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.labels is not None
    assert batch.labels.tolist() == [[8, 1, X, X], [9, 9, 9, 1]]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.labels.dtype == torch.long
    assert batch.query_mask.dtype == torch.bool


def test_decoder_only_training_batch_hides_the_answer_from_the_query() -> None:
    batch = Collator(pad_token_id=0, is_encoder_decoder=False)(ROWS)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1], [5, 9, 9, 9, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert batch.query_mask.tolist() == [[True] * 3 + [False] * 2, [True] + [False] * 4]
    assert batch.labels is not None
    assert batch.labels.tolist() == [[X, X, X, 8, 1], [X, 9, 9, 9, 1]]


def test_decoder_only_labels_begin_where_the_first_answer_is_predicted() -> None:
    longer = {"prompt_ids": [5, 6, 7, 4], "answer_ids": [2, 1]}
    batch = Collator(pad_token_id=0, is_encoder_decoder=False)([ROWS[0], longer])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1, 0], [5, 6, 7, 4, 2, 1]]
    assert batch.labels is not None
    assert batch.labels.tolist() == [[X, 8, 1, X], [X, X, 2, 1]]


def test_padding_that_equals_eos_keeps_the_answers_eos() -> None:
    short = {"prompt_ids": [5], "answer_ids": [1]}
    batch = Collator(pad_token_id=1, is_encoder_decoder=False)([ROWS[0], short])
    assert batch.labels is not None
    assert batch.labels[1].tolist() == [X, 1, X, X, X]
    assert batch.attention_mask[1].tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(("is_encoder_decoder", "second"), [(True, [5, 0, 0]), (False, [0, 0, 5])])
def test_prompts_are_padded_for_generation(is_encoder_decoder: bool, second: list[int]) -> None:
    batch = Collator(0, is_encoder_decoder).prompts([{"prompt_ids": row["prompt_ids"]} for row in ROWS])
    assert batch.labels is None
    assert batch.input_ids.tolist() == [[5, 6, 7], second]
    assert batch.attention_mask[1].tolist() == [int(value > 0) for value in second]
    assert torch.equal(batch.query_mask, batch.attention_mask.bool())
    assert batch.left_padded is not is_encoder_decoder
    assert batch.to("cpu").left_padded is batch.left_padded
    assert not Collator(0, is_encoder_decoder).prompts([ROWS[0], ROWS[0]]).left_padded
    assert not Collator(0, is_encoder_decoder)(ROWS).left_padded


@pytest.mark.parametrize("is_encoder_decoder", [True, False])
def test_a_row_of_which_the_query_sees_nothing_is_refused(is_encoder_decoder: bool) -> None:
    """Where the mask is made: to look at it on a GPU would be a wait in every forward."""
    hidden = {"prompt_ids": [5, 6], "answer_ids": [1], "query_start": 2}
    empty = {"prompt_ids": [], "answer_ids": [1], "query_start": 0}
    collator = Collator(0, is_encoder_decoder, definition_in_query=False)
    for row, made in ((hidden, collator), (empty, Collator(0, is_encoder_decoder))):
        with pytest.raises(ValueError, match="at least one token that the query may see"):
            made([ROWS[0], row])
        with pytest.raises(ValueError, match="at least one token that the query may see"):
            made.prompts([ROWS[0], row])
    assert Collator(0, is_encoder_decoder)([hidden]).query_mask.sum() == 2


@given(
    st.lists(
        st.tuples(st.lists(st.integers(2, 99), min_size=1, max_size=9), st.lists(st.integers(2, 99), max_size=5)),
        min_size=1,
        max_size=6,
    )
)
def test_decoder_only_masks_part_every_row(rows: list[tuple[list[int], list[int]]]) -> None:
    batch = Collator(0, False)([{"prompt_ids": p, "answer_ids": [*a, 1]} for p, a in rows])
    assert batch.labels is not None
    for i, (prompt, answer) in enumerate(rows):
        assert batch.input_ids[i][batch.query_mask[i]].tolist() == prompt
        assert batch.labels[i][batch.labels[i] != X].tolist() == [*answer, 1]
    # Each real token is either looked at or learnt, never both.
    first = min(len(prompt) for prompt, _ in rows) - 1
    learnt = torch.zeros_like(batch.query_mask)
    learnt[:, first:] = batch.labels != X
    assert torch.equal(batch.query_mask ^ learnt, batch.attention_mask.bool())


def test_a_batch_moves_whole() -> None:
    collator = Collator(0, True)
    moved = collator(ROWS).to("meta")
    assert {moved.input_ids.device.type, moved.attention_mask.device.type, moved.query_mask.device.type} == {"meta"}
    assert moved.labels is not None
    assert moved.labels.device.type == "meta"
    assert collator.prompts(ROWS).to("cpu").labels is None


@given(st.lists(st.integers(1, 500), max_size=300), st.integers(1, 40), st.integers(0, 9), st.integers(0, 9))
def test_an_epoch_holds_every_row_once(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(lengths, batch_size, seed, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert batches == epoch_batches(lengths, batch_size, seed, epoch)


def test_seed_and_epoch_change_the_order() -> None:
    lengths = [1 + i % 7 for i in range(100)]
    orders = [epoch_batches(lengths, 8, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_the_order_is_fixed_for_good() -> None:
    # A run that is resumed under another Python must find the same batches.
    assert epoch_batches([3, 1, 2, 5, 4], 2, seed=0, epoch=0) == [[3, 1], [0, 2], [4]]


def test_like_lengths_save_padding_and_batches_stay_shuffled() -> None:
    lengths = [1 + (i * 7919) % 512 for i in range(2000)]
    batches = epoch_batches(lengths, 16, seed=3, epoch=1)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest != sorted(longest, reverse=True)
    assert len(batches) > 2 * MEGA_BATCHES
