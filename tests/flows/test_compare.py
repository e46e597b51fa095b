"""The way to MLflow's page of runs side by side."""

import contextlib
import http.server
import json
import threading

import pytest
from rich.console import Console

from flows.record import compare
from flows.record.tracking import LOCAL_UI, Tracker
from flows.serve import ui


@pytest.fixture
def page(monkeypatch):
    """Pages that were served and opened instead of real ones."""
    done = {"served": [], "opened": []}

    @contextlib.contextmanager
    def serve(store):
        done["served"].append(store)
        yield "http://127.0.0.1:7"

    monkeypatch.setattr(ui, "mlflow_page", serve)
    monkeypatch.setattr(compare, "_until_told", lambda: None)
    monkeypatch.setattr(compare.webbrowser, "open", done["opened"].append)
    return done


def show(config, stage, capsys, *, browse):
    compare.compare(config, stage, Console(), browse=browse)
    return capsys.readouterr().out.split()[0]


def test_a_page_is_served_where_none_is_and_opened(config, page, capsys, monkeypatch):
    monkeypatch.setattr(compare, "shows", lambda *_: False)
    url = show(config, "train-base", capsys, browse=True)
    experiment = Tracker(config.name, config.store_path).experiment("train-base")
    assert url == (
        f"http://127.0.0.1:7/#/experiments/{experiment}/runs"
        "?workflowType=machine_learning&compareRunsMode=CHART"
    )
    assert page == {"served": [config.store_path], "opened": [url]}


def test_a_page_that_is_there_is_used_and_not_opened_when_told_so(
    config, page, capsys, monkeypatch
):
    monkeypatch.setattr(compare, "shows", lambda *_: True)
    assert show(config, None, capsys, browse=False).startswith(f"{LOCAL_UI}/#/experiments/")
    assert page == {"served": [], "opened": []}


def test_a_page_over_another_record_is_not_ours_though_it_has_our_names(config):
    tracker = Tracker(config.name, config.store_path)
    tracker.experiment("filter")
    ours = dict(tracker.client.get_experiment_by_name(f"{config.name}/filter"))
    answer = {}

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path.endswith("%2Ffilter") else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        answer["experiment"] = ours
        assert compare.shows(url, tracker, "filter")
        assert not compare.shows(url, tracker)
        for other in ({"experiment_id": "77"}, {"creation_time": 7}):
            answer["experiment"] = ours | other
            assert not compare.shows(url, tracker, "filter")
        del answer["experiment"]
        assert not compare.shows(url, tracker, "filter")
        server.shutdown()
    assert not compare.shows(url, tracker, "filter")
