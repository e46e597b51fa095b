"""What trainings of a few pictures do without."""

import pytest


@pytest.fixture
def without_charts(monkeypatch):
    """No page of charts at every look: drawing it takes far longer than such a training."""
    from gigagan.training import logs

    monkeypatch.setattr(logs, "draw_health", lambda *_: None)
