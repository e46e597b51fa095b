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


def test_hinge_losses_are_their_formula_weighted_over_predictions():
    logits = [torch.tensor([[-3.0, 0.5], [1.0, 2.5]]), torch.tensor([[0.25], [-0.75]])]
    weights = [0.6, 0.4]
    real, fake, drawn = (
        [sum(of(x) for x in part.flatten().tolist()) / part.numel() for part in logits]
        for of in (lambda x: max(0, 1 - x), lambda x: max(0, 1 + x), lambda x: -x)
    )
    for loss, expected in (
        (losses.hinge_real, real),
        (losses.hinge_fake, fake),
        (losses.hinge_generator, drawn),
    ):
        total = sum(w * value for w, value in zip(weights, expected, strict=True))
        assert loss(logits, weights).item() == pytest.approx(total)
        assert loss([x.bfloat16() for x in logits], weights).dtype == torch.float32


def test_beyond_the_margin_the_hinge_gives_d_no_gradient_and_g_a_constant_one():
    x = torch.tensor([[5.0, 0.5]], requires_grad=True)
    losses.hinge_real([x], [1.0]).backward()
    assert x.grad.tolist() == [[0, -0.5]]
    x.grad = None
    losses.hinge_generator([x], [1.0]).backward()
    assert x.grad.tolist() == [[-0.5, -0.5]]


def test_guidance_is_the_squared_angle_and_has_a_slope_everywhere():
    images = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]], requires_grad=True)
    texts = torch.tensor([[0.0, 1.0], [0.0, 5.0], [1.0, 0.0]])
    angles = torch.tensor([math.pi / 2, 0.0, math.pi / 4])
    loss = losses.squared_angle(images, texts)
    torch.testing.assert_close(loss, angles.square().mean(), rtol=1e-4, atol=1e-5)
    loss.backward()
    assert images.grad.isfinite().all()
    assert images.grad[0].norm() > 0
