import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gigagan.evaluation.heldout import read_heldout
from gigagan.evaluation.judges.features import square
from gigagan.models import pretrained
from studies import _copies, _near, memorisation

STYLES, BACKGROUNDS = ("flat", "outlined"), ("white", "teal")
RANDOM = np.random.default_rng(0)
PICTURES = [Image.fromarray(RANDOM.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(5)]


def squared(vectors, i, j):
    return float(np.square(vectors[i].astype(np.float64) - vectors[j]).sum())


def test_squared_distances_of_the_first_encoder_are_lpips():
    x_NCHW = torch.stack(
        [torch.from_numpy(np.array(square(p, 64))).permute(2, 0, 1) / 127.5 - 1 for p in PICTURES]
    )
    with torch.no_grad():
        theirs = pretrained.lpips("alex")(x_NCHW[:1], x_NCHW[1:]).flatten()
        vectors = _copies.lpips(PICTURES)
    for i, distance in enumerate(theirs, start=1):
        assert squared(vectors, 0, i) == pytest.approx(distance.item(), rel=1e-4)


def test_those_of_the_others_are_cosines_and_mean_squares():
    x, y = (np.asarray(picture) / 255 for picture in PICTURES[:2])
    assert squared(_copies.pixels(PICTURES), 0, 1) == pytest.approx(np.mean((x - y) ** 2), rel=1e-5)
    vectors = torch.from_numpy(_copies.efficientnet(PICTURES))
    cosine = F.cosine_similarity(vectors[0], vectors[1], dim=0).item()
    assert squared(vectors.numpy(), 0, 1) == pytest.approx(2 - 2 * cosine, rel=1e-4)


def test_planted_copies_differ_from_their_source_and_keep_its_size():
    for name, change in _copies.changes().items():
        changed = change(PICTURES[0])
        assert (changed.size, changed.mode) == ((32, 32), "RGB"), name
        assert np.any(np.asarray(changed) != np.asarray(PICTURES[0])), name
    shifted = _copies.changes()["one pixel right and down"](PICTURES[0])
    assert np.array_equal(np.asarray(shifted)[1:, 1:], np.asarray(PICTURES[0])[:-1, :-1])


def test_intervals_know_that_pictures_of_a_concept_are_alike():
    values = np.repeat([0.0, 1.0], 20).repeat(5)
    alone = _near.mean(values, np.arange(200))
    together = _near.mean(values, np.arange(200) // 20)
    assert alone[0] == together[0] == 0.5
    assert alone[1] < 0.5 < alone[2]
    assert together[2] - together[1] > 3 * (alone[2] - alone[1])
    assert _near.mean(np.zeros(20), np.arange(20) // 2)[2] == pytest.approx(0.278, abs=0.01)


def test_kappa_is_agreement_beyond_chance():
    one, other = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0, 0, 0, 0, 0])
    assert _near.kappa(one == 1, other == 1) == pytest.approx((0.8 - 0.58) / 0.42)
    assert _near.kappa(one == 1, one == 1) == 1
    assert _near.kappa(one > 1, one > 1) is None


# ---- the whole of it, on a made-up set of drawings ----------------------------------------------


def drawing(concept, style, background):
    """Blocks of a random figure in a style on a background."""
    figure = np.random.default_rng([concept, STYLES.index(style)]).random((4, 4)) < 0.5
    ink, ground = (40, 200) if style == "flat" else (90, 200)
    ground += 20 * BACKGROUNDS.index(background)
    cells = np.where(figure, ink, ground).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    return Image.fromarray(np.stack([cells] * 3, axis=-1))


@pytest.fixture
def store(tmp_path):
    """Shards, held-out pictures and a filter's table: 24 concepts, one in three never trained."""
    shards, heldout = tmp_path / "filter" / "shards" / "032", tmp_path / "heldout"
    (heldout / "images").mkdir(parents=True)
    shards.mkdir(parents=True)
    images, notes, kept = [], [], []
    for number in range(24 * 4):
        concept, look = divmod(number, 4)
        style, background = STYLES[look // 2], BACKGROUNDS[look % 2]
        split = "unseen" if concept % 3 == 0 else "combination" if look == 3 else "trained"
        name = f"{concept}-{style}-{background}.png"
        drawing(concept, style, background).save(heldout / "images" / name)
        images.append({"id": number, "file_name": name})
        caption = f"{style} c{concept} on {background}"
        note = {"id": number, "image_id": number, "caption": caption, "split": split}
        notes.append(note | {"concept": f"c{concept}", "style": style, "background": background})
        if split == "trained":
            kept.append({"key": f"{number:05}", "url": f"http://site/pictures/{name}"})
    for shard, rows in enumerate((kept[:40], kept[40:])):  # the last one is not full
        with tarfile.open(shards / f"train-{shard:05}.tar", "w") as tar:
            for row in rows:
                file = heldout / "images" / row["url"].rsplit("/", 1)[1]
                tar.add(file, arcname=f"{row['key']}.png")
        told = [{"caption": row["url"], "sha256": row["key"]} for row in rows]
        pq.write_table(pa.Table.from_pylist(told), shards / f"train-{shard:05}.parquet")
    held = [note for note in notes if note["split"] == "combination"]
    for name, some in {"gallery": notes, "captions": held}.items():
        content = {"images": images, "annotations": some}
        (heldout / f"{name}.json").write_text(json.dumps(content))
    (shards / "index.json").write_text(json.dumps({"resolution": 32}))
    pq.write_table(pa.Table.from_pylist(kept), tmp_path / "filter" / "kept.parquet")
    return shards, heldout


class Network:
    """Draws what a function of concept, style, background and latent says."""

    def __init__(self, draw):
        self.draw = draw

    def sample(self, captions, *, seed, upscale):
        assert not upscale
        words = [caption.split() for caption in captions]
        return [
            self.draw(int(concept[1:]), style, ground, seed) for style, concept, _, ground in words
        ]


def noise(concept, style, background, seed):
    values = np.random.default_rng([concept, seed]).integers(0, 256, (32, 32, 3), np.uint8)
    return Image.fromarray(values)


NETWORKS = {
    "copier-seed-0": Network(
        lambda concept, style, background, _: drawing(concept, style, "white")
    ),
    "honest-seed-0": Network(
        lambda concept, style, background, _: drawing(concept, style, background)
    ),
    "noise-seed-1": Network(noise),
}


@pytest.fixture
def measured(store, tmp_path, monkeypatch):
    """Results of three networks by pixels."""
    networks = {name: tmp_path / name / "images-16.safetensors" for name in NETWORKS}
    for name, path in networks.items():
        path.parent.mkdir()
        path.write_text(name)
    for slow in ("LPIPS", "EfficientNet"):
        monkeypatch.delitem(_copies.ENCODERS, slow)
    monkeypatch.setattr(memorisation, "load", lambda path: NETWORKS[path.parent.name])
    monkeypatch.setattr(memorisation, "snapshots", lambda *_: networks)
    shards, heldout = store
    arguments = ["--shards", shards, "--heldout", heldout, "--out", tmp_path / "out"]
    arguments += ["--results", tmp_path / "results", "--images", tmp_path]
    assert memorisation.main(["run", *map(str, arguments)]) == 0
    return tmp_path, arguments


def shares(folder, name, split):
    content = json.loads((folder / "results" / f"{name}.json").read_text())
    found = content["splits"][split]["encoders"]["pixels"]
    return {key: found[key][0] for key in ("near", "drawing", "own", "copying", "latents_near")}


def test_who_copies_is_found_out_and_who_draws_what_was_asked_for_is_not(measured, capsys):
    folder, _ = measured
    copier, honest = (
        shares(folder, f"{name}-seed-0", "combination") for name in ("copier", "honest")
    )
    assert copier["near"] == copier["drawing"] == 1
    assert copier["own"] == 0
    assert honest["own"] == 1
    assert copier["copying"] == 1 > honest["copying"] == 0.5
    assert shares(folder, "copier-seed-0", "trained")["near"] == 1
    assert shares(folder, "honest-seed-0", "trained")["own"] == 1
    assert shares(folder, "honest-seed-0", "unseen")["copying"] == 0.5
    for split in ("trained", "combination", "unseen"):
        random = shares(folder, "noise-seed-1", split)
        assert random["near"] == random["copying"] == random["latents_near"] == 0
        assert random["own"] < 0.05  # of some forty training pictures one is the nearest


def test_the_detector_is_checked_on_real_and_on_planted_pictures(measured):
    folder, _ = measured
    real = json.loads((folder / "results" / "real.json").read_text())["encoders"]["pixels"]
    assert real["near"]["unseen"][0] < 0.3 < 0.9 < real["near"]["combination"][0]
    assert real["planted"]["JPEG, quality 75"]["near"][0] == 1
    assert real["planted"]["JPEG, quality 75"]["source"][0] > 0.9


def test_all_training_pictures_are_looked_at(store):
    shards, heldout = store
    works = read_heldout(heldout).gallery.works
    trained = _near.Trained.read(shards, works, {})
    assert sorted(work.caption for work in trained.works) == sorted(
        work.caption for work in works if work.split == "trained"
    )
    for work, picture in zip(trained.works, trained.pictures, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(work.picture)))


def test_what_has_a_record_is_measured_again_only_if_its_snapshot_is_another(measured, monkeypatch):
    folder, arguments = measured
    monkeypatch.setattr(memorisation, "load", lambda path: pytest.fail("it has a record"))
    assert memorisation.main(["run", *map(str, arguments)]) == 0
    drawn = []
    monkeypatch.setattr(
        memorisation, "load", lambda path: drawn.append(path.parent.name) or Network(noise)
    )
    (folder / "copier-seed-0" / "images-16.safetensors").write_text("trained anew")
    assert memorisation.main(["run", *map(str, arguments)]) == 0
    assert drawn == ["copier-seed-0"]


def test_a_network_that_comes_later_is_held_to_the_same_limits(measured, monkeypatch):
    folder, arguments = measured
    before = (folder / "results" / "honest-seed-0.json").read_bytes()
    (folder / "results" / "honest-seed-0.json").unlink()
    monkeypatch.setattr(_near, "chance_limit", lambda *_: pytest.fail("they are known"))
    assert memorisation.main(["run", *map(str, arguments)]) == 0
    assert (folder / "results" / "honest-seed-0.json").read_bytes() == before


def test_the_report_needs_the_records_alone_and_is_the_same_each_time(measured):
    folder, _ = measured
    images = folder / "again"
    images.mkdir()
    tables = memorisation.report(folder / "results", images)
    assert tables == memorisation.report(folder / "results", images)
    assert all(name.startswith("memorisation-") for name in tables)
    copier = next(line for line in tables["memorisation-trained"].splitlines() if "copier" in line)
    assert copier.startswith("| `copier`, seed 0, 16 images | 100 [81, 100] |")
    assert "planted: JPEG, quality 75 | 100 [81, 100]" in tables["memorisation-detector"]
    assert Image.open(images / "memorisation.png").width > 1000
    assert Image.open(folder / "memorisation-sheet.png").width > 24 * 64


def test_what_is_missing_is_named(store, tmp_path, capsys):
    shards, heldout = store
    with pytest.raises(SystemExit, match="2"):
        memorisation.main(["run"])
    given = ["run", "--shards", str(shards), "--heldout", str(heldout), "--results", str(tmp_path)]
    assert memorisation.main(["report", "--results", str(tmp_path)]) == 1
    assert "memorisation run` makes them" in capsys.readouterr().err
    (shards.parent.parent / "kept.parquet").unlink()
    assert memorisation.main(given) == 1
    assert "kept.parquet: give shards of the stage filter" in capsys.readouterr().err
    (heldout / "gallery.json").unlink()
    assert memorisation.main(given) == 1
    assert "has no gallery.json" in capsys.readouterr().err


def test_snapshots_are_the_packages_and_those_that_the_ladder_has(tmp_path):
    for name in ("vision-seed-1", "vision-seed-7", "tuned-seed-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "images.safetensors").touch()
    found = memorisation.snapshots(tmp_path, ["stylegan2", "vision"], 2)
    assert list(found) == ["package-seed-0", "vision-seed-1"]
    assert all(path.is_file() for path in found.values())
    assert list(memorisation.snapshots(None, ["vision"], 2)) == ["package-seed-0"]
    with pytest.raises(ValueError, match=r"no .*stylegan2-seed-0.*studies.ladder run"):
        memorisation.snapshots(tmp_path, ["stylegan2"], 2)


def test_shards_of_another_set_are_refused(store, tmp_path, capsys):
    shards, heldout = store
    kept = shards.parent.parent / "kept.parquet"
    rows = [
        {**row, "url": f"http://site/{row['key']}.png"} for row in pq.read_table(kept).to_pylist()
    ]
    pq.write_table(pa.Table.from_pylist(rows), kept)
    given = ["--shards", str(shards), "--heldout", str(heldout), "--results", str(tmp_path)]
    assert memorisation.main(["run", *given]) == 1
    assert "has 48, of which the gallery knows 0: give" in capsys.readouterr().err


def test_a_sheet_without_the_strips_of_a_network_is_not_drawn(measured, capsys):
    folder, arguments = measured
    sheet = (folder / "memorisation-sheet.png").read_bytes()
    (folder / "out" / "honest-seed-0-unseen.png").unlink()
    assert memorisation.main(["run", *map(str, arguments)]) == 1
    assert "honest-seed-0-unseen.png for the sheet, which stays" in capsys.readouterr().err
    assert (folder / "memorisation-sheet.png").read_bytes() == sheet
