"""A DPO role with what it was trained against, and a source of scores, loaded for reading."""

from pathlib import Path
from typing import Literal

from rto_lightning.backbone import BackboneSettings, PolicyBackbone, RoleCard, load_chat_tokenizer
from rto_lightning.backbone.chat import PLAIN
from rto_lightning.backbone.fingerprints import adapter_fingerprint
from rto_lightning.backbone.loading import load_tokenizer
from rto_lightning.backbone.model_files import ADAPTER_FILE
from rto_lightning.backbone.roles import ROLE_FILE, role_folder
from rto_lightning.errors import UserError
from rto_lightning.rewards import WeightedReward, WeightedScores, make_scores
from rto_lightning.runs.folder import ROLE_FOLDER


def open_dpo_role(
    dpo: str,
    base_model: str | None = None,
    reference: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> PolicyBackbone:
    """A backbone with the roles `dpo` and `reference`, on the CPU.

    Args:
        dpo: folder of a DPO stage or of the role it saved; or folder or hub name of a model that was trained by DPO.
        base_model: the model that it was trained from; None is what its `role.json` says.
        reference: SFT adapter, or model, that it was trained against; None is the base model.
        dtype: data type of the weights.

    Raises:
        MissingInputError: if a folder does not exist.
        UserError: if the base model or the reference is not known, or is not the one that it was trained against.
    """
    source, reference = _saved_by_stage(dpo), reference and _saved_by_stage(reference)
    folder = role_folder(source, "dpo")
    card = RoleCard.read(folder) if folder is not None else None
    if base_model is None and card is None:
        raise UserError(f"{dpo} is no saved role that says what it was trained from; name that by --base_model.")
    settings = BackboneSettings(
        model=base_model or card.base_model,  # type: ignore[union-attr]
        revision=card.base_revision if card is not None and base_model is None else None,
        dtype=dtype,
        chat_template=_chat_template(source, folder),
    )
    if card is not None:
        _check_reference(card, dpo, reference)
    backbone = PolicyBackbone(settings, load_chat_tokenizer(settings))
    backbone.add_role("reference", reference)
    backbone.add_role("dpo", source)
    backbone.requires_grad_(False).eval()
    return backbone


def open_scores(backbone: PolicyBackbone, reward: str) -> WeightedScores:
    """The scores of a reward model, in its own units, on the device of the backbone.

    Args:
        backbone: where a saved role is added, as `reward`.
        reward: folder of a reward model's stage or of the role it saved; or folder or hub name of a
            sequence-classification model with one label.

    Raises:
        MissingInputError: if a folder does not exist.
        UserError: if it cannot be loaded, or belongs to another base model.
    """
    device = next(backbone.parameters()).device
    scores = make_scores(backbone, [WeightedReward(reward=_saved_by_stage(reward))], normalize=False).to(device)
    backbone.to(device)
    return scores


def _saved_by_stage(source: str) -> str:
    """The role that a stage saved where the folder of a stage is given; else what is given."""
    role = Path(source) / ROLE_FOLDER
    return str(role) if (role / ROLE_FILE).exists() else source


def _chat_template(source: str, folder: Path | None) -> str | None:
    """The template that a role was trained with, which need not be that of its base; None if it came without one."""
    if folder is not None and not (folder / "tokenizer_config.json").exists():
        return None
    template = load_tokenizer(source, None, False).chat_template
    return template if isinstance(template, str) else PLAIN if template is None else None


def _check_reference(card: RoleCard, dpo: str, reference: str | None) -> None:
    """Refuse another SFT adapter than the one that the role was trained against."""
    if card.init_fingerprint is None:
        return
    if reference is None:
        raise UserError(f"{dpo} was trained against an SFT adapter; name that as the reference (--reference).")
    folder = role_folder(reference, "policy")
    if folder is not None and (folder / ADAPTER_FILE).exists() and adapter_fingerprint(folder) != card.init_fingerprint:
        raise UserError(f"{dpo} was trained against another SFT adapter than {reference}; name that one.")
