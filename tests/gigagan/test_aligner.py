import pytest
import torch
from safetensors.torch import save_file

from gigagan.models.aligner import Aligner, cross_fitted_similarity, fit_aligner

N, D, E = 300, 7, 5


@pytest.fixture(scope="module")
def pairs():
    """Captions that are a noisy linear map of the images, both away from the origin."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(N, D, generator=generator) + 3
    mapping = torch.randn(D, E, generator=generator)
    texts = images @ mapping + 0.1 * torch.randn(N, E, generator=generator) - 2
    return images, texts


def test_pairs_are_similar_and_mismatched_ones_are_not(pairs):
    images, texts = pairs
    aligner = fit_aligner(images, texts, ridge=1e-3)
    assert aligner.similarity(images, texts).min() > 0.9
    assert aligner.similarity(images, texts.roll(1, dims=0)).mean().abs() < 0.1


def test_the_solution_is_the_one_of_ridge_regression(pairs):
    images, texts = (t.double() for t in pairs)
    x, y = images - images.mean(0), texts - texts.mean(0)
    penalty = 0.3 * x.var(0, unbiased=False).mean()
    rows = torch.cat([x, (penalty * N).sqrt() * torch.eye(D, dtype=torch.float64)])
    targets = torch.cat([y, torch.zeros(D, E, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, targets).solution
    ours = fit_aligner(images, texts, ridge=0.3).projection_DE
    torch.testing.assert_close(ours, expected.float(), atol=1e-5, rtol=1e-5)


def test_similarity_does_not_change_with_the_scale_of_the_features(pairs):
    images, texts = pairs
    scores = fit_aligner(images, texts).similarity(images, texts)
    scaled = fit_aligner(100 * images, texts).similarity(100 * images, texts)
    torch.testing.assert_close(scaled, scores, atol=1e-4, rtol=0)


def test_fitting_twice_gives_the_same_bits(pairs):
    assert torch.equal(fit_aligner(*pairs).projection_DE, fit_aligner(*pairs).projection_DE)


def test_image_side_is_differentiable(pairs):
    images, texts = pairs
    moving = images[:3].clone().requires_grad_()
    fit_aligner(images, texts).similarity(moving, texts[:3]).sum().backward()
    assert moving.grad.abs().sum() > 0


def test_an_aligner_survives_its_file(pairs, tmp_path):
    aligner = fit_aligner(*pairs, image_encoder="a", text_encoder="b", image_px=96)
    aligner.save(tmp_path / "aligner.safetensors")
    loaded = Aligner.load(tmp_path / "aligner.safetensors")
    assert (loaded.image_encoder, loaded.text_encoder, loaded.image_px) == ("a", "b", 96)
    assert torch.equal(loaded.projection_DE, aligner.projection_DE)
    torch.testing.assert_close(loaded.similarity(*pairs), aligner.similarity(*pairs))
    assert [p.name for p in tmp_path.iterdir()] == ["aligner.safetensors"]


def test_another_safetensors_file_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not an aligner"):
        Aligner.load(tmp_path / "other.safetensors")


def test_cross_fitting_finds_planted_wrong_captions(pairs):
    images, texts = pairs
    texts = texts.clone()
    wrong = torch.arange(0, N, 10)
    texts[wrong] = texts[wrong.roll(1)]
    scores = cross_fitted_similarity(images, texts, folds=5, seed=0)
    assert torch.isin(scores.argsort()[: len(wrong)], wrong).float().mean() > 0.8


def test_a_pair_is_scored_by_a_fit_that_did_not_see_it():
    """With more features than pairs a fit explains anything that it saw, and nothing else."""
    generator = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(40, 60, generator=generator) for _ in range(2))
    seen = fit_aligner(images, texts, ridge=1e-4).similarity(images, texts)
    unseen = cross_fitted_similarity(images, texts, folds=5, seed=0, ridge=1e-4)
    assert seen.mean() > 0.9
    assert unseen.mean().abs() < 0.1


def test_folds_depend_on_the_seed_alone(pairs):
    first = cross_fitted_similarity(*pairs, seed=3)
    assert torch.equal(first, cross_fitted_similarity(*pairs, seed=3))
    assert not torch.equal(first, cross_fitted_similarity(*pairs, seed=4))


def test_too_few_pairs_are_refused():
    one = torch.zeros(1, D), torch.zeros(1, E)
    with pytest.raises(ValueError, match="two pairs or more"):
        fit_aligner(*one)
    with pytest.raises(ValueError, match="3 image and 2 text"):
        fit_aligner(torch.zeros(3, D), torch.zeros(2, E))
    with pytest.raises(ValueError, match="folds"):
        cross_fitted_similarity(torch.zeros(3, D), torch.zeros(3, E), folds=2)
