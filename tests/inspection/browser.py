"""Pages in a headless Chromium: what a person would see, measured and as a picture."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)
"""The browser, if there is one."""

# A frame has the width that is asked for, whatever the least width of a window is. The page forbids scripts; those of
# the frame's own parent read it.
_FRAME = """<!DOCTYPE html><html><body style="margin:0;background:#888">
<iframe id="page" style="border:0;display:block;width:{width}px;height:{height}px" srcdoc="{page}"></iframe>
<script>
const frame = document.getElementById("page");
function channels(colour) {{
  // rgb(1, 2, 3) or rgba(1, 2, 3, 0.5)
  return colour.match(/[\\d.]+/g).map(Number);
}}
function background(element) {{
  for (let at = element; at; at = at.parentElement) {{
    const found = channels(frame.contentWindow.getComputedStyle(at).backgroundColor);
    if (found.length === 3 || found[3] > 0) return found.slice(0, 3);
  }}
  return [255, 255, 255];
}}
function box(element) {{
  const found = element.getBoundingClientRect();
  return [found.left, found.top, found.right, found.bottom];
}}
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const texts = [...page.querySelectorAll("body *")].filter((element) =>
    element.tagName !== "STYLE" && element.getClientRects().length
    && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  const report = {{
    width: frame.contentWindow.innerWidth,
    scroll_width: root.scrollWidth,
    height: root.scrollHeight,
    scripts: page.scripts.length,
    text: page.body.innerText,
    tokens: [...page.querySelectorAll(".t")].map((element) => element.textContent),
    boxes: [...page.querySelectorAll("h1, h2, dd, dt, .t, .turn, svg, .steps span, .ends")].map(box),
    articles: [...page.querySelectorAll("article")].map(box),
    curves: [...page.querySelectorAll("polyline")].map(box),
    texts: texts.map((element) => ({{
      text: element.textContent.slice(0, 40),
      colour: channels(frame.contentWindow.getComputedStyle(element).color).slice(0, 3),
      background: background(element),
    }})),
  }};
  const shown = document.createElement("pre");
  shown.id = "report";
  shown.hidden = true;
  shown.textContent = JSON.stringify(report);
  document.body.append(shown);
}};
</script></body></html>"""


def look(page: str, folder: Path, width: int, height: int = 900, dark: bool = False) -> tuple[dict[str, Any], Path]:
    """Measure a page, and take its picture.

    Args:
        page: the file's contents.
        folder: for the harness and the picture.
        width: of the page, in pixels.
        height: of what the picture shows.
        dark: whether the reader prefers dark pages.
    """
    name = f"{width}{'-dark' if dark else ''}"
    harness, picture = folder / f"{name}.html", folder / f"{name}.png"
    harness.write_text(_FRAME.format(width=width, height=height, page=html.escape(page)), encoding="utf-8")
    document = _run(harness, f"--window-size={width},{height}", dark, "--dump-dom", f"--screenshot={picture}")
    if not picture.exists():  # some versions do one thing at a time
        _run(harness, f"--window-size={width},{height}", dark, f"--screenshot={picture}")
    found = re.search(r'<pre id="report"[^>]*>(.*?)</pre>', document, re.DOTALL)
    assert found is not None, document[-2000:]
    return json.loads(html.unescape(found[1])), picture


def _run(harness: Path, size: str, dark: bool, *options: str) -> str:
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
    ]
    # 0 is dark, 1 is light
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    profile = f"--user-data-dir={harness.with_suffix('')}"
    done = subprocess.run(
        [*command, scheme, profile, size, *options, harness.as_uri()], capture_output=True, timeout=120, check=True
    )
    return done.stdout.decode()


def contrast(colour: list[float], background: list[float]) -> float:
    """The contrast ratio of two colours, from 1 to 21 (WCAG 2.2)."""

    def luminance(channels: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in channels)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(colour), luminance(background)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
