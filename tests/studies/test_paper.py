import pytest

from studies import ladder, memorisation, paper, trilemma

PAGE = """# Page

<!-- one -->
old
<!-- /one -->

Between.

<!-- two -->
<!-- /two -->
"""


def test_tables_go_between_their_marks_and_nothing_else_changes():
    page = paper.filled(PAGE, {"one": "| 1 |", "two": "| 2 \\d |"})
    assert "<!-- one -->\n\n| 1 |\n\n<!-- /one -->" in page
    assert "<!-- two -->\n\n| 2 \\d |\n\n<!-- /two -->" in page
    assert "old" not in page
    assert "Between." in page
    assert paper.filled(page, {"one": "| 1 |", "two": "| 2 \\d |"}) == page


@pytest.mark.parametrize("tables", [{"one": ""}, {"one": "", "two": "", "three": ""}])
def test_a_table_without_a_place_and_a_place_without_a_table_are_refused(tables):
    with pytest.raises(ValueError, match=r"two|three"):
        paper.filled(PAGE, tables)


@pytest.mark.parametrize("study", [ladder, trilemma, memorisation], ids=lambda s: s.__name__)
def test_the_page_says_what_the_records_say(study, tmp_path):
    # Not the scaling law's: digits of a fit depend on the processor, and its intervals take long.
    page = paper.PAGE.read_text(encoding="utf-8")
    name = study.__name__.removeprefix("studies.")
    for block, table in study.report(paper.RESULTS / name, tmp_path).items():
        assert f"<!-- {block} -->\n\n{table}\n\n<!-- /{block} -->" in page
