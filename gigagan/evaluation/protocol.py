"""Named rules of an evaluation: what is drawn, against what, prepared how, judged by whom.

A number means something only with its protocol. The ones named after a paper are complete and
fixed: a run that departs from one in anything that decides is refused, never renamed. Here is no
computing; `measure` does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Resize = Literal["clean", "legacy"]
CLIP_PREFIX = "A photo depicts "
"""What the GigaGAN authors' evaluator puts before every caption."""


class ProtocolError(ValueError):
    """Pictures, captions or settings that a protocol does not allow."""


@dataclass(frozen=True)
class Curve:
    """A truncation curve that belongs to the rules: FID against agreement with captions."""

    truncations: tuple[float, ...]
    """ψ of its points."""
    num_captions: int
    """Drawn for each of them; FID of so few is comparable along the curve alone."""


@dataclass(frozen=True)
class Protocol:
    """One set of rules. `None` means that the protocol leaves it to the settings."""

    name: str
    about: str
    source: str
    """Whose numbers it makes comparable, and where the rules are from."""
    task: Literal["text", "class", "upsample"] = "text"
    """Draw captions (or what else a network is told, where no paper's name is on it), classes in
    equal shares, or enlarge small versions of the reference pictures."""
    num_generated: int | None = None
    num_classes: int | None = None
    """Classes that a network must know, where they are drawn."""
    num_real: int | None = None
    """Pictures in the reference: exactly so many."""
    resolution: int | None = None
    """Side in pixels of both sets: centre crop to the short side, then Pillow Lanczos."""
    input_resolution: int | None = None
    """Side of what an upsampler is given."""
    resize: Resize = "clean"
    """How Inception's 299 px come about: clean-fid's antialiased bicubic, or TensorFlow 1's
    bilinear without antialiasing. The two are not interchangeable."""
    clip: str | None = None
    """Encoder of the CLIP score."""
    clip_prefix: str = CLIP_PREFIX
    """Words put before every caption."""
    patch: int | None = None
    """Side of the crops of a patch-FID."""
    curve: Curve | None = None
    """In place of the settings' `sweep`, whose distance is KID."""
    published: tuple[tuple[str, Mapping[str, float]], ...] = ()
    """What others report under these rules: (model, numbers by our metrics' names)."""

    @property
    def is_ours(self) -> bool:
        """Whether nobody else's numbers compare, and any network may be measured."""
        return self.num_generated is None


