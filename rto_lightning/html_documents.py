"""HTML files that need nothing else, no script and no network, and text that stays text in them."""

import html
import unicodedata

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SHOWN_AS_CODE = {"Cc", "Cs", "Co", "Cn"}
_DIRECTION_MARKS = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
# Soft hyphen, blanks without a width, and marks of byte order. Joiners shape what is beside them, and stay.
_WITHOUT_WIDTH = {0x00AD, 0x180E, 0x200B, *range(0x2060, 0x2065), 0xFEFF}


def html_document(title: str, style: str, body: str) -> str:
    """A whole file, which forbids itself scripts and the network.

    Args:
        title: plain text.
        style: CSS.
        body: HTML.
    """
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escaped(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<style>{style}</style>\n</head>\n'
        f"<body>\n{body}</body>\n</html>\n"
    )


def escaped(text: str) -> str:
    """Plain text as HTML that shows it; see :func:`visible`."""
    return html.escape(visible(text))


def visible(text: str) -> str:
    """Text in which characters that are not seen, or turn the direction of what follows, stand as their code points."""
    return "".join(
        character
        if character in "\n\t"
        or not (
            unicodedata.category(character) in _SHOWN_AS_CODE or ord(character) in _DIRECTION_MARKS | _WITHOUT_WIDTH
        )
        else f"[U+{ord(character):04X}]"
        for character in text
    )
