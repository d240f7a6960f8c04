"""One base model that plays many roles: loading, adapters, log-probabilities, scalar heads, saving."""

from rto_lightning.backbone.chat import ChatTokenizer, Message
from rto_lightning.backbone.decoding import Decoded, Draw, ValueHead, decode
from rto_lightning.backbone.loading import load_chat_tokenizer
from rto_lightning.backbone.policy_backbone import PolicyBackbone
from rto_lightning.backbone.roles import Role, RoleCard
from rto_lightning.backbone.sentences import sentence_ends
from rto_lightning.backbone.sequences import Sequences
from rto_lightning.backbone.settings import BackboneSettings, LoraSettings

__all__ = [
    "BackboneSettings",
    "ChatTokenizer",
    "Decoded",
    "Draw",
    "LoraSettings",
    "Message",
    "PolicyBackbone",
    "Role",
    "RoleCard",
    "Sequences",
    "ValueHead",
    "decode",
    "load_chat_tokenizer",
    "sentence_ends",
]
