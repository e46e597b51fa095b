"""Lists of entries in a JSON document, as COCO's captions format has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def entries(document: Any, part: str, needed: Mapping[str, type]) -> list[dict[str, Any]]:
    """Entries of a list in the document that have what is needed.

    Raises:
        ValueError: there is no such list, or an entry lacks something; it is named.
    """
    found = document.get(part) if isinstance(document, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"it has no list {part!r}")
    for number, entry in enumerate(found):
        for key, kind in needed.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise ValueError(f"{part}[{number}] has no {key!r} that is {kind.__name__}")
    return found
