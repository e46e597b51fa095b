"""The model card: recorded facts and nothing else."""

import pytest

from flows.record import card
from flows.storage.store import Store
from gigagan.common import exits
from tests.flows.outputs import BASE, RULES, UPSAMPLER, evaluated, key

RESULTS = {
    "protocol": RULES
    | {"generated_size": [64, 64], "weights_sha256": {"lpips-alex": "0", "house:own": "0"}},
    "metrics": {"fid": 300.0, "kid": 0.25, "recall_at_1": 0.03},
    "intervals": {"kid": [0.23, 0.28]},
    "reference": {"real": {"kid": 0.01}, "chance": {"recall_at_1": 0.04}},
    "absent": {"clip": "no weights"},
}


@pytest.fixture
def text(config):
    return render(config, evaluated(config, 1, None, results=RESULTS))


def render(config, made):
    store = Store.of(config)
    found = {
        role: card.find(store, f"{stage.name}/{key(1)}")
        for role, stage in (("base", BASE), ("upsampler", UPSAMPLER))
    }
    return card.render("gigagan", store, card.find(store, f"evaluate/{key(1)}"), found)


def test_the_funnel_is_that_of_the_data_it_learned_from(text):
    assert "| listed | 0 | 11 |\n| dead link | 4 | 7 |" in text
    assert "hold 7 pictures" in text


def test_results_stand_beside_their_interval_real_pictures_and_chance(text):
    assert "| kid | 0.25 | 0.23–0.28 | 0.01 |  |" in text
    assert "| recall_at_1 | 0.03 |  |  | 0.04 |" in text
    assert "num_generated 24" in text


def test_limits_are_recorded_numbers_compared(text):
    assert "No better than chance: recall_at_1 (0.03, chance 0.04)" in text
    assert "no better than plain enlargement in: psnr (20, bilinear 21)" in text
    assert "Not measured: clip (no weights)" in text


def test_licences_of_known_models_are_named_and_others_are_not_invented(text):
    assert "| `lpips-alex` | BSD-2-Clause" in text
    assert "| `house:own` | not recorded |" in text
    assert "Pictures and captions: Twemoji (CC-BY 4.0) and OpenMoji (CC-BY-SA 4.0)." in text


def test_training_figures_and_digests(text, config):
    assert "| base | 640 | not recorded | 1:15 | not recorded |" in text
    base = card.find(Store.of(config), f"train-base/{key(1)}")
    (entry,) = [entry for entry in base.manifest.files if entry.path == "snapshot.safetensors"]
    assert f"`{entry.sha256}`" in text


def test_what_is_missing_reads_not_recorded(config):
    made = evaluated(config, 1, None, results={"metrics": {}})
    for name in ("download", "filter"):
        (made.output.path.parents[1] / name / key(1)[:16] / "manifest.json").unlink()
    text = render(config, made)
    assert text.count("not recorded") > 5
    assert "None" not in text


def test_it_shows_how_to_open_it(text):
    assert 'gigagan.load("models:/gigagan@champion")' in text


def test_the_hardware_is_what_the_training_said_at_each_attempt(tmp_path):
    log = tmp_path / "output.log"
    assert card._hardware(log) == "not recorded"
    log.write_text("base on 1 × cpu, 2 threads\n")
    assert card._hardware(log) == "not recorded"
    said = ["8 × cuda, 4 threads", "8 × cuda, 4 threads", "4 × cuda, 4 threads"]
    log.write_text("".join(f"{exits.fact(exits.HARDWARE, text)}\nloss\n" for text in said))
    assert card._hardware(log) == "8 × cuda, 4 threads; 4 × cuda, 4 threads"
