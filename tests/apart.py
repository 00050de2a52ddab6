"""A device that is none: its tensors lie in main memory and may meet no others, as on a GPU.

It shows without a GPU where code mixes tensors of two places, and that results are those of the CPU to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

APART = torch.device("cuda", 0)
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")  # CPU indices will do
_COPIES = ("aten::copy_", "aten::_to_copy")
_CPU = torch.device("cpu")


class Far(Tensor):
    """A tensor of the device apart; ``near`` holds its numbers."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        far = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device="cpu",
        )
        far.near = near
        return far  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:
        return f"Far({self.near})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return APART

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        assert not self.requires_grad, "gradients are not carried from the device apart"
        return self.near.clone()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        where = next((a for a in (*args, kwargs.get("device")) if isinstance(a, torch.device)), None)
        if where is None:
            return super().to(*args, **kwargs)
        return self if where == APART else self.cpu()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return far_call(func, args, kwargs or {})


class Apart(TorchDispatchMode):
    """In the block the device apart exists."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(t, Far) for t in tree_flatten((args, kwargs))[0]) and kwargs.get("device") != APART:
            return func(*args, **kwargs)
        return far_call(func, args, kwargs)


def far_call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the numbers; its results lie where a GPU's would."""
    name = func._schema.name
    flat, shape = tree_flatten((args, kwargs))
    tensors = [t for t in flat if isinstance(t, Tensor)]
    mixed = [t for t in tensors if not isinstance(t, Far) and t.ndim]
    if len(mixed) < len(tensors) and mixed and name not in (*_INDEXED, *_COPIES):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if name in _INDEXED and not isinstance(tensors[0], Far):
        raise RuntimeError(f"{name}: indices of another device")
    if name == "aten::_local_scalar_dense":
        return func(args[0].near)
    where = kwargs.get("device")
    inner_args, inner_kwargs = tree_unflatten([t.near if isinstance(t, Far) else t for t in flat], shape)
    if where == APART:
        inner_kwargs["device"] = _CPU
    out = func(*inner_args, **inner_kwargs)
    if name == "aten::_to_copy" and where is not None and where != APART:
        return out
    if func._schema.is_mutable and not name.endswith("_foreach_norm"):
        known = {id(t.near): t for t in tensors if isinstance(t, Far)}
        near = {id(t): t for t in tensors if not isinstance(t, Far)}
        return tree_map(lambda t: known.get(id(t), near.get(id(t), t)) if isinstance(t, Tensor) else t, out)
    return tree_map(lambda t: Far(t) if isinstance(t, Tensor) else t, out)


@contextmanager
def apart() -> Iterator[None]:
    """The block in which the device apart exists, where there is no GPU of its name."""
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
    lazy = torch.cuda._lazy_init
    torch.cuda._lazy_init = lambda: None
    try:
        with Apart():
            yield
    finally:
        torch.cuda._lazy_init = lazy
