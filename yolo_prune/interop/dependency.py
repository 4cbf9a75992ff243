# SPDX-License-Identifier: AGPL-3.0-or-later
"""torch-pruning's dependency graph, made from our trace. Its groups are cut by our surgery.

Our groups hold channel sets that keep equal fractions. In torch-pruning's groups, they are coupled index by index: a
group is as wide as its `grain`, and index `i` of the group is channel `i` of each set, and channel `i + grain`,
`i + 2 * grain`, ... of a set that is wider. This is how torch-pruning itself couples the heads of an attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch_pruning as tp
from torch import nn
from torch_pruning import _helpers, ops
from torch_pruning.dependency import Node
from ultralytics.engine.model import Model

from yolo_prune import _startup, api
from yolo_prune.cut import surgery
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import read_record
from yolo_prune.env.image_size import ImageSize, image_size
from yolo_prune.errors import ArgumentError, PlanError
from yolo_prune.graph import ChannelSet, Graph, trace
from yolo_prune.graph.pruning_group import Part, group_item, kind_of, members
from yolo_prune.graph.structure import Group as Coupled
from yolo_prune.planning import planner
from yolo_prune.planning.cost import cost_of

ROOTS = (ops.TORCH_CONV, ops.TORCH_LINEAR)
Choice = Mapping[str, Sequence[Sequence[int]]]
"""`{set name: pieces}`: channels that go, in pieces of equal length. Channels at equal places go together."""


@dataclass(frozen=True)
class Member:
    """A channel set of a group, and its places in one part: channel `i` is index `index[i]` for each `index`."""

    group: int
    channels: ChannelSet
    places: tuple[tuple[int, ...], ...]


class Channels(nn.Module):
    """The root of a group that no layer numbers as the group does, for example of whole heads."""

    def __init__(self, width: int) -> None:
        """`width`: number of indices of the group."""
        super().__init__()
        self.width = width


class ChannelsPruner(ops.DummyPruner):  # type: ignore[misc]
    """torch-pruning's object for `Channels`, which have nothing to cut."""

    def get_out_channels(self, layer: Channels) -> int:
        """The width of the group."""
        return layer.width

    get_in_channels = get_out_channels


