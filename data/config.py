"""Every knob of the data half: the embedded source, the download and the filter. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gigagan.common.settings import Frozen

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""A field that holds a seed; gigagan.seeds.LARGEST is the same."""


class EmbeddedConfig(Frozen):
    """The embedded source: two emoji sets as captioned pictures, with planted defects."""

    concepts: Literal["nameable", "all"] = "nameable"
    """`nameable`: things that one can name from a picture of 32 px, easiest first
    (`data/nameable.txt`); `all`: whatever both sets draw, flags and clocks too, in seeded order."""
    max_concepts: int | None = Field(default=None, ge=4)
    """Concepts used, trained and unseen together: the first so many; all of them when null."""
    unseen_concepts: int = Field(default=12, ge=0)
    """How many of the concepts used are never trained."""
    unseen_combinations: float = Field(default=0.25, ge=0, lt=1)
    """Share of the 16 combinations of style and background of each trained concept that are never
    trained: one at least where it is above 0. What is held out are these, or, where it is 0, the
    unseen concepts."""
    pictures_per_style: int = Field(default=8, ge=1, le=8)
    """Most pictures of one concept in one style, each on another of the 8 backgrounds."""
    size_px: int = Field(default=128, ge=32, le=1024)
    """Side of a picture in pixels."""
    jitter: float = Field(default=0.0, ge=0, le=1)
    """How far size and place of what is trained on vary. No caption tells either, so they can only
    be learned as chance; at 0 every glyph is centred and of one size."""
    heldout_pictures: int = Field(default=384, ge=2)
    """Most held-out pictures; every concept comes once before a second time."""
    defect_fraction: float = Field(default=0.2, ge=0, le=0.8)
    """Share of the rows that carry a planted defect."""
    seed: Seed = 0
    """Decides what is never trained, captions, defects and the order of rows."""

    @model_validator(mode="after")
    def _is_possible(self) -> EmbeddedConfig:
        if not self.unseen_combinations and not self.unseen_concepts:
            raise ValueError(
                "download.embedded.unseen_combinations and unseen_concepts are both 0, which holds "
                "nothing out to measure on: raise either"
            )
        return self


ListColumn = Literal[
    "url", "caption", "label", "width", "height", "similarity_b32", "similarity_l14", "unsafe",
    "watermark", "aesthetic", "md5", "sha256", "phash",
]  # fmt: skip
"""Our columns of a list; `schema.ALIASES` has the names under which they are known."""


