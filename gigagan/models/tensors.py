"""Tensors as a safetensors file that others may read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write them, whole or not at all, with the permissions of any new file.

    `save_file` leaves its file to its owner alone, whatever the umask.

    Raises:
        OSError: the disk is full, or refuses.
    """
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode
    try:
        save_file(dict(tensors), partial, metadata=dict(metadata))
        partial.chmod(mode)
        partial.replace(path)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{path} could not be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)
