"""Where Lightning's loops are, in a checkpoint: always between a batch, with its validation, and the next one.

Lightning guesses from its counters at which hook a checkpoint was saved, and goes on from there. This is the one place
where nothing of a step is left to do.
"""

from typing import Any


def put_between_batches(loops: dict[str, Any], training_has_ended: bool, epoch_is_over: bool) -> None:
    """Changes the state of a fit loop, as `checkpoint["loops"]["fit_loop"]` has it, in place.

    Args:
        loops: state at the start of a batch, or after the end of training.
        training_has_ended: whether it is the latter, where Lightning has closed the epoch, finished or not.
        epoch_is_over: whether that epoch had no batches left; the next batch is then the first of another one.
    """
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    batches["is_last_batch"] = False
    for tracker in ("total", "current"):
        batches[tracker]["ready"] = batches[tracker]["completed"]
        if training_has_ended and epoch_is_over:
            epochs[tracker]["ready"] += 1
            epochs[tracker]["started"] += 1
        elif training_has_ended:
            epochs[tracker]["processed"] -= 1
            epochs[tracker]["completed"] -= 1
    if training_has_ended and epoch_is_over:
        optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        validated = loops["epoch_loop.val_loop.batch_progress"]["total"]
        schedulers = loops["epoch_loop.scheduler_progress"]
        for counters in (batches["current"], optimizer["step"]["current"], optimizer["zero_grad"]["current"]):
            _clear(counters)
        _clear(schedulers["current"])
        _clear(validated)


def _clear(counters: dict[str, int]) -> None:
    for name in counters:
        counters[name] = 0
