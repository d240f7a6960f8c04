"""Keeps off the screen what libraries say that a user of the command can do nothing about."""

import logging
import sys
import warnings

# Lines of libraries that say nothing about the run at hand.
_NOISE = (
    "💡 Tip",
    "Seed set to",
    "GPU available: False",
    "TPU available: False",
    "`Trainer.fit` stopped: `max_",
    "Failed to load CPU gemm_4bit_forward",  # bitsandbytes has another kernel
)
_NOISY_LOGGERS = (
    "bitsandbytes.backends.cpu.ops",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.utilities.rank_zero",
    "lightning_utilities.core.rank_zero",
)


def quiet_lightning() -> None:
    """Keeps advertisements and known harmless warnings off the screen; everything else stays."""
    for name in _NOISY_LOGGERS:
        logger = logging.getLogger(name)
        if _is_news not in logger.filters:
            logger.addFilter(_is_news)
    warnings.filterwarnings("ignore", message="The '.*dataloader' does not have many workers")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")


def quiet_libraries() -> None:
    """Keeps notes of the model libraries off the screen that a user of this command can do nothing about."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # names a kernel package that is not needed
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().lstrip().startswith(_NOISE)
