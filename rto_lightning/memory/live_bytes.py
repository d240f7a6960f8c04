"""Bytes of the tensors that are alive while code runs, with or without storage behind them."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Within it, counts what operations allocate until it is freed, in the backward pass too.

    A storage counts once, however many tensors view it. Fake tensors count as real ones: torch keeps the size of a
    storage that was never allocated. What a kernel allocates for itself is not seen, but for 4-bit products, which
    first make the whole weight anew.

    Args:
        known: tensors that are counted elsewhere, such as weights and gradients.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """The most that were alive at a time."""
        self._sizes: dict[int, int] = {}
        self._known = [tensor.untyped_storage() for tensor in known]  # held, so that no other gets their address
        for storage in self._known:
            self._sizes[storage._cdata] = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and count the storages that are new in its result."""
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        if func.name() == "bitsandbytes::gemm_4bit":
            self.peak = max(self.peak, self.now + args[2][0] * args[2][1] * args[0].element_size())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._sizes:
            return
        size = self._sizes[address] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, address)

    def _free(self, address: int) -> None:
        self.now -= self._sizes.pop(address)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
