"""The filter's rule on influence: who goes, who is counted, and what files are refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import FilterConfig
from data.filter import select
from data.filter.influence import InfluenceError
from tests.data.test_select import table, write


def file(path, values):
    """A file of influences of the first rows of `table`."""
    keys = table(caption=["a"] * len(values))["key"]
    pq.write_table(pa.table({"key": keys, "influence": values}), path)
    return str(path)


def chosen(folder, rows, **settings):
    """(verdicts, selection) of a selection by these settings."""
    config = FilterConfig(min_similarity=None, **settings)
    found = select.select(folder / "out", write(rows, folder / "in"), config)
    verdicts = pq.read_table(folder / "out" / "verdicts.parquet")
    return verdicts["verdict"].to_pylist(), found, config


def test_the_worst_share_of_the_scored_goes_and_the_unscored_stay_and_are_counted(tmp_path):
    rows = table(caption=[f"thing {n}" for n in range(12)])
    path = file(tmp_path / "a.parquet", [0.5, -1.0, 3.0, 0.25, 2.0, 0.75, -3.0, 0.0, 1.0, -2.0])
    verdicts, found, config = chosen(tmp_path, rows, influence=path, drop_influence=0.2)
    expected = ["ok"] * 12
    expected[2] = expected[4] = "drop_influence"
    assert verdicts == expected
    assert found.counts == {"ok": 10, "drop_influence": 2}
    told = {"share": 0.2, "most": 1.0, "kept without one": 2}
    assert found.thresholds["drop_influence"] == told
    assert ("drop_influence", 2, 10) in [
        (s.step, s.dropped, s.rows) for s in select.funnel(found.counts, config)
    ]


def test_an_earlier_rule_counts_first_and_equal_influences_stay_together(tmp_path):
    rows = table(unsafe=[0.9, 0.1, 0.1, 0.1, 0.1], caption=list("abcde"))
    path = file(tmp_path / "a.parquet", [9.0, 2.0, 2.0, 2.0, 1.0])
    verdicts, found, _ = chosen(tmp_path, rows, influence=path, drop_influence=0.4)
    assert verdicts == ["max_unsafe", "ok", "ok", "ok", "ok"]
    assert found.thresholds["drop_influence"]["most"] == 2.0


def test_another_content_of_the_file_is_another_selection(tmp_path):
    rows = table(caption=list("abcd"))
    path = file(tmp_path / "a.parquet", [1.0, 2.0, 3.0, 4.0])
    settings = {"influence": path, "drop_influence": 0.25}
    assert chosen(tmp_path, rows, **settings)[0][3] == "drop_influence"
    file(tmp_path / "a.parquet", [40.0, 2.0, 3.0, 4.0, 5.0])
    assert chosen(tmp_path, rows, **settings)[0][0] == "drop_influence"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"key,influence", "is no Parquet file"),
        ({"key": ["a"], "score": [1.0]}, "it has key, score"),
        ({"key": [1], "influence": [1.0]}, "columns key, of text"),
        ({"key": ["a"], "influence": ["1"]}, "influence, of floats"),
        ({"key": ["a", "a"], "influence": [1.0, 2.0]}, "1 of its rows repeat a key and 0 have no"),
        ({"key": ["a", "b"], "influence": [np.nan, None]}, "0 of its rows .* and 2 have no number"),
        ({"key": ["a"], "influence": [1.0]}, "the key of no picture that is scored here"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_remedy(tmp_path, content, message):
    path = tmp_path / "it's [a].parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        pq.write_table(pa.table(content), path)
    with pytest.raises(InfluenceError, match=f"filter.influence .*{message}.*gigagan influence"):
        chosen(tmp_path, table(caption=["a"]), influence=str(path), drop_influence=0.5)


@pytest.mark.parametrize("settings", [{"influence": "a.parquet"}, {"drop_influence": 0.1}])
def test_a_file_without_a_share_and_a_share_without_a_file_are_refused(settings):
    with pytest.raises(ValueError, match="give both or none"):
        FilterConfig(**settings)


def test_generated_pictures_go_above_the_limit_and_an_unscored_one_breaks_the_rule(tmp_path):
    rows = table(generated=[0.1, 0.5, 0.51, None], caption=list("abcd"))
    verdicts, found, _ = chosen(tmp_path, rows, max_generated=0.5)
    assert verdicts == ["ok", "ok", "max_generated", "max_generated"]
    assert found.missing == {"max_generated": 1}
    assert sum(found.histograms["generated"]["counts"]) == 3


def test_a_limit_on_generated_pictures_that_nobody_scored_names_the_remedy(tmp_path):
    with pytest.raises(select.UnscoredError, match=r"max_generated is 0\.5.*score\.generated"):
        chosen(tmp_path, table(caption=["a"]), max_generated=0.5)
