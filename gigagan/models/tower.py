"""A text encoder that learns: a network's own copy of a frozen one (StyleGAN-T, second phase)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gigagan.models import pretrained
from gigagan.models.encoders import LearnableTextEncoder, TextFeatures


class TextTower(nn.Module):
    """Weights of a text encoder as parameters; they start as those of the frozen one.

    Tokenizer and structure are the frozen encoder's, which must be on this machine.

    Raises:
        MissingWeightsError: it is not; the message says which file to place where.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        weights = self._frozen(torch.device("cpu")).weights()
        self._names = list(weights)
        self.weights = nn.ParameterList(w.clone() for w in weights.values())

    def forward(self, captions: Sequence[str]) -> TextFeatures:
        """Features of captions, with gradients to the weights."""
        return self._with(list(self.weights)).features(captions)

    def encoder(self) -> LearnableTextEncoder:
        """The encoder that these weights are now, for drawing. It has a name of its own."""
        encoder = self._with([w.detach() for w in self.weights])
        encoder.name = f"{self.name}, trained"
        return encoder

    def _with(self, weights: Sequence[Tensor]) -> LearnableTextEncoder:
        frozen = self._frozen(weights[0].device)
        return frozen.with_weights(dict(zip(self._names, weights, strict=True)))

    def _frozen(self, device: torch.device) -> LearnableTextEncoder:
        encoder = pretrained.text_encoder(self.name, device)
        assert isinstance(encoder, LearnableTextEncoder)
        return encoder
