"""How good a policy is on held-out prompts: gold reward, distance from the reference, length.

The measurements take a backbone and one of its roles, so that they serve the report, a benchmark and a notebook alike.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rto_lightning.algorithms import kl_estimate, masked_sum
from rto_lightning.backbone import BackboneSettings, Message, PolicyBackbone, Sequences, load_chat_tokenizer
from rto_lightning.errors import UserError
from rto_lightning.quickstart.gold import GoldName, gold_reward
from rto_lightning.quickstart.grammar import words
from rto_lightning.rollout import RolloutSettings, Trajectory, TransformersEngine, response_texts, sample_seeds


@dataclass(frozen=True)
class PolicyEvaluation:
    """What a policy's answers are worth: P prompts with K answers each, the same prompts for every policy.

    `gold`, `kl` and `length` are the means of each prompt, P values: answers to one prompt are alike, so that
    standard errors are to be taken over prompts.
    """

    answer_gold: Sequence[Sequence[float]]
    """Gold reward of each answer, P x K."""
    answer_kl: Sequence[Sequence[float]]
    """Estimated KL divergence to the reference of each answer, in nats, P x K."""
    answer_length: Sequence[Sequence[float]]
    """Words and marks of each answer, without its stop token, P x K."""

    @property
    def gold(self) -> list[float]:
        """Mean gold reward of each prompt's answers."""
        return [statistics.fmean(answers) for answers in self.answer_gold]

    @property
    def kl(self) -> list[float]:
        """Mean KL divergence to the reference of each prompt's answers, in nats an answer."""
        return [statistics.fmean(answers) for answers in self.answer_kl]

    @property
    def length(self) -> list[float]:
        """Mean length of each prompt's answers."""
        return [statistics.fmean(answers) for answers in self.answer_length]


class Sampler:
    """Draws answers of one role to a list of prompts, other ones at each call.

    Args:
        backbone: the model and its roles.
        role: who answers.
        max_new_tokens: length limit of an answer.
        seed: seed of the draws.
    """

    def __init__(self, backbone: PolicyBackbone, role: str, max_new_tokens: int, seed: int) -> None:
        self.backbone, self.role, self.seed = backbone, role, seed
        self.engine = TransformersEngine(backbone, RolloutSettings(max_new_tokens, batch_size=256))
        self.calls = 0

    def trajectory(self, prompts: Sequence[list[Message]]) -> Trajectory:
        """One answer to each prompt, as tokens."""
        chat = self.backbone.chat
        rows = [chat.encode_prompt(messages) for messages in prompts]
        padded = Sequences.from_lists(rows, [[] for _ in rows], chat.pad_id)
        seeds = sample_seeds(self.seed, self.calls, torch.arange(len(rows)))
        self.calls += 1
        return self.engine.rollout(self.role, padded.input_ids, padded.attention_mask, seeds)

    def __call__(self, prompts: list[list[Message]]) -> list[str]:
        """One answer to each prompt, as text."""
        return response_texts(self.trajectory(prompts), self.backbone.chat)


def load_policies(model: str, folders: Mapping[str, str] | None = None) -> PolicyBackbone:
    """A model as the role `reference`, and other roles beside it.

    Args:
        model: folder of the model, the base of all roles.
        folders: folder of each further role, by the role's name.
    """
    settings = BackboneSettings(model)
    backbone = PolicyBackbone(settings, load_chat_tokenizer(settings))
    backbone.add_role("reference")
    for role, folder in (folders or {}).items():
        backbone.add_role(role, folder)
    return backbone


@torch.no_grad()
def evaluate_policy(
    backbone: PolicyBackbone,
    role: str,
    prompts: Sequence[list[Message]],
    answers_per_prompt: int = 4,
    max_new_tokens: int = 36,
    seed: int = 1,
    gold: GoldName = "sum",
) -> PolicyEvaluation:
    """Sample answers of a role to each prompt and measure them.

    Args:
        backbone: holds the role and the role `reference`.
        role: who answers.
        prompts: P different prompts of the quickstart.
        answers_per_prompt: answers to each.
        max_new_tokens: length limit of an answer.
        seed: seed of the answers; the same answers each time.
        gold: which gold reward.

    Raises:
        UserError: if there is no prompt or no answer to measure.
    """
    if not prompts or answers_per_prompt < 1:
        raise UserError(f"{answers_per_prompt} answers to {len(prompts)} prompts measure nothing; set both above 0.")
    asked = list(prompts) * answers_per_prompt
    trajectory = Sampler(backbone, role, max_new_tokens, seed).trajectory(asked)
    texts = response_texts(trajectory, backbone.chat)
    sequences = trajectory.sequences
    logprobs, reference = (backbone.token_logprobs(name, sequences)[0] for name in (role, "reference"))
    kl = masked_sum(kl_estimate(logprobs, reference, sequences.response_mask), sequences.response_mask, dim=1)

    def by_prompt(values: list[float]) -> list[list[float]]:
        return [values[prompt :: len(prompts)] for prompt in range(len(prompts))]

    return PolicyEvaluation(
        answer_gold=by_prompt([gold_reward(*row, gold) for row in zip(asked, texts, strict=True)]),
        answer_kl=by_prompt(kl.tolist()),
        answer_length=by_prompt([float(len(words(text))) for text in texts]),
    )
