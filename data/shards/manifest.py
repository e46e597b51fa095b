"""What a set of training shards says of itself: its index, and a sidecar beside each tar.

    RES/train-NNNNN.tar       KEY.png or .jpg, KEY.txt and KEY.json a sample, keys ascending
    RES/train-NNNNN.parquet   the sidecar: caption and label of each sample, and where it lies
    RES/index.json            written last: the tars, with the sizes and digests of all these files

Shards may come from elsewhere, so that nothing in them is believed unchecked: no name leads out of
the folder, and no byte is parsed whose digest the index does not have.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, ValidationError, model_validator

from gigagan.common.settings import Frozen

INDEX = "index.json"
KEY = r"^[A-Za-z0-9_-]{1,64}$"
"""What a key may look like; it never becomes a path, but other readers may be less careful."""
SHA256 = r"^[0-9a-f]{64}$"
AGAIN = "run the filter stage again"

SIDECAR = pa.schema(
    [
        ("key", pa.string()),
        ("caption", pa.string()),
        ("label", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
    ]
)
"""One row a sample: bytes [offset, offset + size) of the tar are its picture, of this sha256. The
label is the name of its class, and null where it has none."""
Text = Literal["caption", "label"]
"""What of a sample a model is told."""


class ManifestError(ValueError):
    """An index or a sidecar that cannot be used: which file, why, and what to do about it."""


class Entry(Frozen):
    """One shard of the index."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}\.tar$")
    """File name of the tar, which lies beside the index."""
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
    """Size of the tar."""
    sha256: str = Field(pattern=SHA256)
    index_bytes: int = Field(ge=1)
    """Size of the sidecar."""
    index_sha256: str = Field(pattern=SHA256)

    @property
    def sidecar(self) -> str:
        """Name of the sidecar."""
        return self.name.removesuffix("tar") + "parquet"


class Index(Frozen):
    """The shards of one resolution."""

    resolution: int = Field(ge=1, le=2**15)
    """Side of the pictures, px."""
    codec: Literal["png", "jpg"]
    samples: int = Field(ge=0)
    classes: tuple[str, ...]
    """Every label once, sorted as text: the place of a name is the number of its class."""
    unlabelled: int = Field(ge=0)
    """Samples that have no label."""
    shards: tuple[Entry, ...]

    @model_validator(mode="after")
    def _adds_up(self) -> Index:
        if self.samples != sum(entry.samples for entry in self.shards):
            raise ValueError(f"samples is {self.samples}, which is not the sum over the shards")
        if len({entry.name for entry in self.shards}) != len(self.shards):
            raise ValueError("a shard is listed twice")
        if self.classes != tuple(sorted({*self.classes})):
            raise ValueError("its classes are not sorted, or one is listed twice")
        if (self.unlabelled < self.samples) != bool(self.classes):
            raise ValueError("its classes and unlabelled samples contradict one another")
        return self

    def text(self) -> str:
        """As JSON, a line a shard."""
        head = self.model_dump(exclude={"shards"})
        lines = ",\n".join(json.dumps(entry.model_dump()) for entry in self.shards)
        return json.dumps(head)[:-1] + f', "shards": [\n{lines}\n]}}\n'


def parse_index(data: bytes, place: str) -> Index:
    """The index in these bytes of `place`.

    Raises:
        ManifestError: it is none, or of an older version.
    """
    try:
        document = json.loads(data)
        if _is_old(document):
            raise ManifestError(f"{place} was written by an older version: {AGAIN}")
        return Index.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ManifestError(
            f"{place} is no index of shards ({where or 'index'}: {first['msg']}): {AGAIN}"
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(
            f"{place} cannot be read ({error}): give a folder of one resolution that the filter "
            "stage has written, such as shards/032"
        ) from error


def _is_old(document: Any) -> bool:
    """Whether its shards have no sidecars, or its samples no labels."""
    shards = document.get("shards") if isinstance(document, dict) else None
    entries = [e for e in shards if isinstance(e, dict)] if isinstance(shards, list) else []
    return any(
        "bytes" in entry and ("index_sha256" not in entry or "classes" not in document)
        for entry in entries
    )


class Sidecar:
    """Where the samples of one shard lie, by their place in it; what it calls their captions are
    their labels where these are read."""

    def __init__(self, table: pa.Table, reads: Text) -> None:
        table = table.combine_chunks()
        self._keys, self._captions, self._digests = (
            table[name].chunk(0) for name in ("key", reads, "sha256")
        )
        self.offsets: np.ndarray = table["offset"].to_numpy()
        self.sizes: np.ndarray = table["size"].to_numpy()

    def key(self, place: int) -> str:
        """Key of the sample at this place."""
        return str(self._keys[place].as_py())

    def caption(self, place: int) -> str:
        """Caption of the sample at this place."""
        return str(self._captions[place].as_py())

    def captions(self) -> list[str]:
        """Captions of all samples, in their order."""
        return list(self._captions.to_pylist())

    def sha256(self, place: int) -> str:
        """sha256 of the picture of the sample at this place."""
        return str(self._digests[place].as_py())


def parse_sidecar(data: bytes, entry: Entry, place: str, reads: Text = "caption") -> Sidecar:
    """The sidecar in these bytes of `place`.

    Raises:
        ManifestError: not the bytes that the index means, or they do not describe its tar.
    """
    if len(data) != entry.index_bytes or hashlib.sha256(data).hexdigest() != entry.index_sha256:
        raise ManifestError(
            f"{place} has {len(data)} bytes that are not those its index means "
            f"({entry.index_bytes} bytes, sha256 {entry.index_sha256[:12]}…): {AGAIN}"
        )
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ManifestError(f"{place} is no Parquet file ({error}): {AGAIN}") from error
    if (fault := _fault(table, entry, reads)) is not None:
        raise ManifestError(f"{place}: {fault}: {AGAIN}")
    return Sidecar(table, reads)


def _fault(table: pa.Table, entry: Entry, reads: Text) -> str | None:
    """What is wrong with a sidecar."""
    if table.schema.remove_metadata() != SIDECAR:
        return f"its columns are {', '.join(table.column_names)}"
    if table.num_rows != entry.samples:
        return f"it has {table.num_rows} samples, its index says {entry.samples}"
    may_lack = {"label"} - {reads}
    if any(table[name].null_count for name in table.column_names if name not in may_lack):
        return "it has empty cells"
    strange = table.filter(pc.invert(pc.match_substring_regex(table["key"], KEY)))
    if strange.num_rows:
        return f"key {strange['key'][0].as_py()!r} is none of ours"
    offsets, sizes = table["offset"].to_numpy(), table["size"].to_numpy()
    if offsets.min() < 0 or sizes.min() < 0 or (offsets > entry.bytes - sizes).any():
        return f"a picture lies outside of {entry.name}"
    return None
