import numpy as np
import pytest
import scipy.linalg

from gigagan.evaluation.judges.distances import frechet_distance, kernel_distance, mmd2, prdc

RNG = np.random.default_rng(0)


def sets(n, m, d, shift=0.5):
    rng = np.random.default_rng(n * 100 + m)
    mixing = rng.normal(size=(d, d))
    return rng.normal(size=(n, d)) @ mixing, rng.normal(size=(m, d)) + shift


@pytest.mark.parametrize(("n", "m", "d"), [(50, 70, 7), (300, 200, 23), (30, 41, 37)])
def test_frechet_agrees_with_the_matrix_square_root(n, m, d):
    a, b = sets(n, m, d)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    gap = a.mean(0) - b.mean(0)
    expected = gap @ gap + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_agrees_with_the_eigenvalue_form_below_full_rank():
    a, b = sets(10, 12, 30)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    eigenvalues = np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)
    gap = a.mean(0) - b.mean(0)
    expected = gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(eigenvalues).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


def test_frechet_of_a_set_with_itself_is_zero_and_of_a_shift_its_square():
    a, _ = sets(40, 5, 6)
    shift = np.arange(6.0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, a + shift) == pytest.approx(shift @ shift)


def test_frechet_of_two_scales_is_the_closed_form_for_gaussians():
    a, _ = sets(60, 5, 4)
    variance = np.cov(a, rowvar=False).trace()  # N(μ, Σ) and N(3μ, 9Σ): 4 |μ|² + (3 − 1)² tr Σ
    expected = 4 * a.mean(0) @ a.mean(0) + 4 * variance
    assert frechet_distance(a, 3 * a) == pytest.approx(expected)


def test_frechet_is_symmetric():
    a, b = sets(20, 33, 11)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def brute_force_mmd2(a, b):
    def k(x, y):
        return (x @ y / len(x) + 1) ** 3

    def within(s):
        return np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])

    return within(a) + within(b) - 2 * np.mean([k(x, y) for x in a for y in b])


def test_kernel_distance_is_the_mean_over_distinct_pairs():
    a, b = sets(7, 9, 5)
    distance = kernel_distance(a, b, subset_size=5, num_subsets=3)
    assert distance.value == pytest.approx(brute_force_mmd2(a, b))


def test_kernel_distance_sums_in_chunks(monkeypatch):
    a, b = sets(7, 9, 5)
    whole = mmd2(a, b)
    monkeypatch.setattr("gigagan.evaluation.judges.distances._CHUNK", 3)
    assert mmd2(a, b) == pytest.approx(whole)


def test_kernel_distance_is_unbiased_at_small_sizes():
    """Over many draws from one distribution it averages to zero, where FID does not."""
    rng = np.random.default_rng(1)
    draws = [rng.normal(size=(2, 6, 3)) for _ in range(4000)]
    estimates = np.array([mmd2(a, b) for a, b in draws])
    standard_error = estimates.std() / np.sqrt(len(estimates))
    assert abs(estimates.mean()) < 3 * standard_error
    assert min(frechet_distance(a, b) for a, b in draws[:50]) > 0


def test_mean_over_subsets_tends_to_the_estimate_from_all_samples():
    a, b = sets(40, 40, 5)
    distance = kernel_distance(a, b, subset_size=20, num_subsets=2000)
    error = 4 * distance.subset_std / np.sqrt(2000)
    assert abs(distance.subset_mean - distance.value) < error


def test_whole_sets_as_subsets_leave_no_spread():
    a, b = sets(8, 8, 3)
    value, mean, std = kernel_distance(a, b, subset_size=1000, num_subsets=5)
    assert mean == pytest.approx(value)
    assert std == pytest.approx(0, abs=1e-9 * abs(value))


def test_subsets_are_drawn_from_the_seed():
    a, b = sets(30, 30, 4)
    settings = {"subset_size": 10, "num_subsets": 7}
    first = kernel_distance(a, b, seed=1, **settings)
    assert first == kernel_distance(a, b, seed=1, **settings)
    assert first.subset_mean != kernel_distance(a, b, seed=2, **settings).subset_mean


def brute_force_prdc(real, fake, k):
    def radius(s, i):
        return np.sort([np.linalg.norm(s[i] - other) for other in s])[k]

    def near(s, r, x):
        return [np.linalg.norm(s[i] - x) < r[i] for i in range(len(s))]

    real_radius = [radius(real, i) for i in range(len(real))]
    fake_radius = [radius(fake, i) for i in range(len(fake))]
    closest = [min(np.linalg.norm(x - y) for y in fake) for x in real]
    return (
        np.mean([any(near(real, real_radius, x)) for x in fake]),
        np.mean([any(near(fake, fake_radius, x)) for x in real]),
        np.mean([sum(near(real, real_radius, x)) for x in fake]) / k,
        np.mean([c < r for c, r in zip(closest, real_radius, strict=True)]),
    )


@pytest.mark.parametrize("k", [1, 3])
def test_prdc_agrees_with_its_definition(k):
    real, fake = sets(23, 17, 2)
    assert prdc(real, fake, neighbours=k) == pytest.approx(brute_force_prdc(real, fake, k))


def test_prdc_of_far_sets_is_zero_and_of_a_copy_one():
    real = RNG.normal(size=(30, 4))
    assert prdc(real, real + 100) == (0, 0, 0, 0)
    same = prdc(real, real.copy())
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)


def test_bad_features_are_named():
    good = RNG.normal(size=(5, 3))
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 2\)"):
        frechet_distance(good, good[:, :2])
    with pytest.raises(ValueError, match="1 and 5 samples"):
        kernel_distance(good[:1], good)
    with pytest.raises(ValueError, match="second features"):
        frechet_distance(good, np.full((4, 3), np.nan))
    with pytest.raises(ValueError, match="fewer neighbours"):
        prdc(good, good, neighbours=5)
