import math

import pytest
import torch

from gigagan import losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_extreme_logits_give_finite_losses_and_gradients(dtype, logit):
    x = torch.full((2, 3), logit, dtype=dtype, requires_grad=True)
    loss = losses.as_real([x], [1.0]) + losses.as_fake([x], [1.0])
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert loss.item() == pytest.approx(1e4, rel=1e-2)


def test_an_undecided_discriminator_pays_log_two_per_side():
    zeros = [torch.zeros(2, 3, 3), torch.zeros(2, 5, 5)]
    assert losses.as_real(zeros, [0.25, 0.75]).item() == pytest.approx(math.log(2))
    assert losses.as_fake(zeros, [0.25, 0.75]).item() == pytest.approx(math.log(2))


def test_prediction_weights_sum_to_one_and_favour_the_last_stage():
    weights = losses.prediction_weights([(0, 0), (0, 1), (1, 1)], [0.6, 0.4], intermediate=0.5)
    assert sum(weights) == pytest.approx(1)
    assert weights[1] == pytest.approx(2 * weights[0])
    assert weights[2] / weights[1] == pytest.approx(0.4 / 0.6)


def test_r1_of_linear_predictions_is_the_squared_weighted_sum_over_every_level():
    w0, w1 = torch.randn(3, 4, 4), torch.randn(3, 2, 2)
    x0 = torch.randn(5, 3, 4, 4, requires_grad=True)
    x1 = torch.randn(5, 3, 2, 2, requires_grad=True)
    logits = [(x0 * w0).sum((1, 2, 3))[:, None], (x1 * w1).sum((1, 2, 3))[:, None]]
    penalty = losses.r1_penalty(logits, [0.7, 0.3], [x0, x1])
    expected = (0.7 * w0).square().sum() + (0.3 * w1).square().sum()
    torch.testing.assert_close(penalty, expected)


def test_mismatched_captions_are_never_the_samples_own_nor_equal_to_it():
    torch.manual_seed(0)
    captions = torch.randn(6, 4)
    identity = torch.tensor([0, 1, 0, 2, 3, 1])
    is_same = identity[:, None] == identity[None]
    for _ in range(50):
        is_hard = torch.rand(6) < 0.5
        index, exists = losses.mismatches(captions, is_same, is_hard, torch.rand(6, 6))
        assert (identity[index] != identity).all()
        assert exists.all()


def test_hard_mismatches_are_the_most_similar_other_caption():
    captions = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    index, _ = losses.mismatches(
        captions, torch.eye(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool), torch.rand(3, 3)
    )
    assert index.tolist() == [1, 0, 1]


def test_easy_mismatches_are_uniform():
    torch.manual_seed(0)
    seen = torch.zeros(4)
    for _ in range(400):
        index, _ = losses.mismatches(
            torch.randn(4, 3),
            torch.eye(4, dtype=torch.bool),
            torch.zeros(4, dtype=torch.bool),
            torch.rand(4, 4),
        )
        seen[index[0]] += 1
    assert seen[0] == 0
    assert (seen[1:] > 90).all()


def test_a_batch_of_one_caption_has_no_mismatch():
    _, exists = losses.mismatches(
        torch.ones(3, 2),
        torch.ones(3, 3, dtype=torch.bool),
        torch.zeros(3, dtype=torch.bool),
        torch.rand(3, 3),
    )
    assert not exists.any()


def test_info_nce_equals_its_definition():
    torch.manual_seed(0)
    images, texts = torch.randn(3, 5), torch.randn(3, 5)
    total = 0.0
    for b in range(3):
        cosines = [torch.cosine_similarity(images[b], texts[j], dim=0) * 7 for j in range(3)]
        total -= torch.stack(cosines).log_softmax(0)[b]
    torch.testing.assert_close(losses.info_nce(images, texts, scale=7), total / 3)
