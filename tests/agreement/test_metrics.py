"""Our metrics against those of the packages that people quote."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cleanfid.resize import build_resizer
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import CenterCrop

from gigagan.evaluation.judges import features as features_module
from gigagan.evaluation.judges.distances import (
    cmmd,
    frechet_distance,
    kernel_distance,
    mmd2,
    mmd2_interval,
    prdc,
)
from gigagan.evaluation.judges.features import (
    PictureError,
    _clip_pixels,
    extract,
    extractor,
    legacy_resize,
    reference,
    reference_texts,
    square,
)
from gigagan.evaluation.judges.fidelity import lpips_pairs, psnr, ssim
from gigagan.evaluation.judges.statistics import (
    Moments,
    bootstrap,
    frechet_from_moments,
    mean_interval,
    subsampled,
)
from gigagan.models import pretrained
from tests.gigagan import small

RANDOM = np.random.default_rng(0)
REAL = RANDOM.normal(size=(211, 24)) @ RANDOM.normal(size=(24, 24)) * 0.3
MADE = RANDOM.normal(size=(173, 24)) @ RANDOM.normal(size=(24, 24)) * 0.3 + 0.2


def test_the_frechet_distance_is_clean_fids(monkeypatch):
    from cleanfid import fid

    root = fid.linalg.sqrtm  # newer SciPy has no `disp`, which clean-fid passes
    monkeypatch.setattr(fid.linalg, "sqrtm", lambda x, disp=True: (root(x), 0.0))
    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (MADE, REAL)]
    theirs = fid.frechet_distance(*moments[0], *moments[1])
    assert frechet_distance(MADE, REAL) == pytest.approx(theirs, rel=1e-6)


def test_the_frechet_distance_is_torch_fidelitys():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    stats = [fid_features_to_statistics(torch.from_numpy(x)) for x in (MADE, REAL)]
    theirs = fid_statistics_to_metric(*stats, False)["frechet_inception_distance"]
    assert frechet_distance(MADE, REAL) == pytest.approx(theirs, rel=1e-6)


def test_kid_is_torch_fidelitys_over_whole_sets():
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = len(MADE)
    theirs = kid_features_to_metric(
        torch.from_numpy(MADE), torch.from_numpy(REAL[:size]), kid_subsets=1, kid_subset_size=size,
        kid_degree=3, kid_gamma=None, kid_coef0=1, verbose=False, rng_seed=0,
    )["kernel_inception_distance_mean"]  # fmt: skip
    ours = kernel_distance(MADE, REAL[:size], num_subsets=1).value
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_precision_and_recall_are_torch_fidelitys():
    from torch_fidelity.metric_prc import prc_features_to_metric

    theirs = prc_features_to_metric(
        torch.from_numpy(REAL), torch.from_numpy(MADE), prc_neighborhood=3, prc_batch_size=50,
        verbose=False,
    )  # fmt: skip
    ours = prdc(REAL, MADE, neighbours=3)
    found = sorted(v for k, v in theirs.items() if k in ("precision", "recall"))
    assert sorted((ours.precision, ours.recall)) == pytest.approx(found, abs=1e-7)


def test_density_and_coverage_are_those_of_their_definition():
    ours = prdc(REAL, MADE, neighbours=4)
    gap = np.linalg.norm(REAL[:, None] - MADE[None], axis=2)
    own = np.sort(np.linalg.norm(REAL[:, None] - REAL[None], axis=2), axis=1)[:, 4]
    assert ours.density == pytest.approx((gap < own[:, None]).sum() / (4 * len(MADE)))
    assert ours.coverage == pytest.approx((gap < own[:, None]).any(axis=1).mean())


def test_parts_do_not_change_precision_and_recall(monkeypatch):
    whole = prdc(REAL, MADE)
    monkeypatch.setattr("gigagan.evaluation.judges.distances._CHUNK", 13)
    assert prdc(REAL, MADE) == pytest.approx(whole)


def test_cmmd_is_the_biased_estimate_of_its_authors():
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (REAL, MADE))
    gamma = 1 / (2 * 10**2)

    def kernel(a, b):
        return np.exp(-gamma * np.square(a[:, None] - b[None]).sum(axis=2)).mean()

    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert cmmd(REAL, MADE) == pytest.approx(expected, rel=1e-6)
    assert cmmd(REAL, REAL) == pytest.approx(0, abs=1e-9)


@pytest.fixture
def quick_inception():
    with small.quick_inception():
        yield


# ---- statistics


def test_moments_do_not_depend_on_how_samples_come():
    whole, parts, merged = Moments(24), Moments(24), Moments(24)
    whole.update(REAL)
    for part in np.array_split(REAL, [1, 5, 90]):
        parts.update(part)
        other = Moments(24)
        other.update(part)
        merged.merge(other)
    for one in (whole, parts, merged):
        np.testing.assert_allclose(one.mean_D, REAL.mean(axis=0), rtol=1e-10)
        np.testing.assert_allclose(one.covariance_DD, np.cov(REAL, rowvar=False), rtol=1e-9)
    other.update(MADE)
    made = Moments(24)
    made.update(MADE)
    assert frechet_from_moments(made, whole) == pytest.approx(
        frechet_distance(MADE, REAL), rel=1e-9
    )


def test_files_larger_than_memory_give_what_arrays_do(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", REAL.astype(np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    whole = frechet_distance(REAL.astype(np.float32), MADE)
    monkeypatch.setattr("gigagan.evaluation.judges.distances._CHUNK", 13)
    assert frechet_distance(mapped, MADE) == pytest.approx(whole, rel=1e-9)


def test_an_interval_of_a_median_covers_it_about_as_often_as_it_says():
    random = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        found = bootstrap(np.median, random.normal(3, 1, 40), resamples=200, seed=trial)
        hits += found.low <= 3 <= found.high
    assert 0.88 <= hits / 200 <= 0.985


@pytest.mark.parametrize("num", [7, 40])
@pytest.mark.parametrize("share", [False, True])
def test_an_interval_of_a_mean_of_few_covers_it_about_as_often_as_it_says(num, share):
    random = np.random.default_rng(1)
    values = [
        random.random(num) < 0.8 if share else random.normal(0.8, 1, num) for _ in range(2000)
    ]
    found = [mean_interval(x) for x in values]
    assert 0.91 <= np.mean([low <= 0.8 <= high for low, high, _ in found]) <= 0.995


def test_what_all_pictures_do_is_no_certainty_and_one_picture_has_no_interval():
    low, high, _ = mean_interval(np.ones(12))
    assert 0.7 < low < 0.9
    assert high == 1
    assert mean_interval(np.array([0.3])) is None


def share_covered(draw, interval, truth=None, trials=300):
    """Of how many fresh pairs of sets the interval holds the truth, or else the mean value."""
    found = [interval(*draw()) for _ in range(trials)]
    truth = np.mean([value for value, _ in found]) if truth is None else truth
    return np.mean([low <= truth <= high for _, (low, high, _) in found])


def kid_interval(a, b):
    return mmd2(a, b), mmd2_interval(a, b)


MIX = np.random.default_rng(5).normal(size=(24, 8))


def features(random, size, shift):
    """Positive and skewed, as those behind a ReLU."""
    return np.maximum(0, 0.2 + 0.2 * (random.normal(size=(size, 8)) + shift) @ MIX.T)


@pytest.mark.parametrize("shift", [0, 0.1, 0.3, 1])
@pytest.mark.parametrize(
    ("num_a", "num_b", "trials"),
    [(40, 60, 300), pytest.param(60, 300, 300, marks=pytest.mark.slow)],
)
def test_a_kernel_distances_interval_covers_what_it_says(num_a, num_b, trials, shift):
    random = np.random.default_rng(11)
    truth = None if shift else 0.0  # equal distributions: it has no bias

    def draw():
        return features(random, num_a, shift), features(random, num_b, 0)

    assert 0.91 <= share_covered(draw, kid_interval, truth, trials) <= 0.985


def test_a_kernel_distances_interval_is_about_as_wide_as_fresh_sets_spread():
    random = np.random.default_rng(12)
    pairs = [(features(random, 50, 0.3), features(random, 70, 0)) for _ in range(200)]
    reach = np.median([(high - low) / 2 for low, high, _ in (mmd2_interval(*p) for p in pairs)])
    assert reach == pytest.approx(1.96 * np.std([mmd2(*p) for p in pairs]), rel=0.2)


def test_a_kernel_distances_interval_is_summed_in_chunks_and_needs_four(monkeypatch):
    a, b = REAL[:11], MADE[:7]
    whole = mmd2_interval(a, b)
    monkeypatch.setattr("gigagan.evaluation.judges.distances._CHUNK", 4)
    np.testing.assert_allclose(mmd2_interval(a, b), whole)
    with pytest.raises(ValueError, match="11 and 3 samples"):
        mmd2_interval(a, b[:3])


@pytest.mark.parametrize(("shift", "low", "high"), [(1, 0.925, 0.98), (0, 0.95, 1)])
def test_an_interval_of_resampled_parts_covers_at_least_what_it_says(shift, low, high):
    random = np.random.default_rng(2)

    def draw():
        return random.normal(size=(60, 3)), random.normal(shift, 1, size=(80, 3))

    def interval(a, b):
        value = frechet_distance(a, b)
        return value, subsampled(frechet_distance, a, b, value=value)

    assert low <= share_covered(draw, interval) <= high


# ---- pictures


def picture(side=37, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side + 4, 3), np.uint8)


SIZES = [(w, h) for w in (8, 9, 10, 11, 12, 23) for h in range(7, 20)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_centre_square_is_torchvisions(width, height):
    random = np.random.default_rng(width * 100 + height)
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
    side = min(image.size)
    assert np.array_equal(square(image, side), CenterCrop(side)(image))


@pytest.mark.parametrize(
    ("width", "height"), [(37, 37), (61, 40), (40, 61), (43, 40), (97, 31), (31, 98), (20, 27)]
)
def test_the_pixels_of_clip_are_open_clips(width, height):
    random = np.random.default_rng(width * 100 + height)
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
    theirs = image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(image)
    ours = torch.from_numpy(_clip_pixels(image, 32).copy())
    assert torch.equal(ours, (theirs * 255).round().byte().permute(1, 2, 0))


def test_the_clean_resize_is_clean_fids():
    one = extractor("inception-2015-12-05/clean")
    image = picture(64)
    expected = build_resizer("clean")(image)
    assert np.array_equal(one.prepare(Image.fromarray(image)), expected)


@pytest.mark.parametrize("side", [64, 299, 400])
def test_the_legacy_resize_is_the_one_inside_the_published_network(side):
    """By the grid that NVIDIA's TorchScript samples its input at."""
    image = picture(side)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    _, C, H, W = x.shape
    theta = torch.eye(2, 3, dtype=torch.float64)
    theta[0, 2] += theta[0, 0] / W - theta[0, 0] / 299
    theta[1, 2] += theta[1, 1] / H - theta[1, 1] / 299
    grid = F.affine_grid(theta[None], [1, C, 299, 299], align_corners=False)
    expected = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    np.testing.assert_allclose(legacy_resize(image), expected[0].permute(1, 2, 0), atol=1e-2)


