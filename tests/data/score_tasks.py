"""Encoders for the tests of scoring: imported by name in other processes."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.score.run import Encoders


def image_features(images):
    return np.stack([np.asarray(image.resize((2, 2))).reshape(-1) / 255 for image in images])


def text_features(captions):
    assert len(captions) == len(set(captions))
    return np.array([[len(caption), caption.count("e"), 1.0] for caption in captions])


def unsafe(images):
    return np.array([image.getpixel((0, 0))[0] / 255 for image in images])


def similarity(images_ND, texts_NE):
    return images_ND[:, 0] + texts_NE[:, 0]


def fit_similarity(images_ND, texts_NE):
    """Hangs on all pairs, in their order."""
    images_ND = images_ND.astype(np.float32)
    return images_ND.mean(1) - images_ND.mean() + np.arange(len(texts_NE)) / 1000


def aesthetic(images_ND):
    return images_ND.sum(1)


def pairwise(worker: int = 0) -> Encoders:
    return Encoders(image_features, text_features, similarity, None, aesthetic, unsafe)


def fitted(worker: int = 0) -> Encoders:
    return Encoders(image_features, text_features, None, fit_similarity, None, unsafe)


def detecting(worker: int = 0) -> Encoders:
    return replace(fitted(), generated=lambda images: 1 - unsafe(images))


class Killed:
    """Makes encoders that kill their process once, at the given picture of all."""

    def __init__(self, once: Path) -> None:
        self.once = once

    def __call__(self, worker: int) -> Encoders:
        def features(images):
            if not self.once.exists():
                self.once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return image_features(images)

        return Encoders(features, text_features, None, fit_similarity, None, unsafe)


class Slow:
    """Makes encoders that take their time, and leave a mark when they have begun."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __call__(self, worker: int) -> Encoders:
        def features(images):
            time.sleep(0.3)
            self.mark.touch()
            return image_features(images)

        return Encoders(features, text_features, None, fit_similarity, None, unsafe)
