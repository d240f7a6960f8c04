"""Tables, pictures, pages and histograms for TensorBoard and Weights & Biases; other loggers take numbers only."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from rto_lightning.figures import pixels
from rto_lightning.inspection import TokenRewardPage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~&])")


def takes_pictures(trainer: Trainer) -> bool:
    """Whether any logger shows what is logged here."""
    return any(isinstance(logger, TensorBoardLogger | WandbLogger) for logger in trainer.loggers)


def log_table(trainer: Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    """Log a table, to TensorBoard as text.

    Args:
        trainer: has the loggers.
        name: of the table.
        columns: their names.
        rows: numbers and texts, as many as columns.
        step: iterations so far.
    """
    for logger in _tensorboards(trainer):
        logger.experiment.add_text(name, _markdown(columns, rows), step)
    for logger in _wandbs(trainer):
        logger.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)


def log_figure(trainer: Trainer, name: str, figure: "Figure", step: int) -> None:
    """Log a figure as a picture."""
    picture = pixels(figure)
    for logger in _tensorboards(trainer):
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
    for logger in _wandbs(trainer):
        logger.log_image(name, [picture], step=step)


def log_histogram(trainer: Trainer, name: str, values: Tensor, step: int) -> None:
    """Log how values (N,) are distributed, without those that are not finite, as a skipped step may have them."""
    values = values[values.isfinite()]
    if not len(values):
        return
    numbers: Any = values.detach().float().cpu().numpy()
    for logger in _tensorboards(trainer):
        logger.experiment.add_histogram(name, numbers, step)
    for logger in _wandbs(trainer):
        import wandb

        logger.log_metrics({name: wandb.Histogram(numbers)}, step)


def log_page(trainer: Trainer, name: str, page: TokenRewardPage, step: int) -> None:
    """Log a page; TensorBoard shows none."""
    for logger in _wandbs(trainer):
        import wandb

        logger.log_metrics({name: wandb.Html(page.html(), inject=False)}, step)


def _tensorboards(trainer: Trainer) -> Iterator[TensorBoardLogger]:
    return (logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))


def _wandbs(trainer: Trainer) -> Iterator[Any]:
    return (logger for logger in trainer.loggers if isinstance(logger, WandbLogger))


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown in which texts stay what they are."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(cell(value) for value in cells) + " |"

    def cell(value: Any) -> str:
        if isinstance(value, str):
            return _MARKDOWN.sub(r"\\\1", " ".join(value.split()))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "\n".join([line(columns), _line_of_rules(len(columns)), *(line(row) for row in rows)])


def _line_of_rules(columns: int) -> str:
    """What stands between the heading of a table in Markdown and its rows."""
    return "|" + " --- |" * columns
