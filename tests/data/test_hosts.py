"""What hosts say of themselves in robots.txt and tdmrep.json."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.config import DownloadConfig
from data.web import hosts
from data.web.addresses import RefusedError
from data.web.fetch import Fetcher, FetchSettings
from data.web.hosts import Hosts, Store

spec = importlib.util.spec_from_file_location("hostile", Path(__file__).with_name("hostile.py"))
hostile = importlib.util.module_from_spec(spec)
sys.modules["hostile"] = hostile
spec.loader.exec_module(hostile)

AGENT = "gigagan-pipeline"
SLOW_HOSTS = {"robots-mute.test", "robots-drip.test"}


@pytest.fixture
def site():
    with hostile.serve() as server:
        yield server


def fetcher(site, hosts_cache=None, names=(), **changes) -> Fetcher:
    settings = {"timeout_s": 2, "total_deadline_s": 8, "retries": 0, **changes}
    config = DownloadConfig(**settings)
    return Fetcher(FetchSettings.of(config, site.connect_to(*names), hosts_cache))


def refusal(fetch: Fetcher, url: str) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        fetch.fetch(url)
    return caught.value


def fate(fetch: Fetcher, host: str) -> str:
    try:
        fetch.fetch(f"http://{host}/good/1.png")
    except RefusedError as refusal:
        return refusal.fate
    return "ok"


# robots.txt and tdmrep.json


def test_each_host_of_the_hostile_site_ends_with_its_fate(site):
    names = sorted(set(hostile.HOSTS) - SLOW_HOSTS)
    fetch = fetcher(site)
    assert {name: fate(fetch, name) for name in names} == {n: hostile.HOSTS[n][0] for n in names}


def test_hosts_with_a_slow_robots_txt_are_left_and_remembered(site):
    fetch = fetcher(site, timeout_s=0.4)
    for name in SLOW_HOSTS:
        assert str(refusal(fetch, f"http://{name}/good/1.png")).startswith("robots.txt unreachable")
        assert fate(fetch, name) == "robots_txt"
        assert site.asked_hosts[name, "/robots.txt"] == 1


def test_a_refusal_says_which_file_forbids_it(site):
    fetch = fetcher(site)
    details = {
        "robots-503.test": "robots.txt unreachable: http_503",
        "robots-all.test": "disallowed by robots.txt",
        "tdmrep.test": "http://tdmrep.test/.well-known/tdmrep.json",
    }
    found = {name: str(refusal(fetch, f"http://{name}/good/1.png")) for name in details}
    assert found == details


def test_what_a_host_forbids_is_never_asked_for(site):
    fetch = fetcher(site)
    for name in ("robots-all.test", "robots-503.test", "tdmrep.test"):
        fate(fetch, name)
        assert site.asked_hosts[name, "/good/1.png"] == 0


def test_hosts_are_not_asked_for_files_that_the_config_ignores(site):
    fetch = fetcher(site, honour_robots_txt=False, honour_opt_outs=False)
    for name in ("robots-all.test", "tdmrep.test"):
        assert fate(fetch, name) == "ok"
    assert {path for _, path in site.asked_hosts} == {"/good/1.png"}


def test_a_redirect_to_a_forbidden_place_is_not_followed(site):
    fetch = fetcher(site)
    assert fate(fetch, hostile.HOST) == "ok"
    assert refusal(fetch, f"http://{hostile.HOST}/forbidden/1.png").fate == "robots_txt"


class Asked:
    """Stands for the web: texts by URL, and how often each was asked for."""

    def __init__(self, texts, seconds=0.0):
        self.texts, self.seconds, self.urls = texts, seconds, []

    def __call__(self, url, end):
        self.urls.append(url)
        time.sleep(self.seconds)
        text = self.texts.get(url, "")
        if isinstance(text, RefusedError):
            raise text
        return text


def hosts_of(asked, store=None, robots=True, opt_outs=False) -> Hosts:
    return Hosts(asked, agent=f"{AGENT}/0.1", robots=robots, opt_outs=opt_outs, store=store)


def allowed(said: Hosts, url: str) -> bool:
    try:
        said.vet(url, time.monotonic() + 5)
    except RefusedError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "path", "ok"),
    [
        ("User-agent: *\nDisallow: /a\nAllow: /a/b", "/a/b/1.png", True),
        ("User-agent: *\nDisallow: /a\nAllow: /a/b", "/a/c/1.png", False),
        ("User-agent: *\nDisallow: /*.png$", "/1.png", False),
        ("User-agent: *\nDisallow: /*.png$", "/1.png?x", True),
        ("User-agent: GIGAGAN-PIPELINE\nDisallow: /\n", "/1.png", False),
        ("User-agent: gigagan-pipeline/0.1\nDisallow: /\n", "/1.png", False),
        (f"User-agent: {AGENT}\nAllow: /\n\nUser-agent: *\nDisallow: /", "/1.png", True),
        ("User-agent: pipeline\nDisallow: /", "/1.png", True),
        ("Disallow: /", "/1.png", True),
        ("<html>not found</html>", "/1.png", True),
    ],
)
def test_robots_txt_is_read_as_its_standard_says(text, path, ok):
    said = hosts_of(Asked({"http://a.test/robots.txt": text}))
    assert allowed(said, f"http://a.test{path}") == ok


@pytest.mark.parametrize(
    ("text", "path", "ok"),
    [
        ('[{"location": "/", "tdm-reservation": 1}]', "/x.png", False),
        ('[{"location": "*", "tdm-reservation": 1}]', "/x.png", False),
        ('[{"location": "/", "tdm-reservation": 0}]', "/x.png", True),
        ('[{"location": "/a/", "tdm-reservation": 1}]', "/b/x.png", True),
        ('[{"location": "/a/*.png$", "tdm-reservation": 1}]', "/a/x.png", False),
        ('[{"location": "/A/", "tdm-reservation": 1}]', "/a/x.png", True),
        (
            '[{"location": "/a", "tdm-reservation": 0}, {"location": "/", "tdm-reservation": 1}]',
            "/a/x.png",
            True,
        ),
        (
            '[{"location": "/", "tdm-reservation": 1}, {"location": "/a", "tdm-reservation": 0}]',
            "/a/x.png",
            False,
        ),
        ('[{"location": "/q\\nAllow: /", "tdm-reservation": 1}]', "/x.png", True),
        ('[{"tdm-reservation": 1}, 7, null, {"location": 5}]', "/x.png", True),
        ('{"location": "/", "tdm-reservation": 1}', "/x.png", True),
        ("[" * 100_000, "/x.png", True),
    ],
)
def test_of_a_tdmrep_json_the_first_rule_that_matches_counts(text, path, ok):
    said = hosts_of(Asked({"http://a.test/.well-known/tdmrep.json": text}), opt_outs=True)
    assert allowed(said, f"http://a.test{path}") == ok


def test_schemes_and_ports_of_a_host_speak_for_themselves():
    asked = Asked({"http://a.test/robots.txt": "User-agent: *\nDisallow: /"})
    said = hosts_of(asked)
    urls = ("http://a.test/1", "https://a.test/1", "http://a.test:8080/1")
    assert [allowed(said, url) for url in urls] == [False, True, True]


# Asked once


def test_many_threads_ask_a_host_once():
    asked = Asked({"http://a.test/robots.txt": "User-agent: *\nDisallow: /x"}, seconds=0.2)
    said = hosts_of(asked)
    with ThreadPoolExecutor(16) as pool:
        results = [*pool.map(lambda n: allowed(said, f"http://a.test/{n}"), range(50))]
    assert all(results)
    assert asked.urls == ["http://a.test/robots.txt"]


def test_who_waits_for_another_s_question_keeps_to_the_deadline():
    said = hosts_of(Asked({}, seconds=1.5))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(allowed, said, "http://a.test/1")
        time.sleep(0.2)
        with pytest.raises(RefusedError) as caught:
            said.vet("http://a.test/2", time.monotonic() + 0.1)
        assert caught.value.fate == "deadline"
        assert first.result()


def test_our_own_deadline_says_nothing_of_the_host():
    asked = Asked({"http://a.test/robots.txt": RefusedError("deadline", "6 s")})
    said = hosts_of(asked)
    assert not allowed(said, "http://a.test/1")
    asked.texts.clear()
    assert allowed(said, "http://a.test/1")


@pytest.mark.parametrize("failed", [False, True])
def test_what_hosts_say_is_asked_again_when_it_is_old(monkeypatch, failed):
    asked = Asked({"http://a.test/robots.txt": RefusedError("http_503")} if failed else {})
    said = hosts_of(asked)
    life = hosts.FAILURE_LIFE_S if failed else hosts.LIFE_S
    now = time.time()
    for seconds, times in ((0, 1), (life - 10, 1), (life + 10, 2)):
        monkeypatch.setattr(hosts.time, "time", lambda seconds=seconds: now + seconds)
        assert allowed(said, "http://a.test/1") != failed
        assert len(asked.urls) == times


def test_memory_holds_the_latest_hosts_within_a_limit(monkeypatch):
    monkeypatch.setattr(hosts, "MEMORY_CHARS", 1000)
    text = "User-agent: *\nDisallow: /x\n" + "#" * 270  # some 300 characters
    asked = Asked({f"http://{n}.test/robots.txt": text for n in range(7)})
    said = hosts_of(asked)
    for number in (0, 1, 2, 0, 3, 0, 1):
        assert allowed(said, f"http://{number}.test/1")
    assert [url[7] for url in asked.urls] == ["0", "1", "2", "3", "1"]


def test_processes_share_what_hosts_said(tmp_path):
    path = str(tmp_path / "hosts.sqlite")
    asked = Asked({"http://a.test/robots.txt": "User-agent: *\nDisallow: /é"})
    for said in (hosts_of(asked, Store(path)), hosts_of(asked, Store(path))):
        assert not allowed(said, "http://a.test/%C3%A9")
        assert allowed(said, "http://b.test/")
    assert asked.urls == ["http://a.test/robots.txt", "http://b.test/robots.txt"]


WRITES = """
import sys, time
from data.web.hosts import Said, Store
store = Store(sys.argv[1])
for number in range(100):
    store.put(f"http://{number}.test/", Said("text", "", "", time.time() + 60))
