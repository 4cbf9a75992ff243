# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a command of the console script takes: read, checked, and written out as help, from one description."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from typing import Any

from yolo_prune.errors import PruneError

WIDTH = 118  # of help, in characters
HELP = ("help", "h")


@dataclass(frozen=True)
class Argument:
    """One `name=value` of a command.

    Attributes:
        name: left of the equals sign.
        example: a value, for usage lines.
        help: what it is, as a noun with its article, so that "pass ..." may stand before it.
        read: `(name, text) -> value`; raises `PruneError` where the text is none.
        default: the value where the argument is left out; None: there is none.
        required: it must be given.
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
    """What a user typed after the name of a command.

    Attributes:
        words: as typed.
        places: the files and folders among them.
        values: `{argument: value as it was read}`, with the defaults.
        overrides: `{recipe field: text}`.
    """

    words: list[str]
    places: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """A command: what it is for, what it takes, and the function that does it.

    Attributes:
        name: as typed after `yolo-prune`.
        summary: one line.
        run: `(request) -> exit status`.
        arguments: in the order of the help; one named "recipe" lets `recipe.<field>=` through, too.
        places: an example of the files that it takes without a key; empty: it takes none.
        passes_on: to whom every word is passed on unread; empty: the command reads them itself.
    """

    name: str
    summary: str
    run: Callable[[Request], int]
    arguments: tuple[Argument, ...] = ()
    places: str = ""
    passes_on: str = ""

    @property
    def known(self) -> dict[str, Argument]:
        """The arguments by their names."""
        return {argument.name: argument for argument in self.arguments}

    @property
    def shortest(self) -> str:
        """The shortest call, without `yolo-prune`."""
        return " ".join([self.name, *self._words(a for a in self.arguments if a.required)])

    @property
    def usage(self) -> str:
        """One line with all that may be typed."""
        return " ".join(["Usage: yolo-prune", self.name, *self._words(self.arguments)])

    def _words(self, arguments: Iterable[Argument]) -> list[str]:
        return [*([self.places] if self.places else []), *map(str, arguments)]

    def help(self) -> str:
        """What the command is for, its usage, and a line for every argument."""
        indent = " " * len(f"Usage: yolo-prune {self.name} ")
        usage = wrap(self.usage, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        rows = {name: _explained(argument) for name, argument in self.known.items()}
        if "recipe" in rows:
            rows["recipe.<field>"] = "one field of the recipe, for example recipe.target.flops=0.4"
        parts = [f"yolo-prune {self.name}: {self.summary}", "\n".join(usage)]
        if rows:
            parts.append(table(rows))
        if self.passes_on:
            parts.append(f"It takes every argument of {self.passes_on} as well.")
        return "\n\n".join(parts)

    def read(self, words: Sequence[str]) -> Request:
        """Read what a user typed.

        Raises:
            PruneError: If an argument is unknown, missing or impossible; with the nearest that is known.
        """
        request = Request(list(words))
        if self.passes_on:
            return request
        request.values.update((a.name, a.default) for a in self.arguments if a.default is not None)
        for word in request.words:
            if self.places and ("=" not in word or Path(word).exists()):
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

    def _unknown(self, key: str) -> str:
        near = nearest(key, self.known) or next(iter(_recipe_fields(key) if "recipe" in self.known else []), "")
        hint = f"Did you mean '{near}'? " if near else ""
        takes = f"It takes {', '.join(self.known)}." if self.known else "It takes none."
        return f"'{key}' is not an argument of '{self.name}'. {hint}{takes}"


def nearest(word: str, known: Mapping[str, Any]) -> str:
    """The known word that was probably meant; empty where none is near."""
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


def whole(name: str, text: str) -> int:
    """A whole number of at least 1.

    Raises:
        PruneError: If the text is none.
    """
    if not text.isdigit() or not int(text):
        raise PruneError(f"{name}={text}: must be a whole number of at least 1.")
    return int(text)


def image_size(name: str, text: str) -> int:
    """Height and width of square images, in pixels.

    Raises:
        PruneError: If a model cannot take such images.
    """
    if not text.isdigit() or not 32 <= int(text) <= 8192 or int(text) % 32:
        raise PruneError(f"{name}={text}: must be a multiple of 32 between 32 and 8192.")
    return int(text)


def truth(name: str, text: str) -> bool:
    """True or False.

    Raises:
        PruneError: If the text is neither.
    """
    if text.lower() not in ("true", "false", "1", "0"):
        raise PruneError(f"{name}={text}: must be True or False.")
    return text.lower() in ("true", "1")


def file(suffix: str) -> Callable[[str, str], Path]:
    """The reader of file names that must end in `suffix`."""

    def read(name: str, text: str) -> Path:
        path = Path(text)
        if path.suffix != suffix:
            raise PruneError(f"{name}={text}: the name must end in {suffix}.")
        return path

    return read


def _explained(argument: Argument) -> str:
    told = argument.default is not None and str(argument.default) not in argument.help
    return f"{argument.help} (left out: {argument.default})" if told else argument.help


def _recipe_fields(key: str) -> list[str]:
    """Recipe fields that a name without their section may mean."""
    from yolo_prune.recipe.schema import Recipe

    last = key.rpartition(".")[2]
    sections = {name: getattr(part.annotation, "model_fields", {}) for name, part in Recipe.model_fields.items()}
    return [f"recipe.{name}.{last}" for name, fields in sections.items() if last in fields] + (
        [f"recipe.{last}"] if last in sections else []
    )
