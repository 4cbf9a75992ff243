# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reads the YAML of recipes: plain data, without duplicate keys and without aliases."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Safe YAML without duplicate keys, which hide each other, and without aliases, which can fill the memory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, refusing duplicate keys."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Build a node, refusing aliases."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError("while scanning an alias", None, f"'*{event.anchor}'", event.start_mark)
        return super().compose_node(parent, index)


# YAML 1.1 reads 1e-4 as a string, but users mean a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)

# YAML 1.1 reads 2:4 as the number 124 in base 60, but users mean a pattern of zeros.
for _digit in "0123456789":
    _Loader.yaml_implicit_resolvers[_digit].insert(0, ("tag:yaml.org,2002:str", re.compile(r"\d+:\d+$")))


def read_yaml(text: str) -> Any:
    """Read YAML.

    Raises:
        ValueError: If the text is not valid; the message says what is wrong, and where.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        if e.context == "while scanning an alias":
            raise ValueError(f"{where}aliases are not allowed; put quotes around a text that begins with *") from None
        raise ValueError(where + ", ".join(filter(None, (e.context, e.problem)))) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as e:  # constructors of PyYAML raise errors of their own, for example for a 13th month
        raise ValueError(" ".join(str(e).split())) from None
