"""The decode loop: from a batch of prompts to sampled responses, one token of every response at a time.

It does what `model.generate` does for plain sampling, and four things that `generate` does not: neighbours with the
same prompt share its forward, responses that have ended leave the batch, the cache is written in place, and what the
sampling distribution says of each drawn token is kept. How a token is drawn is the caller's choice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rto_lightning.backbone.kv_cache import build_cache, cache_argument, select_rows
from rto_lightning.errors import UserError
from rto_lightning.parallel import largest

LEAVING_SHARE = 8
"""Ended responses leave once they are one in this many of the batch: moving the cache costs about one decode step."""


class Draw(NamedTuple):
    """One token for each of N rows."""

    tokens: Tensor
    """(N,) int64."""
    logprobs: Tensor | None = None
    """Log-probability of the token under the distribution it was drawn from, (N,) in nats, or None if not asked."""
    entropies: Tensor | None = None
    """Entropy of that distribution, (N,) in nats, or None if not asked."""


DrawTokens = Callable[[Tensor, Tensor, int], Draw]
"""Maps logits (N, V), the N rows of the batch that they belong to (int64) and the step (from 0) to their tokens."""

ValueHead = Callable[[Tensor], Tensor]
"""Maps hidden states (N, H) to values (N,)."""


class Decoded(NamedTuple):
    """Responses of one batch, (B, T) each with T the longest."""

    tokens: Tensor
    """int64; the padding id after a response's stop id."""
    logprobs: Tensor | None
    """As :attr:`Draw.logprobs`, 0 after the response."""
    entropies: Tensor | None
    """As :attr:`Draw.entropies`, 0 after the response."""
    values: Tensor | None
    """The value head on the hidden state before each token, 0 after the response."""


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    draw: DrawTokens,
    stop_ids: tuple[int, ...],
    pad_id: int,
    max_new_tokens: int,
    value_head: ValueHead | None = None,
    in_step: bool = False,
) -> Decoded:
    """Sample one response for each prompt.

    Args:
        model: a causal language model in evaluation mode, on the device of the prompts.
        input_ids: left-padded prompts, (B, P) int64.
        attention_mask: 1 on prompt tokens, (B, P).
        draw: chooses the tokens.
        stop_ids: ids that end a response; they are part of it.
        pad_id: fills the columns after a response.
        max_new_tokens: length limit of a response, the stop id included.
        value_head: read off the same hidden states as the logits, if given.
        in_step: go on until the responses of all ranks have ended, as models do whose forward the ranks compute
            together.

    Raises:
        UserError: if the model takes no key-value cache.
    """
    stops = torch.tensor(stop_ids, device=input_ids.device)
    first, group = shared_prompts(input_ids, attention_mask)
    context = _Context(model, input_ids[first], attention_mask[first], max_new_tokens)
    record = _Record(len(group), max_new_tokens, pad_id)
    rows, live = torch.arange(len(group), device=group.device), torch.ones_like(group, dtype=torch.bool)
    hidden = context.read_prompts()
    for step in range(max_new_tokens):
        # Logits of the last position only: those of whole prompts would be the largest tensor of the run.
        logits: Tensor = model.get_output_embeddings()(hidden)
        values = None if value_head is None else value_head(hidden)
        if step == 0 and len(first) < len(group):
            logits, values = logits[group], None if values is None else values[group]
        drawn = draw(logits, rows, step)
        record.write(step, rows, live, drawn, values)
        live = live & ~torch.isin(drawn.tokens, stops)
        running = int(live.sum())
        if (largest(running)[0] if in_step else running) == 0 or step + 1 == max_new_tokens:
            break
        tokens = torch.where(live, drawn.tokens, pad_id)
        if step == 0 or len(rows) - running >= max(1, len(rows) // LEAVING_SHARE):
            # Whoever waits for other ranks needs a row to read.
            staying = live.nonzero().squeeze(-1) if running else torch.zeros_like(rows[:1])
            context.select(group[staying] if step == 0 else staying)
            rows, live, tokens = rows[staying], live[staying], tokens[staying]
        hidden = context.read_tokens(tokens)
    return record.until(step + 1)


def shared_prompts(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Find neighbours with the same prompt, such as several responses to it.

    Args:
        input_ids: left-padded prompts, (B, P) int64.
        attention_mask: 1 on prompt tokens, (B, P).

    Returns:
        Position of the first row of each of U prompts, (U,), and the prompt of each row, (B,) with numbers below U.
    """
    same = ((input_ids[1:] == input_ids[:-1]) & (attention_mask[1:] == attention_mask[:-1])).all(-1)
    group = torch.cat([same.new_zeros(1, dtype=torch.int64), (~same).cumsum(0)])
    first = torch.cat([same.new_zeros(1, dtype=torch.int64), (~same).nonzero().squeeze(-1) + 1])
    return first, group


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, the model is in evaluation mode: gradient checkpointing in training mode switches the cache off."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _Context:
    """What the model has read: its cache, and where the padding is.

    Args:
        model: a causal language model.
        input_ids: left-padded prompts, (U, P) int64.
        attention_mask: 1 on prompt tokens, (U, P).
        max_new_tokens: tokens of a response.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> None:
        self.decoder: Any = model.get_decoder()
        # The last token of a response is never read.
        self.cache = build_cache(model.config, input_ids.shape[1] + max_new_tokens - 1)
        name = cache_argument(self.decoder, self.cache)
        if name is None:
            raise UserError(
                f"{model.config.model_type} models take no key-value cache, which rollouts need; use a model with "
                "attention layers."
            )
        self.prompts = input_ids
        self.cache_argument = {name: self.cache}
        self.mask = torch.nn.functional.pad(attention_mask.long(), (0, max_new_tokens), value=1)
        self.width = input_ids.shape[1]
        self.lengths = attention_mask.sum(-1)
        self.padded = self._has_padding()

    def read_prompts(self) -> Tensor:
        """Hidden state of the last token of each prompt, (U, H)."""
        positions = (self.mask[:, : self.width].cumsum(-1) - 1).clamp(min=0)
        return self._forward(self.prompts, positions)

    def read_tokens(self, tokens: Tensor) -> Tensor:
        """Read one more token (N,) int64 in each row; returns its hidden state (N, H)."""
        positions = self.lengths[:, None]
        self.width, self.lengths = self.width + 1, self.lengths + 1
        return self._forward(tokens[:, None], positions)

    def select(self, index: Tensor) -> None:
        """Go on with these rows (N,) int64, each of which may occur several times or not at all."""
        if torch.equal(index, torch.arange(len(self.lengths), device=index.device)):
            return
        select_rows(self.cache, index)
        self.mask, self.lengths = self.mask[index], self.lengths[index]
        self.padded = self._has_padding()

    def _forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        output = self.decoder(
            input_ids=input_ids,
            # Without a mask the attention kernels need not read one, and can share keys and values between heads.
            attention_mask=self.mask[:, : self.width] if self.padded else None,
            position_ids=positions,
            use_cache=True,
            **self.cache_argument,
        )
        # A frozen output layer is many times slower on a slice that is not contiguous.
        hidden: Tensor = output.last_hidden_state[:, -1].contiguous()
        return hidden

    def _has_padding(self) -> bool:
        return not bool(self.mask[:, : self.width].all())


class _Record:
    """Tables (B, T) that are filled a column at a time."""

    def __init__(self, rows: int, max_new_tokens: int, pad_id: int) -> None:
        self.shape = rows, max_new_tokens
        self.pad_id = pad_id
        self.tables: dict[str, Tensor] = {}

    def write(self, step: int, rows: Tensor, live: Tensor, drawn: Draw, values: Tensor | None) -> None:
        """Column `step` of these rows (N,), padding for those that are not live (N,)."""
        columns = {**drawn._asdict(), "values": values}
        for name, column in columns.items():
            if column is None:
                continue
            empty = self.pad_id if name == "tokens" else 0
            if name not in self.tables:
                self.tables[name] = column.new_full(self.shape, empty)
            self.tables[name][rows, step] = column.masked_fill(~live, empty)

    def until(self, steps: int) -> Decoded:
        """The first columns."""
        tables = (self.tables.get(name) for name in Decoded._fields)
        return Decoded(*(None if table is None else table[:, :steps] for table in tables))  # type: ignore[arg-type]
