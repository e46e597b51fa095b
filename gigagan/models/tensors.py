"""Tensors as a safetensors file that others may read, and files that others gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gigagan.common.files import filled_aside


@contextmanager
def opened(path: Path, *, framework: str = "pt", device: str = "cpu") -> Iterator[Any]:
    """The file, as safetensors opens it.

    Raises:
        ValueError: it is not there, or no safetensors file; the text names it.
    """
    try:
        with safe_open(path, framework=framework, device=device) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file ({error})") from error


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write them, whole or not at all, with the permissions of any new file.

    `save_file` leaves its file to its owner alone, whatever the umask.

    Raises:
        OSError: the disk is full, or refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with filled_aside(path) as partial:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(dict(tensors), partial, metadata=dict(metadata))
        except SafetensorError as error:  # a full disk, say
            raise OSError(f"{path} could not be written ({error})") from error
        partial.chmod(mode)
