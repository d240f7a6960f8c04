"""One base model that plays every role of RLHF.

In mode `adapters` there is one frozen copy of the base; policy, critic, dpo and reward are adapters on it and the
reference is the base with the adapters off. In mode `full` each trained role has a copy of its own. Either way a
caller names the role and the backbone sees to the weights. It knows nothing of losses.
"""

from functools import partial

import torch
from torch import Tensor

from rto_lightning.backbone.decoding import Decoded, DrawTokens, ValueHead, decode, evaluating
from rto_lightning.backbone.divergence import TokenDivergence, gather_divergence
from rto_lightning.backbone.logprobs import gather_logprobs
from rto_lightning.backbone.role_bank import RoleBank
from rto_lightning.backbone.sequences import Sequences, scatter
from rto_lightning.backbone.sharding import forward_of_role, gathered


class PolicyBackbone(RoleBank):
    """The roles on one base model, made as :class:`RoleBank` says, and what can be asked of each.

    That is log-probabilities, values, scores, divergences and answers.
    """

    @forward_of_role
    def token_logprobs(
        self,
        name: str,
        sequences: Sequences,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each response token under a role.

        The output layer is applied to valid response positions only, in chunks; see :func:`gather_logprobs`.

        Returns:
            Log-probabilities (B, T) in nats, 0 outside the response; entropy (B, T) of each distribution, or None.

        Raises:
            ValueError: if a prompt has no tokens: nothing predicts the first one of its response.
        """
        return self._token_logprobs(name, self._response_hidden(name, sequences), sequences, temperature, with_entropy)

    @forward_of_role
    def token_logprobs_and_values(
        self,
        name: str,
        value_role: str,
        sequences: Sequences,
        temperature: float = 1.0,
        with_entropy: bool = False,
        value_coefficient: float = 1.0,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As :meth:`token_logprobs`, and the values (B, T) that the head of `value_role` reads off the same forward.

        Gradients of the values reach the head whole, and the weights below it times `value_coefficient`.
        """
        hidden = self._response_hidden(name, sequences)
        logprobs, entropy = self._token_logprobs(name, hidden, sequences, temperature, with_entropy)
        hidden = hidden.detach() + value_coefficient * (hidden - hidden.detach())
        return logprobs, entropy, scatter(self.head(value_role)(hidden), sequences.response_mask)

    @forward_of_role
    def token_divergence(self, name: str, reference: str, sequences: Sequences) -> TokenDivergence:
        """Each response token under two roles: its log-probabilities, and KL(reference || role) over the vocabulary.

        Chunked as in :meth:`token_logprobs`; see :func:`gather_divergence`. The reference gets no gradient.

        Returns:
            Three tensors (B, T) in nats, 0 outside the response.
        """
        return self._token_divergence(reference, name, sequences)

    @forward_of_role
    def token_values(self, name: str, sequences: Sequences, head_only: bool = False) -> Tensor:
        """Value of the state before each response token, (B, T), 0 outside; `head_only` gives no gradient below."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not head_only):
            hidden = self._response_hidden(name, sequences)
        return scatter(self.head(name)(hidden), sequences.response_mask)

    @forward_of_role
    def sequence_scores(self, name: str, sequences: Sequences) -> Tensor:
        """Score of each prompt and response, (B,): the scalar head at the last response token."""
        last = sequences.prompt_lengths + sequences.response_lengths - 1
        scores: Tensor = self.head(name)(
            self._hidden(name, sequences, torch.arange(len(last), device=last.device), last)
        )
        return scores

    @torch.no_grad()
    @forward_of_role
    def decode(
        self,
        name: str,
        input_ids: Tensor,
        attention_mask: Tensor,
        draw: DrawTokens,
        max_new_tokens: int,
        value_head: ValueHead | None = None,
        gather_weights: bool = True,
    ) -> Decoded:
        """Sample a response to each left-padded prompt (B, P) as a role; see :func:`rto_lightning.backbone.decode`.

        Weights that are spread over ranks are gathered once, or a layer at a time at every token, in step on all ranks.
        """
        ends = self.chat.stop_ids, self.chat.pad_id
        with self.play(name) as model, evaluating(model), gathered(model, gather_weights):
            return decode(
                model, input_ids, attention_mask, draw, *ends, max_new_tokens, value_head, in_step=not gather_weights
            )

    # Inside -----------------------------------------------------------------------------------------------------

    def _response_hidden(self, name: str, sequences: Sequences) -> Tensor:
        """Hidden states (N, H) from which the N response tokens, row by row, are predicted."""
        if not bool((sequences.prompt_lengths > 0).all()):
            raise ValueError("a prompt has no tokens, so that nothing predicts the first one of its response")
        rows, tokens = sequences.response_mask.nonzero(as_tuple=True)
        return self._hidden(name, sequences, rows, sequences.prompt_lengths[rows] - 1 + tokens)

    def _hidden(self, name: str, sequences: Sequences, rows: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states (N, H) of a role at positions (N,), counted from the prompt's start, of rows (N,)."""
        input_ids = sequences.left_aligned()
        with self.play(name) as model:
            hidden: Tensor = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, rows * input_ids.shape[1] + positions)

    @forward_of_role
    def _token_divergence(self, reference: str, name: str, sequences: Sequences) -> TokenDivergence:
        mask = sequences.response_mask
        with torch.no_grad():
            reference_hidden = self._response_hidden(reference, sequences)
        compared = gather_divergence(
            self._response_hidden(name, sequences),
            reference_hidden,
            partial(self._logits, name),
            partial(self._logits, reference),
            sequences.response_ids[mask],
            self.settings.logprob_chunk_tokens,
        )
        return TokenDivergence(*(scatter(values, mask) for values in compared))

    def _token_logprobs(
        self, name: str, hidden: Tensor, sequences: Sequences, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        mask = sequences.response_mask
        with self.play(name) as model:
            logprobs, entropy = gather_logprobs(
                hidden,
                model.get_output_embeddings(),
                sequences.response_ids[mask],
                temperature,
                self.settings.logprob_chunk_tokens,
                with_entropy,
            )
        return scatter(logprobs, mask), None if entropy is None else scatter(entropy, mask)

    def _logits(self, name: str, hidden: Tensor) -> Tensor:
        """The output layer of a role on hidden states (N, H), whoever is active."""
        with self.play(name) as model:
            logits: Tensor = model.get_output_embeddings()(hidden)
        return logits
