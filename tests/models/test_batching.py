import numpy as np
import pytest
from hypothesis import given, strategies as st

from ketchup_cache.models.batching import token_budget_batches

rows = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30), st.integers(0, 4)), max_size=40)


@given(rows, st.integers(1, 300))
def test_every_row_once_within_the_budget(rows, budget):
    prompts, completions, index = (np.array([row[i] for row in rows], dtype=int) for i in range(3))
    batches = token_budget_batches(prompts, completions, budget, prompt_index=index)
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
    for batch in batches:
        padded = sum(max(lengths[row] for row in batch) for lengths in (prompts, completions)) * len(batch)
        assert padded <= budget or len(batch) == 1


def test_rows_of_one_prompt_stand_together_and_are_split_only_by_the_budget():
    prompts, completions, index = [5] * 6, [2, 9, 3, 2, 9, 3], [0, 1, 2, 0, 1, 2]
    (batch,) = token_budget_batches(prompts, completions, 1000, prompt_index=index)
    assert [index[row] for row in batch] == [0, 0, 1, 1, 2, 2]
    split = token_budget_batches(prompts, completions, 14, prompt_index=index)
    assert [batch.tolist() for batch in split] == [[0, 3], [1], [4], [2], [5]]


def test_similar_lengths_share_a_batch():
    batches = token_budget_batches([100, 3, 99, 2], [10, 1, 10, 1], 220)
    assert [sorted(batch.tolist()) for batch in batches] == [[1, 3], [0, 2]]


@pytest.mark.parametrize("budget", [1, 10_000])
def test_no_rows_give_no_batches(budget):
    assert token_budget_batches([], [], budget) == []


def test_an_outlier_does_not_pad_a_full_batch():
    """2,400 tokens of short rows are enough for a batch; one long row would quadruple each of them."""
    prompts, completions = [100] * 20 + [480], [20] * 21
    batches = token_budget_batches(prompts, completions, 100_000)
    assert [len(batch) for batch in batches] == [20, 1]
    # few short rows are not worth a batch of their own
    assert len(token_budget_batches(prompts[-4:], completions[-4:], 100_000)) == 1
    # and what one prompt's rows share is worth more than the padding
    lengths = [20] * 20 + [400]
    (batch,) = token_budget_batches([100] * 21, lengths, 100_000, prompt_index=[7] * 21)
    assert len(batch) == 21
