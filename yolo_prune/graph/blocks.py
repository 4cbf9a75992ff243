# SPDX-License-Identifier: AGPL-3.0-or-later
"""One rule per Ultralytics block: what a trace cannot see, stated as facts.

A rule gets the stock block and a `Scope`; it returns a stand-in with the same channel dependencies, written with plain
convolutions, sums and concatenations, and states which parts keep equal counts, which outputs are fixed and which
attributes follow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.block import C2PSA, C3, SPPF, Attention, Bottleneck, C2f, C3k, C3k2, PSABlock
from ultralytics.nn.modules.conv import Concat, Conv, DWConv
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel

from yolo_prune.graph.scope import Scope, read_as_is, register_block

read_as_is(DetectionModel, Conv, DWConv, Concat, Bottleneck, C3, C3k, SPPF, PSABlock)


class _Halves(nn.Module):
    """`C2f` with its chunked `cv1` written as two convolutions."""

    def __init__(self, a: nn.Module, b: nn.Module, m: nn.Module, cv2: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.m, self.cv2 = a, b, m, cv2

    def forward(self, x: Tensor) -> Tensor:
        y = [self.a(x), self.b(x)]
        for m in self.m.children():
            y.append(m(y[-1]))
        out: Tensor = self.cv2(torch.cat(y, 1))
        return out


@register_block(C2f, C3k2)
def _c2f(block: C2f, scope: Scope) -> nn.Module:
    a, b = scope.split("cv1", {"a": block.c, "b": block.c})
    scope.equal(a, b)
    scope.attribute("c", a)
    return _Halves(a, b, scope.child("m"), scope.child("cv2"))


class _HalfStream(nn.Module):
    """`C2PSA` with its split `cv1` written as two convolutions."""

    def __init__(self, a: nn.Module, b: nn.Module, m: nn.Module, cv2: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.m, self.cv2 = a, b, m, cv2

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cv2(torch.cat((self.a(x), self.m(self.b(x))), 1))
        return out


@register_block(C2PSA)
def _c2psa(block: C2PSA, scope: Scope) -> nn.Module:
    a, b = scope.split("cv1", {"a": block.c, "b": block.c})
    scope.equal(a, b)
    scope.attribute("c", a)
    return _HalfStream(a, b, scope.child("m"), scope.child("cv2"))


class _Heads(nn.Module):
    """`Attention` with one convolution per head and role; the softmax between positions touches no channel."""

    def __init__(self, q: list[nn.Module], k: list[nn.Module], v: list[nn.Module], pe: nn.Module, proj: nn.Module):
        super().__init__()
        self.q, self.k, self.v = nn.ModuleList(q), nn.ModuleList(k), nn.ModuleList(v)
        self.pe, self.proj = pe, proj
        self.products: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.products = [q(x) * k(x) for q, k in zip(self.q, self.k, strict=True)]
        v = torch.cat([v(x) for v in self.v], 1)
        out: Tensor = self.proj(v + self.pe(v))
        return out


@register_block(Attention)
def _attention(block: Attention, scope: Scope) -> nn.Module:
    heads = range(block.num_heads)
    sizes = {"q": block.key_dim, "k": block.key_dim, "v": block.head_dim}
    pieces = scope.split("qkv", {f"{role}{h}": size for h in heads for role, size in sizes.items()})
    q, k, v = pieces[0::3], pieces[1::3], pieces[2::3]
    scope.equal(*q, *k)
    scope.equal(scope.inputs(q[0]), *v)  # forward reshapes heads x head_dim back to the input's width
    scope.attribute("key_dim", q[0])
    scope.attribute("head_dim", v[0])
    qkv, both = f"{scope.path}.qkv.conv", ("qkv.bn.weight", "pe.bn.weight")
    for tensor in both:  # q'k and v'a cost N^2 a channel of k and of v; k + v = (qkv outputs + v) / 2
        scope.costs(tensor, lambda positions: positions[qkv] ** 2 / 2)
    return _Heads(q, k, v, scope.child("pe"), scope.child("proj"))


class _Towers(nn.Module):
    """`Detect` with all of its towers side by side: no decoding, no detach."""

    def __init__(self, towers: list[nn.Module]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return [level(f) for tower in self.towers for level, f in zip(tower.children(), x, strict=True)]


@register_block(Detect)
def _detect(block: Detect, scope: Scope) -> nn.Module:
    if block.cv2 is None:
        raise_fused(scope.path)
    names = [n for n in ("cv2", "cv3", "one2one_cv2", "one2one_cv3") if getattr(block, n, None) is not None]
    towers = {name: scope.child(name) for name in names}  # of each level: two hidden layers and the output
    for name in names:
        for level in range(block.nl):
            scope.fixed(f"{name}.{level}.2", "task output")
        if name.startswith("one2one_"):
            _twins(towers[name.removeprefix("one2one_")], towers[name], scope)
            scope.spare(name)
    if isinstance(block.dfl, nn.Module) and hasattr(block.dfl, "conv"):
        boxes = [f"{scope.path}.cv2.{level}.2" for level in range(block.nl)]
        scope.fixed("dfl.conv", "box distribution (DFL)")
        scope.costs("dfl.conv.weight", lambda positions: 4 * sum(positions[b] for b in boxes))
    return _Towers(list(towers.values()))


def _twins(tower: nn.Module, copy: nn.Module, scope: Scope) -> None:
    """The one-to-one copy of a tower keeps the widths of the original: either can be the one deployed."""
    pairs = zip(tower.modules(), copy.modules(), strict=True)
    for a, b in pairs:
        if isinstance(a, nn.Conv2d) and a.groups == 1:
            scope.equal(a, b)


def raise_fused(path: str) -> None:
    """Refuse a model whose layers were folded for inference."""
    from yolo_prune.errors import UnsupportedModelError

    raise UnsupportedModelError(
        f"'{path}' is fused for inference (a branch of the head is gone), which cannot be undone. "
        "Pass the checkpoint that training wrote, as it was before fuse()."
    )
