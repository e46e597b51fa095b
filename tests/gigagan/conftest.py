"""What trainings and evaluations of a few pictures do without."""

import pytest


@pytest.fixture
def without_charts(monkeypatch):
    """No page of charts at every look: drawing it takes far longer than such a training."""
    from gigagan.training import logs

    monkeypatch.setattr(logs, "draw_health", lambda *_: None)


@pytest.fixture
def quick_inception():
    """Random features for Inception's, where its values prove nothing."""
    from tests.gigagan.small import quick_inception

    with quick_inception():
        yield
