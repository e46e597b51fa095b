"""Near duplicates by hash and colour, by embeddings, and of evaluation pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.filter import duplicates


def brute_force(phash, miniature, area, max_bits, max_colour):
    """Who yields to whom, by comparing each picture with all that stay."""
    keeper, staying = np.full(len(phash), -1), []
    for row in sorted(range(len(phash)), key=lambda row: (-area[row], row)):
        for other in staying:
            bits = int(phash[row] ^ phash[other]).bit_count()
            colours = np.abs(miniature[row].astype(int) - miniature[other]).mean()
            if bits <= max_bits and colours <= max_colour:
                keeper[row] = other
                break
        else:
            staying.append(row)
    return keeper


def crowd(seed: int, num: int, spread: int):
    """Looks in a few clusters, up to `spread` flipped bits and a shade apart."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**63, 5).astype(np.uint64)
    phash = centres[rng.integers(0, 5, num)]
    for _ in range(spread):
        bit = np.uint64(1) << rng.integers(0, 64, num).astype(np.uint64)
        phash = np.where(rng.random(num) < 0.5, phash ^ bit, phash)
    shades = rng.integers(0, 256, (3, 48))[rng.integers(0, 3, num)]
    miniature = np.clip(shades + rng.integers(-9, 10, (num, 1)), 0, 255).astype(np.uint8)
    return phash, miniature, rng.integers(1, 5, num).astype(float)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num=st.integers(0, 90),
    spread=st.integers(0, 9),
    max_bits=st.integers(0, 8),
    dense=st.sampled_from([1, 3, 256]),
    block=st.sampled_from([5, 1 << 21]),
)
def test_the_search_finds_what_comparing_all_pairs_finds(seed, num, spread, max_bits, dense, block):
    looks = crowd(seed, num, spread)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "DENSE", dense)
        patch.setattr(duplicates, "BLOCK", block)
        found = duplicates.near_duplicates(*looks, max_bits, 6.0)
    assert found.tolist() == brute_force(*looks, max_bits, 6.0).tolist()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), max_bits=st.integers(1, 8))
def test_the_choice_is_independent_of_order_where_areas_differ(seed, max_bits):
    phash, miniature, _ = crowd(seed, 61, 4)
    rng = np.random.default_rng(seed)
    area, order = rng.permutation(61).astype(float), rng.permutation(61)
    stays = duplicates.near_duplicates(phash, miniature, area, max_bits, 6.0) < 0
    shuffled = duplicates.near_duplicates(
        phash[order], miniature[order], area[order], max_bits, 6.0
    )
    assert (stays[order] == (shuffled < 0)).all()


@pytest.mark.parametrize("shades", [1, 16])
def test_many_white_pictures_are_one_and_take_no_quadratic_time(shades):
    num = 30_000
    phash = np.full(num, 1 << 63, np.uint64)
    rng = np.random.default_rng(0)
    miniature = (255 - rng.integers(0, shades, (num, 48))).astype(np.uint8)
    keeper = duplicates.near_duplicates(phash, miniature, np.ones(num), 8, 12.0)
    assert keeper[0] == -1
    assert (keeper[1:] == 0).all()


def test_one_that_went_takes_no_other_with_it():
    phash = np.array([0b0, 0b111, 0b111111], np.uint64)
    white = np.zeros((3, 48), np.uint8)
    keeper = duplicates.near_duplicates(phash, white, np.array([3.0, 2, 1]), 3, 0)
    assert keeper.tolist() == [-1, 0, -1]


def test_no_pictures_have_no_duplicates():
    none = np.empty(0, np.uint64), np.empty((0, 48), np.uint8), np.empty(0)
    assert duplicates.near_duplicates(*none, 4, 12.0).size == 0
    assert duplicates.embedding_duplicates(np.empty((0, 7)), np.empty(0), 0.9).size == 0


def cosine_brute_force(features, area, least):
    unit = features.astype(np.float32)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    keeper, staying = np.full(len(unit), -1), []
    for row in sorted(range(len(unit)), key=lambda row: (-area[row], row)):
        near = [other for other in staying if unit[row] @ unit[other] >= least]
        if near:
            keeper[row] = near[0]
        else:
            staying.append(row)
    return keeper


def vectors(num: int, copies: int, noise: float) -> np.ndarray:
    """The first `copies` of `num` vectors once more, with noise, at the end."""
    rng = np.random.default_rng(num)
    drawn = rng.standard_normal((num, 7))
    noisy = drawn[:copies] + noise * rng.standard_normal((copies, 7))
    return np.concatenate([drawn, noisy]).astype(np.float16)


