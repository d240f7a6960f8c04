from rto_lightning.html_documents import html_document, visible


def test_characters_that_are_not_seen_are_named() -> None:
    assert visible("a\x00\u202eb\ud800\n") == "a[U+0000][U+202E]b[U+D800]\n"
    assert visible("\u200b\ufeff\u200f") == "[U+200B][U+FEFF][U+200F]"
    assert visible("👩\u200d🚀 می\u200cخواهم é") == "👩\u200d🚀 می\u200cخواهم é"


def test_a_title_is_text() -> None:
    page = html_document("<b> & \u202e", "p{margin:0}", "<p>body</p>")
    assert "<title>&lt;b&gt; &amp; [U+202E]</title>" in page
    assert "<style>p{margin:0}</style>" in page and "<body>\n<p>body</p></body>" in page
