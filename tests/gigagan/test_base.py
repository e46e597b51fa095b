"""Both kinds of base generator are used alike: here StyleGAN-T's, elsewhere GigaGAN's."""

import numpy as np
import pytest
import torch

from gigagan.config import StyleTConfig
from gigagan.inference import onnx_export
from gigagan.inference.editing import Edit
from gigagan.inference.sampler import load
from gigagan.models import snapshot
from gigagan.models.base import base_generator
from gigagan.models.generator import Generator
from gigagan.models.snapshot import SnapshotError
from gigagan.models.stylegan_t import StyleGANT
from gigagan.models.upsampler import Upsampler

from . import small

ONE, TWO = "a red cat", "flat emoji of a violin on a teal background"
CONFIG = StyleTConfig(channels=(16, 8), latent_dim=5)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("snapshots")
    base = base_generator(CONFIG)
    torch.nn.init.normal_(base.style_mean[: CONFIG.latent_dim])
    larger = small.UPSAMPLER.model_copy(update={"input_resolution": 16})
    paths = folder / "base.safetensors", folder / "upsampler.safetensors"
    snapshot.save(paths[0], base, {"images_seen": 5})
    snapshot.save(paths[1], Upsampler(larger), {})
    return paths


@pytest.fixture(scope="module")
def sampler(files):
    return load(*files)


def pixels(sampler, prompts=(ONE,), **settings):
    settings = {"seed": 1, "upscale": False, **settings}
    return np.stack([np.asarray(picture) for picture in sampler.sample(prompts, **settings)])


def test_a_section_makes_its_kind():
    assert isinstance(base_generator(small.GENERATOR), Generator)
    assert isinstance(base_generator(CONFIG), StyleGANT)


def test_a_snapshot_of_stylegan_t_draws_under_an_upsampler(sampler, files):
    assert isinstance(sampler.base, StyleGANT)
    assert pixels(sampler).shape == (1, 16, 16, 3)
    assert pixels(sampler, upscale=True).shape == (1, 32, 32, 3)
    assert snapshot.read_about(files[0]) == {"images_seen": 5}
    one = pixels(sampler, [ONE, TWO])
    assert (one == pixels(sampler, [ONE, TWO], batch_size=1)).mean() > 0.99  # but for rounding
    assert (one[0] != one[1]).any()
    assert (pixels(sampler) != pixels(sampler, seed=2)).any()


def test_truncation_to_nothing_leaves_one_picture_a_prompt(sampler):
    means = [pixels(sampler, [ONE, TWO], seed=seed, truncation=0.0) for seed in (1, 2)]
    assert (means[0] == means[1]).all()
    assert (means[0][0] != means[0][1]).any()


def test_edits_go_from_one_prompt_to_the_other(sampler):
    there = pixels(sampler, [TWO])
    for how, settings in {"interpolate": {"amount": 1.0}, "mix": {"crossover": 0}}.items():
        edited = pixels(sampler, edit=Edit(TWO, how, **settings))
        assert np.abs(edited.astype(int) - there).max() <= 1, how
    with pytest.raises(ValueError, match="levels 0 to 1"):
        pixels(sampler, edit=Edit(TWO, "mix", crossover=3))


def test_an_onnx_file_draws_the_same(sampler, tmp_path):
    pytest.importorskip("onnxscript")
    path = tmp_path / "g.onnx"
    assert onnx_export.export(path, sampler.base, sampler.condition, ONE) < 1e-4


def test_a_snapshot_of_neither_kind_is_refused(files):
    with pytest.raises(SnapshotError, match="is the snapshot of an upsampler"):
        load(files[1])
    with pytest.raises(SnapshotError, match="is not the snapshot of an upsampler"):
        load(files[0], files[0])