@pytest.mark.parametrize("block", [3, 1024])
def test_one_cluster_of_embeddings_is_brute_force(block):
    features = vectors(130, 40, 0.1)
    area = np.random.default_rng(1).integers(1, 4, 170).astype(float)
    members = duplicates.ranking(area)
    keeper = duplicates._greedy_cosine(features, members, 0.9, block)
    found = np.full(170, -1)
    found[members[keeper >= 0]] = members[keeper[keeper >= 0]]
    expected = cosine_brute_force(features, area, 0.9)
    assert (found < 0).tolist() == (expected < 0).tolist()
    assert found.tolist() == expected.tolist()


def test_embeddings_of_all_in_one_cluster_equal_those_of_no_clusters():
    features, area = vectors(130, 40, 0.1), np.ones(170)
    found = duplicates.embedding_duplicates(features, area, 0.9, num_clusters=1)
    assert found.tolist() == cosine_brute_force(features, area, 0.9).tolist()


def test_planted_copies_of_embeddings_are_found_within_clusters_at_cosine_one(tmp_path):
    features = np.memmap(tmp_path / "spool", np.float16, "w+", shape=(350, 7))
    features[:] = vectors(300, 50, 0)
    area = np.r_[np.ones(300), np.full(50, 2.0)]
    keeper = duplicates.embedding_duplicates(features, area, 1.0, seed=3)
    assert keeper[:50].tolist() == list(range(300, 350))
    assert (keeper[50:] == -1).all()
    again = duplicates.embedding_duplicates(features, area, 1.0, seed=3)
    assert keeper.tolist() == again.tolist()


def test_vectors_of_zeros_are_near_to_nothing():
    keeper = duplicates.embedding_duplicates(np.zeros((5, 3), np.float16), np.ones(5), 0.5)
    assert (keeper == -1).all()


def picture(seed: int, side: int = 40) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def test_a_resized_picture_has_almost_the_fingerprint_of_the_original():
    hashes, colours = zip(
        *(duplicates.fingerprint(picture(1, side)) for side in (48, 350)), strict=True
    )
    assert (hashes[0] ^ hashes[1]).bit_count() <= 4
    assert (
        np.abs(np.subtract(*(np.frombuffer(c, np.uint8).astype(int) for c in colours))).max() < 12
    )
    assert len(colours[0]) == 48
    assert (hashes[0] ^ duplicates.fingerprint(picture(2))[0]).bit_count() > 8


def evaluation_set(folder, num: int):
    """A captions file in COCO's format with pictures 0 … num − 1; the first has two captions."""
    (folder / "images").mkdir(parents=True)
    for number in range(num):
        picture(number).save(folder / "images" / f"{number}.png")
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(num)]
    notes = [{"id": n, "image_id": n % num, "caption": "a thing"} for n in range(num + 1)]
    captions = folder / "captions.json"
    captions.write_text(json.dumps({"images": images, "annotations": notes}))
    return captions


def looks_of(images):
    phash, colours = zip(*map(duplicates.fingerprint, images), strict=True)
    miniature = np.frombuffer(b"".join(colours), np.uint8).reshape(-1, 48)
    return np.array(phash, np.uint64), miniature


def test_pictures_near_to_an_evaluation_picture_are_told_from_others(tmp_path):
    known = duplicates.references([str(evaluation_set(tmp_path, 5))])
    assert [path.stem for path in known.paths] == list("01234")
    looks = looks_of([picture(77), picture(3, 97), picture(78), picture(0)])
    assert duplicates.contaminated(*looks, known, 6, 12.0).tolist() == [-1, 3, -1, 0]
    assert duplicates.contaminated(*looks, known, 6, 0.0)[3] == 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), spread=st.integers(0, 9), max_bits=st.integers(0, 8))
def test_contamination_is_what_comparing_all_pairs_finds(seed, spread, max_bits):
    phash, miniature, _ = crowd(seed, 80, spread)
    known = duplicates.References([None] * 31, phash[:31], miniature[:31])
    found = duplicates.contaminated(phash[31:], miniature[31:], known, max_bits, 6.0)
    bits = np.bitwise_count(phash[31:, None] ^ phash[:31]) <= max_bits
    colours = np.abs(miniature[31:, None].astype(int) - miniature[:31]).mean(-1) <= 6
    assert ((found >= 0) == (bits & colours).any(1)).all()
    hits = np.flatnonzero(found >= 0)
    assert (bits & colours)[hits, found[hits]].all()


def test_an_evaluation_picture_that_cannot_be_decoded_is_named(tmp_path):
    captions = evaluation_set(tmp_path, 3)
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"decontaminate: .*1\.png cannot be decoded"):
        duplicates.references([str(captions)])
