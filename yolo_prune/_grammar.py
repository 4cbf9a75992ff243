# SPDX-License-Identifier: AGPL-3.0-or-later
"""The arguments of the console script's commands. One description of each is used for reading, checks and help."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from typing import Any, get_args

from yolo_prune.env import outputs
from yolo_prune.errors import PruneError

WIDTH = 118  # of help, in characters
HELP = ("help", "h")
SUFFIXES = (".pt", ".yaml", ".yml", ".onnx", ".engine", ".torchscript")
"""Endings of the names of models."""


@dataclass(frozen=True)
class Argument:
    """One `name=value` of a command.

    Attributes:
        name: the text left of the equals sign.
        example: an example of a value, for usage lines.
        help: a noun with its article that describes the value, so that a message can say "pass ...".
        read: `(name, text) -> value`; raises `PruneError` if the text is not a valid value.
        default: the value if the argument is left out; None if there is no default.
        required: whether the argument must be given.
    """

    name: str
    example: str
    help: str
    read: Callable[[str, str], Any] = lambda name, text: text
    default: Any = None
    required: bool = False

    def __str__(self) -> str:
        pair = f"{self.name}={self.example}"
        return pair if self.required else f"[{pair}]"


@dataclass(frozen=True)
class Request:
    """The words that a user typed after the name of a command.

    Attributes:
        words: all words, as typed.
        places: the files and folders among the words.
        values: `{argument: value}`, with the defaults.
        overrides: `{recipe field: text}`.
    """

    words: list[str]
    places: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """A command: its purpose, its arguments, and the function that runs it.

    Attributes:
        name: the name, as typed after `yolo-prune`.
        summary: the purpose, in one line.
        run: `(request) -> exit status`.
        arguments: the arguments, in the order of the help. With an argument "recipe", the command also accepts
            `recipe.<field>=`.
        places: an example of the files that the command takes without a key; empty if it takes no such files.
        passes_on: the command that gets all words unread; empty if this command reads the words itself.
    """

    name: str
    summary: str
    run: Callable[[Request], int]
    arguments: tuple[Argument, ...] = ()
    places: str = ""
    passes_on: str = ""

    @property
    def known(self) -> dict[str, Argument]:
        """`{name: argument}`."""
        return {argument.name: argument for argument in self.arguments}

    @property
    def shortest(self) -> str:
        """The shortest call, without `yolo-prune`."""
        return " ".join([self.name, *self._words(a for a in self.arguments if a.required)])

    @property
    def usage(self) -> str:
        """One line with all arguments."""
        return " ".join(["Usage: yolo-prune", self.name, *self._words(self.arguments)])

    def _words(self, arguments: Iterable[Argument]) -> list[str]:
        return [*([self.places] if self.places else []), *map(str, arguments)]

    def help(self) -> str:
        """The help of the command: its purpose, its usage, and a line for every argument."""
        indent = " " * len(f"Usage: yolo-prune {self.name} ")
        usage = wrap(self.usage, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        rows = {name: _explained(argument) for name, argument in self.known.items()}
        if "recipe" in rows:
            rows["recipe.<field>"] = "one field of the recipe, for example recipe.target.flops=0.4"
        parts = [f"yolo-prune {self.name}: {self.summary}", "\n".join(usage)]
        if rows:
            parts.append(table(rows))
        if self.passes_on:
            parts.append(f"It also takes every argument of {self.passes_on}.")
        return "\n\n".join(parts)

    def read(self, words: Sequence[str]) -> Request:
        """Read the words that a user typed.

        Raises:
            PruneError: If an argument is unknown, missing or invalid. The message suggests the nearest known argument.
        """
        request = Request(list(words))
        if self.passes_on:
            return request
        request.values.update((a.name, a.default) for a in self.arguments if a.default is not None)
        for word in request.words:
            if self.places and ("=" not in word or Path(word).exists() or self._is_path(word)):
                request.places.append(word)
                continue
            key, equals, value = word.removeprefix("--").partition("=")
            if not equals or not value:
                raise PruneError(f"'{word}' is not of the form key=value. {self.usage}")
            if key.startswith("recipe.") and "recipe" in self.known:
                request.overrides[key.removeprefix("recipe.")] = value
            elif key in self.known:
                request.values[key] = self.known[key].read(key, value)
            else:
                raise PruneError(self._unknown(key))
        for argument in self.arguments:
            if argument.required and argument.name not in request.values:
                example = f"{argument.name}={argument.example}"
                raise PruneError(f"{argument.name}= is missing: pass {argument.help}, for example {example}.")
        return request

    def _is_path(self, word: str) -> bool:
        """Whether a word with an equals sign is a path, which may be mistyped: no argument has a slash in its name."""
        return bool(set(word.partition("=")[0]) & {"/", os.sep})

    def _unknown(self, key: str) -> str:
        near = nearest(key, self.known) or next(iter(_recipe_fields(key) if "recipe" in self.known else []), "")
        hint = f"Did you mean '{near}'? " if near else ""
        takes = f"It takes {', '.join(self.known)}." if self.known else "It takes none."
        return f"'{key}' is not an argument of '{self.name}'. {hint}{takes}"


def as_typed(words: Sequence[str]) -> list[str]:
    """The words as a shell should pass them: `a = b` is one word, as in Ultralytics, and `~` is the home folder.

    Not every shell replaces the `~` in `model=~/best.pt`.
    """
    joined: list[str] = []
    for word in words:
        if joined and (word.startswith("=") or (joined[-1].endswith("=") and "=" not in word)):
            joined[-1] += word
        else:
            joined.append(word)
    home = os.path.expanduser("~")
    return [re.sub(r"(^|[=,])~(?=[/\\]|$)", lambda found: found[1] + home, word) for word in joined]


def nearest(word: str, known: Mapping[str, Any]) -> str:
    """The known word that was probably meant; empty if no known word is similar."""
    return next(iter(get_close_matches(word, known, n=1)), "")


def asks_for_help(word: str) -> bool:
    """Whether a word is `help`, `-h`, `--help`, ..."""
    return word.lstrip("-") in HELP


def table(rows: Mapping[str, str]) -> str:
    """Two columns: the left one as wide as its longest entry, the right one wrapped."""
    left = max(map(len, rows)) + 4
    lines: list[str] = []
    for name, text in rows.items():
        lines += wrap(text, WIDTH, initial_indent=f"  {name:{left - 2}}", subsequent_indent=" " * left)
    return "\n".join(lines)


def positive_integer(name: str, text: str) -> int:
    """A whole number of at least 1.

    Raises:
        PruneError: If the text is not such a number.
    """
    if not text.isdigit() or not int(text):
        raise PruneError(f"{name}={text}: must be a whole number of at least 1.")
    return int(text)


def files(name: str, text: str) -> list[str]:
    """The files in a list that is separated by commas. Paths may contain commas, too.

    A file that exists is one item. Otherwise a comma ends an item only after a suffix, as in `a.pt,b.pt`.
    """
    parts, found = text.split(","), []
    while parts:
        joined = [",".join(parts[:count]) for count in range(len(parts), 0, -1)]
        there = next((path for path in joined if Path(path).is_file()), None)
        ends = next((path for path in reversed(joined) if Path(path).suffix in SUFFIXES), joined[0])
        parts = parts[(there or ends).count(",") + 1 :]
        found.append(there or ends.strip())
    return [path for path in found if path]


def boolean(name: str, text: str) -> bool:
    """True or False.

    Raises:
        PruneError: If the text is neither true nor false.
    """
    if text.lower() not in ("true", "false", "1", "0"):
        raise PruneError(f"{name}={text}: must be True or False.")
    return text.lower() in ("true", "1")


def file(suffix: str) -> Callable[[str, str], Path]:
    """A function that reads the names of files to write, which must end in `suffix`."""

    def read(name: str, text: str) -> Path:
        path = Path(text)
        if path.suffix != suffix:
            raise PruneError(f"{name}={text}: the name must end in {suffix}.")
        outputs.check(path)
        return path

    return read


def _explained(argument: Argument) -> str:
    told = argument.default is not None and str(argument.default) not in argument.help
    return f"{argument.help} (default: {argument.default})" if told else argument.help


def _recipe_fields(key: str) -> list[str]:
    """Recipe fields that may be meant by a name without its section."""
    from yolo_prune.recipe.schema import Recipe

    last = key.rpartition(".")[2]
    sections = {
        name: {
            field
            for kind in (part.annotation, *get_args(part.annotation))  # a section may be `Target | None`
            for field in getattr(kind, "model_fields", ())
        }
        for name, part in Recipe.model_fields.items()
    }
    return [f"recipe.{name}.{last}" for name, fields in sections.items() if last in fields] + (
        [f"recipe.{last}"] if last in sections else []
    )
