"""Private names of other libraries that this package reads, sets or overrides, and why no public one does.

Read it before a bound in `pyproject.toml` is raised. `pytest tests/test_private_names.py` holds it against the code and
against the installed versions: a name that is used but not listed, listed but not used, or gone fails there.
"""

from typing import NamedTuple


class PrivateName(NamedTuple):
    """A name that its library may change without notice."""

    owner: str
    """Where it is: `module` or `module:object`, whose attribute, instance attribute or parameter it is."""
    name: str
    """As the code has it."""
    used_in: tuple[str, ...]
    """Files of this package."""
    reason: str
    """What it is for."""


_TUNER = "peft.tuners.tuners_utils:BaseTunerLayer"
_EPOCH_LOOP = "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop"
_LIGHTNING_CLI = "lightning.pytorch.cli:LightningCLI"
_CLI = ("cli/lightning_cli.py",)

PRIVATE_NAMES = (
    # peft
    PrivateName(
        _TUNER,
        "_active_adapter",
        ("backbone/adapters.py", "backbone/lora.py"),
        "`set_adapter` switches off the gradients of all other adapters, and policy and critic are trained together.",
    ),
    PrivateName(
        _TUNER,
        "_disable_adapters",
        ("backbone/adapters.py", "backbone/lora.py"),
        "Leaving `disable_adapter` switches off the gradients of all adapters but the active one.",
    ),
    # lightning
    PrivateName(
        "lightning.pytorch:LightningModule",
        "_trainer",
        (
            "modules/preference.py",
            "modules/replay.py",
            "modules/rewarded_rollouts.py",
            "modules/rto.py",
            "modules/stage.py",
        ),
        "`trainer` raises where there is none, as in a notebook.",
    ),
    PrivateName(
        _EPOCH_LOOP,
        "_batches_that_stepped",
        ("callbacks/save_checkpoints.py",),
        "Lightning takes every checkpoint for one of the end of a batch; set right where it is not.",
    ),
    PrivateName(
        _EPOCH_LOOP,
        "_num_ready_batches_reached",
        ("callbacks/save_checkpoints.py",),
        "Whether an epoch has ended when a checkpoint is written after its last batch.",
    ),
    PrivateName(
        _EPOCH_LOOP,
        "_should_accumulate",
        ("callbacks/save_checkpoints.py",),
        "A checkpoint amid accumulated gradients would lose them.",
    ),
    PrivateName(
        "lightning.pytorch.loops.progress",
        "_ProcessedTracker",
        ("data/order.py",),
        "The type of `batch_progress.total`, whose `processed` is right after resuming.",
    ),
    PrivateName(
        "lightning.pytorch.core.optimizer:LightningOptimizer",
        "_optimizer",
        ("strategies.py",),
        "torch's functions for the state of an optimizer take no wrapper.",
    ),
    PrivateName(
        "lightning.pytorch.strategies:ModelParallelStrategy",
        "_save_distributed_checkpoint",
        ("strategies.py",),
        "Whether a checkpoint is written in shards; an argument that has no property.",
    ),
    PrivateName(
        "lightning.pytorch.callbacks:TQDMProgressBar",
        "_train_progress_bar",
        ("callbacks/progress.py",),
        "`train_progress_bar` raises before there is one.",
    ),
    PrivateName(
        "lightning.pytorch.callbacks:TQDMProgressBar",
        "_should_update",
        ("callbacks/progress.py",),
        "Overridden: a file that takes the output gets a line now and then.",
    ),
    PrivateName(_LIGHTNING_CLI, "_parser", _CLI, "The parser of a command, which writes the settings that a run had."),
    PrivateName(_LIGHTNING_CLI, "_subcommand_parsers", _CLI, "The settings that a command accepts, for its errors."),
    PrivateName(
        _LIGHTNING_CLI,
        "_run_subcommand",
        ("cli/lightning_cli.py", "cli/opening.py"),
        "Overridden: signals are heard around the run alone, and a stage that is opened or planned runs nothing.",
    ),
    PrivateName(
        _LIGHTNING_CLI,
        "_parse_ckpt_path",
        _CLI,
        "Overridden: settings are not taken from a checkpoint, and a path that is not there is an error.",
    ),
    # jsonargparse
    PrivateName(
        "jsonargparse",
        "_typehints",
        ("cli/short_names.py",),
        "`resolve_class_path_by_name` in it is replaced, so that `AdamW` is torch's whatever else is imported.",
    ),
    # transformers
    PrivateName(
        "transformers:PreTrainedConfig",
        "_name_or_path",
        ("backbone/logprob_cache.py",),
        "Taken out of what is hashed: a folder that has moved holds the same model.",
    ),
    PrivateName(
        "transformers.utils.hub:cached_files",
        "_raise_exceptions_for_connection_errors",
        ("backbone/model_files.py",),
        "A file that cannot be had is told by the loading that follows.",
    ),
    PrivateName(
        "transformers.utils.hub:cached_files",
        "_raise_exceptions_for_missing_entries",
        ("backbone/model_files.py",),
        "A model need not have each of the files that are asked for.",
    ),
    # datasets
    PrivateName(
        "datasets:Dataset",
        "_fingerprint",
        ("data/sources.py",),
        "What the cache of tokenized rows knows a data set of the hub by.",
    ),
    # torch
    PrivateName(
        "torch.nn:Module",
        "_parameters",
        ("memory/shapes.py", "memory/sharding.py"),
        "Weights are replaced under their names: by fake ones, and by what is gathered of shards.",
    ),
    PrivateName("torch.nn:Module", "_buffers", ("memory/shapes.py",), "The same for a buffer."),
    PrivateName(
        "torch:UntypedStorage",
        "_cdata",
        ("memory/live_bytes.py",),
        "Tells storages apart; an address of their data fake ones do not have.",
    ),
    PrivateName(
        "torch", "_subclasses", ("memory/shapes.py",), "`FakeTensorMode`: shapes of a model without memory for it."
    ),
    PrivateName(
        "torch.utils", "_python_dispatch", ("memory/live_bytes.py",), "`TorchDispatchMode`: sees every operation."
    ),
    PrivateName("torch.utils", "_pytree", ("modules/dumps.py",), "`tree_map_only`: nested tensors to the CPU."),
    PrivateName(
        "torch.ops:mkldnn",
        "_linear_pointwise",
        ("backbone/cpu_linear.py",),
        "oneDNN's product; asked for before it is used, so that its absence costs speed only.",
    ),
    PrivateName(
        "torch.optim.adam:Adam",
        "_step_supports_amp_scaling",
        ("optimizers.py",),
        "Taken off fused optimizers, of which Lightning otherwise refuses to clip gradients.",
    ),
    PrivateName(
        "torch.distributed.checkpoint.metadata",
        "_MEM_FORMAT_ENCODING",
        ("backbone/shard_files.py",),
        "One of the names that the index of a sharded checkpoint may hold; no others are unpickled.",
    ),
    PrivateName(
        "torch.distributed.checkpoint.filesystem", "_StorageInfo", ("backbone/shard_files.py",), "Another of them."
    ),
    PrivateName("torch.serialization", "_get_layout", ("backbone/shard_files.py",), "Another of them."),
)
