"""What a network is told: words, the name of a class, or nothing at all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from gigagan.evaluation.heldout import Asks
from gigagan.inference.prompts import PromptError, check_prompt, is_cut
from gigagan.models.base import BaseGenerator, text_encoder_of
from gigagan.models.classes import ClassNumbers, UnknownClassError
from gigagan.models.encoders import TextEncoder, TextFeatures
from gigagan.models.text import Features
from gigagan.models.upsampler import Upsampler

_KEPT_TEXTS = 256


class Condition(ABC):
    """Prompts as a network reads them."""

    asks: Asks
    """Which kind it is."""
    classes: tuple[str, ...] = ()
    """Names of the classes that a network knows, by number."""
    name: str
    """Two of one name read alike: features for one serve the other."""
    example: str
    """A prompt to begin with."""

    @abstractmethod
    def check(self, prompt: str, *, cut: bool = False) -> str:
        """The prompt as it is drawn; raises PromptError where it cannot be."""

    @abstractmethod
    def __call__(self, prompts: Sequence[str]) -> Features:
        """Checked prompts → what the network reads."""

    def is_cut(self, prompt: str) -> bool:
        """Whether some of the prompt would not be read."""
        return False


class Words(Condition):
    """Captions, by the text encoder that a network was trained with."""

    asks = "text"
    example = "flat emoji of a violin on a teal background"

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder, self.name = encoder, encoder.name
        self._texts: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def check(self, prompt: str, *, cut: bool = False) -> str:
        """By `check_prompt`."""
        return check_prompt(prompt, self.encoder, cut=cut)

    def is_cut(self, prompt: str) -> bool:
        """Whether it has more tokens than the encoder reads."""
        return is_cut(prompt, self.encoder)

    def __call__(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of the prompts; a prompt that came lately is not encoded again."""
        found = {prompt: self._texts[prompt] for prompt in prompts if prompt in self._texts}
        if new := list(dict.fromkeys(prompt for prompt in prompts if prompt not in found)):
            features = self.encoder.encode(new)
            for row, prompt in enumerate(new):
                tokens_LD = features.tokens_BLD[row][features.mask_BL[row]]
                found[prompt] = tokens_LD, features.pooled_BD[row].clone()
        self._texts |= found
        while len(self._texts) > _KEPT_TEXTS:
            self._texts.popitem(last=False)
        tokens = [found[prompt][0] for prompt in prompts]
        mask = [torch.ones(len(x), dtype=torch.bool, device=x.device) for x in tokens]
        return TextFeatures(
            pad_sequence(tokens, batch_first=True),
            pad_sequence(mask, batch_first=True),
            torch.stack([found[prompt][1] for prompt in prompts]),
        )


class Classes(Condition):
    """Names of classes, or their numbers."""

    asks = "class"

    def __init__(self, numbers: ClassNumbers) -> None:
        self.numbers, self.classes = numbers, numbers.names
        self.name = f"{len(numbers.names)} classes: {', '.join(numbers.names)}"
        self.example = numbers.names[0]

    def check(self, prompt: str, *, cut: bool = False) -> str:
        """The class's name: what is given is one or, if no class has that name, a number."""
        try:
            return self.numbers.find(" ".join(prompt.split()))
        except UnknownClassError as error:
            raise PromptError(str(error)) from error

    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        """Numbers B."""
        return self.numbers(prompts)


class Untold(Condition):
    """Nothing: the latent decides all."""

    asks = "nothing"
    name, example = "nothing", ""

    def check(self, prompt: str, *, cut: bool = False) -> str:
        """An empty prompt, and no other."""
        if prompt.strip():
            raise PromptError(
                f"the network is unconditional and reads no prompt such as {prompt[:60]!r}: leave "
                "it out"
            )
        return ""

    def __call__(self, prompts: Sequence[str]) -> None:
        """None."""
        return


def condition_of(network: BaseGenerator | Upsampler, device: torch.device | str) -> Condition:
    """What a network is told."""
    config = network.config
    if config.text is not None:
        return Words(text_encoder_of(network, device))
    if config.classes is not None:
        return Classes(ClassNumbers(config.classes, torch.device(device)))
    return Untold()
