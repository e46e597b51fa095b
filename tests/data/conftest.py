"""A small embedded source, rendered and downloaded once for the whole folder."""

from __future__ import annotations

import numpy as np
import pytest

from data.config import DownloadConfig, EmbeddedConfig
from data.download import run as download
from data.score.run import Encoders


def small_config() -> DownloadConfig:
    embedded = EmbeddedConfig(
        max_concepts=30, pictures_per_style=3, size_px=96, unseen_concepts=9, defect_fraction=0.6
    )
    return DownloadConfig(embedded=embedded, rows_per_shard=70, timeout_s=5)


@pytest.fixture
def config() -> DownloadConfig:
    return small_config()


@pytest.fixture(scope="session")
def downloaded(tmp_path_factory):
    """(folder, report) of the download stage over the small embedded source."""
    out = tmp_path_factory.mktemp("download")
    return out, download.run(out, small_config())


def tiny_encoders() -> Encoders:
    """Deterministic functions in the place of networks: they judge the mean colour only."""

    def image_features(images):
        return np.stack([np.asarray(image.resize((2, 2))).reshape(-1) / 255 for image in images])

    def text_features(captions):
        return np.array([[len(caption), caption.count("e"), 1.0] for caption in captions])

    def similarity(images_ND, texts_NE):
        return 1 - images_ND.std(1) / 10 + 0 * texts_NE[:, 0]

    def unsafe(images):
        return np.full(len(images), 0.1)

    return Encoders(image_features, text_features, similarity, unsafe)


@pytest.fixture(scope="session")
def encoders() -> Encoders:
    return tiny_encoders()