assert all(store.get(f"http://{number}.test/") for number in range(100))
"""


def test_a_store_bears_many_processes_at_once(tmp_path):
    command = [sys.executable, "-c", WRITES, str(tmp_path / "hosts.sqlite")]
    root = Path(__file__).resolve().parents[2]
    processes = [subprocess.Popen(command, cwd=root) for _ in range(5)]
    assert [process.wait(60) for process in processes] == [0] * 5


def test_a_store_that_fails_later_costs_only_requests(tmp_path, caplog):
    store = Store(str(tmp_path / "hosts.sqlite"))
    store.close()
    asked = Asked({})
    assert allowed(hosts_of(asked, store), "http://a.test/")
    assert "the host is asked instead" in caplog.text


def test_a_store_that_cannot_be_opened_names_its_setting(tmp_path):
    (tmp_path / "text").write_text("no database" * 100)
    for path in (tmp_path / "no" / "hosts.sqlite", tmp_path / "text"):
        with pytest.raises(ValueError, match="hosts_cache"):
            Store(str(path))


# Turns


def test_waiting_for_a_turn_is_not_the_server_s_fault(site):
    """Twelve fetches that start apart; servers and turns have two seconds each."""
    fetch = fetcher(site, host_delay_s=0.15, total_deadline_s=2, timeout_s=2)
    with ThreadPoolExecutor(12) as pool:
        fates = [*pool.map(lambda _: fate(fetch, hostile.HOST), range(12))]
    assert fates == ["ok"] * 12


def test_a_crawl_delay_is_kept(site):
    fetch = fetcher(site, total_deadline_s=4)
    assert fetch.hosts.vet("http://robots-slow.test/good/1.png", time.monotonic() + 4) == 0.3
    assert [fate(fetch, "robots-slow.test") for _ in range(3)] == ["ok"] * 3
    assert [fate(fetch, "robots-slowest.test") for _ in range(2)] == ["ok", "host_busy"]
