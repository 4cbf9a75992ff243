# SPDX-License-Identifier: AGPL-3.0-or-later
"""Descriptions of commands and arguments of the console script, which reads, checks and documents them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from typing import Any

from yolo_prune.errors import PruneError

WIDTH = 118  # line length of the help, in characters
HELP = ("help", "h")


@dataclass(frozen=True)
class Argument:
    """One `name=value` argument of a command.

    Attributes:
        name: the part before the equals sign.
        example: an example value, for usage lines.
        help: description as a noun with its article, because messages put "pass" before it.
        read: `(name, text) -> value`; raises `PruneError` if the text is not valid.
        default: the value if the argument is left out; None for no value.
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
        words: all words.
        places: the words that are files or folders without a key.
        values: `{argument name: value}`, including default values.
        overrides: `{recipe field: text}`.
    """

    words: list[str]
    places: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """A command: its summary, its arguments, and its function.

    Attributes:
        name: the word after `yolo-prune`.
        summary: one line for the help.
        run: `(request) -> exit status`.
        arguments: arguments in the order of the help. With an argument named "recipe", `recipe.<field>=` is valid too.
        places: an example of files without a key; empty if the command takes no such files.
        passes_on: the program that reads all words instead of this command; empty if the command reads them itself.
    """

    name: str
    summary: str
    run: Callable[[Request], int]
    arguments: tuple[Argument, ...] = ()
    places: str = ""
    passes_on: str = ""

    @property
    def known(self) -> dict[str, Argument]:
        """The arguments by name."""
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
        """The help text: the summary, the usage, and a line for every argument."""
        indent = " " * len(f"Usage: yolo-prune {self.name} ")
        usage = wrap(self.usage, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        rows = {name: _explained(argument) for name, argument in self.known.items()}
        if "recipe" in rows:
            rows["recipe.<field>"] = "one field of the recipe, for example recipe.target.flops=0.4"
        parts = [f"yolo-prune {self.name}: {self.summary}", "\n".join(usage)]
        if rows:
            parts.append(table(rows))
        if self.passes_on:
            parts.append(f"All arguments of {self.passes_on} are valid as well.")
        return "\n\n".join(parts)

    def read(self, words: Sequence[str]) -> Request:
        """Read the words that a user typed.

        Raises:
            PruneError: If an argument is unknown, missing or not valid.
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
        takes = f"Arguments: {', '.join(self.known)}." if self.known else "It has no arguments."
        return f"'{key}' is not an argument of '{self.name}'. {hint}{takes}"


def nearest(word: str, known: Mapping[str, Any]) -> str:
    """The most similar known word; empty if no word is similar."""
    return next(iter(get_close_matches(word, known, n=1)), "")


def asks_for_help(word: str) -> bool:
    """Whether a word asks for help: `help`, `-h`, `--help`, ..."""
    return word.lstrip("-") in HELP


def table(rows: Mapping[str, str]) -> str:
    """A table with two columns: the left column is as wide as its longest entry, the right column is wrapped."""
    left = max(map(len, rows)) + 4
    lines: list[str] = []
    for name, text in rows.items():
        lines += wrap(text, WIDTH, initial_indent=f"  {name:{left - 2}}", subsequent_indent=" " * left)
    return "\n".join(lines)


def whole(name: str, text: str) -> int:
    """Read a whole number of at least 1.

    Raises:
        PruneError: If the text is not such a number.
    """
    if not text.isdigit() or not int(text):
        raise PruneError(f"{name}={text}: must be a whole number of at least 1.")
    return int(text)


def image_size(name: str, text: str) -> int:
    """Read the height and width of square images, in pixels.

    Raises:
        PruneError: If the text is not a possible image size.
    """
    if not text.isdigit() or not 32 <= int(text) <= 8192 or int(text) % 32:
        raise PruneError(f"{name}={text}: must be a multiple of 32 between 32 and 8192.")
    return int(text)


def truth(name: str, text: str) -> bool:
    """Read True or False.

    Raises:
        PruneError: If the text is neither.
    """
    if text.lower() not in ("true", "false", "1", "0"):
        raise PruneError(f"{name}={text}: must be True or False.")
    return text.lower() in ("true", "1")


def file(suffix: str) -> Callable[[str, str], Path]:
    """Make a reader for file names that must end in `suffix`."""

    def read(name: str, text: str) -> Path:
        path = Path(text)
        if path.suffix != suffix:
            raise PruneError(f"{name}={text}: the name must end in {suffix}.")
        return path

    return read


def _explained(argument: Argument) -> str:
    show_default = argument.default is not None and str(argument.default) not in argument.help
    return f"{argument.help} (default: {argument.default})" if show_default else argument.help


def _recipe_fields(key: str) -> list[str]:
    """Recipe fields that a name without its section can mean."""
    from yolo_prune.recipe.schema import Recipe

    last = key.rpartition(".")[2]
    sections = {name: getattr(part.annotation, "model_fields", {}) for name, part in Recipe.model_fields.items()}
    return [f"recipe.{name}.{last}" for name, fields in sections.items() if last in fields] + (
        [f"recipe.{last}"] if last in sections else []
    )