class Group(tp.Group):  # type: ignore[misc]  # torch-pruning has no types
    """A group of torch-pruning whose `prune` makes a plan, which our surgery applies."""

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Cut the model. The graph, the widths that blocks store and the pruning record of the model follow.

        Args:
            idxs: indices of the root to remove; None removes all indices of this group.
            record_history: whether to add the cut to `pruning_history()`.

        Raises:
            PlanError: If a part of the cut is missing, or parts that must lose equally many do not.
        """
        if idxs is None:
            self._DG.cut(self, record_history)
        else:
            root = self[0].dep
            self._DG.get_pruning_group(root.target.module, root.handler, idxs).prune(record_history=record_history)


class DependencyGraph(tp.DependencyGraph):  # type: ignore[misc]
    """torch-pruning's `DependencyGraph`, made from our trace. `yolo_prune.dependency_graph` makes one."""

    structure: Graph

    def __init__(self) -> None:
        super().__init__()
        super().register_customized_layer(Channels, ChannelsPruner())

    def build_dependency(
        self,
        model: Any,
        example_inputs: Any = None,
        *,
        imgsz: ImageSize = 640,
        heads: str = "dims",
        ignored_layers: Sequence[nn.Module] | None = None,
        ignored_params: Sequence[nn.Parameter] | None = None,
        verbose: bool = True,
    ) -> DependencyGraph:
        """Trace a model.

        Args:
            model: a `YOLO` object or its module.
            example_inputs: a batch of images; only its height and width are used, in place of `imgsz`.
            imgsz: image size in pixels, at which the FLOPs in plans are counted.
            heads: "dims" removes channels in the heads of attentions, "heads" removes whole heads.
            ignored_layers: layers of which no output may be removed.
            ignored_params: parameters that may not be cut.
            verbose: as in torch-pruning.

        Raises:
            PruneError: If the model is not supported.
        """
        _startup.install(force=True)  # a later `model.train(...)` must keep the pruned structure
        if isinstance(model, str | Path):
            model = api.open_model(model)
        if example_inputs is not None:
            imgsz = image_size([int(n) for n in example_inputs.shape[-2:]])
        self.owner, self.model, self.verbose = model, api.module_of(model), verbose
        self.IGNORED_LAYERS_IN_TRACING.extend(ignored_layers or ())
        self.ignored_params = list(ignored_params or ())
        self.unwrapped_parameters: list[Any] = []
        self._widths = api.dense_widths(self.model, imgsz)
        self._cuts: Plan | None = None
        self._layers = dict(self.model.named_modules())
        self._module2name = {layer: name for name, layer in self._layers.items()}
        self._param_to_name: dict[nn.Parameter, str] = {}
        self.module2node: dict[Any, Node] = {}
        self._nodes: dict[str, Node] = {}
        self._places: dict[str, list[tuple[Part, tuple[tuple[int, ...], ...]]]] = {}
        self._grouped: set[str] = set()  # sets whose indices depend on the number of inputs per group
        self._record = read_record(self.model)
        if heads not in ("dims", "heads"):
            raise ArgumentError(f"heads={heads!r}: must be 'dims' or 'heads'.")
        self._read(trace(self.model, imgsz=imgsz, heads=heads))
        return self

    def register_customized_layer(self, layer_type_or_instance: Any, layer_pruner: Any) -> None:
        """Refused: our surgery is the only one that cuts."""
        raise PlanError(
            "yolo-prune cuts layers itself, so a pruner for a class of layers has no use here. If a block of yours is "
            "protected, state its rule with yolo_prune.register_block."
        )

    def get_pruner_of_module(self, module: Any) -> Any:
        """The object of torch-pruning that belongs to the type of a layer."""
        if isinstance(module, Channels):
            return self.CUSTOMIZED_PRUNERS[Channels]
        return self.REGISTERED_PRUNERS.get(kind_of(module))

    def get_all_groups(
        self, ignored_layers: Sequence[nn.Module] = (), root_module_types: Sequence[type] = ROOTS
    ) -> Iterator[Group]:
        """All groups that can be pruned, each with all its indices.

        A group is left out if one of its outputs belongs to a layer in `ignored_layers`, or if no root has one of
        these types. Protected groups are always left out.
        """
        ignored = {m for layer in (*ignored_layers, *self.IGNORED_LAYERS_IN_TRACING) for m in layer.modules()}
        used: set[str] = set()
        for number in range(len(self.structure.groups)):
            group = self.structure.groups[number]  # read now: the loop's body may cut
            if group.protected or group.grain < 2 or self._is_ignored(group, ignored):
                continue
            root = self._root(group, tuple(root_module_types), used)
            if root is not None:
                used.add(root.name)
                yield self._group(root, {number: coupled(group, range(group.grain))})

    def get_pruning_group(self, module: nn.Module, pruning_fn: Callable[..., Any], idxs: Any) -> Group:
        """The group that removes indices of a layer, with everything that must go with them.

        Sets of channels that must keep equal fractions lose channels at equal places: channel `i` of one half of a
        convolution and channel `i` of the other half.

        Args:
            module: a layer, or a parameter that belongs to no layer.
            pruning_fn: one of torch-pruning's functions; it says whether `idxs` are outputs or inputs.
            idxs: one index or several.

        Raises:
            ValueError: If the layer is not in the graph.
            PlanError: If an index does not exist, or is protected.
        """
        if module not in self.module2node:
            raise ValueError(f"Module {module} is not in the dependency graph.")
        part = self._part_of(module, pruning_fn)
        if not isinstance(idxs, Iterable):
            idxs = [idxs]
        return self._group(part, self._together({part: {int(i) for i in idxs}}))

    def check_pruning_group(self, group: Group) -> bool:
        """Whether something is left of every set of channels."""
        for number, sets in self._channels(self._indices(group)).items():
            for channels in self.structure.groups[number].sets:
                gone = set().union(*sets.get(channels.name, {}).values())
                if len(gone) == channels.size:
                    return False
        return True

    def groups_of(self, plan: Plan) -> Iterator[Group]:
        """The groups that together make the cut of a plan. They may be pruned in this loop.

        Raises:
            PlanError: If the plan was made for another model.
        """
        surgery.check(self.model, plan)
        gone = {
            (tensor, dim): set(range(plan.shapes[tensor][dim])) - set(kept)
            for tensor, dims in plan.keep.items()
            for dim, kept in dims.items()
        }
        choices: dict[int, Choice] = {}
        for number, group in enumerate(self.structure.groups):
            taken = {s.name: _removed(s, gone) for s in group.sets}
            if any(taken.values()):
                choices[number] = free(group, taken)
        if self._plan({s: c for choice in choices.values() for s, c in _flat(choice).items()}).keep != plan.keep:
            raise PlanError("The plan was not made for this graph: it cuts parts of groups. Make a new plan.")
        for number, choice in choices.items():
            group = self.structure.groups[number]
            root = self._root(group, (nn.Module,), set()) or self._parts(group)[0][0]
            yield self._group(root, {number: choice})

    def plan_of(self, group: Group) -> Plan:
        """The plan of the cut that `group.prune()` makes.

        Raises:
            PlanError: If a part of the cut is missing, or parts that must lose equally many do not.
        """
        return self._plan(self._complete(self._channels(self._indices(group))))

    def cut(self, group: Group, record_history: bool = True) -> None:
        """Make the cut of a group; see `Group.prune`."""
        gone = self._complete(self._channels(self._indices(group)))
        plan = self._plan(gone)
        if not plan:
            return
        if record_history:
            self._pruning_history.append(self._history(group, gone, plan))
        self._apply(plan)

    def load_pruning_history(self, pruning_history: list[Any]) -> None:
        """Make the cuts of a history again, on a model of the same shapes."""
        self._pruning_history = pruning_history
        for name, out, idxs, *free_choice in pruning_history:
            if free_choice:
                self._apply(Plan.from_dict(free_choice[0]))
                continue
            module = self._nodes[name].module
            pruner = self.get_pruner_of_module(module)
            fn = pruner.prune_out_channels if out else pruner.prune_in_channels
            self.get_pruning_group(module, fn, idxs).prune(record_history=False)

    def _apply(self, plan: Plan) -> None:
        """Cut the model and write the record; the graph follows."""
        replaced = surgery.apply(self.model, plan)
        for old in self._param_to_name.keys() & replaced.keys():
            name, new = self._param_to_name.pop(old), replaced[old]
            self._param_to_name[new] = name
            self.module2node[new] = self.module2node.pop(old)
            self.module2node[new].module = new
        self._cuts = self._cuts.then(plan) if self._cuts else plan
        self._record = api.finish_cut(self.owner, plan, self._record, self._widths, self._cuts)
        self._read(self.structure.after(plan.keep))

    def _read(self, graph: Graph) -> None:
        """Take in a graph, and find the parts in which its sets lie."""
        before = {s.name: s for g in self.structure.groups for s in g.sets} if self._places else {}
        self.structure = graph
        self._members: dict[Part, list[Member]] = {}
        self._owners: dict[Part, dict[int, tuple[Member, int]]] = {}
        self._rootless: dict[str, Part] = {}
        for number, group in enumerate(graph.groups):
            for channels in group.sets:
                if before.get(channels.name) is not channels or channels.name in self._grouped:
                    self._places[channels.name] = self._find(channels)
                for part, places in self._places[channels.name]:
                    self._members.setdefault(part, []).append(Member(number, channels, places))
            if not group.protected and not self._natural(group):
                self._add_root(number, group)

    def _add_root(self, number: int, group: Coupled) -> None:
        """Give a group a root that no layer is."""
        part, channels = Part(f"group {group.name}", True), group.sets[0]
        if part.name not in self._nodes:
            self._node(part.name, Channels(group.grain))
        module = self._nodes[part.name].module
        module.width, self._module2name[module] = group.grain, part.name
        self._rootless[group.name] = part
        self._members[part] = [Member(number, channels, (tuple(range(channels.size)),))]

    def _find(self, channels: ChannelSet) -> list[tuple[Part, tuple[tuple[int, ...], ...]]]:
        """The parts in which channels lie, and their indices there."""
        found = members(self._layers, channels)
        for member in found:
            self._node(member.part.name, member.module, member.dim)
            if isinstance(member.module, nn.Parameter):
                self._param_to_name[member.module] = member.part.name
            if member.repeats > 1:
                self._grouped.add(channels.name)
        return [(member.part, member.places) for member in found]

    def _node(self, name: str, module: Any, dim: int = -1) -> None:
        if name not in self._nodes:
            node = self._nodes[name] = self.module2node[module] = Node(module, None, name)
            node.pruning_dim = dim

    def _part_of(self, module: Any, pruning_fn: Callable[..., Any]) -> Part:
        """The part that a function of torch-pruning cuts."""
        pruner = self.get_pruner_of_module(module)
        one = pruner.prune_in_channels.__func__ is pruner.prune_out_channels.__func__
        out, name = self.is_out_channel_pruning_fn(pruning_fn), self.module2node[module]._name
        if not out and not self.is_in_channel_pruning_fn(pruning_fn):
            raise PlanError(f"'{pruning_fn}' is not one of torch-pruning's pruning functions.")
        return Part(name, one or out)

    def _handler(self, part: Part) -> Callable[..., Any]:
        pruner = self.get_pruner_of_module(self._nodes[part.name].module)
        handler: Callable[..., Any] = pruner.prune_out_channels if part.out else pruner.prune_in_channels
        return handler

    def _is_ignored(self, group: Coupled, ignored: set[nn.Module]) -> bool:
        """Whether an ignored layer puts out channels of a group, or they lie in an ignored parameter."""
        targets = [self._nodes[p.name].module for s in group.sets for p, _ in self._places[s.name] if p.out]
        return any(any(t is p for p in self.ignored_params) or t in ignored for t in targets)

    def _root(self, group: Coupled, types: tuple[type, ...], used: set[str]) -> Part | None:
        """A part whose first indices are those of the group, so that scores and indices are numbered alike.

        Outputs come first. Each layer is the root of one group only, because torch-pruning tells groups apart by it.
        """
        if group.name in self._rootless:
            found = any(isinstance(self._nodes[part.name].module, types) for part, _ in self._parts(group))
            return self._rootless[group.name] if found else None
        natural = [p for p in self._natural(group) if isinstance(self._nodes[p.name].module, types)]
        parts = [p for p in natural if p.name not in used] or natural
        return min(parts, key=lambda part: not part.out, default=None)

    def _natural(self, group: Coupled) -> list[Part]:
        """The parts whose first indices are those of a group."""
        first = tuple(range(group.grain))
        return [part for part, places in self._parts(group) if any(p[: group.grain] == first for p in places)]

    def _parts(self, group: Coupled) -> list[tuple[Part, tuple[tuple[int, ...], ...]]]:
        """All parts in which channels of a group lie, and their indices there."""
        return [found for s in group.sets for found in self._places[s.name]]

    def _group(self, root: Part, choices: Mapping[int, Choice]) -> Group:
        """The group of torch-pruning for the channels that go."""
        group = Group()
        group._DG = self
        first: list[Any] = []
        others: list[tuple[bool, Any]] = []
        for number, choice in choices.items():
            numbering = self._numbering(root, number, choice)
            if root in self._rootless.values():
                first.append(self._item(root, root, [(n, n) for n in sorted(numbering)]))
            for s in self.structure.groups[number].sets:
                for piece in choice[s.name]:
                    for part, places in self._places[s.name]:
                        # A layer may read channels several times, which are one item in torch-pruning. If it puts
                        # them out several times (queries and keys), each time is an item, as long as the group is wide.
                        for place in [(p,) for p in places] if part.out else [places]:
                            pairs = {p[c]: n for p in place for c, n in zip(piece, numbering, strict=True)}
                            item = self._item(root, part, sorted(pairs.items()))
                            if part == root and numbering[0] in pairs:
                                first.append(item)
                            else:
                                others.append((part.out, item))
        others.sort(key=lambda other: not other[0])  # scores are as long as the first item with weights
        for item in (*first, *(item for _, item in others)) or [self._item(root, root, [])]:  # nothing may go
            group.items.append(item)
        return group

    def _numbering(self, root: Part, number: int, choice: Choice) -> list[int]:
        """For each place in the pieces of a choice: the index of the root that stands for it."""
        members = [(place, m.channels.name) for m in self._members[root] if m.group == number for place in m.places]
        place, name = min(members)
        return [place[c] for c in choice[name][0]]

    def _item(self, root: Part, part: Part, pairs: list[tuple[int, int]]) -> Any:
        return group_item(
            self._nodes[root.name], self._handler(root), self._nodes[part.name], self._handler(part), pairs
        )

    def _together(self, indices: Mapping[Part, set[int]]) -> dict[int, Choice]:
        """`{group: channels that go}`, if these indices go and take their partners with them."""
        choices = {}
        for number, sets in self._channels(indices).items():
            group = self.structure.groups[number]
            units = {c % group.grain for parts in sets.values() for channels in parts.values() for c in channels}
            choices[number] = coupled(group, sorted(units))
        return choices

    def _indices(self, group: Group) -> dict[Part, set[int]]:
        """`{part: indices that go}` of a group."""
        found: dict[Part, set[int]] = {}
        for dependency, idxs in group:
            node = dependency.target
            if self._nodes.get(node._name) is None or self._nodes[node._name].module is not node.module:
                raise PlanError(f"The group was made before '{node._name}' was cut. Make it again from the graph.")
            found.setdefault(self._part_of(node.module, dependency.handler), set()).update(_helpers.to_plain_idxs(idxs))
        return found

    def _channels(self, indices: Mapping[Part, set[int]]) -> dict[int, dict[str, dict[Part, list[int]]]]:
        """`{group: {set: {part: channels}}}`: what removing these indices takes away.

        Raises:
            PlanError: If an index does not exist, is protected, or is one of several that are the same channel.
        """
        found: dict[int, dict[str, dict[Part, list[int]]]] = {}
        for part, gone in indices.items():
            owners = self._owner(part)
            for index in sorted(gone):
                if index not in owners:
                    raise PlanError(f"{part} has no index {index} that can be removed.")
                member, channel = owners[index]
                if reason := self.structure.groups[member.group].protected:
                    raise PlanError(f"{part}: index {index} may not be removed ({reason}).")
                sets = found.setdefault(member.group, {}).setdefault(member.channels.name, {})
                sets.setdefault(part, []).append(channel)
        return found

    def _owner(self, part: Part) -> dict[int, tuple[Member, int]]:
        """`{index of a part: (member, channel)}`."""
        if part not in self._owners:
            self._owners[part] = {
                index: (member, channel)
                for member in self._members.get(part, ())
                for place in member.places
                for channel, index in enumerate(place)
            }
        return self._owners[part]

    def _complete(self, taken: dict[int, dict[str, dict[Part, list[int]]]]) -> dict[str, set[int]]:
        """`{set: channels that go}`, if all members lose the same channels and all sets the same fraction.

        Raises:
            PlanError: If not; the message says what is missing.
        """
        gone: dict[str, set[int]] = {}
        for number, sets in taken.items():
            group = self.structure.groups[number]
            for s in group.sets:
                lost = gone[s.name] = {c for channels in sets.get(s.name, {}).values() for c in channels}
                for part, places in self._places[s.name]:
                    wanted = {p[c] for p in places for c in lost}
                    found = sets.get(s.name, {}).get(part, [])
                    if len(found) != len(wanted):
                        missing = sorted(wanted - {p[c] for p in places for c in found} or wanted)
                        raise PlanError(
                            f"The group is incomplete: {part} must also lose {_few(missing)}, or the other layers that "
                            "hold these channels must keep them. get_pruning_group makes complete groups."
                        )
            counts = {s.name: len(gone[s.name]) for s in group.sets}
            shares = {counts[s.name] * group.grain / s.size for s in group.sets}
            if len(shares) > 1 or not next(iter(shares)).is_integer() or max(shares) >= group.grain:
                told = ", ".join(f"'{s.name}' {counts[s.name]} of {s.size}" for s in group.sets[:6])
                raise PlanError(
                    f"These sets must lose the same fraction of their channels, a multiple of 1/{group.grain} and not "
                    f"all, but would lose: {told}. get_pruning_group makes complete groups."
                )
        return gone

    def _plan(self, gone: Mapping[str, Iterable[int]]) -> Plan:
        kept = {
            s.name: tuple(sorted(set(range(s.size)) - set(gone[s.name])))
            for group in self.structure.groups
            for s in group.sets
            if gone.get(s.name)
        }
        dense = self._record.plan.shapes if self._record and self._record.plan else {}
        return planner.build_plan(self.structure, cost_of(self.model, self.structure), kept, dense)

    def _history(self, group: Group, gone: Mapping[str, set[int]], plan: Plan) -> list[Any]:
        """A line of torch-pruning's history; with the plan, if partners lose other indices than the root."""
        root = group[0].dep
        part = self._part_of(root.target.module, root.handler)
        idxs = sorted(self._indices(group)[part])
        again = _flat({k: v for choice in self._together({part: set(idxs)}).values() for k, v in choice.items()})
        return [part.name, part.out, idxs] + ([] if again == gone else [plan.to_dict()])


