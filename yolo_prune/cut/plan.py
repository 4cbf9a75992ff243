# SPDX-License-Identifier: AGPL-3.0-or-later
"""`Plan`: which channels of which tensors are kept. Processes, files and rounds exchange nothing but plans."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from yolo_prune.cut.classes import COUNTS, Classes
from yolo_prune.cut.forecast import Forecast
from yolo_prune.cut.masks import Mask
from yolo_prune.env.files import write_text
from yolo_prune.env.json_files import JsonFile
from yolo_prune.errors import PlanError

VERSIONS = (1, 2, 3)
"""A plan is written in the oldest version that can hold it, so that earlier releases can read it.

Version 2 has masks, and version 3 has classes.
"""
MAX_INDICES = (
    10_000_000  # more than any model has; without this limit, a range of a few bytes in a file could fill the memory
)
FILE = JsonFile(
    "a plan",
    unreadable="Cannot read the plan '{path}': {why}.",
    broken="'{path}' is not a yolo-prune plan: it is not valid JSON ({why}).",
    error=PlanError,
)

CHANGES = ("keep", "attributes", "shapes", "scale", "masks", "classes")
"""The keys of a plan in a file that change a model."""

Keep = dict[str, dict[int, tuple[int, ...]]]
Attributes = dict[str, dict[str, int | list[int]]]
Scale = dict[str, dict[int, float]]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class GroupWidth:
    """One line of the plan's table: a group of coupled channels and its width before and after."""

    name: str
    layers: tuple[str, ...]
    before: int
    after: int


