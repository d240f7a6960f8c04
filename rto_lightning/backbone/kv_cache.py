"""The key-value cache of rollouts: it is written in place, grows in blocks, and rows can leave it.

transformers' `DynamicCache` copies the keys and values of all earlier tokens for every layer and token, since it
appends with `torch.cat`. Here a layer holds room for more tokens than it has, and copies only when a block is full.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

BLOCK_TOKENS = 64
"""Tokens by which a layer grows: at most this many are allocated in vain, and a token is copied once per block."""


def build_cache(config: Any, max_tokens: int) -> Cache:
    """An empty cache for one batch of a model.

    Args:
        config: the model's configuration.
        max_tokens: prompt and response tokens that are fed to the model at most; no layer allocates more.

    Returns:
        A cache of :class:`BlockLayer` if every layer attends to all earlier tokens. For anything else (sliding windows,
        linear attention, layers that share a cache) what transformers builds, which knows those layers' own states.
    """
    cache = DynamicCache(config=config)
    if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers):
        return Cache(layers=[BlockLayer(max_tokens) for _ in cache.layers])
    return cache


def cache_argument(decoder: nn.Module, cache: Cache) -> str | None:
    """The name by which a decoder takes keys and values, which transformers 5.24 has changed; None if it takes none.

    Args:
        decoder: what stands below the output layer.
        cache: what :func:`build_cache` has built for its model.
    """
    if cache.layers and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return None  # of states alone, such as Mamba's
    parameters = inspect.signature(decoder.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Make the cache hold these rows of the batch, in this order; a row may occur several times or not at all.

    Args:
        cache: changed in place, a layer at a time.
        rows: (N,) int64 positions in the present batch.
    """
    # Of transformers' several ways to pick rows this is the one that every kind of layer has.
    cache.reorder_cache(rows)  # type: ignore[arg-type]


class BlockLayer(DynamicLayer):
    """Keys and values of one attention layer, (B, heads, tokens, width) each, as views of the first part of a room.

    Args:
        max_tokens: tokens for which room is made at most, unless more are written.
        block_tokens: tokens by which the room grows.
    """

    def __init__(self, max_tokens: int, block_tokens: int = BLOCK_TOKENS) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it without annotations
        self.max_tokens = max_tokens
        self.block_tokens = block_tokens
        self._room: tuple[Tensor, Tensor] | None = None

    @property
    def room_tokens(self) -> int:
        """Tokens for which memory is held."""
        return 0 if self._room is None else self._room[0].shape[-2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty keys and values with the shapes and types of these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._room = None
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, (B, heads, new tokens, width); returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if end > self.room_tokens:
            self._move(self._tokens_of_room(end))
        assert self._room is not None
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, length:end] = states
        return self._show(end)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Hold these rows of the batch, (N,) int64; see :func:`select_rows`."""
        if self._room is not None:
            self._move(self.room_tokens, beam_idx.to(self.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """The same as :meth:`reorder_cache`, by the name that transformers uses elsewhere."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch `repeats` times in a row."""
        if self._room is not None:
            rows = torch.arange(self._room[0].shape[0], device=self.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def get_seq_length(self) -> int:
        """Tokens held."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def reset(self) -> None:
        """Forget everything, and give the memory back."""
        super().reset()
        self._room = None

    def _tokens_of_room(self, needed: int) -> int:
        rounded = -(-needed // self.block_tokens) * self.block_tokens
        return max(needed, min(rounded, self.max_tokens))

    def _move(self, tokens: int, rows: Tensor | None = None) -> None:
        """Copy what is held, or some rows of it, into new room; only this layer is held twice meanwhile."""
        assert self.keys is not None and self.values is not None
        length = self.get_seq_length()
        self._room = _copied(self.keys, tokens, rows), _copied(self.values, tokens, rows)
        self._show(length)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        assert self._room is not None
        self.keys, self.values = (room[:, :, :length] for room in self._room)
        return self.keys, self.values


def _copied(states: Tensor, tokens: int, rows: Tensor | None) -> Tensor:
    picked = states if rows is None else states.index_select(0, rows)
    room = states.new_empty(picked.shape[0], states.shape[1], tokens, states.shape[3])
    room[:, :, : states.shape[2]] = picked
    return room
