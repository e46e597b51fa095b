"""Influence: exact products of gradients, and a flipped caption that gets the worst score."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data.config import FilterConfig
from data.filter import influence as reading
from data.shards import write
from gigagan import losses
from gigagan.__main__ import main
from gigagan.models import pretrained, snapshot
from gigagan.models.base import base_generator
from gigagan.models.layers import pyramid
from gigagan.models.pixels import from_uint8
from gigagan.training import influence
from gigagan.training.captions import CaptionFeatures
from tests.data.kept_rows import write_kept
from tests.gigagan.small import BASE, WordEncoder

THINGS, LOOKS = ("moon", "fish", "tree"), ("red", "blue", "big", "old", "new")
LAYERS = ("mapping", "to_scale", "text.from_pooled")
SIDE = 8


@pytest.fixture(autouse=True)
def words(monkeypatch):
    encoder = WordEncoder()
    monkeypatch.setattr(pretrained, "text_encoder", lambda name, device="cpu": encoder)
    return CaptionFeatures(encoder, torch.device("cpu"))


def generator(seed: int = 0):
    torch.manual_seed(seed)
    return base_generator(BASE.generator)


def thing(name: str) -> np.ndarray:
    """A pattern that a caption's thing decides, 8 × 8."""
    coarse = np.random.default_rng(THINGS.index(name)).integers(0, 256, (2, 2, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def pairs(flipped: int | None = None) -> influence.Pairs:
    """Each thing in every look, nearest to its like; one caption may name another thing."""
    found = [(f"{name} or {name} {look}", thing(name)) for name in THINGS for look in LOOKS]
    captions = [caption for caption, _ in found]
    if flipped is not None:
        name = THINGS[flipped // len(LOOKS)]
        captions[flipped] = captions[flipped].replace(name, THINGS[THINGS.index(name) - 1])
    images = torch.from_numpy(np.stack([picture for _, picture in found])).permute(0, 3, 1, 2)
    return influence.Pairs([f"{n:011d}" for n in range(len(found))], captions, images)


def naive(network, layer, some: influence.Pairs, words) -> torch.Tensor:
    """∇ℓ_i of weight and bias by one backward a pair, N D, in double precision."""
    random = torch.Generator().manual_seed(0)
    z_1Z = torch.randn(1, network.config.latent_dim, generator=random).double()
    rows = []
    for caption, image_CHW in zip(some.captions, some.images_NCHW, strict=True):
        text = type(words([caption]))(
            *(x.double() if x.is_floating_point() else x for x in words([caption]))
        )
        target = from_uint8(image_CHW[None]).double()
        loss = 0.0
        images = network(z_1Z, text)
        for x, y in zip(images, pyramid(target, len(images)), strict=True):
            error = x - y
            edges = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
            loss = loss + (error.abs().mean() + influence.EDGES * edges) / len(images)
        parts = torch.autograd.grad(loss, [layer.weight, layer.bias])
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def test_products_of_gradients_are_those_of_a_backward_for_each_pair(words):
    some = influence.Pairs(*(part[:7] for part in pairs()))
    network = generator()
    layers = influence.chosen_layers(network, LAYERS)
    found, _ = influence.at_checkpoint(network, some, words, layers)
    near_NK = influence.neighbours(influence._pooled(words, some.captions), 3)
    exact = generator().double()
    assert len(layers) > 5
    for name, layer in influence.chosen_layers(exact, LAYERS).items():
        rows_ND = naive(exact, layer, some, words)
        products_NN = rows_ND @ rows_ND.T
        got_NN = found[name].with_all(found[name])
        torch.testing.assert_close(got_NN.double(), products_NN, rtol=1e-3, atol=1e-6)
        norm_N = rows_ND.norm(dim=1)
        torch.testing.assert_close(found[name].norms().double(), norm_N, rtol=1e-3, atol=1e-6)
        if norm_N.min() > 1e-6:
            cosine_NK = (products_NN / norm_N[:, None] / norm_N).gather(1, near_NK)
            got_NK = found[name].cosines(near_NK).double()
            torch.testing.assert_close(got_NK, cosine_NK, rtol=1e-3, atol=1e-3)


def test_losses_are_those_of_each_pair_alone(words):
    some, network = pairs(), generator()
    layers = influence.chosen_layers(network, ["mapping"])
    _, loss_N = influence.at_checkpoint(network, some, words, layers)
    for row in (0, 3, 14):
        one = influence.Pairs(*(part[row : row + 1] for part in some))
        _, alone = influence.at_checkpoint(network, one, words, layers)
        assert float(loss_N[row]) == pytest.approx(float(alone), rel=1e-4)


def test_neighbours_are_the_nearest_others_though_captions_are_equal():
    vectors_NT = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    vectors_NT[4] = vectors_NT[2]
    near_NK = influence.neighbours(vectors_NT, 3)
    centred = vectors_NT - vectors_NT.mean(0)
    for row in range(7):
        cosine_N = F.cosine_similarity(centred[row : row + 1], centred)
        others = [n for n in cosine_N.argsort(descending=True).tolist() if n != row]
        assert set(near_NK[row].tolist()) == set(others[:3])
    assert (near_NK[4, 0], near_NK[2, 0]) == (2, 4)
    with pytest.raises(ValueError, match="7 pairs have no 7 others"):
        influence.neighbours(vectors_NT, 7)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Snapshots of a base after 40, 80 and 120 steps on pairs of which one caption is wrong."""
    folder, some, network = tmp_path_factory.mktemp("run"), pairs(flipped=6), generator()
    words = CaptionFeatures(WordEncoder(), torch.device("cpu"))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    random = torch.Generator().manual_seed(1)
    target_NCHW, text = from_uint8(some.images_NCHW), words(some.captions)
    for step in range(1, 121):
        z_NZ = torch.randn(len(some.keys), network.config.latent_dim, generator=random)
        optimizer.zero_grad()
        images = network(z_NZ, text)
        losses.regression(images, pyramid(target_NCHW, len(images))).backward()
        optimizer.step()
        if step % 40 == 0:
            path = folder / "snapshots" / f"images-{step:010d}.safetensors"
            snapshot.save(path, network, {"images_seen": step})
    snapshot.save(folder / "snapshot.safetensors", network, {"images_seen": 120})
    return folder


def test_a_flipped_caption_gets_the_worst_score_of_all(trained):
    checkpoints = sorted((trained / "snapshots").iterdir())
    some = pairs(flipped=6)
    clean = influence.influence(checkpoints, pairs(), layers=["mapping"])
    found = influence.influence(checkpoints, some, layers=["mapping"])
    assert int(found.disagreement_N.argmax()) == 6
    worst, second = found.disagreement_N.topk(2).values
    assert worst - second > 0.1
    assert int(clean.disagreement_N.argmax()) != 6
    assert found.tracin_N is None


def test_tracin_sums_products_over_checkpoints_and_layers(trained, words):
    checkpoints, some = sorted((trained / "snapshots").iterdir()), pairs(flipped=6)
    good = influence.Pairs(*(part[3:8] for part in pairs()))
    chosen = ["mapping", "to_scale"]
    found = influence.influence(checkpoints, some, layers=chosen, heldout=good)
    own, theirs = torch.zeros(2, len(some.keys))
    for path in checkpoints:
        network, _ = snapshot.load(path)
        layers = influence.chosen_layers(network, chosen)
        of_good, _ = influence.at_checkpoint(network, good, words, layers)
        for name, one in influence.at_checkpoint(network, some, words, layers)[0].items():
            own += one.with_all(one).diagonal()
            theirs -= one.with_all(of_good[name]).sum(1) / len(good.keys)
    torch.testing.assert_close(found.self_influence_N, own, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.tracin_N, theirs, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["mapping", "nothing"], "no linear layer 'nothing'.*mapping.layers.0"),
        (["text.from_tokens"], "text.from_tokens sees more than one vector"),
    ],
)
def test_layers_that_cannot_be_compared_are_refused_by_name(trained, layers, message):
    with pytest.raises(ValueError, match=message):
        influence.influence([trained / "snapshot.safetensors"], pairs(), layers=layers)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards of 8 px whose pictures and captions are those of `pairs(flipped=6)`."""
    some, root = pairs(flipped=6), tmp_path_factory.mktemp("shards")

    def png(place: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(some.images_NCHW[place].permute(1, 2, 0).numpy()).save(buffer, "PNG")
        return buffer.getvalue()

    kept, download = write_kept(root, len(some.keys), png, caption=some.captions.__getitem__)
    config = FilterConfig(resolutions=(SIDE, 16), samples_per_shard=4)
    write.write(kept, download, root / "shards", config)
    return root / "shards"


def test_the_command_writes_what_the_filter_reads_with_the_worst_pair_first(
    trained, shards, tmp_path, capsys
):
    out = tmp_path / "deep" / "influence.parquet"
    command = ["influence", "--run", str(trained), "--shards", str(shards / "008"), "--out"]
    assert main([*command, str(out), "--layers", "mapping", "--device", "cpu"]) == 0
    table = pq.read_table(out)
    values = table["influence"].to_numpy()
    assert values.argmax() == 6
    assert values.tolist() == table["disagreement"].to_pylist()
    about = json.loads(table.schema.metadata[b"influence"])
    assert (about["by"], about["layers"], about["neighbours"]) == ("neighbours", ["mapping"], 4)
    positions = ["images-0000000040", "images-0000000080", "snapshot"]
    assert list(about["checkpoints"]) == [f"{name}.safetensors" for name in positions]
    assert Image.open(out.with_suffix(".png")).width > 500
    with reading.duckdb.connect() as database:
        reading.read(database, str(out))
        count = database.execute(f"SELECT count(*) FROM {reading.TABLE}").fetchone()
    assert count == (15,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "RUN", "--by", "heldout"], "give --heldout"),
        (["--run", "RUN", "--out", "a.csv"], "must end in .parquet"),
        (["--run", "RUN", "--neighbours", "0"], "--neighbours 0: give 1 or more"),
        (["--run", "RUN", "--neighbours", "15"], "15 pairs have no 15 others"),
        (["--run", "SHARDS"], "no snapshot.safetensors"),
        (["--base", "SHARDS/none.safetensors"], "no such snapshot"),
        (["--run", "RUN", "--shards", "SHARDS/016"], "give the folder 008"),
        (["--run", "RUN", "--shards", "SHARDS"], "index.json"),
    ],
)
def test_bad_input_is_one_message(trained, shards, tmp_path, capsys, arguments, message):
    given = ["--shards", str(shards / "008"), "--out", str(tmp_path / "a.parquet")]
    given += ["--layers", "mapping", *arguments]
    places = {"RUN": str(trained), "SHARDS": str(shards)}
    for name, place in places.items():
        given = [part.replace(name, place) for part in given]
    assert main(["influence", *given]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "a.parquet").exists()
