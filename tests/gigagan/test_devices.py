import threading

import numpy as np
import pytest
import torch
from PIL import Image

from gigagan.commands.options import device, devices
from gigagan.evaluation.devices import Team, deal, parse
from gigagan.evaluation.judges.features import Extractor, PictureError, extract, extractor, square

TOGETHER_S = 30


class Namespace:
    def __init__(self, device=None):
        self.device = device


def test_devices_by_name(monkeypatch):
    assert parse("cpu") == ("cpu",)
    assert parse("cpu, cpu") == ("cpu", "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert parse("cuda") == ("cuda:0", "cuda:1", "cuda:2")
    assert parse("cuda:2,cuda:0") == ("cuda:2", "cuda:0")
    with pytest.raises(ValueError, match="'cuda:3' is not there: torch sees 3 CUDA devices"):
        parse("cuda:3")
    with pytest.raises(ValueError, match="'gpu' is no device"):
        parse("gpu")


def test_a_command_takes_every_gpu_or_the_first_or_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices(Namespace()) == ("cpu",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices(Namespace()) == ("cuda:0", "cuda:1")
    assert device(Namespace()) == "cuda:0"
    with pytest.raises(ValueError, match="works on one"):
        device(Namespace("cuda:0,cuda:1"))


def test_work_is_done_at_the_same_time_and_told_in_order():
    together, busy, most = threading.Barrier(2), [], []

    def work(piece):
        busy.append(piece)
        most.append(len(busy))
        together.wait(TOGETHER_S)  # breaks unless two are under way
        busy.remove(piece)
        return piece

    assert list(deal(work, range(6), 2)) == list(range(6))
    assert max(most) == 2


def test_pieces_are_not_taken_far_ahead():
    taken = []

    def pieces():
        for piece in range(10):
            taken.append(piece)
            yield piece

    results = deal(lambda piece: piece, pieces(), 2)
    assert next(results) == 0
    assert len(taken) == 3
    results.close()


def test_an_error_ends_the_work():
    done = []

    def work(piece):
        if piece == 1:
            raise ZeroDivisionError
        done.append(piece)

    with pytest.raises(ZeroDivisionError):
        list(deal(work, range(100), 2))
    assert len(done) <= 4


def test_a_member_is_lent_to_one_at_a_time():
    team, lent = Team(["a", "b"]), []

    def work(piece):
        with team.one() as member:
            assert member not in lent
            lent.append(member)
            lent.remove(member)
            return member

    assert set(deal(work, range(50), 2)) == {"a", "b"}


class Mean(Extractor):
    """Mean colour, as if on two devices: a batch waits until another is under way."""

    name = weights = "mean"
    width = 3
    lanes = 2

    def __init__(self):
        self._together = threading.Barrier(2)

    def prepare(self, image):
        return np.asarray(image)

    def __call__(self, batch_NHWC):
        self._together.wait(TOGETHER_S)
        return batch_NHWC.mean((1, 2))


def pictures(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(count)]


def test_features_are_judged_on_all_devices_and_stay_in_their_rows(tmp_path):
    items, seen = pictures(12), []
    found = extract(
        items,
        [Mean()],
        transform=lambda item: square(item, 8),
        folder=tmp_path,
        batch_size=2,
        progress=lambda what, done, total: seen.append(done),
    )
    expected = np.stack([np.asarray(item).mean((0, 1)) for item in items])
    np.testing.assert_allclose(found["mean"], expected, rtol=1e-6)
    assert seen == [2, 4, 6, 8, 10, 12]


def test_one_unreadable_picture_stops_all_devices(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    one = extractor("inception-2015-12-05/clean", "cpu", "cpu")
    with pytest.raises(PictureError, match=r"1 of 5 .*bad\.png"):
        extract(
            [*pictures(4), bad],
            [one],
            transform=lambda item: square(item, 8),
            folder=tmp_path / "features",
            batch_size=1,
        )
    assert not list((tmp_path / "features").iterdir())


def test_inception_on_two_devices_is_inception(tmp_path):
    settings = {"transform": lambda item: square(item, 8), "batch_size": 2}
    found = []
    for names in (("cpu",), ("cpu", "cpu")):
        judge = extractor("inception-2015-12-05/clean", *names)
        folder = tmp_path / str(len(names))
        found.append(extract(pictures(6), [judge], folder=folder, **settings)[judge.name])
    assert judge.lanes == 2
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
