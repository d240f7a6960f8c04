"""The little of Markdown that reports are written in, as HTML."""

import itertools
import re
from collections.abc import Iterator, Sequence

from rto_lightning.html_documents import escaped

_RULE = re.compile(r"\|?(\s*:?-+:?\s*\|)+\s*:?-*:?\s*")


def markdown_html(text: str) -> str:
    """Paragraphs, lists, tables and fenced blocks as HTML. All else, other markup included, is shown as it is."""
    return "".join(_block(block) for block in _blocks(text))


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column has names and whose others have figures; too wide a one scrolls for itself."""

    def line(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escaped(cell)}</{kind}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>\n'


def _blocks(text: str) -> Iterator[list[str]]:
    """Lines between blank ones; a fenced block is one."""
    block: list[str] = []
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            if not fenced and block:
                yield block
                block = []
            block.append(line)
            fenced = not fenced
            if not fenced:
                yield block
                block = []
        elif line.strip() or fenced:
            block.append(line)
        elif block:
            yield block
            block = []
    if block:
        yield block


def _block(lines: list[str]) -> str:
    def shown(text: str) -> str:
        return escaped(text)

    if lines[0].startswith("```"):
        inner = lines[1:-1] if len(lines) > 1 and lines[-1].startswith("```") else lines[1:]  # it may never end
        return f"<pre>{shown(chr(10).join(inner))}</pre>\n"
    if len(lines) > 1 and _RULE.fullmatch(lines[1].strip()):
        head, _, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines)
        return table_html(head, rows)
    if all(line.startswith("- ") for line in lines):
        return "<ul>" + "".join(f"<li>{shown(line[2:])}</li>" for line in lines) + "</ul>\n"
    heading = "".join(itertools.takewhile("#".__eq__, lines[0]))
    if heading and len(lines) == 1:
        return f"<h3>{shown(lines[0][len(heading) :].strip())}</h3>\n"
    return f"<p>{shown(' '.join(lines))}</p>\n"
