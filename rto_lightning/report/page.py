"""The report of a pipeline: one HTML file that needs nothing else, no script and no network."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from rto_lightning.figures import svg
from rto_lightning.html_documents import escaped, html_document
from rto_lightning.inspection.page import TokenRewardPage
from rto_lightning.report.answers import before_and_after
from rto_lightning.report.charts import Point, curve_figure, frontier_figure
from rto_lightning.report.metrics import KINDS, Kind, Run, first_and_last, read_run
from rto_lightning.report.text import markdown_html, table_html
from rto_lightning.runs.files import written_whole
from rto_lightning.runs.folder import ROLE_FOLDER

_LARGEST_PICTURE = 4 * 2**20
"""Bytes; a larger one is left out."""


@dataclass(frozen=True)
class ReportedStage:
    """A finished stage of a pipeline."""

    name: str
    """Name of the stage and of its folder."""
    what: str
    """What it did: `fit rto.yaml`."""
    seconds: float
    """How long it took."""
    folder: Path
    """Its folder."""


def write_report(path: Path, title: str, facts: Mapping[str, str], stages: Sequence[ReportedStage]) -> None:
    """Write the page; a file that is there is replaced.

    It has a table of the stages; for each kind of stage its curves, all runs of the kind in one chart, and what they
    began and ended with; the frontier of KL and score of the RTO stages; their answers to the same prompts before and
    after training, with the reward of each token, where the callback `LogSamples` has kept some; and what stages that
    call a function have left in their folders as Markdown files and PNG pictures.

    Args:
        path: the file.
        title: heading.
        facts: what stands under the heading, by name.
        stages: in the order in which they ran.

    Raises:
        UserError: if there is no room for it.
    """
    runs = {stage.name: run for stage in stages if (run := read_run(stage.folder)) is not None}
    body = "".join(
        [
            f"<h1>{escaped(title)}</h1>\n",
            _facts(facts),
            *(_left_by_functions(stages)),
            *(_kind(kind, {name: run for name, run in runs.items() if run.kind is kind}) for kind in KINDS),
            _answers(stages),
            "<h2>Stages</h2>\n",
            table_html(["stage", "what", "seconds"], [[s.name, s.what, f"{s.seconds:.1f}"] for s in stages]),
        ]
    )
    with written_whole(path, "w", encoding="utf-8") as file:
        file.write(html_document(title, _style_sheet(), f'<main class="report">\n{body}</main>\n'))


def _kind(kind: Kind, runs: Mapping[str, Run]) -> str:
    """The section of one kind of stage; nothing if there is none."""
    if not runs:
        return ""
    charts, columns = [], []
    for quantity in kind.quantities:
        series = {
            name: (run.series(f"train/{quantity.name}"), run.series(f"validation/{quantity.name}"))
            for name, run in runs.items()
        }
        series = {name: both for name, both in series.items() if len(both[0])}
        if not series:
            continue
        charts.append(_figure(quantity.title, svg(curve_figure(series, quantity.unit))))
        columns.append((quantity.title, {name: first_and_last(train) for name, (train, _) in series.items()}))
    if kind is KINDS[0]:
        charts.append(_frontier(runs))
    head = [f"{kind.title}: first to last", *(title for title, _ in columns)]
    rows = [
        [name, *("" if name not in ends else "{:.4g} to {:.4g}".format(*ends[name]) for _, ends in columns)]
        for name in runs
    ]
    return f'<h2>{escaped(kind.title)}</h2>\n<div class="charts">{"".join(charts)}</div>\n{table_html(head, rows)}'


def _frontier(runs: Mapping[str, Run]) -> str:
    points = {name: _points(run) for name, run in runs.items()}
    points = {name: found for name, found in points.items() if found}
    if not points:
        return ""
    return _figure("Score against KL, from ring to square", svg(frontier_figure(points, "score (mean of a response)")))


def _points(run: Run) -> list[Point]:
    """KL and score of the iterations that have both."""
    kl, score = run.series("train/kl"), run.series("train/score")
    by_step = dict(zip(kl.steps, kl.values, strict=True))
    return [(by_step[step], value) for step, value in zip(score.steps, score.values, strict=True) if step in by_step]


def _answers(stages: Sequence[ReportedStage]) -> str:
    compared = before_and_after({stage.name: stage.folder for stage in stages})
    if not compared:
        return ""
    page = TokenRewardPage(compared, title="", unit="")
    return f"<h2>Answers before and after training</h2>\n{page._repr_html_()}"


def _left_by_functions(stages: Sequence[ReportedStage]) -> Iterator[str]:
    """Markdown and pictures in the folders of stages that trained nothing."""
    for stage in stages:
        if (stage.folder / ROLE_FOLDER).exists():
            continue
        files = sorted(stage.folder.glob("*.md"))
        texts = [markdown_html(path.read_text(encoding="utf-8", errors="replace")) for path in files]
        pictures = [
            _figure(path.stem.replace("_", " "), path.read_bytes(), wide=True)
            for path in sorted(stage.folder.glob("*.png"))
            if path.stat().st_size <= _LARGEST_PICTURE
        ]
        if texts or pictures:
            yield f"<h2>{escaped(stage.name)}</h2>\n{''.join(pictures)}{''.join(texts)}"


def _figure(title: str, picture: str | bytes, wide: bool = False) -> str:
    """A picture with its title; text is SVG, bytes are PNG."""
    kind, data = ("svg+xml", picture.encode()) if isinstance(picture, str) else ("png", picture)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    shape = ' class="broad"' if wide else ""
    title = escaped(title[:1].upper() + title[1:])
    return f'<figure{shape}><figcaption>{title}</figcaption><img alt="{title}" src="{source}"></figure>\n'


def _facts(facts: Mapping[str, str]) -> str:
    rows = (f"<div><dt>{escaped(name)}:</dt><dd>{escaped(value)}</dd></div>" for name, value in facts.items())
    return f"<dl>{''.join(rows)}</dl>\n"


@cache
def _style_sheet() -> str:
    return (files("rto_lightning.report") / "page.css").read_text(encoding="utf-8")
