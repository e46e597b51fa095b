"""The study of scaling: its law, parts of the pictures, counts, and report."""

import itertools
import json

import numpy as np
import pytest
import torch

from bench.model import gmac
from gigagan import losses
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.layers import pyramid
from gigagan.models.summary import NUM_TOKENS, summarize
from studies import _law, _scaling_plot, scaling
from studies import _scaling_tables as tables

LAW_7 = np.array([*np.log([0.05, 0.02, 0.06, 0.11]), 0.35, 0.6, 0.45])
SIZES, PICTURES, SEEN = (2e5, 4e5, 7e5, 1.4e6), (600, 2000, 5300), (1000, 2000, 4000, 8000)
GRID_P3 = np.array([*itertools.product(SIZES, PICTURES, SEEN)])


def test_a_law_is_the_sum_of_its_terms_at_each_point():
    N, D, S = 3e6, 2e3, 5e3
    naive = 0.05 + 0.02 * 3**-0.35 + 0.06 * 2**-0.6 + 0.11 * 5**-0.45
    assert _law.predicted(LAW_7, np.array([[N, D, S]])) == pytest.approx([naive], rel=1e-12)
    unlimited = _law.predicted(LAW_7, np.array([[N, np.inf, S]]))
    assert unlimited == pytest.approx([naive - 0.06 * 2**-0.6])


def test_a_fit_finds_the_exponents_of_what_follows_a_law():
    found_7 = _law.fitted(GRID_P3, _law.predicted(LAW_7, GRID_P3))
    assert found_7[4:] == pytest.approx(LAW_7[4:], rel=1e-3)
    assert np.exp(found_7[:4]) == pytest.approx(np.exp(LAW_7[:4]), rel=1e-2)


def intervals(seed, resamples):
    """Bounds of exponents, fitted to trainings that err as a whole and a little by reading."""
    names = [f"{n} {d}" for n, d, _ in GRID_P3]
    number_P = np.unique(names, return_inverse=True)[1]
    random = np.random.default_rng(seed)
    noise_P = random.normal(0, 0.004, 12)[number_P] + random.normal(0, 0.001, len(GRID_P3))
    loss_P = _law.predicted(LAW_7, GRID_P3) * np.exp(noise_P)
    found_7 = _law.fitted(GRID_P3, loss_P)
    laws_R7 = _law.resampled(found_7, GRID_P3, loss_P, names, resamples=resamples, seed=seed)
    return np.quantile(laws_R7, [0.025, 0.975], axis=0)[:, 4:]


def test_intervals_of_exponents_hold_them_and_say_something():
    low, high = intervals(2, resamples=40)
    assert (low < LAW_7[4:]).all()
    assert (high > LAW_7[4:]).all()
    assert (high - low).max() < 1


@pytest.mark.slow
def test_intervals_hold_exponents_in_nine_of_ten_studies():
    found = [intervals(seed, resamples=60) for seed in range(24)]
    held = [(low < LAW_7[4:]) & (high > LAW_7[4:]) for low, high in found]
    assert np.mean(held, axis=0).min() >= 0.9


@pytest.mark.parametrize(
    ("losses_P", "says"), [(np.ones(5), "5 measurements"), (np.zeros(48), "above 0")]
)
def test_what_no_law_can_be_fitted_to_is_refused(losses_P, says):
    with pytest.raises(ValueError, match=says):
        _law.fitted(GRID_P3[: len(losses_P)], losses_P)


def test_a_power_law_is_found():
    C = np.array([1e12, 3e12, 7e13])
    log_k, kappa = _law.power_law(C, 5 * C**-0.3)
    assert (np.exp(log_k), kappa) == pytest.approx((5, 0.3))


def test_parts_of_the_pictures_are_nested_and_leave_no_concept_out():
    labels = [f"concept {i % 7}" for i in range(7 * 8)]
    keys = [f"{i:05d}" for i in range(len(labels))]
    label_of = dict(zip(keys, labels, strict=True))
    few, more, whole = (scaling.part_of(keys, labels, share) for share in (0.05, 0.375, 1))
    assert few < more < whole == set(keys)
    assert [sum(label_of[key] == f"concept {i}" for key in more) for i in range(7)] == [3] * 7
    assert {label_of[key] for key in few} == set(labels)
    assert scaling.part_of(keys[::-1], labels[::-1], 0.375) == more


def test_all_channel_counts_double_in_two_steps_and_multiply_adds_grow_fourfold():
    small, large = (scaling.config_of("regression", step).generator for step in (-2, 0))
    assert [2 * c for c in small.channels] == list(large.channels)
    assert (2 * small.style_dim, 2 * small.text.width) == (large.style_dim, large.text.width)
    assert not any(large.attention)
    ratio = summarize(large).multiply_adds / summarize(small).multiply_adds
    assert ratio == pytest.approx(4, rel=0.01)


def test_longer_trainings_end_at_the_compute_of_the_largest_width():
    at = {step: max(scaling.lengths_of("longer", step).values()) for step in (-2, -1, 0)}
    assert at == {-2: 64_000, -1: 32_000, 0: 16_000}
    assert min(scaling.lengths_of("longer", -2).values()) > max(scaling.REGRESSION.values())


