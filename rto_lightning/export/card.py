"""The model card: what an exported folder is, how it was made, and how to load it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from rto_lightning.backbone.roles import looks_like_hub_name
from rto_lightning.data.files import READERS
from rto_lightning.export.check import Agreement
from rto_lightning.export.lineage import StageRecord, final_metrics
from rto_lightning.export.names import shown
from rto_lightning.export.usage import usage
from rto_lightning.modules.preference import OWN_SETTINGS
from rto_lightning.secrets import mask_text

PAPER = "[arXiv 2404.18922](https://arxiv.org/abs/2404.18922)"

_WHAT = {
    "policy": "answers prompts",
    "dpo": "carries a reward for every token of an answer, beta * log(pi_dpo / pi_ref)",
    "reward": "scores an answer as a whole",
    "critic": "gives the value of every position of an answer",
}
_METHODS = {
    "RTO": f"Reinforced Token Optimization (RTO, {PAPER}): PPO on token rewards of a DPO model and one score an answer",
    "Semi-RTO": f"Semi-RTO ({PAPER}): PPO on token rewards of a DPO model, summed by sentence, and one score an answer",
    "DDPO": f"DDPO ({PAPER}): PPO on the summed token rewards of a DPO model and one score, at the end of an answer",
    "RS-PPO": f"RS-PPO ({PAPER}): PPO on one score an answer, shaped by the token rewards of a DPO model",
    "PPO": "PPO on one score an answer",
    "REINFORCE++": "REINFORCE++ on one score an answer",
    "RLOO": "RLOO on one score an answer",
    "GRPO": "GRPO on one score an answer",
    "SFT": "supervised fine-tuning on demonstrations",
    "reward model": "a Bradley-Terry model of preferences",
}
_OPTIONS = (
    "model.rewards.truncation_penalty",
    "model.rewards.min_response_tokens",
    "model.rewards.short_penalty",
    "model.ppo.value_clip_range",
    "model.ppo.dual_clip",
    "model.ppo.entropy_coefficient",
    "model.ppo.kl_stop",
    "model.ppo.importance_weight_cap",
)
"""Settings that are off at 0 and shown where they are not."""
_SETTINGS = (
    "model.backbone.mode",
    "model.backbone.lora.rank",
    "model.backbone.lora.alpha",
    "model.backbone.lora.rank_stabilized",
    "model.backbone.quantization",
    "model.backbone.dtype",
    "model.loss",
    "model.beta",
    *(f"model.{name}" for name in OWN_SETTINGS.values()),
    "model.rewards.beta_1",
    "model.rewards.token_reward_clip",
    "model.rewards.granularity",
    "model.rewards.beta_2",
    "model.rewards.kl_target",
    "model.rewards.beta_3",
    "model.rewards.score_clip",
    "model.rewards.normalize_score",
    "model.reward_function",
    "model.rollout.max_new_tokens",
    "model.rollout.temperature",
    "model.rollout.responses_per_prompt",
    "model.ppo.estimator",
    "model.ppo.epochs",
    "model.ppo.minibatch_size",
    "model.ppo.gamma",
    "model.ppo.lam",
    "model.ppo.clip_range",
    "model.ppo.aggregation",
    *_OPTIONS,
    "model.critic.init",
    "model.critic.shared",
    "model.critic.warmup_iterations",
    "model.ema_decay",
    "model.optimizer",
    "model.policy_optimizer",
    "model.critic_optimizer",
    "model.lr_scheduler",
    "model.policy_scheduler",
    "data.batch_size",
    "trainer.accumulate_grad_batches",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.precision",
    "seed_everything",
)
"""What decides a result; every other setting is in `config.yaml`."""
_LIBRARIES = ("rto-lightning", "lightning", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Exported:
    """What a card is written about."""

    name: str
    """Under which the folder is loaded: its own, or USER/NAME on the hub."""
    on_hub: bool
    """Which of the two."""
    role: str
    """What it was trained to be."""
    kind: str
    """`adapter`, `model` or `classifier`."""
    base: str
    """The model from which training started."""
    dtype: str
    """Of its weights."""
    step: int | None
    """Of the checkpoint that they come from; None for a saved role."""
    stop_token: str
    """Ends an answer."""
    has_template: bool
    """Whether the tokenizer has a chat template."""
    has_head: bool
    """Whether a scalar head is beside it."""
    missing_bias: float
    """What has to be added to a classifier's scores to get those of the role."""
    agreement: Agreement | None
    """What the check found; None if there was none."""


def write_card(folder: Path, exported: Exported, records: Sequence[StageRecord]) -> None:
    """Write `README.md` into an exported folder, with secrets masked.

    Args:
        folder: the export.
        exported: what it is.
        records: the stages that led to it; see :func:`rto_lightning.export.lineage.lineage`.
    """
    parts = [
        f"---\n{_front_matter(exported, records)}\n---",
        f"# {exported.name.rpartition('/')[2]}",
        _introduction(exported, records[-1]),
        "## How to load it\n\n" + usage(exported),
        "## Stages\n\n" + _stages(records),
    ]
    configured = [record for record in records if record.config is not None]
    if configured:
        parts.append("## Settings\n\n" + _settings(configured))
        parts.append("## Data\n\n" + _data(configured))
    metrics = final_metrics(records[-1].folder) if records[-1].folder is not None else []
    if metrics:
        rows = [(name, f"{value:.4g}", str(step)) for name, value, step in metrics]
        parts.append("## Metrics\n\nLast values of the run.\n\n" + _table(("metric", "value", "step"), rows))
    parts.append("## Export\n\n" + _export(exported))
    (folder / "README.md").write_text(mask_text("\n\n".join(parts) + "\n"), encoding="utf-8")


