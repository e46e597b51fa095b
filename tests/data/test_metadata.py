from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import metadata
from data.config import DownloadConfig
from data.schema import MetadataError, resolve

LAION = ["URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "hash", "punsafe", "pwatermark"]
RELAION = [
    "url",
    "caption",
    "key",
    "status",
    "error_message",
    "width",
    "height",
    "original_width",
    "original_height",
    "exif",
    "md5",
    "similarity",
    "hash",
    "punsafe",
    "pwatermark",
]
COYO = [
    "id",
    "url",
    "text",
    "width",
    "height",
    "image_phash",
    "text_length",
    "word_count",
    "num_tokens_bert",
    "num_tokens_gpt",
    "num_faces",
    "clip_similarity_vitb32",
    "clip_similarity_vitl14",
    "nsfw_score_opennsfw2",
    "nsfw_score_gantman",
    "watermark_score",
    "aesthetic_score_laion_v2",
]
DATACOMP = [
    "uid",
    "url",
    "text",
    "original_width",
    "original_height",
    "clip_b32_similarity_score",
    "clip_l14_similarity_score",
    "face_bboxes",
    "sha256",
]

URLS_ONLY = {
    "min_side": None,
    "max_aspect": None,
    "max_unsafe": None,
    "max_watermark": None,
    "min_caption_words": 0,
    "min_caption_chars": 0,
}


def config(**changes) -> DownloadConfig:
    return DownloadConfig(source="parquet", metadata=("x",), **changes)


def write(path, **columns) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (LAION, {"url": "URL", "caption": "TEXT", "width": "WIDTH", "unsafe": "punsafe"}),
        (RELAION, {"caption": "caption", "width": "original_width", "watermark": "pwatermark"}),
        (COYO, {"caption": "text", "similarity_b32": "clip_similarity_vitb32", "width": "width"}),
        (DATACOMP, {"height": "original_height", "similarity_l14": "clip_l14_similarity_score"}),
        (["url", "caption"], {"url": "url", "caption": "caption"}),
    ],
    ids=["laion", "relaion", "coyo", "datacomp", "plain"],
)
def test_each_source_resolves_to_our_columns(columns, expected):
    assert expected.items() <= resolve(columns, "file").items()


def test_a_missing_url_column_names_file_and_remedy():
    with pytest.raises(MetadataError, match=r"list\.parquet: no url column.*found link, text"):
        resolve(["link", "text"], "list.parquet")


@pytest.mark.parametrize("columns", [["url", "URL", "text"], ["url", "text", "caption"]])
def test_ambiguous_columns_are_refused(columns):
    with pytest.raises(MetadataError, match="could all be"):
        resolve(columns, "file")


def test_an_unreadable_parquet_names_file_and_remedy(tmp_path):
    path = tmp_path / "torn.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(MetadataError, match=r"torn\.parquet: not a readable Parquet.*fetch it"):
        metadata.prepare((str(path),), tmp_path / "out.parquet", config())


def test_a_rule_without_its_column_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", url=["http://a/1"], text=["three good words"])
    with pytest.raises(MetadataError, match=r"download\.min_side.*null"):
        metadata.prepare((path,), tmp_path / "out.parquet", config())


def test_every_row_is_counted_at_its_first_failing_rule(tmp_path):
    nan = None
    path = write(
        tmp_path / "a.parquet",
        URL=[
            "http://a/1",
            "http://a/2",
            "http://a/3",
            nan,
            "http://a/5",
            "http://a/6",
            "http://a/1",
        ],
        TEXT=["a b cccc"] * 5 + ["ab", "a b cccc"],
        WIDTH=pa.array([100, nan, 100, 100, 30, 100, 100], pa.float64()),
        HEIGHT=pa.array([90, 90, 900, 90, 90, 90, 90], pa.float64()),
        punsafe=[0.1] * 7,
        pwatermark=[0.1] * 7,
    )
    funnel = metadata.prepare((path,), tmp_path / "out.parquet", config())
    dropped = {step.step: step.dropped for step in funnel if step.dropped}
    assert dropped == {
        "no url": 1,
        "null width": 1,
        "min_side": 1,
        "max_aspect": 1,
        "caption too short": 1,
        "same url and caption": 1,
    }
    assert (funnel[0].rows, funnel[-1].rows) == (7, 1)
    assert pq.read_table(tmp_path / "out.parquet")["url"].to_pylist() == ["http://a/1"]


def test_the_order_is_seeded_and_keys_are_those_of_img2dataset(tmp_path):
    from img2dataset.downloader import compute_key

    path = write(tmp_path / "a.parquet", url=[f"http://a/{i}" for i in range(11)], text=["x"] * 11)
    orders = {}
    for seed in (0, 0, 1):
        chosen = config(**URLS_ONLY, seed=seed, rows_per_shard=5)
        metadata.prepare((path,), tmp_path / "out.parquet", chosen)
        table = pq.read_table(tmp_path / "out.parquet")
        orders.setdefault(seed, table["url"].to_pylist())
        assert orders[seed] == table["url"].to_pylist()
        keys = [compute_key(i % 5, i // 5, 1, 5) for i in range(11)]
        assert table["key"].to_pylist() == keys
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_nothing_left_names_the_strictest_rule(tmp_path):
    path = write(tmp_path / "a.parquet", url=["http://a/1"], text=["short"])
    chosen = config(**{**URLS_ONLY, "min_caption_words": 3})
    with pytest.raises(MetadataError, match="'caption too short' dropped most"):
        metadata.prepare((path,), tmp_path / "out.parquet", chosen)


def test_the_fingerprint_of_lists_follows_their_content_and_not_their_folder(tmp_path):
    def written(folder, urls):
        path = tmp_path / folder / "a.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"url": urls, "caption": ["x y z"] * len(urls)}), path)
        return metadata.fingerprint((str(path.parent / "*.parquet"),))

    first = written("one", ["http://a/1", "http://a/2"])
    assert first == written("two", ["http://a/1", "http://a/2"])
    assert first != written("three", ["http://a/1", "http://a/3"])
    assert first != metadata.fingerprint((str(tmp_path / "nothing" / "*.parquet"),))