def coupled(group: Coupled, units: Sequence[int]) -> Choice:
    """The channels at these places of all sets of a group."""
    return {s.name: [[u + t * group.grain for u in units] for t in range(s.size // group.grain)] for s in group.sets}


def free(group: Coupled, taken: Mapping[str, Iterable[int]]) -> Choice:
    """Any channels of the sets of a group, in pieces of equal length."""
    pieces = {}
    for s in group.sets:
        if s.name in taken:
            channels, count = sorted(taken[s.name]), s.size // group.grain
            length = len(channels) // count
            pieces[s.name] = [channels[i * length : (i + 1) * length] for i in range(count)]
    return pieces


def _flat(choice: Choice) -> dict[str, set[int]]:
    return {name: {c for piece in pieces for c in piece} for name, pieces in choice.items()}


def _removed(channels: ChannelSet, gone: Mapping[tuple[str, int], set[int]]) -> set[int]:
    slot = channels.slots[0]
    lost = gone.get((slot.tensor, slot.dim), set())
    return {c for c, index in enumerate(slot.index) if index in lost}


def _few(indices: Iterable[int]) -> str:
    listed = list(indices)
    return f"index {listed[0]}" if len(listed) == 1 else f"indices {listed[:8]}{' and more' if len(listed) > 8 else ''}"


def dependency_graph(
    model: Model | nn.Module | str | Path, imgsz: ImageSize = 640, *, heads: str = "dims"
) -> DependencyGraph:
    """torch-pruning's `DependencyGraph` of a model, for all architectures that this package can read.

    Args:
        model: a `YOLO` object, its module, or a path to a `.pt` or `.yaml` file.
        imgsz: image size in pixels, at which the FLOPs in plans are counted.
        heads: "dims" removes channels in the heads of attentions, "heads" removes whole heads.

    Returns:
        The graph. `group.prune()` of its groups cuts the model by a plan, and writes the pruning record.

    Raises:
        PruneError: If the model is not supported.

    Example:
        >>> import torch_pruning
        >>> from ultralytics import YOLO
        >>> import yolo_prune
        >>> model = YOLO("best.pt")
        >>> graph = yolo_prune.dependency_graph(model, imgsz=640)
        >>> importance = torch_pruning.importance.GroupMagnitudeImportance()
        >>> for group in graph.get_all_groups():
        ...     worst = importance(group).argsort()[: len(group[0].idxs) // 2]
        ...     group.prune(worst.tolist())
        >>> yolo_prune.is_pruned(model)
        True
    """
    return DependencyGraph().build_dependency(model, imgsz=imgsz, heads=heads)
