"""Headers by which a picture is reserved."""

from __future__ import annotations

import pytest
import urllib3

from data.web.optout import opt_out

AGENT = "gigagan-pipeline"


@pytest.mark.parametrize(
    ("values", "binds"),
    [
        (["noai"], True),
        (["NoImageAI"], True),
        (["none"], True),
        (["all"], False),
        (["nofollow, noarchive"], False),
        (["nofollow", "noindex"], True),
        (["otherbot: noai"], False),
        (["otherbot: noai, noindex"], False),
        (["otherbot: nofollow, *: noai"], True),
        (["otherbot: noindex", "noimageindex"], True),
        (["Gigagan-Pipeline: noai"], True),
        (["gigagan-pipeline/0.1: nofollow, noai"], True),
        (["otherbot: noai, gigagan-pipeline: noindex"], True),
        (["unavailable_after: 25 Jun 2031 15:00:00 PST"], False),
        (["unavailable_after: Wed, 25 Jun 2031 15:00:00 GMT, noai"], True),
        (["max-snippet:-1, max-image-preview: large, noai"], True),
        (["otherbot: unavailable_after: 25 Jun 2031 15:00:00 PST, noai"], False),
        ([""], False),
        ([":,:,"], False),
        (["a:" * 30_000 + "noai"], False),
    ],
)
def test_x_robots_tag_binds_when_it_is_for_all_or_for_us(values, binds):
    headers = urllib3.HTTPHeaderDict()
    for value in values:
        headers.add("X-Robots-Tag", value)
    assert (opt_out(headers, AGENT) is not None) == binds


def test_the_header_that_reserves_is_named():
    headers = urllib3.HTTPHeaderDict({"X-Robots-Tag": "nofollow, noai"})
    assert opt_out(headers, AGENT) == "X-Robots-Tag: nofollow, noai"
    assert opt_out(urllib3.HTTPHeaderDict({"tdm-reservation": "1"}), AGENT) == "TDM-Reservation: 1"
    assert opt_out(urllib3.HTTPHeaderDict({"TDM-Reservation": "0"}), AGENT) is None
