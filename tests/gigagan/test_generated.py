"""The probe for generated pictures, on concepts that it was not fitted to; and UnivFD's reading."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.metrics import roc_auc_score

import gigagan
from data.concepts import concepts
from data.config import ScoreConfig
from data.demo import Picture, draw, render
from gigagan.models import generated, pretrained
from gigagan.models.encoders import ImageEncoder, ImageFeatures
from gigagan.scoring import encoders

COUNT = 24


@pytest.fixture(scope="module")
def works() -> list[Picture]:
    """Looks of concepts no picture of which the probe was fitted to."""
    with safe_open(pretrained.locate("embedded:generated-v1"), framework="pt") as file:
        kept_back = set(json.loads(file.metadata()["probe"])["kept_back"])
    unseen = [concept for concept in concepts() if concept.name in kept_back]
    assert len(unseen) > 50
    colours = ("white", "teal", "pink")
    return [
        Picture(c, n % 2, colours[n % 3]) for n, c in enumerate(unseen[:: len(unseen) // COUNT])
    ]


@pytest.fixture(scope="module")
def real(works) -> list[Image.Image]:
    return [draw(w, render(w.concept.glyphs[w.style], 128), (128, 128)) for w in works]


def test_the_package_s_own_pictures_are_told_from_real_ones_of_the_same_captions(works, real):
    drawn = gigagan.load().sample([work.caption for work in works], seed=5)
    detect = pretrained.generated()
    scores = np.concatenate([detect(real), detect(drawn)])
    is_drawn = np.repeat([0, 1], [len(real), len(drawn)])
    assert roc_auc_score(is_drawn, scores) > 0.97
    assert (detect(real) < 0.5).mean() > 0.9


def test_the_probe_is_the_logistic_of_means_and_deviations_of_early_stages(real):
    detect, encoder = pretrained.generated(), pretrained.probe_encoder(torch.device("cpu"))
    with safe_open(pretrained.locate("embedded:generated-v1"), framework="np") as file:
        weight, bias = file.get_tensor("weight_D").astype(float), file.get_tensor("bias_1")[0]
    for picture, got in zip(real[:3], detect(real[:3]), strict=True):
        x = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        logit = float(bias)
        place = 0
        for stage in encoder(x).stages:
            maps = stage[0].flatten(1).double().numpy()
            for moment in (maps.mean(1), maps.std(1, ddof=1)):
                logit += moment @ weight[place : place + len(moment)]
                place += len(moment)
        assert place == len(weight) == 2 * (16 + 24 + 40)
        assert got == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-4)


def test_a_large_picture_is_cropped_and_never_made_smaller():
    noise = np.random.default_rng(0).integers(0, 256, (201, 300, 3), np.uint8)
    assert np.array_equal(np.asarray(generated.crop(Image.fromarray(noise))), noise[36:164, 86:214])
    assert generated.crop(Image.fromarray(noise[:60])).size == (128, 128)


def test_no_pictures_have_no_scores():
    assert pretrained.generated()([]).shape == (0,)


class Means(ImageEncoder):
    """A CLIP of means over a crop's colours: what its layer is given can be told."""

    width, image_size = 3, 224

    def forward(self, x_BCHW):
        assert x_BCHW.shape[1:] == (3, 224, 224)
        return ImageFeatures(x_BCHW.mean((2, 3)), [])


def test_univfd_reads_the_published_layer_and_frames_small_pictures_in_black(tmp_path):
    layer = {"weight": torch.tensor([[1.0, -2.0, 0.5]]), "bias": torch.tensor([0.25])}
    torch.save(layer, tmp_path / "fc.pt")
    detect = generated.univfd(tmp_path / "fc.pt", Means(), torch.device("cpu"))
    large, small = Image.new("RGB", (300, 400), (255, 0, 51)), Image.new("RGB", (112, 112), "white")
    quarter = -1 + 2 * 0.25
    for picture, mean in ((large, (1, -1, -0.6)), (small, (quarter,) * 3)):
        logit = mean[0] - 2 * mean[1] + 0.5 * mean[2] + 0.25
        assert detect([picture])[0] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)
    torch.save({"weight": torch.zeros(1, 5)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is not UnivFD's.*fc_weights\.pth"):
        generated.univfd(tmp_path / "other.pt", Means(), torch.device("cpu"))


def test_unplaced_and_unknown_detectors_name_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv(pretrained.WEIGHTS_VARIABLE, str(tmp_path))
    with pytest.raises(pretrained.MissingWeightsError, match="univfd-vitl14"):
        pretrained.generated("univfd:vitl14")
    with pytest.raises(ValueError, match="embedded:generated-v1 or univfd:vitl14"):
        pretrained.generated("univfd:nothing")
    with pytest.raises(ValueError, match="univfd:vitl14"):
        ScoreConfig(generated="univfd:nothing")


@pytest.mark.parametrize("take_over", [("watermark",), ("watermark", "similarity_b32")])
def test_scoring_has_a_detector_where_one_is_named_and_none_by_default(take_over):
    assert encoders(ScoreConfig(nsfw=None, take_over=take_over)).generated is None
    named = ScoreConfig(nsfw=None, take_over=take_over, generated="embedded:generated-v1")
    assert encoders(named).generated is pretrained.generated()
