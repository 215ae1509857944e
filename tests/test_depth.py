"""The dial of depth: hand-computed recipes, and larger models get more tokens, larger batches and smaller steps."""

import itertools

import pytest

from fastlm.depth import DEEPEST, budget, num_parameters, shape
from fastlm.models import GPTConfig


def model(depth: int, **fields: int) -> GPTConfig:
    sizes = {"vocab_size": 2048, "sequence_length": 256}
    return GPTConfig.llama(tie_embeddings=True, **(sizes | shape(depth) | fields))


def test_shape_is_64_a_layer_in_whole_heads_of_128():
    assert [shape(depth)["hidden_size"] for depth in (1, 2, 3, 12, 13, 20)] == [128, 128, 256, 768, 896, 1280]
    assert shape(12) == {"num_layers": 12, "hidden_size": 768, "num_heads": 6}


@pytest.mark.parametrize("depth", [0, -3, DEEPEST + 1])
def test_shape_refuses_a_depth_out_of_range(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}, expected an integer from 1 to {DEEPEST}"):
        shape(depth)


def test_budget_at_depth_12_is_as_computed_by_hand():
    # a block: 4 * 768^2 of attention, 3 * 768 * 2048 of the MLP, two norms; all tied to an embedding of 2048 rows
    parameters = 12 * (2_359_296 + 4_718_592 + 1_536) + 2048 * 768 + 768
    assert num_parameters(model(12)) == parameters == 86_526_720
    # D = 1.7305e9; F = (509,607,936 + 28,311,552) * D = 9.3089e17, of which log10 is 17.9689
    # B = 0.2920 * 10^5.8776 = 220,300 tokens = 860.5 rows, nearest 2^10; rate 0.3118 * 10^-2.2461 = 0.001769
    assert budget(model(12)) == (20 * parameters, 1024, 0.0018)


def test_budget_at_depth_4_is_as_computed_by_hand():
    # 4 * (4 * 256^2 + 3 * 256 * 704 + 512) + 2048 * 256 + 256 = 3,737,856 parameters
    # F = (18,874,368 + 3,145,728) * 74,757,120 = 1.6462e15, log10 15.2165
    # B = 0.2920 * 10^4.97731 = 27,713 tokens = 108.3 rows, nearest 2^7; rate 0.3118 * 10^-1.90206 = 0.003907
    assert budget(model(4)) == (20 * 3_737_856, 128, 0.0039)


def test_budget_rounds_batches_to_the_nearest_power_of_two():
    # F = 6.7372e16: B = 0.2920 * 10^5.50460 = 93,320 tokens = 364.5 rows, above 2^8.5 = 362.0
    assert budget(model(7)).batch_rows == 512
    # F = 4.5264e18: B = 0.2920 * 10^6.10230 = 369,560 tokens = 1443.6 rows, below 2^10.5 = 1448.2
    assert budget(model(15)).batch_rows == 1024


def test_budget_grows_with_depth_and_its_learning_rate_falls():
    budgets = [budget(model(depth)) for depth in range(1, 20)]
    for smaller, larger in itertools.pairwise(budgets):
        assert larger.tokens > smaller.tokens
        assert larger.batch_rows >= smaller.batch_rows
        assert larger.learning_rate <= smaller.learning_rate
    assert budgets[-1].batch_rows > budgets[0].batch_rows
    assert budgets[-1].learning_rate < budgets[0].learning_rate


def test_budget_counts_longer_rows_and_larger_vocabularies():
    assert budget(model(4, vocab_size=50257)).tokens > budget(model(4)).tokens
    assert budget(model(4, sequence_length=1024)).batch_rows == 32  # as many tokens in fewer rows


def test_parameters_leave_out_the_padding_of_the_vocabulary():
    tied, untied = (GPTConfig.llama(vocab_size=65, num_layers=1, tie_embeddings=tie) for tie in (True, False))
    assert num_parameters(untied) - num_parameters(tied) == 65 * 768