@dataclass(frozen=True)
class Protected:
    """Layers that the plan must not change, and the reason."""

    layers: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Plan:
    """The kept channels of a cut: kept indices per tensor and dimension, and the new values of module attributes.

    Attributes:
        keep: `{tensor name: {dimension: kept indices, ascending}}`, for the tensors that get smaller.
        attributes: `{module name: {attribute: value}}` for blocks that store a width as an attribute (`C2f.c`, ...).
        shapes: shapes of the tensors in `keep`, before the plan is applied.
        groups: the groups that get narrower, for the table.
        protected: protected layers and the reasons, for the table.
        forecast: the predicted cost; None if the plan has none.
        scale: `{tensor name: {index along dimension 0 before the plan is applied: factor}}`, for blocks whose forward
            divides by a power of a width.
        masks: `{tensor name: mask}` of the tensors in which single weights become zero. Their shapes are those after
            the plan is applied.
        opaque: `{module name: reason}` of blocks that were not traced and keep all their channels. Later cuts of the
            model do not trace them either.
        classes: the kept classes, if the plan removes classes.

    Example:
        >>> import yolo_prune
        >>> plan = yolo_prune.plan("best.pt", "half-flops", imgsz=640, data="data.yaml")
        >>> [(group.name, group.before, group.after) for group in plan.groups]
        [(...)]
        >>> [part.reason for part in plan.protected]
        [...]
    """

    keep: Keep
    attributes: Attributes
    shapes: Shapes
    groups: tuple[GroupWidth, ...] = ()
    protected: tuple[Protected, ...] = ()
    forecast: Forecast | None = None
    scale: Scale = field(default_factory=dict)
    masks: dict[str, Mask] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    classes: Classes | None = None
    _hash: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def hash(self) -> str:
        """SHA-256 of everything that changes the model: the table and the forecast are left out.

        Example:
            >>> import yolo_prune
            >>> plan = yolo_prune.Plan.load("plan.json")
            >>> plan.hash == yolo_prune.Plan.from_dict(plan.to_dict()).hash
            True
        """
        if not self._hash:
            body = {k: v for k, v in self.to_dict().items() if k in CHANGES}
            self._hash.append(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest())
        return self._hash[0]

    @property
    def predicted(self) -> Forecast:
        """The predicted cost.

        Raises:
            PlanError: If the plan has no forecast.

        Example:
            >>> import yolo_prune
            >>> plan = yolo_prune.Plan.load("plan.json")
            >>> plan.predicted.flops_kept <= 0.5, plan.predicted.params_after < plan.predicted.dense_params
            (True, True)
        """
        if self.forecast is None:
            raise PlanError("This plan has no forecast. Make a plan with yolo_prune.plan to get one.")
        return self.forecast

    def __bool__(self) -> bool:
        """True if the plan removes channels or classes, or sets weights to zero."""
        return bool(self.keep or self.masks or self.classes)

    @property
    def class_part(self) -> Plan:
        """The plan that removes the same classes and nothing else. `then(since(class_part))` is the whole plan again.

        Example:
            >>> import yolo_prune
            >>> plan = yolo_prune.plan("best.pt", {"structure": {"keep_classes": [0]}}, imgsz=640)
            >>> plan.class_part.keep == plan.keep
            True
        """
        if self.classes is None:
            return Plan({}, {}, {})
        rows = self.classes.tensors
        counts = {n: {k: v for k, v in values.items() if k in COUNTS} for n, values in self.attributes.items()}
        return Plan(
            {name: {0: self.classes.kept} for name in rows},
            {name: values for name, values in counts.items() if values},
            {name: self.shapes[name] for name in rows},
            classes=self.classes,
        )

    def shape_after(self, tensor: str) -> tuple[int, ...]:
        """Shape of `tensor` after the plan is applied.

        Example:
            >>> import yolo_prune
            >>> plan = yolo_prune.Plan.load("plan.json")
            >>> name = next(iter(plan.keep))
            >>> plan.shape_after(name) == plan.shapes[name]
            False
        """
        shape = list(self.shapes[tensor])
        for dim, kept in self.keep.get(tensor, {}).items():
            shape[dim] = len(kept)
        return tuple(shape)

    def then(self, later: Plan) -> Plan:
        """Compose two plans into one that does both cuts at once: this plan, then `later`.

        Raises:
            PlanError: If `later` was made for a model with other shapes.

        Example:
            >>> from ultralytics import YOLO
            >>> import yolo_prune
            >>> model = YOLO("best.pt")
            >>> first = yolo_prune.plan(model, {"target": {"flops": 0.7}}, imgsz=640)
            >>> proof = yolo_prune.apply(model, first)
            >>> second = yolo_prune.plan(model, {"target": {"flops": 0.5}}, imgsz=640)
            >>> first.then(second).predicted.flops_kept <= 0.5
            True
        """
        keep: Keep = {name: dict(dims) for name, dims in self.keep.items()}
        shapes = dict(self.shapes)
        for name, dims in later.keep.items():
            if name in self.keep and self.shape_after(name) != later.shapes[name]:
                raise PlanError(
                    f"The plans do not follow one another: '{name}' has shape {self.shape_after(name)} after the "
                    f"first plan but {later.shapes[name]} before the second. Make the second plan again."
                )
            shapes.setdefault(name, later.shapes[name])
            mine = keep.setdefault(name, {})
            for dim, kept in dims.items():
                mine[dim] = tuple(mine[dim][i] for i in kept) if dim in mine else kept
        attributes = {name: dict(values) for name, values in self.attributes.items()}
        for name, values in later.attributes.items():
            attributes.setdefault(name, {}).update(values)
        scale = {name: dict(factors) for name, factors in self.scale.items()}
        for name, factors in later.scale.items():
            shapes.setdefault(name, later.shapes[name])
            before = self.keep.get(name, {}).get(0) or range(shapes[name][0])
            mine_scale = scale.setdefault(name, {})
            for i, factor in factors.items():
                mine_scale[before[i]] = mine_scale.get(before[i], 1.0) * factor
        groups = {g.name: g for g in self.groups}
        for g in later.groups:
            groups[g.name] = replace(g, before=groups[g.name].before) if g.name in groups else g
        forecast, first = later.forecast, self.forecast
        if forecast and first and forecast.imgsz == first.imgsz:
            forecast = first.then(forecast)
        masks = {name: mask.cut(later.keep.get(name, {})) for name, mask in self.masks.items()}
        for name, mask in later.masks.items():
            masks[name] = masks[name] & mask if name in masks else mask
        protected = later.protected if later.keep else tuple(dict.fromkeys((*self.protected, *later.protected)))
        opaque = self.opaque | later.opaque
        classes = self.classes.then(later.classes) if self.classes else later.classes
        widths = tuple(groups.values())
        return Plan(keep, attributes, shapes, widths, protected, forecast, scale, masks, opaque, classes)

    def since(self, earlier: Plan) -> Plan:
        """Undo `then`: the rest of this plan for a model to which `earlier` was already applied.

        Raises:
            PlanError: If this plan keeps a channel that `earlier` removed.

        Example:
            >>> from ultralytics import YOLO
            >>> import yolo_prune
            >>> model = YOLO("best.pt")
            >>> first = yolo_prune.plan(model, {"target": {"flops": 0.7}}, imgsz=640)
            >>> proof = yolo_prune.apply(model, first)
            >>> second = yolo_prune.plan(model, {"target": {"flops": 0.5}}, imgsz=640)
            >>> first.then(second).since(first).keep == second.keep
            True
        """
        keep: Keep = {}
        for name, dims in self.keep.items():
            for dim, kept in dims.items():
                before = earlier.keep.get(name, {}).get(dim)
                if before is not None:
                    place = {old: new for new, old in enumerate(before)}
                    if not place.keys() >= set(kept):
                        raise PlanError(
                            f"The plans do not follow one another: the earlier plan removes more channels of '{name}'."
                        )
                    kept = tuple(place[i] for i in kept)
                if before is None or len(kept) < len(before):
                    keep.setdefault(name, {})[dim] = kept
        scale: Scale = {}
        for name, factors in self.scale.items():
            before, known = earlier.keep.get(name, {}).get(0), earlier.scale.get(name, {})
            place = {old: new for new, old in enumerate(before or range(self.shapes[name][0]))}
            later = {place[i]: f / known.get(i, 1.0) for i, f in factors.items() if i in place}
            if left := {i: f for i, f in later.items() if not math.isclose(f, 1.0, rel_tol=1e-12)}:
                scale[name] = left
        shapes = {n: earlier.shape_after(n) if n in earlier.shapes else self.shapes[n] for n in {**keep, **scale}}
        widths = {g.name: g.after for g in earlier.groups}
        groups = [replace(g, before=widths.get(g.name, g.before)) for g in self.groups]
        narrower = tuple(g for g in groups if g.after < g.before)
        classes = self.classes.since(earlier.classes) if self.classes else None
        return replace(self, keep=keep, shapes=shapes, groups=narrower, forecast=None, scale=scale, classes=classes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (dict, list, str, numbers), as `from_dict` reads it.

        Example:
            >>> import yolo_prune
            >>> plan = yolo_prune.Plan.load("plan.json")
            >>> sorted(plan.to_dict())
            ['attributes', 'forecast', 'groups', 'keep', 'protected', 'shapes', 'version']
        """
        data: dict[str, Any] = {
            "version": 3 if self.classes else 2 if self.masks else 1,
            "keep": {n: {str(d): _to_ranges(k) for d, k in sorted(v.items())} for n, v in sorted(self.keep.items())},
            "attributes": {n: dict(sorted(v.items())) for n, v in sorted(self.attributes.items())},
            "shapes": {n: list(s) for n, s in sorted(self.shapes.items())},
            "groups": [[g.name, list(g.layers), g.before, g.after] for g in self.groups],
            "protected": [[list(p.layers), p.reason] for p in self.protected],
        }
        if self.scale:
            data["scale"] = {n: _to_runs(v) for n, v in sorted(self.scale.items())}
        if self.masks:
            data["masks"] = {name: mask.to_dict() for name, mask in sorted(self.masks.items())}
        if self.opaque:
            data["opaque"] = dict(sorted(self.opaque.items()))
        if self.classes:
            data["classes"] = self.classes.to_dict()
        if self.forecast:
            data["forecast"] = self.forecast.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read what `to_dict` wrote.

        Raises:
            PlanError: If the data is not a plan, or is a plan of another version.

        Example:
            >>> import yolo_prune
            >>> plan = yolo_prune.Plan.load("plan.json")
            >>> yolo_prune.Plan.from_dict(plan.to_dict()) == plan
            True
        """
        try:
            if data["version"] not in VERSIONS:
                raise PlanError(
                    f"This plan has version {data['version']}; this yolo-prune reads versions {VERSIONS[0]} to "
                    f"{VERSIONS[-1]}. Make the plan again."
                )
            keep: Keep = {}
            for name, dims in data["keep"].items():
                keep[name] = {int(d): _from_ranges(k) for d, k in dims.items()}
                if sum(len(kept) for dims in keep.values() for kept in dims.values()) > MAX_INDICES:
                    raise ValueError("more indices than any model has channels")
            shapes = {n: tuple(int(i) for i in s) for n, s in data["shapes"].items()}
            plan = cls(
                keep=keep,
                attributes={n: {a: _width(x) for a, x in v.items()} for n, v in data["attributes"].items()},
                shapes=shapes,
                groups=tuple(_group(*g) for g in data.get("groups", ())),
                protected=tuple(Protected(tuple(map(str, ls)), str(r)) for ls, r in data.get("protected", ())),
                forecast=Forecast.from_dict(data["forecast"]) if data.get("forecast") else None,
                scale={n: _from_runs(v) for n, v in data.get("scale", {}).items()},
                masks={n: Mask.from_dict(m) for n, m in data.get("masks", {}).items()},
                opaque={str(n): str(why) for n, why in data.get("opaque", {}).items()},
                classes=Classes.from_dict(data["classes"]) if data.get("classes") else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise PlanError(
                f"This is not a yolo-prune plan: {type(e).__name__}: {e}. Pass a plan that 'yolo-prune plan' saved."
            ) from e
        plan.validate()
        return plan

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON. If this fails, no incomplete file is left.

        Example:
            >>> import yolo_prune
            >>> plan = yolo_prune.plan("best.pt", "half-flops", imgsz=640, data="data.yaml")
            >>> path = plan.save("plan.json")
        """
        return write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a JSON file.

        Raises:
            PlanError: If the file is missing, is not JSON, or is not a plan.

        Example:
            >>> import yolo_prune
            >>> plan = yolo_prune.Plan.load("plan.json")
            >>> print(plan)
            group ...
        """
        data = FILE.read(path)
        if not isinstance(data, dict):
            raise PlanError(
                f"'{path}' is not a yolo-prune plan: expected a mapping, found {type(data).__name__}. Pass a file that "
                "'yolo-prune plan' saved."
            )
        try:
            return cls.from_dict(data)
        except PlanError as e:
            raise PlanError(f"'{path}' cannot be used: {e}") from e

    def validate(self) -> None:
        """Check that all indices and widths are possible.

        Raises:
            PlanError: For the first index or width that is not possible.

        Example:
            >>> import yolo_prune
            >>> plan = yolo_prune.Plan.load("plan.json")
            >>> plan.validate()  # passes, or raises PlanError
        """
        for name, dims in self.keep.items():
            shape = self.shapes.get(name, ())
            for dim, kept in dims.items():
                size = shape[dim] if 0 <= dim < len(shape) else 0
                ascending = all(a < b for a, b in pairwise(kept))
                if not kept or not ascending or kept[0] < 0 or kept[-1] >= size:
                    raise PlanError(
                        f"The plan is damaged: kept indices of '{name}', dimension {dim}, must be ascending and "
                        f"within 0..{size - 1}. Make the plan again."
                    )

        for name, values in self.attributes.items():
            for key, value in values.items():
                if key.startswith("_") or not key.isidentifier():
                    raise PlanError(f"The plan is damaged: '{name}.{key}' is not a width. Make the plan again.")
                if any(v < 1 for v in (value if isinstance(value, list) else [value])):
                    raise PlanError(
                        f"The plan is damaged: '{name}.{key}' must be at least 1, found {value}. Make the plan again."
                    )
        for name, factors in self.scale.items():
            rows = self.shapes.get(name, (0,))[0]
            if not all(0 <= i < rows and 0 < f < math.inf for i, f in factors.items()):
                raise PlanError(
                    f"The plan is damaged: factors of '{name}' must be positive, and their indices within "
                    f"0..{rows - 1}. Make the plan again."
                )

        if self.classes:
            self.classes.validate()
            for name in self.classes.tensors:
                if self.keep.get(name, {}).get(0) != self.classes.kept:
                    raise PlanError(
                        f"The plan is damaged: '{name}' must keep the rows of the kept classes. Make the plan again."
                    )
        for name, mask in self.masks.items():
            if name in self.keep and mask.shape != self.shape_after(name):
                raise PlanError(
                    f"The plan is damaged: the zeros of '{name}' are for the shape {mask.shape}, and the plan leaves "
                    f"{self.shape_after(name)}. Make the plan again."
                )

    def __str__(self) -> str:
        """The table that `describe` returns."""
        return self.describe()

    def describe(self) -> str:
        """A table for `print`: kept classes, widths of groups before and after, protected layers, predicted cost.

        Example:
            >>> import yolo_prune
            >>> plan = yolo_prune.Plan.load("plan.json")
            >>> print(plan.describe())
            group ...
        """
        lines = [self.classes.describe()] if self.classes else []
        lines += [_row("group", "layers", "before", "after", "kept"), "-" * 100]
        for g in self.groups:
            layers = _shorten(g.layers, 44)
            lines.append(_row(g.name, layers, str(g.before), str(g.after), f"{g.after / g.before:.0%}"))
        if not self.groups:
            lines.append("no channel is removed" if self else "nothing is removed")
        for name, mask in self.masks.items():
            lines.append(
                f"{name.removesuffix('.weight'):35} {mask.zeros / mask.size:7.1%} of {mask.size:,} weights are zero"
            )
        for p in self.protected:
            lines.append(f"protected ({p.reason}): {_shorten(p.layers, 60)}")
        if f := self.forecast:
            lines += [
                "-" * 100,
                f"{'':12}{'dense':>12}{'before':>12}{'after':>12}{'kept':>10}",
                f"{'GFLOPs':12}{f.dense_flops / 1e9:12.3f}{f.flops_before / 1e9:12.3f}"
                f"{f.flops_after / 1e9:12.3f}{f.flops_kept:10.1%}   at imgsz {f.imgsz}",
                f"{'parameters':12}{f.dense_params:12,}{f.params_before:12,}{f.params_after:12,}{f.params_kept:10.1%}",
            ]
            if f.weights:
                lines.append(
                    f"{'zeros':12}{'':12}{f.zeros_before:12,}{f.zeros_after:12,}{f.zeros_after / f.weights:10.1%}   of "
                    f"{f.weights:,} weights that may be zero"
                )
            if f.dense_ms is not None and f.ms_before is not None and f.ms_after is not None:
                lines.append(
                    f"{'latency, ms':12}{f.dense_ms:12.3f}{f.ms_before:12.3f}{f.ms_after:12.3f}"
                    f"{f.kept('latency'):10.1%}   {'measured' if f.measured else 'predicted'}"
                )
        return "\n".join(lines)


def _group(name: object, layers: Iterable[object], before: Any, after: Any) -> GroupWidth:
    group = GroupWidth(str(name), tuple(map(str, layers)), int(before), int(after))
    if not 1 <= group.after <= group.before:
        raise ValueError(f"group '{name}' goes from {before} to {after} channels")
    return group


def _width(value: Any) -> int | list[int]:
    return [int(v) for v in value] if isinstance(value, list) else int(value)


def _to_runs(factors: Mapping[int, float]) -> list[list[Any]]:
    """{0: 0.5, 1: 0.5, 7: 2.0} -> [['0-1', 0.5], ['7', 2.0]]."""
    return [
        [_to_ranges(tuple(sorted(i for i, f in factors.items() if f == factor))), factor]
        for factor in sorted(set(factors.values()))
    ]


def _from_runs(runs: Iterable[tuple[str, Any]]) -> dict[int, float]:
    return {i: float(factor) for ranges, factor in runs for i in _from_ranges(ranges)}


def _row(name: str, layers: str, before: str, after: str, kept: str) -> str:
    return f"{name:35} {layers:44} {before:>6} {after:>6} {kept:>5}"


def _shorten(names: Iterable[str], width: int) -> str:
    names = list(names)
    text = ", ".join(names)
    if len(text) <= width:
        return text
    shown = ""
    for i, name in enumerate(names):
        rest = f", +{len(names) - i} more"
        if len(shown) + len(name) + len(rest) + 2 > width and i:
            return shown + rest
        shown += (", " if i else "") + name
    return shown[: width - 3] + "..."


def _to_ranges(keep: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> '0-2,5'."""
    parts: list[str] = []
    start = previous = keep[0]
    for i in (*keep[1:], None):
        if i is not None and i == previous + 1:
            previous = i
            continue
        parts.append(str(start) if start == previous else f"{start}-{previous}")
        if i is not None:
            start = previous = i
    return ",".join(parts)


def _from_ranges(text: str) -> tuple[int, ...]:
    keep: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        stop = int(last or first) + 1
        if stop > 1_000_000:
            raise ValueError(f"index {stop - 1} is larger than any layer has")
        keep.extend(range(int(first), stop))
        if len(keep) > 1_000_000:
            raise ValueError("more indices than any layer has channels")
    return tuple(keep)
