"""The encoders that the score stage makes from its settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from data.config import ScoreConfig
from gigagan.evaluation.judges.alignment import clip_score_per_picture
from gigagan.models.pretrained import WEIGHTS_VARIABLE
from gigagan.scoring import _device, encoders

CLIP = "open_clip:ViT-S-32-alt/other"
CAPTIONS = ["a violin", "a violin", "two cats on a red sofa"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP of random weights, found by its name."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    model = open_clip.create_model("ViT-S-32-alt").eval()
    save_file(model.state_dict(), folder / "ViT-S-32-alt-other.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WEIGHTS_VARIABLE, str(folder))
        yield


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    sizes = [(40, 70), (70, 40), (64, 64)]
    return [Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]


def test_the_similarity_of_a_clip_is_what_a_clip_score_averages(clip, images):
    made = encoders(ScoreConfig(encoder=CLIP, nsfw=None, batch_size=2, precision="float32"))
    vectors = made.image_features(images), made.text_features(CAPTIONS)
    similarity_N = made.similarity(*vectors)
    assert [len(v) for v in (*vectors, similarity_N)] == [3, 3, 3]
    expected = clip_score_per_picture(images, CAPTIONS, CLIP, prefix="").mean()
    assert similarity_N.mean() == pytest.approx(expected, abs=1e-5)
    assert (made.unsafe, made.aesthetic, made.fit_similarity) == (None, None, None)


def test_scores_that_are_taken_over_need_no_model():
    made = encoders(ScoreConfig(take_over=("similarity_l14", "unsafe", "aesthetic")))
    assert made == type(made)()


def test_the_embedded_aligner_is_fitted_to_all_pairs(images):
    made = encoders(ScoreConfig(nsfw=None))
    assert made.similarity is None
    similarity_N = made.fit_similarity(
        np.random.default_rng(1).normal(size=(20, 5)).astype(np.float16),
        np.random.default_rng(2).normal(size=(20, 3)).astype(np.float16),
    )
    assert similarity_N.shape == (20,)
    assert np.abs(similarity_N).max() <= 1


def test_workers_take_the_devices_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [_device(("auto",), n) for n in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [_device(("cuda:1", "cpu"), n) for n in range(3)] == ["cuda:1", "cpu", "cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert _device(("auto",), 5) == "cpu"


def test_an_encoder_that_is_neither_is_refused_by_name():
    with pytest.raises(ValueError, match="'clip': choose embedded:aligner or open_clip"):
        encoders(ScoreConfig(encoder="clip", nsfw=None))