def _front_matter(exported: Exported, records: Sequence[StageRecord]) -> str:
    hub_base = looks_like_hub_name(exported.base)
    sources = [source.partition(":")[0] for record in records for source in _sources(record).values()]
    # The file of a folder that is not here looks like the name of a data set.
    named = [name for name in sources if looks_like_hub_name(name) and Path(name).suffix not in READERS]
    datasets = dict.fromkeys(named)
    methods = [record.title.lower().replace(" ", "-") for record in records if record.role != "outside model"]
    generates = exported.kind != "classifier" and exported.role in ("policy", "dpo")
    return ModelCardData(
        library_name="peft" if exported.kind == "adapter" else "transformers",
        base_model=exported.base if hub_base else None,
        base_model_relation=("adapter" if exported.kind == "adapter" else "finetune") if hub_base else None,
        pipeline_tag="text-generation"
        if generates
        else "text-classification"
        if exported.kind == "classifier"
        else None,
        tags=list(
            dict.fromkeys(["rto-lightning", "rlhf", *(["lora"] if exported.kind == "adapter" else []), *methods])
        ),
        datasets=list(datasets) or None,
    ).to_yaml()


def _introduction(exported: Exported, own: StageRecord) -> str:
    forms = {
        "adapter": f"A LoRA adapter on `{shown(exported.base)}`",
        "model": f"A model trained from `{shown(exported.base)}`",
        "classifier": f"A sequence classifier with one label, trained from `{shown(exported.base)}`,",
    }
    method = _METHODS.get(own.title, f"preference optimization ({own.title})" if exported.role == "dpo" else own.title)
    by_tokens, _, estimator = own.title.rpartition("-")
    if own.title not in _METHODS and by_tokens in _METHODS:
        method = _METHODS[by_tokens].replace("PPO on", f"{estimator} on")
    return f"{forms[exported.kind]} that {_WHAT[exported.role]}. It was trained by {method}."


def _stages(records: Sequence[StageRecord]) -> str:
    rows = []
    for record in records:
        base = record.arguments["backbone"]["model"] if record.arguments else record.card and record.card.base_model
        rows.append((shown(record.title), record.role, record.used_as or "this export", shown(base) if base else ""))
    return _table(("stage", "trained as", "used as", "on the model"), rows)


def _settings(records: Sequence[StageRecord]) -> str:
    rows = []
    for key in _SETTINGS:
        values = [_value(record, key) for record in records]
        if any(value is not None for value in values):
            rows.append((f"`{key}`", *("" if value is None else shown(value) for value in values)))
    return _table(("setting", *(_column(record) for record in records)), rows)


def _data(records: Sequence[StageRecord]) -> str:
    splits = ("train", "validation", "test")
    rows = [(_column(record), *(shown(_sources(record).get(split, "")) for split in splits)) for record in records]
    return _table(("stage", *splits), rows)


def _export(exported: Exported) -> str:
    when = f", from the checkpoint at step {exported.step}" if exported.step is not None else ""
    lines = [f"Weights are {exported.dtype}{when}."]
    if exported.agreement is not None:
        lines.append(f"Compared in float32 with the trained role: {exported.agreement}.")
    else:
        lines.append("They were not compared with the trained role.")
    if exported.missing_bias:
        lines.append(
            f"The class has no place for the head's bias: add {exported.missing_bias:.6g} to its scores to get those "
            "of the trained role. Differences between answers are the same."
        )
    lines.append("Versions: " + ", ".join(f"{name} {version(name)}" for name in _LIBRARIES) + ".")
    return "\n".join(lines)


def _value(record: StageRecord, key: str) -> Any:
    """A setting of a stage, or None where it has none or does not read it."""
    assert record.config is not None
    if "lora" in key and record.arguments["backbone"].get("mode") == "full":
        return None
    name = key.removeprefix("model.")
    if name in OWN_SETTINGS.values() and name != OWN_SETTINGS.get(record.arguments.get("loss", "dpo")):
        return None
    place: Any = record.config
    top, *parts = key.split(".")
    for part in [top, *(["init_args"] if top in ("model", "data") else []), *parts]:
        place = place.get(part) if isinstance(place, Mapping) else None
    if key == "model.beta" and place is None and record.card is not None:
        place = record.card.settings.get("beta")  # the default depends on the loss
    is_off = (place is False and key != "model.rewards.normalize_score") or (key in _OPTIONS and place == 0)
    return None if is_off or place == -1 else place


def _sources(record: StageRecord) -> dict[str, str]:
    """The data of a stage by split."""
    arguments = ((record.config or {}).get("data") or {}).get("init_args") or {}
    return {split: str(arguments[split]) for split in ("train", "validation", "test") if arguments.get(split)}


def _column(record: StageRecord) -> str:
    return record.title if record.title.lower().startswith(record.role) else f"{record.title} ({record.role})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
