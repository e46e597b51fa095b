"""What options of training learn beside a discriminator: linear maps of its features.

Shape letters: B batch, F features of a picture, P parameters of an augmentation, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gigagan.models.layers import EqualLinear, full_precision, without_autocast


class OptionHeads(nn.Module):
    """The head of AugSelf-GAN, the classifier of ADC-GAN, or both; in float32.

    `num_told` are the parameters of each kind of augmentation that it tells, `num_classes` those
    that it keeps apart, real and generated; without any there is no such map.
    """

    def __init__(self, width: int, *, num_told: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.num_told = list(num_told)
        self.augmentation = EqualLinear(width, sum(num_told)) if num_told else None
        self.classifier = EqualLinear(width, 2 * num_classes) if num_classes else None

    def tell(self, augmented_BF: Tensor, plain_BF: Tensor) -> list[Tensor]:
        """How pictures were augmented, of the difference of their features: B P a kind."""
        assert self.augmentation is not None
        with without_autocast(augmented_BF.device):
            told_BP = self.augmentation(full_precision(augmented_BF) - full_precision(plain_BF))
        return list(told_BP.split(self.num_told, dim=1))

    def classify(self, features_BF: Tensor) -> Tensor:
        """Logits of real, then of generated pictures of each class: B 2K."""
        assert self.classifier is not None
        with without_autocast(features_BF.device):
            logits_BK: Tensor = self.classifier(full_precision(features_BF))
        return logits_BK