class DownloadConfig(Frozen):
    """From metadata to original bytes: what is listed, what is asked for, and how politely."""

    source: Literal["embedded", "metadata"] = "embedded"
    """`embedded` renders and serves its own pictures; `metadata` reads the lists named below."""
    embedded: EmbeddedConfig = EmbeddedConfig()
    """The embedded source; unused when `source` is `metadata`."""
    metadata: tuple[str, ...] = ()
    """Lists of LAION, Re-LAION, COYO, DataComp, or of url and caption: Parquet, CSV or TSV. Local
    paths, globs, or URLs that fsspec reads (`s3://`, `gs://`, `hf://`)."""
    columns: dict[ListColumn, Annotated[str, Field(min_length=1)] | None] = Field(default={})
    """Which column of the lists is which of ours (`{caption: re_caption}`), before the names that
    are known; null for one to do without. Unused when `source` is `embedded`."""
    allow_withdrawn: bool = False
    """Also read LAION's releases of before 2024, which their authors have withdrawn."""
    unique: Literal["url", "url and caption"] = "url"
    """What no two rows share: of equal ones a seeded choice stays."""
    max_rows: int | None = Field(default=None, ge=1)
    """Rows kept after the pre-filter, a seeded sample; all of them when null."""
    seed: Seed = 0
    """Order of the rows, and so the contents of shards; each host is spread over all of them."""

    min_side: int | None = Field(default=64, ge=1)
    """Least listed short side, px. A null in a column that a rule reads drops the row."""
    max_aspect: float | None = Field(default=3.0, ge=1)
    """Greatest listed long side ÷ short side."""
    min_caption_words: int = Field(default=3, ge=0, le=1000)
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

    rows_per_shard: int = Field(default=1000, ge=1, le=100_000)
    """Rows in one image shard: the unit of commit and of resume."""
    rows_per_part: int = Field(default=1_000_000, ge=1)
    """About as many rows are in one part: a list, one run of img2dataset, one folder of shards."""
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
    connect_to: dict[str, str] = Field(default={})
    """Host → "address:port" to connect to instead, unvetted, like curl's `--connect-to`: for
    mirrors and local sites."""
    verify_hashes: bool = True
    """Refuse bytes whose md5 or sha256 is not the listed one, where a list has one."""
    honour_opt_outs: bool = True
    """Refuse pictures whose server reserves them: `X-Robots-Tag: noai` and the like,
    `TDM-Reservation: 1`, or `/.well-known/tdmrep.json`."""
    honour_robots_txt: bool = True
    """Ask a host for robots.txt first, and refuse what it disallows us."""
    host_connections: int = Field(default=8, ge=1)
    """Most connections at once from one process to one host."""
    host_delay_s: float = Field(default=0.0, ge=0)
    """Least time between two requests of one process to one host; a longer `Crawl-delay` of its
    robots.txt goes before it."""
    user_agent: str = Field(default="gigagan-pipeline", pattern=r"^[A-Za-z_-]+$")
    """Who asks: the name by which robots.txt may address us."""
    contact: str | None = Field(default=None, min_length=4, pattern=r"^[\x20-\x7e]+$")
    """E-mail address or page where site owners reach you; sent with each request, and needed to
    ask the web."""

    distributor: Literal["multiprocessing", "ray", "pyspark"] = "multiprocessing"
    """What img2dataset spreads its work with: processes here, or a Ray or Spark cluster."""
    max_memory_gb: float = Field(default=4.0, gt=0)
    """The download's processes together are ended above this, and go on with fewer threads."""
    stall_s: float = Field(default=180.0, gt=0)
    """Without a row answered for so long, the download's processes are ended and begun anew."""

    @model_validator(mode="after")
    def _is_possible(self) -> DownloadConfig:
        if self.source == "metadata" and not self.metadata:
            raise ValueError(
                "download.source is 'metadata' but download.metadata is empty: "
                "name at least one list, or use source: embedded"
            )
        if needed := [name for name in ("url", "caption") if self.columns.get(name, "") is None]:
            raise ValueError(
                f"download.columns.{needed[0]} is null, but a row is nothing without it: name the "
                "column that holds it"
            )
        if self.stall_s <= 2 * self.total_deadline_s:
            raise ValueError(
                f"download.stall_s is {self.stall_s:g}, but one fetch may take twice "
                f"total_deadline_s ({self.total_deadline_s:g} s: for servers, and for its turn at "
                "them), which would look like a standstill: raise the one or lower the other"
            )
        if self.rows_per_part < self.rows_per_shard:
            raise ValueError(
                f"download.rows_per_part {self.rows_per_part} is less than rows_per_shard "
                f"{self.rows_per_shard}: a part holds whole shards"
            )
        return self


LIMITS = frozenset(
    {
        "metadata",  # whose content counts, wherever it lies
        "max_bytes",
        "max_pixels",
        "timeout_s",
        "total_deadline_s",
        "max_redirects",
        "retries",
        "allow_private_addresses",
        "connect_to",
        "verify_hashes",
        "host_connections",
        "host_delay_s",
        "user_agent",
        "contact",
        "distributor",
        "max_memory_gb",
        "stall_s",
    }
)
"""Settings that a download may go on with changed: keys name the same rows, of the same lists."""


