"""What a prompt must be before it is drawn: something, and no longer than is read."""

from __future__ import annotations

import unicodedata

from gigagan.models.encoders import TextEncoder

MAX_CHARACTERS = 4_000


class PromptError(ValueError):
    """A prompt that cannot be drawn as it stands."""


def check_prompt(prompt: str, encoder: TextEncoder, *, cut: bool = False) -> str:
    """The prompt without space around it.

    With `cut` a prompt longer than the encoder reads is let through: the encoder drops what is
    beyond its limit and keeps the end token.

    Raises:
        PromptError: it is empty, has control characters, or more tokens than the encoder reads.
    """
    stripped = " ".join(prompt.split())
    if not stripped:
        raise PromptError("the prompt is empty: say what to draw")
    control = next((c for c in stripped if unicodedata.category(c) == "Cc"), None)
    if control is not None:
        raise PromptError(f"the prompt {_short(stripped)} has the control character {control!r}")
    if len(stripped) > MAX_CHARACTERS and not cut:
        raise PromptError(
            f"the prompt {_short(stripped)} has {len(stripped):,} characters, the limit is "
            f"{MAX_CHARACTERS:,}: shorten it"
        )
    if not cut and (count := encoder.count_tokens(stripped)) > encoder.max_tokens:
        raise PromptError(
            f"the prompt {_short(stripped)} has {count} tokens, {encoder.name} reads "
            f"{encoder.max_tokens}: shorten it, or have it cut (--cut, cut=True)"
        )
    return stripped


def is_cut(prompt: str, encoder: TextEncoder) -> bool:
    """Whether the encoder would drop some of it."""
    return encoder.count_tokens(" ".join(prompt.split())) > encoder.max_tokens


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")
