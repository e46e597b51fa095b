"""Classes by their names: what people and shards say → the numbers that networks are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gigagan.common.settings import nearest
from gigagan.config import ClassConfig


class UnknownClassError(ValueError):
    """Neither the name nor the number of a class that the network knows."""


class ClassNumbers:
    """Names of classes → their numbers; without names the numbers themselves are the names."""

    def __init__(self, config: ClassConfig, device: torch.device) -> None:
        self.names = config.names or tuple(map(str, range(config.number)))
        self.device = device
        self._number = {name: number for number, name in enumerate(self.names)}

    def find(self, said: str) -> str:
        """The name of the class that has this name or, if none has, this number.

        Raises:
            UnknownClassError: there is none; the message has the nearest names.
        """
        if said in self._number:
            return said
        if said.isdecimal() and int(said) < len(self.names):
            return self.names[int(said)]
        raise UnknownClassError(
            f"the network knows no class {said!r}{nearest(said, self.names)}: it has "
            f"{len(self.names)}, give a name as in {self.names[0]!r} or a number from 0 to "
            f"{len(self.names) - 1}"
        )

    def __call__(self, names: Sequence[str]) -> Tensor:
        """Names (or numbers) → numbers B.

        Raises:
            UnknownClassError: one is of no class.
        """
        numbers = [self._number[self.find(name)] for name in names]
        return torch.tensor(numbers, dtype=torch.long).to(self.device)


class Nothing:
    """What an unconditional network reads, whatever the caption."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, captions: Sequence[str]) -> None:
        """None."""
        return
