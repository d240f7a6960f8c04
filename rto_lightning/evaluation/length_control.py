"""The length-controlled win rate of AlpacaEval 2, by `alpaca_eval`'s own metric (arXiv 2404.04475).

It fits a regression with the difference in length as one cause of a preference, and asks for the win rate at no
difference. The regression also needs how difficult each instruction is, from a file that `alpaca_eval` downloads: so
it is defined for the 805 instructions of AlpacaEval 2 only, in their order.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace

from rto_lightning.errors import UserError, first_line
from rto_lightning.evaluation.annotations import annotation_rows
from rto_lightning.evaluation.win_rates import ModelResult

INSTRUCTIONS = 805
"""Of AlpacaEval 2; the file of their difficulties knows them by their positions."""


def check_length_control() -> Callable[..., dict[str, float]]:
    """The metric.

    Raises:
        UserError: if `alpaca_eval` is not installed.
    """
    try:
        from alpaca_eval.metrics import get_length_controlled_winrate
    except ImportError as error:
        raise UserError("--length_controlled needs alpaca_eval; run `pip install 'rto-lightning[eval]'`.") from error
    metric: Callable[..., dict[str, float]] = get_length_controlled_winrate
    return metric


def check_instructions(model: str, count: int) -> None:
    """Raise UserError unless a model answers as many instructions as AlpacaEval 2 has."""
    if count != INSTRUCTIONS:
        raise UserError(
            f"--length_controlled is for all {INSTRUCTIONS} instructions of AlpacaEval 2 in their order, and {model} "
            f"answers {count}; leave it out."
        )


def length_controlled(result: ModelResult) -> ModelResult:
    """The result with the length-controlled win rate of `alpaca_eval`, and its standard error, in percent.

    Raises:
        UserError: if `alpaca_eval` is not installed, these are not the instructions of AlpacaEval 2, or the file that
            it downloads is not there.
    """
    get_length_controlled_winrate = check_length_control()
    check_instructions(result.model, len(result.comparisons))
    import pandas

    annotations = pandas.DataFrame(annotation_rows(result))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries behind it, on what they will change
            metrics = get_length_controlled_winrate(annotations, save_weights_dir=None)
    except OSError as error:  # of huggingface_hub, as are its errors of the network
        raise UserError(
            "alpaca_eval cannot get df_gamed.csv of the data set tatsu-lab/alpaca_eval from the Hugging Face hub "
            f"({first_line(error)}); download it where the hub can be reached, or leave out --length_controlled."
        ) from error
    names = ("length_controlled_winrate", "lc_standard_error", "win_rate", "standard_error", "discrete_win_rate")
    return replace(result, length_controlled={name: float(metrics[name]) for name in names})
