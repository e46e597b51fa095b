"""Every knob of the data half: the embedded source, the download and the filter. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """A config: immutable, unknown keys refused, field docstrings as descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


class EmbeddedConfig(Frozen):
    """The embedded source: two emoji sets as captioned pictures, with planted defects."""

    max_concepts: int | None = Field(default=None, ge=4)
    """Concepts used, training and held-out together; all of them (about 1,900) when null."""
    pictures_per_style: int = Field(default=2, ge=1, le=8)
    """Pictures of one concept in one style, each with another background, size and offset."""
    size_px: int = Field(default=160, ge=32, le=1024)
    """Side of a picture in pixels."""
    heldout_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of the concepts that training never sees."""
    heldout_pictures: int = Field(default=384, ge=2)
    """Upper bound on the held-out pictures; every held-out concept comes once before a second."""
    defect_fraction: float = Field(default=0.2, ge=0, le=0.8)
    """Share of the rows that carry a planted defect."""
    seed: int = 0
    """Decides concepts held out, looks, captions, defects and the order of rows."""


class DownloadConfig(Frozen):
    """From metadata to original bytes: what is listed, what is asked for, and how politely."""

    source: Literal["embedded", "parquet"] = "embedded"
    """`embedded` renders and serves its own pictures; `parquet` reads the lists of `metadata`."""
    embedded: EmbeddedConfig = EmbeddedConfig()
    """The embedded source; unused when `source` is `parquet`."""
    metadata: tuple[str, ...] = ()
    """Parquet files or globs with the columns of LAION, Re-LAION, COYO, DataComp, or url, text."""
    max_rows: int | None = Field(default=None, ge=1)
    """Rows kept after the pre-filter, a seeded sample; all of them when null."""
    seed: int = 0
    """Order of the rows, and so the contents of each shard."""

    min_side: int | None = Field(default=64, ge=1)
    """Least listed short side, px. A null in a column that a rule reads drops the row."""
    max_aspect: float | None = Field(default=3.0, ge=1)
    """Greatest listed long side ÷ short side."""
    min_caption_words: int = Field(default=3, ge=0)
    """Fewest words of a caption."""
    min_caption_chars: int = Field(default=6, ge=0)
    """Fewest characters of a caption."""
    max_unsafe: float | None = Field(default=0.5, ge=0, le=1)
    """Greatest shipped unsafe score (`punsafe` of LAION, `nsfw_score_opennsfw2` of COYO)."""
    max_watermark: float | None = Field(default=0.8, ge=0, le=1)
    """Greatest shipped watermark score."""
    min_similarity_b32: float | None = None
    """Least shipped CLIP ViT-B/32 similarity (LAION-2B-en was cut at 0.28)."""
    min_similarity_l14: float | None = None
    """Least shipped CLIP ViT-L/14 similarity."""
    min_aesthetic: float | None = None
    """Least shipped LAION aesthetic v2 score."""

    rows_per_shard: int = Field(default=1000, ge=1)
    """Rows in one image shard: the unit of work, of commit and of resume."""
    max_bytes: int = Field(default=20_000_000, ge=1)
    """A body longer than this is refused."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """A picture with more pixels is refused from its header, before it is decoded."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Longest silence of a server."""
    total_deadline_s: float = Field(default=30.0, gt=0)
    """Longest whole fetch of a URL: name lookup, redirects, retries and body."""
    max_redirects: int = Field(default=5, ge=0)
    """Redirects followed; the address of each is vetted again."""
    retries: int = Field(default=1, ge=0)
    """Further attempts, with back-off, where they can help: time-outs, resets, 429 and 5xx."""
    allow_private_addresses: bool = False
    """Also fetch from loopback, private and link-local addresses. Not for lists from the web."""
    honour_opt_outs: bool = True
    """Refuse pictures whose server reserves them (`X-Robots-Tag: noai`, `TDM-Reservation: 1`)."""
    user_agent: str = "gigagan-pipeline/0.1 (image dataset research)"
    """Who asks; put an address here where site owners reach you."""

    @model_validator(mode="after")
    def _has_a_list(self) -> DownloadConfig:
        if self.source == "parquet" and not self.metadata:
            raise ValueError(
                "download.source is 'parquet' but download.metadata is empty: "
                "name at least one Parquet file, or use source: embedded"
            )
        return self


class FilterConfig(Frozen):
    """Which pictures we learn from, and the shards they go to."""

    aligner: str = "embedded:aligner"
    """Judges how well picture and caption fit: `embedded:aligner`, or `open_clip:ARCH/WEIGHTS`."""
    nsfw: str | None = "embedded:opennsfw"
    """Scores unsafe pictures; not scored when null."""
    aesthetic: Literal["embedded:colourfulness"] = "embedded:colourfulness"
    """Hasler–Süsstrunk colourfulness, a stand-in: no learned aesthetic model is embedded."""

    min_similarity: float | None = 0.1
    """Least aligner similarity. The scale is the aligner's own: look at the report's histogram. On
    the embedded source 0.1 finds 3 in 4 wrong captions, and drops 1 in 10 right ones."""
    min_aesthetic: float | None = None
    """Least aesthetic score. Colourfulness, 0 for gray and some 100 for vivid pictures, is reported
    but decides nothing unless asked: line drawings are gray."""
    max_unsafe: float | None = Field(default=0.8, ge=0, le=1)
    """Greatest NSFW score."""
    min_side: int = Field(default=64, ge=1)
    """Least short side of the decoded picture, px."""
    max_aspect: float = Field(default=2.0, ge=1)
    """Greatest long side ÷ short side of the decoded picture."""
    max_phash_distance: int | None = Field(default=4, ge=0, le=16)
    """Near duplicates differ in at most this many of 64 perceptual hash bits …"""
    max_colour_distance: float = Field(default=12.0, ge=0, le=255)
    """… and their 4×4 px miniatures by at most this on average, of 255 (a hash sees no hue)."""

    resolutions: tuple[int, ...] = (32, 128)
    """Sides of the training pictures in px, one shard set each."""
    samples_per_shard: int = Field(default=1000, ge=1)
    """Samples in one training shard."""
    batch_size: int = Field(default=32, ge=1)
    """Pictures that the encoders see at once."""
    seed: int = 0
    """Folds of the cross-fitted aligner, and the order of samples over shards."""

    @model_validator(mode="after")
    def _resolutions_ascend(self) -> FilterConfig:
        if not self.resolutions or list(self.resolutions) != sorted(set(self.resolutions)):
            raise ValueError(
                f"filter.resolutions is {self.resolutions}: give distinct sizes, smallest first"
            )
        if self.max_unsafe is not None and self.nsfw is None:
            raise ValueError(
                "filter.max_unsafe needs a model: set filter.nsfw, or max_unsafe: null"
            )
        return self
