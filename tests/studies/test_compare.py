import numpy as np
import pytest
from scipy import stats

from studies._compare import agreement, difference, mean_of, spread


def test_the_spread_is_pooled_within_settings():
    values = {"a": [1.0, 3.0], "b": [10.0, 10.0, 16.0], "c": [7.0]}
    common = spread(values)
    assert common.freedom == 3
    assert common.deviation == pytest.approx(np.sqrt((2 + 24) / 3))


def test_intervals_are_student_s():
    rng = np.random.default_rng(0)
    values = {name: list(rng.normal(size=5)) for name in "abcdefg"}
    common = spread(values)
    t = stats.t.ppf(0.975, 28)
    found = mean_of(values["a"], common)
    assert found.high - found.value == pytest.approx(t * common.deviation / np.sqrt(5))
    change = difference(values["b"], values["a"], common)
    assert change.value == pytest.approx(np.mean(values["b"]) - np.mean(values["a"]))
    assert change.high - change.value == pytest.approx(t * common.deviation * np.sqrt(2 / 5))


def test_intervals_cover_what_they_should():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(400):
        values = {name: list(rng.normal(size=3)) for name in "abcd"}
        found = mean_of(values["a"], spread(values))
        hits += found.low <= 0 <= found.high
    assert 0.92 < hits / 400 < 0.98


def test_one_seed_each_has_no_spread():
    with pytest.raises(ValueError, match="no setting has two seeds"):
        spread({"a": [1.0], "b": [2.0]})


def test_the_same_order_is_1_and_the_reverse_minus_1():
    theirs = {name: float(i) for i, name in enumerate("abcdefgh")}
    same = {name: [10 * v, 10 * v + 1] for name, v in theirs.items()}
    found = agreement(same, theirs)
    assert found.rho.value == pytest.approx(1)
    assert found.rho.low == pytest.approx(1)
    assert found.p_value < 0.001
    reverse = {name: [-v for v in vs] for name, vs in same.items()}
    assert agreement(reverse, theirs).rho.value == pytest.approx(-1)


def test_the_value_is_scipy_s_with_ties_and_where_nothing_differs_there_is_none():
    theirs = {name: float(i // 2) for i, name in enumerate("abcdefgh")}
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    ours = {name: [v] for name, v in zip(theirs, values, strict=True)}
    expected = stats.spearmanr(values, list(theirs.values()))
    found = agreement(ours, theirs)
    assert found.rho.value == pytest.approx(expected.statistic)
    assert abs(found.p_value - expected.pvalue) < 0.1
    assert np.isnan(agreement({name: [2.0] for name in theirs}, theirs).rho.value)


def test_orders_by_lot_have_intervals_around_0():
    rng = np.random.default_rng(3)
    theirs = {name: float(i) for i, name in enumerate("abcdefghijkl")}
    by_lot = {name: list(rng.normal(size=3)) for name in theirs}
    found = agreement(by_lot, theirs)
    assert found.rho.low < 0 < found.rho.high
    assert found.p_value > 0.05


def test_only_what_is_in_both_orders_counts():
    theirs = {name: float(i) for i, name in enumerate("abcde")}
    ours = {**{name: [v] for name, v in theirs.items()}, "more": [99.0]}
    assert agreement(ours, theirs).rho.value == pytest.approx(1)
    with pytest.raises(ValueError, match="needs four"):
        agreement({"a": [1.0], "b": [2.0], "more": [3.0]}, theirs)
