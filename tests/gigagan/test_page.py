import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from gigagan.inference.editing import Edit
from gigagan.inference.page import BLEND, MIX, NOTHING, STYLE, Controls, Table, prepare
from gigagan.inference.pictures import read_about

SETTINGS = {
    "prompt": "a bell",
    "seed": 3,
    "truncation": 0.5,
    "change": NOTHING,
    "second": "",
    "amount": 0.25,
    "crossover": 1,
    "style_seed": 9,
    "upscale": True,
}


class FakeSampler:
    def __init__(self):
        self.asked = []
        self.base = SimpleNamespace(levels=[1, 2, 3])
        self.upsampler = None
        self.condition = SimpleNamespace(example="a bell")

    def sample(self, prompts, **settings):
        self.asked.append((prompts, settings))
        return [Image.new("RGB", (4, 4))]

    def upscale(self, images, prompts, **settings):
        return [image.resize((image.width * 4, image.height * 4)) for image in images]


@pytest.fixture
def table(tmp_path):
    return Table(FakeSampler(), tmp_path)


def test_the_controls_reach_the_sampler_and_the_pictures_metadata(table):
    path = table.draw(Controls(**SETTINGS))
    prompts, settings = table.sampler.asked[0]
    assert prompts == ["a bell"]
    assert settings == {"seed": 3, "truncation": 0.5, "edit": None, "upscale": True}
    assert read_about(path) == {"prompt": "a bell", "seed": 3, "truncation": 0.5, "upscaled": True}


@pytest.mark.parametrize(
    ("change", "edit"),
    [
        (MIX, Edit("a dog", "mix", crossover=1)),
        (BLEND, Edit("a dog", "interpolate", amount=0.25)),
        (STYLE, Edit(how="style", seed=9, crossover=1)),
    ],
)
def test_every_change_is_the_edit_of_its_name(table, change, edit):
    table.draw(Controls(**SETTINGS | {"change": change, "second": "a dog"}))
    assert table.sampler.asked[0][1]["edit"] == edit


@pytest.mark.parametrize("change", [NOTHING, MIX, BLEND, STYLE])
def test_what_is_taken_up_again_draws_the_same(table, change):
    table.draw(Controls(**SETTINGS | {"change": change, "second": "a dog", "upscale": False}))
    again = table.controls_of(table.folder / "picture-00001.png")
    assert again.change == change
    table.draw(again)
    first, second = table.sampler.asked
    assert first == second
    files = (read_about(path) for path in sorted(table.folder.iterdir()))
    assert next(files) == next(files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x" * 401}, "401 characters"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": None}, "seed is None"),
        ({"change": MIX}, "second prompt is empty"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_drawn(table, changes, message):
    with pytest.raises(ValueError, match=message):
        table.draw(Controls(**SETTINGS | changes))
    assert not table.sampler.asked


def test_a_picture_beyond_the_pages_size_is_refused(table):
    with pytest.raises(ValueError, match="2000×3 px"):
        table.enlarge(Image.new("RGB", (2000, 3)), "x", 0)
    with pytest.raises(ValueError, match="no picture"):
        table.enlarge(None, "x", 0)
    assert Image.open(table.enlarge(Image.new("I;16", (5, 3)), "x", 0)).size == (20, 12)


def test_old_pictures_go(table):
    for _ in range(60):
        table.draw(Controls(**SETTINGS))
    assert len(list(table.folder.iterdir())) == 48


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_the_pages_own_address_is_never_asked_through_a_proxy(tmp_path, monkeypatch, name):
    for other in ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(other, raising=False)
    for kept in ("GRADIO_TEMP_DIR", "MPLCONFIGDIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(kept, os.environ.get(kept, ""))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv(name, "example.org")
    prepare(tmp_path, "192.0.2.7")
    for host in ("127.0.0.1:7860", "localhost", "192.0.2.7", "example.org"):
        assert urllib.request.proxy_bypass_environment(host)
    assert not urllib.request.proxy_bypass_environment("example.com")


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1100,900"):
        options.add_argument(argument)
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The page with the package's networks, in a process whose home and temporary folder we see."""
    pytest.importorskip("gradio")
    home = tmp_path_factory.mktemp("home")
    temporary = tmp_path_factory.mktemp("temporary")
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "gigagan", "play", "--port", "0"],
        cwd=home,
        env=os.environ
        | {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": str(root)}
        | {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"},
        stdout=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    address = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert address, line
    yield address[0], home, temporary
    process.send_signal(signal.SIGINT)  # with the page still open
    assert process.wait(timeout=60) == 0
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_typing_and_clicking_changes_the_picture_and_nothing_leaves_the_folder(browser, played):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    address, home, temporary = played
    browser.get(address)
    wait = WebDriverWait(browser, 60)

    def find(css):
        return wait.until(lambda b: b.find_element(By.CSS_SELECTOR, css))

    def source():
        found = browser.find_elements(By.CSS_SELECTOR, "#result img")
        return found[0].get_attribute("src") if found else None

    def type_prompt(text):
        field = find("#prompt textarea")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)
        find("#draw").click()

    type_prompt("flat emoji of a bell on a pink background")
    first = wait.until(lambda b: source())
    lone = wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#history img"))[0]
    wait.until(lambda b: 40 < lone.size["width"] == lone.size["height"] < 200)
    assert find("#result img").size["width"] > 400
    type_prompt("outlined emoji of a tree on a teal background")
    second = wait.until(lambda b: source() if source() != first else None)
    assert len(wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#history img"))) >= 1
    pixels = (
        "const i=document.querySelector('#result img');const c=document.createElement('canvas');"
    )
    pixels += "c.width=i.naturalWidth;c.height=i.naturalHeight;const x=c.getContext('2d');"
    pixels += "x.drawImage(i,0,0);return [i.naturalWidth,Array.from(x.getImageData(2,2,1,1).data)]"
    time.sleep(1)
    side, corner = browser.execute_script(pixels)
    assert side == 128
    assert corner[1] > corner[0]  # teal, no longer pink

    type_prompt(" ")
    wait.until(lambda b: "the prompt is empty" in b.find_element(By.TAG_NAME, "body").text)
    assert source() == second

    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert not list(home.iterdir()), json.dumps([str(p) for p in home.rglob("*")])
    (own,) = temporary.glob("gigagan-play-*")
    outside = [p.name for p in temporary.iterdir() if p != own]
    assert not outside
    if picture := os.environ.get("GIGAGAN_SCREENSHOT"):
        type_prompt("flat emoji of a sun on a pale blue background")
        time.sleep(12)  # until the message is gone
        browser.save_screenshot(picture)
