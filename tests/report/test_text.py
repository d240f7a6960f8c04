import pytest

from rto_lightning.report.text import markdown_html


@pytest.mark.parametrize("text", ["```\na\nb\n```", "```\na\nb"])
def test_a_fenced_block_has_all_its_lines_also_if_it_never_ends(text: str) -> None:
    assert markdown_html(text) == "<pre>a\nb</pre>\n"
