"""A list's columns by their Arrow types: which can become ours, and how."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from data import sql
from data.schema import TYPES, MetadataError

HASH_BYTES = {"md5": 16, "sha256": 32, "phash": 8}
"""Columns of hashes, and how long these are."""
HEX_DIGITS = {"md5": "{32}", "sha256": "{64}", "phash": "{1,16}"}
"""How many digits they have where a source writes them in hexadecimal."""


class Kind(Enum):
    """What is stored, in whatever layout."""

    TEXT = auto()
    BYTES = auto()
    """A hash: its bytes, or its hexadecimal digits in ASCII."""
    NUMBER = auto()
    NOTHING = auto()
    """A column of nulls."""


class Column(NamedTuple):
    """A column to read."""

    theirs: str
    """Its name in the list."""
    kind: Kind


def column(ours: str, theirs: str, stored: pa.DataType, file: str) -> Column:
    """What is read of a list's column `theirs` as our column `ours` (or `status`).

    Raises:
        MetadataError: that type cannot be it: a list of captions, a structure, a date …
    """
    kind = _kind(ours, stored)
    if kind is None:
        is_number = TYPES.get(ours, "VARCHAR") != "VARCHAR"
        wanted = "numbers" if is_number else "text"
        if ours == "label":
            wanted = "text or integers"
        if ours in HASH_BYTES:
            wanted = f"{ours} hashes, as hexadecimal text or {HASH_BYTES[ours]} bytes"
        if ours == "phash":
            wanted = "perceptual hashes, as hexadecimal text or integers of 64 bits"
        instead = "" if ours in ("url", "caption") else ", or set that to null to do without"
        raise MetadataError(
            f"{file}: the column {theirs!r} for our {ours} is {stored}, not {wanted}: write it as "
            f"such, or name another one in download.columns.{ours}{instead}"
        )
    return Column(theirs, kind)


def _kind(ours: str, stored: pa.DataType) -> Kind | None:
    """None: it cannot be that column."""
    if pa.types.is_dictionary(stored):
        stored = stored.value_type
    if pa.types.is_null(stored):
        return Kind.NOTHING
    is_text = any(t(stored) for t in (_t.is_string, _t.is_large_string, _t.is_string_view))
    is_bytes = any(t(stored) for t in (_t.is_binary, _t.is_large_binary, _t.is_binary_view))
    if ours in HASH_BYTES:
        if _t.is_fixed_size_binary(stored):
            size = HASH_BYTES[ours]
            sizes = (2 * size,) if ours == "phash" else (size, 2 * size)
            return Kind.BYTES if stored.byte_width in sizes else None
        if ours == "phash" and (_t.is_int64(stored) or _t.is_uint64(stored)):
            return Kind.NUMBER
        return Kind.TEXT if is_text else Kind.BYTES if is_bytes else None
    if is_text or is_bytes:  # older writers do not say which bytes are text
        return Kind.TEXT
    if ours == "label":
        return Kind.NUMBER if _t.is_integer(stored) else None
    is_number = _t.is_integer(stored) or _t.is_floating(stored) or _t.is_decimal(stored)
    return Kind.NUMBER if is_number and TYPES.get(ours, "VARCHAR") != "VARCHAR" else None


_t = pa.types


def expression(ours: str, read: Column) -> str:
    """SQL of our column.

    What does not fit becomes null: NaN and infinities, a size that is no number, a hash of another
    length or with other digits, a label that is empty or has control characters. Hashes become
    lower-case, and numbers of classes text.
    """
    name, kind = sql.name(read.theirs), TYPES.get(ours, "VARCHAR")
    if read.kind is Kind.NOTHING:
        return f"NULL::{kind}"
    if ours in HASH_BYTES and read.kind is not Kind.NUMBER:
        fits = f"regexp_full_match({name}, '[0-9a-fA-F]{HEX_DIGITS[ours]}')"
        value = f"CAST('0x' || {name} AS UBIGINT)" if ours == "phash" else f"lower({name})"
        return f"CASE WHEN {fits} THEN {value} END"
    if ours == "phash":  # signed integers have the same 64 bits
        signed = f"({name}::HUGEINT + {1 << 64})::UBIGINT"
        return f"CASE WHEN {name} < 0 THEN {signed} ELSE {name}::UBIGINT END"
    if kind == "INTEGER" and read.kind is Kind.TEXT:
        return f"TRY_CAST(TRY_CAST({name} AS DOUBLE) AS INTEGER)"
    if ours == "label":
        text = f"trim({name}::VARCHAR)"
        return rf"CASE WHEN regexp_full_match({text}, '\P{{Cc}}+') THEN {text} END"
    if kind == "FLOAT":
        value = f"TRY_CAST({name} AS FLOAT)"
        return f"CASE WHEN isfinite({value}) THEN {value} END"
    return f"TRY_CAST({name} AS {kind})"


def listed(read: Mapping[str, Column]) -> dict[str, str]:
    """SQL of each hash that is text: the list has something there, whether it fits or not."""
    kinds = (Kind.TEXT, Kind.BYTES)
    hashes = [name for name in HASH_BYTES if name in read and read[name].kind in kinds]
    return {f"listed_{name}": f"{sql.name(read[name].theirs)} <> ''" for name in hashes}


# ---- row by row --------------------------------------------------------------------------------


def plain(ours: str, read: Column, stored: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Values in a layout that DuckDB has, and whether each could be read at all.

    Text that is not UTF-8 cannot. Bytes of a hash become hexadecimal text.
    """
    if pa.types.is_dictionary(stored.type):
        stored = stored.dictionary_decode()
    if read.kind is Kind.BYTES:
        found = [_hexadecimal(ours, value) for value in stored.to_pylist()]
        return pa.array(found, pa.large_string()), pa.repeat(True, len(stored))
    if read.kind is Kind.NUMBER:
        if _t.is_float16(stored.type) or _t.is_decimal(stored.type):
            stored = stored.cast(pa.float64())
        return stored, pa.repeat(True, len(stored))
    text = _text(stored)
    return text, pc.equal(stored.is_null(), text.is_null())


def _hexadecimal(ours: str, value: bytes | None) -> str | None:
    """A hash as text; it may be wrong, but then it fits nothing."""
    if value is None:
        return None
    if ours != "phash" and len(value) == HASH_BYTES[ours]:
        return value.hex()
    return value.decode("ascii", "replace")


def _text(values: pa.Array) -> pa.Array:
    """Text or bytes as text, null where they are not UTF-8."""
    if _t.is_null(values.type):
        return values.cast(pa.large_string())
    values = values.cast(pa.large_binary())
    try:
        return values.cast(pa.large_string())
    except pa.ArrowInvalid:
        return pa.array([_decoded(value) for value in values.to_pylist()], pa.large_string())


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None