@pytest.mark.usefixtures("quick_inception")
def test_one_pass_serves_all_judges_and_batches_do_not_matter(tmp_path):
    pictures = [picture(40, seed) for seed in range(5)]
    judges = [extractor("inception-2015-12-05/clean"), extractor("inception-2015-12-05/legacy")]
    decoded = []

    def transform(item):
        decoded.append(1)
        return square(item, 32)

    one = extract(pictures, judges, transform=transform, folder=tmp_path / "a", batch_size=2)
    assert len(decoded) == 5
    other = extract(
        pictures, judges[:1], transform=transform, folder=tmp_path / "b", batch_size=5, workers=1
    )
    name = judges[0].name
    assert isinstance(one[name], np.memmap)
    np.testing.assert_allclose(one[name], other[name], atol=1e-3)
    assert np.abs(one[name] - one[judges[1].name]).max() > 0.1


@pytest.mark.usefixtures("quick_inception")
def test_unreadable_pictures_are_all_named_and_nothing_is_left(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path in paths:
        Image.fromarray(picture()).save(path)
    paths[1].write_text("no")
    paths[3].write_bytes(paths[0].read_bytes()[:200])
    judge = extractor("inception-2015-12-05/clean")
    with pytest.raises(PictureError, match=r"2 of 4 .*1\.png.*3\.png"):
        extract(paths, [judge], transform=lambda p: square(p, 32), folder=tmp_path / "f")
    assert not list((tmp_path / "f").iterdir())


@pytest.mark.usefixtures("quick_inception")
def test_a_reference_is_computed_once_and_anew_when_its_entry_is_damaged(tmp_path, caplog):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for seed, path in enumerate(paths):
        Image.fromarray(picture(seed=seed)).save(path)
    judge, calls = extractor("inception-2015-12-05/clean"), []

    def transform(item):
        calls.append(item)
        return square(item, 32)

    def found(name="32"):
        settings = {"transform": transform, "transform_name": name, "cache": tmp_path / "cache"}
        return np.array(reference(paths, [judge], **settings)[judge.name])

    first = found()
    assert np.array_equal(found(), first)
    assert len(calls) == 2
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_bytes(entry.read_bytes()[:-9])
    assert np.array_equal(found(), first)
    assert "is damaged" in caplog.text
    assert len(calls) == 4
    found("another")
    Image.fromarray(picture(seed=9)).save(paths[0])
    assert not np.array_equal(found(), first)
    assert len(calls) == 8


def test_texts_of_a_reference_are_encoded_once_and_anew_when_they_differ(tmp_path, monkeypatch):
    asked = []

    def vectors(captions, encoder):
        asked.append(list(captions))
        return torch.arange(len(captions) * encoder.pooled_width).float().reshape(len(captions), -1)

    monkeypatch.setattr(features_module, "text_vectors", vectors)

    def found(*captions):
        return reference_texts(captions, "embedded:minilm-l6", cache=tmp_path / "cache")

    assert torch.equal(found("b", "a"), found("b", "a"))
    found("a", "b")
    assert asked == [["b", "a"], ["a", "b"]]


# ---- pairs


def test_psnr_and_ssim_are_those_of_their_papers():
    a = np.stack([picture(20, 1), picture(20, 2)])
    b = np.clip(a.astype(int) + np.random.default_rng(3).integers(-20, 20, a.shape), 0, 255)
    b = b.astype(np.uint8)
    error = np.square(a.astype(float) - b).reshape(2, -1).mean(axis=1)
    np.testing.assert_allclose(psnr(b, a), 20 * np.log10(255) - 10 * np.log10(error))
    assert psnr(a, a).tolist() == [100, 100]
    np.testing.assert_allclose(ssim(a, a), 1)
    luma = [x[0] @ np.array([0.299, 0.587, 0.114]) for x in (a, b)]
    np.testing.assert_allclose(ssim(b, a)[0], naive_ssim(*luma), rtol=1e-9)


def naive_ssim(x, y):
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / 4.5)
    window /= window.sum()
    found = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            c1, c2 = 2.55**2, 7.65**2
            found.append(
                (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
            )
    return np.mean(found)


def test_lpips_of_pairs_is_zero_for_equal_ones_and_each_pairs_own():
    network = pretrained.lpips("alex")
    a = np.stack([np.asarray(square(picture(64, s), 64)) for s in (1, 2)])
    found = lpips_pairs(a, np.stack([a[0], 255 - a[1]]), network)
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[1] > 0.1
    with pytest.raises(ValueError, match="give pairs"):
        lpips_pairs(a, a[:1], network)


def test_dinov2_says_which_file_to_place_and_gives_the_class_token(tmp_path, monkeypatch):
    import timm
    from safetensors.torch import save_file

    monkeypatch.setenv(pretrained.WEIGHTS_VARIABLE, str(tmp_path))
    with pytest.raises(pretrained.MissingWeightsError, match=r"dinov2-vits14\.safetensors"):
        extractor("dinov2:vits14")
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224).eval()
    save_file(model.state_dict(), tmp_path / "dinov2-vits14.safetensors")
    judge = extractor("dinov2:vits14")
    image = Image.fromarray(picture(230))
    x = torch.from_numpy(judge.prepare(image)).permute(2, 0, 1)[None] / 255
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        expected = model.forward_features((x - mean) / std)[:, 0]
    np.testing.assert_allclose(judge(judge.prepare(image)[None]), expected, atol=1e-4)
