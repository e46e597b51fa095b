import pytest

from studies import paper

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
