"""Bytes that are alive while code runs on fake tensors: shapes and lifetimes, no numbers."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make inside a FakeTensorMode, by label, and their peak.

    Operators on real tensors (masks, token ids) run as they are, so that their values are known.
    Where a value or a size depends on the numbers of a fake tensor, the largest case is taken:
    conditions hold, a mask keeps everything, ids are distinct.

    Args:
        ignored: Tensors that are counted elsewhere, such as parameters.
        most_distinct: Most distinct ids that there can be: the vocabulary.

    Attributes:
        label: Under which the next storages are counted.
        held: Label -> bytes alive now.
        peak: `held` at the moment when most was alive.
    """

    def __init__(self, ignored: Iterable[Tensor] = (), most_distinct: int = 2**62) -> None:
        super().__init__()
        self.label = "activations"
        self.held: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._most_distinct = most_distinct
        self._ignored = {_key(tensor) for tensor in ignored}
        self._storages: dict[int, tuple[str, int]] = {}

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Count what is made inside under `label`."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Count a tensor that is alive under `label` from now on."""
        key = _key(tensor)
        if key in self._storages:
            old, size = self._storages[key]
            self._storages[key] = label, size
            self.held[old] -= size
            self.held[label] += size

    def forget_peak(self) -> None:
        """Start the peak again from what is alive now."""
        self.peak = Counter(self.held)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and count the storages of its results."""
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = self._run(func, args, kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in given:
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._storages or key in self._ignored:
            return
        size = storage.nbytes()
        self._storages[key] = self.label, size
        finalize(storage, self._drop, key)
        self.held[self.label] += size
        if self.held.total() > self.peak.total():
            self.peak = Counter(self.held)

    def _drop(self, key: int) -> None:
        label, size = self._storages.pop(key)
        self.held[label] -= size

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fake = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if tensors and not fake:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        if func is aten.equal.default:
            return True
        if func in (aten.unique_consecutive.default, aten._unique2.default):
            ids = args[0].reshape(-1)
            distinct = ids.new_empty(min(ids.numel(), self._most_distinct))
            return distinct, torch.empty_like(args[0]), torch.empty_like(distinct)
        if func is aten.nonzero.default:
            return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.long)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], _as_places(args[1]), *args[2:])
        return func(*args, **kwargs)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _as_places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Replace each mask by the places that it keeps: all of them where it is fake."""
    places: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            places.append(index)
            continue
        count = index.numel()
        if not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                count = int(index.sum())
        places += [torch.empty(count, dtype=torch.long, device=index.device)] * index.dim()
    return places
