import json
import shutil

import numpy as np
import pytest
import torch

from gigagan.__main__ import main
from gigagan.inference import onnx_export
from gigagan.inference.conditions import Words
from gigagan.inference.onnx_export import export
from gigagan.models import pretrained, snapshot
from gigagan.models.generator import Generator
from gigagan.models.upsampler import Upsampler

from . import small

pytest.importorskip("onnxscript")

PROMPT = "a red cat"


@pytest.fixture(scope="module")
def encoder():
    return pretrained.text_encoder("embedded:minilm-l6")


@pytest.fixture(scope="module")
def exported(encoder, tmp_path_factory):
    """A generator, and the only file in a folder, which was made of it."""
    torch.manual_seed(0)
    network = Generator(small.GENERATOR).eval().requires_grad_(False)
    path = tmp_path_factory.mktemp("exported") / "g.onnx"
    assert export(path, network, Words(encoder), PROMPT, about={"version": "x"}) < 1e-4
    return network, path


def test_a_generator_of_one_prompt_draws_the_same_in_onnxruntime(exported, encoder):
    import onnxruntime

    network, path = exported
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    described = json.loads(session.get_modelmeta().custom_metadata_map["gigagan"])
    assert described == {"prompt": PROMPT, "seed": 0, "version": "x"}
    drawn = []
    for seed in (1, 2):
        z = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed))
        (picture,) = session.run(None, {"z": z.numpy()})
        with torch.no_grad():
            expected = network(z, encoder.encode([PROMPT]))[0].numpy()
        np.testing.assert_allclose(picture, expected, atol=1e-4)
        drawn.append(picture)
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3  # z is an input, not a constant
    assert list(path.parent.iterdir()) == [path]


def test_an_upsampler_takes_any_number_of_tiles(encoder, tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    network = Upsampler(small.UPSAMPLER).eval().requires_grad_(False)
    torch.nn.init.normal_(network.levels[-1].to_rgb.bank)  # zero in a new one
    path = tmp_path / "u.onnx"
    assert export(path, network, Words(encoder), PROMPT, seed=3) < 1e-4
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        tile = np.zeros((count, 3, 8, 8), np.float32)
        (large,) = session.run(None, {"image": tile, "noise": tile})
        assert large.shape == (count, 3, 16, 16)


def test_a_file_that_draws_otherwise_is_not_kept(exported, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_trace", lambda path, *_: shutil.copy(exported[1], path))
    torch.manual_seed(1)
    network = Generator(small.GENERATOR).eval().requires_grad_(False)
    with pytest.raises(ValueError, match=r"g\.onnx would draw otherwise"):
        export(tmp_path / "g.onnx", network, Words(encoder), PROMPT)
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_what_it_cannot_write(tmp_path, capsys):
    file = tmp_path / "g.safetensors"
    snapshot.save(file, Generator(small.GENERATOR), {})
    assert main(["export", str(file), str(tmp_path / "x.onnx")]) == 1
    assert "give --prompt" in capsys.readouterr().err
    assert main(["export", str(file), str(tmp_path / "x.bin")]) == 1
    assert ".safetensors or .onnx" in capsys.readouterr().err


@pytest.mark.slow
def test_the_packages_own_networks_export(tmp_path, capsys):
    for name in ("base", "upsampler"):
        out = tmp_path / f"{name}.onnx"
        assert main(["export", f"published:{name}", str(out), "--prompt", PROMPT]) == 0
        difference = float(capsys.readouterr().out.rsplit(" ", 1)[1])
        assert difference < 1e-4