class ScoreConfig(Frozen):
    """What is measured of each downloaded picture and caption, and by which models."""

    encoder: str = "embedded:aligner"
    """Judges how well picture and caption fit: `embedded:aligner`, or `open_clip:ARCH/WEIGHTS`."""
    nsfw: str | None = "embedded:opennsfw"
    """Scores unsafe pictures; not scored when null."""
    generated: Literal["embedded:generated-v1", "univfd:vitl14"] | None = None
    """Scores how likely a picture is a network's: `embedded:generated-v1`, or `univfd:vitl14`;
    not scored when null. What each can tell, and cannot: docs/cleaning.md."""
    aesthetic: Literal["colourfulness", "laion-v2"] | None = "colourfulness"
    """`colourfulness` is Hasler–Süsstrunk's, a stand-in; `laion-v2` needs the encoder
    `open_clip:ViT-L-14/openai`, on whose embeddings it was fitted. Not scored when null."""
    language: bool = True
    """Also name the language of each caption."""
    take_over: tuple[
        Literal["similarity_b32", "similarity_l14", "unsafe", "watermark", "aesthetic"], ...
    ] = ("watermark",)
    """Scores that are copied from the metadata and not computed. Either similarity stands in the
    column `similarity`, and then no encoder runs."""
    batch_size: int = Field(default=32, ge=1)
    """Pictures that the encoders see at once."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of open_clip encoders; `auto` is bfloat16 where the device computes in it."""
    devices: tuple[str, ...] = ("auto",)
    """Worker processes take these in turn; `auto` is every CUDA device, or else the CPU."""
    seed: Seed = 0
    """Folds of the cross-fitted aligner."""

    @model_validator(mode="after")
    def _is_possible(self) -> ScoreConfig:
        both = {"similarity_b32", "similarity_l14"} & {*self.take_over}
        if len(both) == 2:
            raise ValueError(
                "score.take_over names two similarities; their scales differ, so take one"
            )
        learned = self.aesthetic == "laion-v2" and "aesthetic" not in self.take_over
        if learned and self.encoder != "open_clip:ViT-L-14/openai":
            raise ValueError(
                f"score.aesthetic 'laion-v2' reads embeddings of open_clip:ViT-L-14/openai, but "
                f"score.encoder is {self.encoder!r}: change either"
            )
        if learned and both:
            raise ValueError(
                "score.aesthetic 'laion-v2' reads embeddings, but score.take_over brings the "
                "similarity, so that no encoder runs: take over aesthetic as well"
            )
        return self


