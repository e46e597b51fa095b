"""The pipeline of a base by classes and an unconditional upsampler, for real and in small."""

import json

import pytest

from flows.config import PipelineConfig
from flows.stages.full_pipeline import full_pipeline
from gigagan.models import snapshot

pytestmark = [pytest.mark.flow, pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

UNTOLD = {"text": None}
BY_CLASS = {"text": None, "classes": {"number": 8, "width": 16}}
CHANGES = {
    "download": {"embedded": {"max_concepts": 10, "unseen_concepts": 2, "pictures_per_style": 4}},
    "train_base": {
        "total_images": 64, "batch_size": 16, "checkpoint_images": 32, "sample_images": 64,
        "generator": {"channels": [16, 16, 8, 8], "attention": [0, 0, 0, 0], **BY_CLASS},
        "discriminator": {"kind": "projected", "maps": 8, **BY_CLASS},
        "optimizer": {"r1_weight": 0},
        "loss": {"matching": 0.5, "contrastive": 0, "vision": 0},
    },
    "train_upsampler": {
        "lpips": 0, "upsampler": UNTOLD, "discriminator": UNTOLD,
        "loss": {"matching": 0, "contrastive": 0},
    },
    "evaluate": {"speed_batches": [], "neighbours": 0},
}  # fmt: skip


def merged(below, above):
    """Nested mappings, the second's values first."""
    return {**below, **{
        key: merged(below[key], value) if isinstance(below.get(key), dict) else value
        for key, value in above.items()
    }}  # fmt: skip


def test_classes_go_from_the_download_to_their_own_figures(config):
    smoke = PipelineConfig.preset("smoke").model_dump(mode="json", exclude_defaults=True)
    changed = PipelineConfig.parse(
        merged(smoke, {**CHANGES, "name": config.name, "store": config.store})
    )
    outputs = full_pipeline(config=changed)
    base, _ = snapshot.load(outputs["train-base"].path / "snapshot.safetensors")
    assert len(base.config.classes.names) == 8
    results = json.loads((outputs["evaluate"].path / "results.json").read_text())
    assert results["reference"]["chance"]["class_accuracy_nearest_mean"] <= 1 / 2
    assert {"fid", "intra_class_lpips", "classes_covered"} <= results["metrics"].keys()
    drawn = (outputs["evaluate"].path / "captions.txt").read_text().splitlines()
    assert set(drawn) <= set(base.config.classes.names)
