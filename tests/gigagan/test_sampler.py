import os

import numpy as np
import pytest
import torch

import gigagan
from gigagan.__main__ import main
from gigagan.config import GeneratorConfig, UpsamplerConfig
from gigagan.models import snapshot
from gigagan.models.generator import Generator
from gigagan.models.pretrained import MissingWeightsError, locate
from gigagan.models.upsampler import Upsampler

SMALL_G = GeneratorConfig(
    channels=(8, 8), kernels=(1, 2), blocks=(1, 1), attention=(0, 0), latent_dim=5, style_dim=12
)
SMALL_U = UpsamplerConfig(
    input_resolution=8, down_channels=(8,), up_channels=(8, 8), kernels=(1, 1), blocks=(1, 1),
    attention=(0, 0), latent_dim=5, style_dim=12,
)  # fmt: skip

try:
    locate("embedded:minilm-l6")
except MissingWeightsError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("snapshots")
    snapshot.save(folder / "base.safetensors", Generator(SMALL_G), {})
    snapshot.save(folder / "up.safetensors", Upsampler(SMALL_U), {})
    return folder / "base.safetensors", folder / "up.safetensors"


def pixels(pictures):
    return [p.tobytes() for p in pictures]


def close(a, b):
    """Equal up to one grey level: another batch may round otherwise."""
    both = [np.frombuffer(b"".join(x), np.uint8).astype(int) for x in (a, b)]
    return np.abs(both[0] - both[1]).max() <= 1


def test_pictures_depend_on_prompt_place_and_seed_but_not_on_the_batch_size(snapshots):
    sampler = gigagan.load(*snapshots)
    prompts = ["a red cat", "a red cat", "a dog on pale blue", "sun"]
    one = pixels(sampler.sample(prompts, seed=3, batch_size=4))
    other = pixels(sampler.sample(prompts, seed=3, batch_size=3))
    assert close(one, other)
    assert one[0] != one[1]
    assert one != pixels(sampler.sample(prompts, seed=4, batch_size=4))


def test_a_prompt_that_comes_again_is_not_encoded_again(snapshots, monkeypatch):
    sampler = gigagan.load(*snapshots)
    encode, asked = type(sampler.encoder).encode, []

    def counted(self, captions):
        asked.append(list(captions))
        return encode(self, captions)

    monkeypatch.setattr(type(sampler.encoder), "encode", counted)
    first = sampler.sample(["a cat", "a dog on pale blue", "a cat"], seed=3)
    assert asked == [["a cat", "a dog on pale blue"]]
    again = sampler.sample(["a cat", "a dog on pale blue", "a cat"], seed=3)
    assert asked == [["a cat", "a dog on pale blue"]]
    assert pixels(first) == pixels(again)
    sampler.sample(["sun", "a cat"], seed=3)
    assert asked[1:] == [["sun"]]


def test_kept_features_are_those_of_the_encoder(snapshots):
    sampler = gigagan.load(*snapshots)
    prompts = ["a red cat on a hill", "sun", "a red cat on a hill"]
    sampler.condition(["sun"])
    for ours, theirs in zip(
        sampler.condition(prompts), sampler.encoder.encode(prompts), strict=True
    ):
        assert ours.shape == theirs.shape
        mask = sampler.encoder.encode(prompts).mask_BL
        if ours.shape[:2] == mask.shape:
            ours, theirs = ours[mask], theirs[mask]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_no_more_prompts_are_kept_than_said(snapshots, monkeypatch):
    monkeypatch.setattr("gigagan.inference.conditions._KEPT_TEXTS", 2)
    sampler = gigagan.load(*snapshots)
    sampler.sample(["a", "b", "c", "d"], seed=0)
    assert list(sampler.condition._texts) == ["c", "d"]


def test_any_seed_that_a_command_takes_reaches_the_upsampler(snapshots):
    sampler = gigagan.load(*snapshots)
    assert pixels(sampler.sample(["a"], seed=2**63 - 1)) != pixels(sampler.sample(["a"], seed=0))


def test_sizes_follow_the_networks(snapshots):
    assert gigagan.load(snapshots[0]).sample(["x"], seed=0)[0].size == (8, 8)
    sampler = gigagan.load(*snapshots)
    assert sampler.sample(["x"], seed=0)[0].size == (16, 16) == (sampler.resolution,) * 2


def test_no_truncation_is_the_limit_of_truncation(snapshots):
    sampler = gigagan.load(snapshots[0])
    free = pixels(sampler.sample(["a", "b"], seed=1))
    assert close(free, pixels(sampler.sample(["a", "b"], seed=1, truncation=0.9999)))
    full = pixels(sampler.sample(["a", "a"], seed=1, truncation=0.0))
    assert full[0] == full[1]


def test_wrong_arguments_are_refused_with_the_remedy(snapshots):
    sampler = gigagan.load(*snapshots)
    with pytest.raises(ValueError, match="truncation=2"):
        sampler.sample(["x"], seed=0, truncation=2)
    with pytest.raises(ValueError, match="one per image"):
        sampler.upscale([], ["x"])
    with pytest.raises(snapshot.SnapshotError, match="snapshot of an upsampler"):
        gigagan.load(snapshots[1])


def test_command_line_draws_files(snapshots, tmp_path, capsys):
    base, up = map(str, snapshots)
    argv = ["sample", "--base", base, "--upsampler", up, "--out", str(tmp_path), "a cat", "a dog"]
    assert main(argv) == 0
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["000000.png", "000001.png"]
    assert "a dog" in capsys.readouterr().out
    assert main(["sample", "--base", base, "--out", str(tmp_path)]) == 1
    assert "error: no prompts" in capsys.readouterr().err
    assert main(["sample", "--base", str(tmp_path / "none"), "x"]) == 1
    assert "no such snapshot" in capsys.readouterr().err


def test_the_package_draws_without_being_given_a_snapshot():
    sampler = gigagan.load()
    (teal,), (pink,) = (
        sampler.sample([f"flat emoji of a violin on a {colour} background"], seed=0)
        for colour in ("teal", "pink")
    )
    assert teal.size == (128, 128)
    red = [np.median(np.asarray(picture)[:4, :, 0]) for picture in (teal, pink)]
    assert red[1] - red[0] > 50  # of the borders: pink has more red than teal


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_snapshots_have_the_permissions_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        snapshot.save(tmp_path / "x.safetensors", Generator(SMALL_G), {})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert len(list(tmp_path.iterdir())) == 1


def test_an_exported_snapshot_is_half_as_large_and_draws_nearly_the_same(snapshots, tmp_path):
    out = tmp_path / "small.safetensors"
    assert main(["export", str(snapshots[0]), str(out)]) == 0
    whole, _ = snapshot.load(snapshots[0])
    small, _ = snapshot.load(out)
    for name, value in whole.state_dict().items():
        rounded = small.state_dict()[name]
        assert rounded.dtype == value.dtype
        assert torch.equal(rounded, value.bfloat16().to(value.dtype))
    weights = sum(value.nbytes for value in whole.state_dict().values())
    assert out.stat().st_size < weights / 2 + 20_000


def test_a_missing_snapshot_is_named_by_export(tmp_path, capsys):
    assert main(["export", str(tmp_path / "no.safetensors"), str(tmp_path / "x.safetensors")]) == 1
    assert "no.safetensors: no such snapshot" in capsys.readouterr().err