def test_a_step_of_the_regression_costs_three_forwards():
    config = scaling.config_of("regression", -2).generator
    with torch.device("meta"):
        g, B = Generator(config), 2
        text = TextFeatures(
            torch.empty(B, NUM_TOKENS - 1, 384),
            torch.ones(B, NUM_TOKENS - 1, dtype=torch.bool),
            torch.empty(B, 384),
        )
        z_BZ, real = torch.empty(B, config.latent_dim), pyramid(torch.empty(B, 3, 32, 32), 4)
        step = gmac(lambda: losses.regression(g(z_BZ, text), real).backward())
    assert step / B == pytest.approx(3e-9 * summarize(config).multiply_adds, rel=0.02)


def test_the_loss_that_is_measured_is_the_one_that_is_trained():
    random = torch.Generator().manual_seed(3)
    real_NCHW = torch.rand(5, 3, 32, 32, generator=random)
    drawn = [torch.rand(x.shape, generator=random) for x in pyramid(real_NCHW, 4)]
    found_N = scaling.losses_of(drawn, real_NCHW)
    assert found_N.shape == (5,)
    expected = losses.regression(drawn, pyramid(real_NCHW, 4))
    assert found_N.mean() == pytest.approx(float(expected), rel=1e-5)


def test_a_regression_never_leaves_its_warm_start_nor_its_full_rate():
    from gigagan.training.phases import phase_at

    config = scaling.config_of("regression", 0)
    late = phase_at(config, max(scaling.REGRESSION.values()))
    assert not late.has_discriminator
    assert late.generator_lr == config.warm_start.lr
    assert phase_at(scaling.config_of("adversarial", 0), 0).regression == 0


# ---- the report ----------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Records of all trainings of the queue, as if they followed the law exactly."""
    monkeypatch.setattr(scaling, "RESAMPLES", 10)
    folder = tmp_path / "results"
    folder.mkdir()
    place = scaling.Place(tmp_path, tmp_path, tmp_path, folder)
    widths = sorted({one.about["width"] for one in scaling.trainings(place)})
    counted = {f"{width:g}": 1e8 * width**2 for width in widths}
    paper = {"multiply_adds": 10**12, "parameters": 7 * 10**8, "images": 10**9}
    compute = {"regression": counted, "adversarial": counted, "paper_64": paper}
    (folder / scaling.COMPUTE).write_text(json.dumps(compute))
    for one in scaling.trainings(place):
        size, pictures = 7e5 * one.about["width"] ** 2, round(5_300 * one.about["share"])
        readings = {}
        for name, images in one.readings.items():
            seen = 16 * -(-images // 16)
            y = float(_law.predicted(LAW_7, np.array([[size, pictures, seen]]))[0])
            measured = {"loss": y, "standard_error": 0.002}
            if one.about["kind"] == "adversarial":
                measured = {"kid": y, "interval": [y - 0.01, y + 0.01]}
            readings[name] = {"images": images, **measured}
        record = {"about": dict(one.about), "readings": readings, "parameters": round(size)}
        record |= {"data": {"pictures": pictures}, "milliseconds": 4.5}
        (folder / f"{one.name}.json").write_text(json.dumps(record))
    return folder


def test_the_report_finds_the_law_in_the_records_and_predicts_a_width_left_out(results, tmp_path):
    blocks = scaling.report(results, tmp_path)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert all(name.startswith("scaling-") for name in blocks)
    assert "| γ | 0.450 | 0.450 to 0.450 |" in blocks["scaling-law"]
    rows = [row for row in blocks["scaling-left-out"].splitlines() if "% |" in row]
    assert len(rows) == len(scaling.SHARES) * len(scaling.REGRESSION)
    rows += [row for row in blocks["scaling-longer"].splitlines() if "% |" in row]
    assert all(row.split("|")[7].strip() in ("+0.0 %", "-0.0 %") for row in rows)
    assert "× 1.414 | 5,300" in blocks["scaling-kid"]
    assert "κ of KID" in blocks["scaling-paper"]
    assert scaling.report(results, tmp_path) == blocks


def test_the_report_says_what_it_has_before_there_is_a_game(results, tmp_path):
    for file in results.glob("adversarial-*"):
        file.unlink()
    blocks = scaling.report(results, tmp_path)
    assert "κ of KID" not in blocks["scaling-paper"]
    assert "held-out L1" in blocks["scaling-paper"]


def test_the_best_at_a_compute_is_never_worse_than_a_width_that_was_measured(results):
    compute = json.loads((results / scaling.COMPUTE).read_text())
    loss = tables.readings_of(
        scaling._queue.records(results), ["regression"], compute["regression"]
    )
    for one in (one for one in loss if one.share == 1):
        best = _scaling_plot.best(LAW_7, loss, np.array([one.compute]))
        assert best[0] <= one.y * 1.001


@pytest.mark.parametrize("is_empty", [True, False])
def test_too_little_is_one_message(is_empty, results, tmp_path, capsys):
    for file in results.glob("*" if is_empty else "*-width-[01].[47]*"):
        file.unlink()
    asked = ["report", "--results", str(results), "--images", str(tmp_path)]
    assert scaling.main(asked) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "run `python -m studies.scaling run" in said


def test_shards_of_no_filter_are_refused(tmp_path, capsys):
    asked = ["run", "--shards", str(tmp_path / "a" / "032"), "--heldout", str(tmp_path)]
    assert scaling.main([*asked, "--out", str(tmp_path), "--results", str(tmp_path / "r")]) == 1
    assert "kept.parquet" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        scaling.main(["run"])
    assert stopped.value.code == 2
