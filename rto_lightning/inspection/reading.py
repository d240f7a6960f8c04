"""Ask the roles of a backbone for token rewards of responses: sampled ones, texts, and preference pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rto_lightning.algorithms import token_rewards
from rto_lightning.backbone import ChatTokenizer, Message, PolicyBackbone, Sequences, sentence_ends
from rto_lightning.data.formats import Preference
from rto_lightning.errors import UserError
from rto_lightning.inspection.pieces import token_texts
from rto_lightning.inspection.responses import RewardedPair, RewardedResponse
from rto_lightning.modules.reading import TrajectoryReader
from rto_lightning.rewards import WeightedScores
from rto_lightning.rollout import Trajectory


def rewarded_responses(
    chat: ChatTokenizer,
    prompts: Sequence[list[Message]],
    sequences: Sequences,
    rewards: Tensor,
    scores: Tensor | None = None,
) -> list[RewardedResponse]:
    """Put rewards that are known already beside their tokens, for example those of an RTO iteration.

    Args:
        chat: the tokenizer of the sequences.
        prompts: B prompts, as messages.
        sequences: their tokens and those of the responses.
        rewards: (B, T) floating point, read where the response mask is true.
        scores: what a reward model says of each response, (B,); None if none was asked.
    """
    ends = sentence_ends(chat.tokenizer, sequences.response_ids, sequences.response_mask)
    result = []
    for row, prompt in enumerate(prompts):
        mask = sequences.response_mask[row]
        ids: list[int] = sequences.response_ids[row][mask].tolist()
        response = chat.decode_response(ids)
        texts, special = token_texts(chat.tokenizer, ids)
        if texts and not special[0] and not response.startswith(" "):
            texts[0] = texts[0].removeprefix(" ")  # tokenizers of words put a blank between words only
        values = rewards[row][mask].double().tolist()
        score = None if scores is None else float(scores[row])
        result.append(RewardedResponse(prompt, response, ids, texts, special, values, ends[row][mask].tolist(), score))
    return result


class TokenRewardReader:
    """Token rewards of any response under the roles of a backbone.

    Args:
        backbone: the model and its roles.
        scores: where the score of a response comes from, read in the source's own units; None for none. Of several
            sources the first is read.
        dpo: the role that gives the rewards.
        reference: what it was trained against; None is `dpo_reference` where there is one, else `reference`.
        beta_1: scale of the rewards; 1 leaves them in nats.
        clip: largest magnitude of a reward after scaling; 0 is none.
        batch_size: responses for each forward.
        max_response_tokens: texts are cut to this many tokens, the stop included, and to what the model's context
            leaves behind their prompt.

    Raises:
        UserError: if the backbone has no such role.
    """

    def __init__(
        self,
        backbone: PolicyBackbone,
        scores: WeightedScores | None = None,
        dpo: str = "dpo",
        reference: str | None = None,
        beta_1: float = 1.0,
        clip: float = 0.0,
        batch_size: int = 8,
        max_response_tokens: int = 2048,
    ) -> None:
        if reference is None:
            reference = "dpo_reference" if "dpo_reference" in backbone.roles else "reference"
        missing = [name for name in (dpo, reference) if name not in backbone.roles]
        if missing:
            raise UserError(f"the backbone has no role {missing[0]}; add it by add_role, or name another one.")
        self.backbone = backbone
        self.weighted_scores = scores
        self.dpo, self.reference = dpo, reference
        self.beta_1, self.clip = beta_1, clip
        self.max_response_tokens = max_response_tokens
        self._reader = TrajectoryReader(backbone, batch_size)

    @torch.no_grad()
    def trajectory(self, trajectory: Trajectory, prompts: Sequence[list[Message]]) -> list[RewardedResponse]:
        """Rewards of sampled responses, as they were sampled.

        Args:
            trajectory: B prompts with a response each, on the device of the backbone.
            prompts: the prompts as messages.
        """
        sequences = trajectory.sequences
        dpo, reference = (self._reader.logprobs(role, trajectory) for role in (self.dpo, self.reference))
        rewards = token_rewards(dpo, reference, sequences.response_mask, self.beta_1, self.clip)
        scores = None
        if self.weighted_scores is not None:
            scores = self._reader.scores(self.weighted_scores, trajectory, list(prompts))[:, 0]
        return rewarded_responses(self.backbone.chat, prompts, sequences, rewards, scores)

    def responses(
        self, prompts: Sequence[list[Message]], responses: Sequence[str], truncated: Sequence[bool] | None = None
    ) -> list[RewardedResponse]:
        """Rewards of texts.

        Args:
            prompts: N prompts, as messages.
            responses: N texts.
            truncated: which of them were cut off before their stop token, and so have none; None for none of them.

        Raises:
            UserError: if a response has no tokens, or a prompt is refused by the chat template or leaves no place for
                a response in the model's context.
        """
        if not responses:
            return []
        chat = self.backbone.chat
        asked = chat.encode_prompts(prompts)
        rows = chat.encode_responses(responses, self.max_response_tokens)
        rows = [row[: self._room(number, prompt)] for number, (prompt, row) in enumerate(zip(asked, rows, strict=True))]
        for row, was_cut in zip(rows, truncated or [False] * len(rows), strict=True):
            if was_cut and row[-1] in chat.stop_ids:
                row.pop()
        if not all(rows):
            raise UserError(f"response {rows.index([]) + 1} has no tokens to reward; leave it out.")
        device = next(self.backbone.parameters()).device
        sequences = Sequences.from_lists(asked, rows, chat.pad_id).to(device)
        stopped = torch.tensor([row[-1] in chat.stop_ids for row in rows], device=device)
        return self.trajectory(Trajectory(sequences, ~stopped), prompts)

    def _room(self, number: int, prompt: list[int]) -> int:
        """Tokens that a response to a prompt may have, in the context of both roles.

        Raises:
            UserError: if there are none.
        """
        context = min(self.backbone.context_length(role) for role in (self.dpo, self.reference))
        if len(prompt) >= context:
            raise UserError(
                f"the prompt of response {number + 1} has {len(prompt)} tokens, and the model takes {context} with the "
                "response; leave it out."
            )
        return context - len(prompt)

    def pairs(self, pairs: Sequence[Preference]) -> list[RewardedPair]:
        """Rewards of both responses of each pair."""
        prompts = [pair.prompt for pair in pairs]
        both = self.responses(prompts * 2, [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
        return [RewardedPair(*answers) for answers in zip(both[: len(pairs)], both[len(pairs) :], strict=True)]