class FilterConfig(Frozen):
    """Which pictures we learn from, and the shards they go to. Nothing is scored here."""

    min_similarity: float | None = 0.1
    """Least similarity. The scale is the encoder's own: look at the report's histogram. On
    the embedded source 0.1 finds 7 in 10 wrong captions, and drops 1 in 200 right ones."""
    top_similarity: float | None = Field(default=None, gt=0, le=1)
    """Only this share of all scored pictures, those of highest similarity (DataComp: 0.3)."""
    min_aesthetic: float | None = None
    """Least aesthetic score. Colourfulness, 0 for gray and some 100 for vivid pictures, is reported
    but decides nothing unless asked: line drawings are gray."""
    top_aesthetic: float | None = Field(default=None, gt=0, le=1)
    """Only this share of all scored pictures, those of highest aesthetic score."""
    max_unsafe: float | None = Field(default=0.8, ge=0, le=1)
    """Greatest NSFW score."""
    max_watermark: float | None = Field(default=None, ge=0, le=1)
    """Greatest watermark score."""
    max_generated: float | None = Field(default=None, ge=0, le=1)
    """Greatest likelihood that a network made the picture; needs `score.generated`."""
    min_side: int = Field(default=64, ge=1)
    """Least short side of the decoded picture, px."""
    max_aspect: float = Field(default=2.0, ge=1)
    """Greatest long side ÷ short side of the decoded picture."""
    min_caption_words: int | None = Field(default=None, ge=0)
    """Fewest words of a caption, parted by blanks. Captions that are empty or hold control
    characters are dropped whatever is set here."""
    max_caption_words: int | None = Field(default=None, ge=0)
    """Most words of a caption."""
    min_caption_chars: int | None = Field(default=None, ge=0)
    """Fewest characters of a caption."""
    max_caption_chars: int | None = Field(default=None, ge=0)
    """Most characters of a caption."""
    min_distinct_words: float | None = Field(default=None, ge=0, le=1)
    """Least share of different words in a caption, whatever their case: one word 20 times has 0.05,
    a sentence 0.7 and more. 0.3 is for captions that only repeat. A million rows take some 7 s."""
    languages: tuple[str, ...] | None = None
    """ISO 639-1 codes of the captions' languages that are kept; all when null."""
    labels: Literal["keep", "require"] = "keep"
    """`require` drops pictures without a label, the name of their class; a model of classes is
    trained on nothing else."""
    max_phash_change: int | None = Field(default=16, ge=0, le=64)
    """Most bits by which a picture's perceptual hash may differ from the one its list has (COYO):
    beyond, the address shows another picture now. Rows without a listed hash pass."""
    max_phash_distance: int | None = Field(default=4, ge=0, le=8)
    """Near duplicates differ in at most this many of 64 perceptual hash bits …"""
    max_colour_distance: float = Field(default=12.0, ge=0, le=255)
    """… and their 4×4 px miniatures by at most this on average, of 255 (a hash sees no hue)."""
    min_duplicate_cosine: float | None = Field(default=None, gt=0, le=1)
    """Also near duplicates: pictures of one cluster whose embeddings have at least this cosine
    (SemDeDup). Needs embeddings."""
    influence: str | None = None
    """Parquet of `python -m gigagan influence`: what a trained network learned from each picture,
    great for one that learns against pictures of like captions. Pictures without a score, which
    that training never saw, are kept, and counted in the report."""
    drop_influence: float | None = Field(default=None, gt=0, lt=1)
    """Share of the pictures with an influence that is dropped, those of the greatest."""
    decontaminate: tuple[str, ...] = ()
    """Captions files in COCO's format, with their pictures in `images` beside them: training
    pictures that are near duplicates of one of theirs are dropped."""

    resolutions: tuple[Annotated[int, Field(ge=1, le=2**15)], ...] = (32, 128)
    """Sides of the training pictures in px, one shard set each."""
    samples_per_shard: int = Field(default=1000, ge=1)
    """Samples in one training shard."""
    codec: Literal["png", "jpg"] = "png"
    """Of training pictures: `png` keeps every bit, `jpg` at quality 95 takes a quarter of it."""

    @model_validator(mode="after")
    def _is_possible(self) -> FilterConfig:
        if not self.resolutions or list(self.resolutions) != sorted(set(self.resolutions)):
            raise ValueError(
                f"filter.resolutions is {self.resolutions}: give distinct sizes, smallest first"
            )
        for unit in ("words", "chars"):
            least, most = (getattr(self, f"{bound}_caption_{unit}") for bound in ("min", "max"))
            if least is not None and most is not None and least > most:
                raise ValueError(
                    f"filter.min_caption_{unit} is {least} and max_caption_{unit} {most}, which no "
                    "caption fulfils: lower the one or raise the other"
                )
        if (self.influence is None) != (self.drop_influence is None):
            raise ValueError(
                f"filter.influence is {self.influence!r} and drop_influence {self.drop_influence}: "
                "the one says which picture did what and the other how many go; give both or none"
            )
        if self.decontaminate and self.max_phash_distance is None:
            raise ValueError(
                "filter.decontaminate looks for near duplicates, but filter.max_phash_distance is "
                "null: give the bits by which they may differ"
            )
        return self