_PSI = tuple(tenths / 10 for tenths in range(2, 11))
_CLIP = "open_clip:ViT-B-32/openai"
_CLIP_NAME = "clip_score_ViT-B-32_openai"

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "embedded-heldout",
            "the held-out part of the download",
            "ours: for the embedded pictures, and for runs among themselves",
        ),
        Protocol(
            "coco-captions",
            "any captions file in COCO's format, any number of captions",
            "ours: for looking; its numbers compare with nobody's",
        ),
        Protocol(
            "gigagan-coco2014-256",
            "zero-shot FID-30k on COCO 2014 at 256 px",
            "Kang et al. 2023, table 2, by the rules of the authors' published evaluator",
            num_generated=30_000,
            num_real=40_504,
            resolution=256,
            clip=_CLIP,
            published=(
                ("GigaGAN (paper)", {"fid": 9.09}),
                ("GigaGAN (authors' evaluator)", {"fid": 9.06, _CLIP_NAME: 0.33}),
                ("Stable Diffusion 1.5 (as cited there)", {"fid": 9.62}),
            ),
        ),
        Protocol(
            "coco2017-512",
            "FID-5k on COCO 2017 val at 512 px",
            "Kang et al. 2023, table 3: the comparison with distilled diffusion",
            num_generated=5_000,
            num_real=5_000,
            resolution=512,
            clip=_CLIP,
            published=(
                ("GigaGAN (paper)", {"fid": 21.1, _CLIP_NAME: 0.32}),
                ("Stable Diffusion distilled, 4 steps (as cited there)", {"fid": 26.0}),
            ),
        ),
        Protocol(
            "imagenet-256",
            "FID-50k and Inception Score: the 1,000 classes of ImageNet in equal shares at 256 px, "
            "against its validation pictures",
            "Kang et al. 2023, class-conditional; numbers recalled, not read in the paper; whether "
            "theirs are against the validation pictures, as ours, is not known",
            task="class",
            num_generated=50_000,
            num_classes=1_000,
            num_real=50_000,
            resolution=256,
            published=(("GigaGAN (paper)", {"fid": 3.45, "inception_score": 225.52}),),
        ),
        Protocol(
            "imagenet-64-256",
            "64 → 256 px on the 50,000 validation pictures of ImageNet",
            "Kang et al. 2023, the unconditional upsampler; counts recalled, not read in the paper",
            task="upsample",
            num_generated=50_000,
            num_real=50_000,
            resolution=256,
            input_resolution=64,
            published=(("GigaGAN (paper)", {"fid": 1.2}),),
        ),
        Protocol(
            "upsampler-128-1024",
            "128 → 1024 px on 10,000 pictures: FID, patch-FID, LPIPS",
            "Kang et al. 2023, table 5; the size of its patches is not known, ours are 299 px",
            task="upsample",
            num_generated=10_000,
            num_real=10_000,
            resolution=1024,
            input_resolution=128,
            patch=299,
            published=(
                ("GigaGAN (paper)", {"fid": 1.54, "patch_fid": 8.90, "lpips": 0.274}),
                ("Real-ESRGAN (as cited there)", {"fid": 8.60, "patch_fid": 22.8, "lpips": 0.363}),
            ),
        ),
        Protocol(
            "stylegan-t-coco-256",
            "zero-shot FID-30k on COCO 2014 at 256 px with TensorFlow's resize",
            "Sauer et al. 2023 (StyleGAN-T)",
            num_generated=30_000,
            num_real=40_504,
            resolution=256,
            resize="legacy",
            curve=Curve(_PSI, num_captions=5_000),
            published=(("StyleGAN-T (paper)", {"fid": 13.90}),),
        ),
        Protocol(
            "stylegan-t-coco-64",
            "zero-shot FID-30k on COCO 2014 at 64 px with TensorFlow's resize",
            "Sauer et al. 2023 (StyleGAN-T), its base alone; the number recalled, not read",
            num_generated=30_000,
            num_real=40_504,
            resolution=64,
            resize="legacy",
            curve=Curve(_PSI, num_captions=5_000),
            published=(("StyleGAN-T (paper)", {"fid": 7.30}),),
        ),
    )
}
"""All by name."""


def named(name: str) -> Protocol:
    """The protocol of this name; raises ProtocolError with those that there are."""
    if name not in PROTOCOLS:
        raise ProtocolError(f"protocol {name!r} is not known: choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def check_settings(protocol: Protocol, *, resolution: int | None, num_images: int | None) -> None:
    """Refuse settings that a fixed protocol decides otherwise."""
    for setting, given, ruled in (
        ("resolution", resolution, protocol.resolution),
        ("num_images", num_images, protocol.num_generated),
    ):
        if given is not None and ruled is not None and given != ruled:
            raise ProtocolError(
                f"evaluate.{setting}={given}, but {protocol.name} says {ruled}: leave it out, or "
                "choose protocol=coco-captions, whose numbers carry no paper's name"
            )


def check_counts(protocol: Protocol, *, num_generated: int, num_real: int) -> None:
    """Refuse fewer or other pictures than the protocol names: FID depends on the counts."""
    for what, found, ruled in (
        ("generated pictures (or captions to draw)", num_generated, protocol.num_generated),
        ("reference pictures", num_real, protocol.num_real),
    ):
        if ruled is not None and found != ruled:
            raise ProtocolError(
                f"{protocol.name} asks for {ruled:,} {what}, there are {found:,}: complete the "
                "set, or choose protocol=coco-captions, whose numbers carry no paper's name"
            )


# ---- comparing results ---------------------------------------------------------------------------

DECISIVE = (
    *("name", "task", "num_generated", "num_real", "input_resolution", "crop", "resize", "storage"),
    *("captions_sha256", "reference_sha256", "kid", "patch", "clip", "naming", "weights_sha256"),
)
"""Fields of a result's `protocol` that must agree before two numbers stand in one table. None of
them is what a model's owner chooses: networks, seed, truncation. Nor is the aligner one, which
comes with the data."""


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first decisive field in which two results' rules differ, with both values; or None."""
    for field in DECISIVE:
        if a.get(field) != b.get(field):
            return field, a.get(field), b.get(field)
    return None
