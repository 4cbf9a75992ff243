# SPDX-License-Identifier: AGPL-3.0-or-later
"""Runs a model without weights and follows its labels from operation to operation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from yolo_prune.graph import code_sizes, probes, widths
from yolo_prune.graph.labels import OUTPUT, TRACED, Ids, Labels, Tag, collapse, tag_of, varying
from yolo_prune.graph.ops import EFFECTS, Call

LIKE_INPUT = frozenset(f"aten::{name}" for name in ("silu", "relu", "sigmoid", "gelu", "hardswish", "leaky_relu"))
ARITHMETIC = frozenset({"aten::add", "aten::sub", "aten::mul", "aten::div"})


class Tracer:
    """Follows the labels of one model through any number of forward passes.

    Attributes:
        labels: receives the result of the trace.
        ran: names of the parameters that an operation has read.
        work: `{parameter: MACs}` of the operations that ran while `counting` was true.
        label_work: `(labels, MACs per label)` of products of activations.
        fixed_work: MACs of products of tensors without labels.
        counting: whether MACs are counted.
        failed: name of the innermost module that raised an error.
        layers: the named modules of the model that runs.
    """

    def __init__(
        self,
        labels: Labels,
        trusts: Callable[[nn.Module], bool],
        reasons: Mapping[str, str],
        spare: Sequence[str],
    ) -> None:
        """Start with the labels of a model's tensors.

        Args:
            labels: the labels of the tensors.
            trusts: `(module) -> bool`: whether sizes in the code of the module's forward are safe.
            reasons: `{module path: reason to show for labels that are pinned inside the module}`.
            spare: prefixes of the modules whose MACs do not count.
        """
        self.labels = labels
        self.ran: set[str] = set()
        self.work: dict[str, float] = defaultdict(float)
        self.label_work: list[tuple[Ids, float]] = []
        self.fixed_work = 0.0
        self.counting = False
        self.failed = ""
        self._trusts, self._reasons, self._spare = trusts, reasons, tuple(spare)
        self._stack: list[tuple[str, nn.Module, Any]] = []
        self._paused = False
        self.layers: dict[str, nn.Module] = {}
        labels.explain = self.explain

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Follow the labels of everything that runs inside this context."""
        self.layers = dict(model.named_modules())
        paths = {module: path for path, module in self.layers.items()}

        def enter(module: nn.Module, inputs: Any) -> None:
            if module in paths:  # the hooks are global; other models may run in other threads
                self._stack.append((paths[module], module, inputs))

        def leave(module: nn.Module, _: Any, out: Any) -> None:
            if module in paths and self._stack:
                path, *_ = self._stack.pop()
                self.failed = "" if out is not None else self.failed or path  # None: the module raised an error

        self._stack.clear()
        handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),  # always: a block may catch the error of a child
        ]
        fast = torch.backends.mha.get_fastpath_enabled()  # it hides the single operations of an attention
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad(), _Functions(self), _Operations(self):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for handle in handles:
                handle.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Follow nothing that runs inside this context."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @property
    def follows(self) -> bool:
        """Whether operations are followed."""
        return not self._paused

    def count_fixed(self, macs: float) -> None:
        """Count MACs that do not depend on any width."""
        self._count(None, None, macs)

    @property
    def where(self) -> str:
        """Name of the module that is running."""
        return self._stack[-1][0] if self._stack else ""

    @property
    def trusted(self) -> bool:
        """Whether sizes in the code of the running module are safe."""
        return bool(self._stack) and self._trusts(self._stack[-1][1])

    def explain(self, why: str) -> str:
        """A reason as the user reads it: what happens, and in which block."""
        for path, *_ in reversed(self._stack):
            if path in self._reasons:
                return self._reasons[path]
        return f"{why} in {type(self._stack[-1][1]).__name__}" if self._stack else why

    def pin(self, tensor: Any, why: str, rank: int = TRACED) -> None:
        """Pin all labels of a tensor."""
        for plane in (tag_of(tensor) or Tag()).planes:
            self.labels.pin(plane, why, rank)

    def outputs(self, out: Any) -> None:
        """Pin the outputs of the model."""
        for tensor in probes.outputs(out):
            self.pin(tensor, "task output", OUTPUT)

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Follow one operation."""
        name = func._schema.name.removeprefix("aten::")
        call = Call(
            name.rstrip("_") if name.endswith("_") and not name.endswith("__") else name,
            *(func, args, kwargs, out, self.labels, self.trusted, self._count),
        )
        tags = [tag for tag in map(tag_of, call.tensors) if tag]
        if not tags:
            return
        self.ran.update(tag.source for tag in tags if tag.source)
        apply = EFFECTS.get(call.name)
        if apply is None:
            call.pin_all(f"meets '{call.name}', which is not known,")
        else:
            before = tag_of(out)
            apply(call)
            after = tag_of(out)
            if before and after and before.silent and not after.silent and isinstance(out, Tensor) and out._is_view():
                call.pin_all("is overwritten in part")  # the base tensor keeps its tag, which is wrong now

    def _count(self, labelled: Tensor | None, parameter: str | None, macs: float) -> None:
        if not self.counting or self.where.startswith(self._spare):
            return
        if parameter is not None:
            self.work[parameter] += macs
        elif labelled is not None:
            ids = torch.unique(collapse(labelled)).numpy()
            self.label_work.append((ids[ids >= 0], macs / max(1, len(ids))))
        else:
            self.fixed_work += macs


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.tracer.follows:
            return func(*args, **kwargs)
        args, kwargs, written = _on_one_device(func, args, kwargs)
        out = _shortcut(func, args)
        if out is None:
            out = func(*args, **kwargs)
        self.tracer.operation(func, args, kwargs, out)
        if written is None:
            return out
        for tensor in _tensors(args, kwargs):  # the code goes on with the tensor on the CPU, which has no labels
            self.tracer.pin(tensor, "is written into a tensor of fixed width")
        return written


def _on_one_device(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], Tensor | None]:
    """The arguments of an operation, with all tensors on the meta device if one is.

    A forward may make constants on the CPU. The twin runs on the meta device, as another model runs on a GPU.

    Returns:
        The arguments, and the tensor outside of the meta device into which the operation writes (or None).
    """
    if func._schema.name == "aten::_to_copy" and args[0].is_meta and kwargs.get("device") is not None:
        return args, {**kwargs, "device": torch.device("meta"), "non_blocking": False}, None
    tensors = _tensors(args, kwargs)
    if all(t.is_meta == tensors[0].is_meta for t in tensors):
        return args, kwargs, None
    writes = isinstance(args[0], Tensor) and not args[0].is_meta and func._schema.is_mutable
    written = args[0] if writes else None
    return *tree_map(_to_meta, (args, kwargs)), written


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(v for v in value if isinstance(v, Tensor))
    return found


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value


def _shortcut(func: Any, args: Any) -> Any:
    """The output of an operation on the meta device, for operations whose meta kernels are slow (written in Python)."""
    name = func._schema.name
    if name == "aten::native_batch_norm" and not args[5]:
        none = args[0].new_empty(0)
        return torch.empty_like(args[0]), none, none
    if name == "aten::grid_sampler_2d" and args[0].is_meta:
        return args[0].new_empty((*args[0].shape[:2], *args[1].shape[1:3]))
    if name in LIKE_INPUT and args[0].is_meta:
        return torch.empty_like(args[0])
    if name in ARITHMETIC and all(isinstance(a, Tensor) and a.is_meta and a.dtype == args[0].dtype for a in args[:2]):
        shape = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
        return args[0].new_empty(shape)
    return None


class _Functions(TorchFunctionMode):
    """Follows Python calls, because operations do not show that `chunk` makes equal parts or that code has sizes."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.tracer.follows:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "type" and args[0].is_meta:
            return _type(*args, **kwargs)
        out = func(*args, **kwargs)
        if name == "chunk":
            self._equal_parts(args, kwargs, out)
        if self.tracer.trusted:
            return out
        if name == "size" or getattr(func, "__self__", None) is Tensor.shape:
            return widths.read(args[0], kwargs.get("dim", args[1] if len(args) > 1 else None), self.tracer.labels)
        args, kwargs = widths.current((args, kwargs), self.tracer.labels)
        code_sizes.follow(code_sizes.Use(self.tracer.labels, name, args, kwargs, out, self.tracer.layers))
        return out

    def _equal_parts(self, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        tensor = args[0] if args else kwargs["input"]
        planes = (tag_of(tensor) or Tag()).planes
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % tensor.ndim
        if not any(dim in varying(p) for p in planes):
            return
        tags = [tag_of(o) or Tag() for o in out]
        if all(tag.planes for tag in tags):
            self.tracer.labels.equal([torch.cat([collapse(p).flatten() for p in tag.planes]).numpy() for tag in tags])
        else:
            self.tracer.pin(tensor, "is cut up by 'chunk' into single channels")


def _type(tensor: Tensor, dtype: Any = None, non_blocking: bool = False) -> Any:
    """`tensor.type(...)`, which knows no names for types on the meta device: the type as it is on the CPU."""
    if dtype is None:
        return torch.empty(0, dtype=tensor.dtype).type()
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.rpartition(".")[2])
    return tensor.to(dtype if isinstance(dtype, torch.dtype) else dtype.dtype)
