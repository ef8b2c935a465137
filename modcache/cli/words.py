"""What is typed after ``modcache``: commands, options, sizes, ages, and where the directory is among the words."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import UsageError
from ..stores.disk.names import FORMAT_FILE

__all__ = ["COMMANDS", "Command", "age_of", "key_of", "parsed", "parting", "size_of"]


@dataclass(frozen=True, slots=True)
class Command:
    """One of the commands.

    Args:
        name: the first word.
        words: what comes after the directory, for people.
        about: one sentence.
        options: adds its options to a parser.
        least: how many words come after the directory.
        most: the same.
    """

    name: str
    words: str
    about: str
    options: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    least: int = 0
    most: float = 0

    @property
    def usage(self) -> str:
        """The line that is shown when something is wrong."""
        return f"modcache {self.name} [DIRECTORY]{' ' * bool(self.words)}{self.words} [options]"


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repair", action="store_true", help="write damaged segments anew, or unlink them")


def _gc_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-bytes", type=size_of, metavar="SIZE", help="drop the longest unused namespaces until so much is left"
    )
    parser.add_argument("--older-than", type=age_of, metavar="AGE", help="drop namespaces not used for so long")
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be done")


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, metavar="FILE", help=".safetensors, .npy or .parquet")


COMMANDS: Final = {
    command.name: command
    for command in (
        Command("ls", "", "List the namespaces: class, rows, bytes, last use, and what differs."),
        Command("show", "NAMESPACE", "Show one namespace, with its manifest.", least=1, most=1),
        Command("stats", "", "Show the totals of a directory."),
        Command("verify", "", "Compare every row with its checksum.", _verify_options),
        Command("gc", "", "Reclaim what nobody can use any more, and keep limits.", _gc_options),
        Command("clear", "NAMESPACE", "Drop all rows of a namespace.", least=1, most=1),
        Command("forget", "KEY...", "Wipe rows from the files, in all namespaces.", least=1, most=math.inf),
        Command("export", "NAMESPACE", "Write keys and rows into one file.", _export_options, least=1, most=1),
        Command("du", "", "Show where the bytes of a directory are."),
    )
}


def parsed(command: Command, words: Sequence[str]) -> argparse.Namespace:
    """The options and words of a command; leaves the process with status 2 if they cannot be right."""
    parser = argparse.ArgumentParser(
        prog=f"modcache {command.name}", usage=command.usage, description=command.about, allow_abbrev=False
    )
    parser.add_argument(
        "words", nargs="*", metavar=f"DIRECTORY {command.words}".strip(), help="the cache directory comes first"
    )
    command.options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_intermixed_args(words)


def parting(command: Command, words: Sequence[str]) -> tuple[str, list[str]]:
    """The directory, and the words after it; where none is given it is the current one, if that is a cache directory.

    Raises:
        UsageError: it is not clear what is meant.
    """
    rest = list(words)
    if len(rest) > command.least and not (command.most == math.inf and _is_key(rest[0])):
        directory, rest = rest[0], rest[1:]
    elif os.path.lexists(FORMAT_FILE):
        directory = os.curdir
    else:
        raise UsageError(f"Which directory? Usage: {command.usage}")
    if not command.least <= len(rest) <= command.most:
        raise UsageError(f"Too many words: {' '.join(rest[int(command.least) :])!r}. Usage: {command.usage}")
    if rest and not os.path.lexists(directory) and os.path.isdir(rest[0]):
        raise UsageError(f"There is no directory {directory!r}; the directory comes first. Usage: {command.usage}")
    return directory, rest


def _is_key(word: str) -> bool:
    return re.fullmatch(r"[0-9a-fA-F]{32}", word) is not None and not os.path.isdir(word)


# --- values ---------------------------------------------------------------------------------------------

_SIZES: Final = {
    "": 1,
    "b": 1,
    **{prefix + "b": 1000 ** (power + 1) for power, prefix in enumerate("kmgtp")},
    **{prefix + "ib": 1024 ** (power + 1) for power, prefix in enumerate("kmgtp")},
    **{prefix: 1024 ** (power + 1) for power, prefix in enumerate("kmgtp")},
}
_AGES: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
_VALUE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)")


def size_of(text: str) -> int:
    """The bytes that a text says.

    >>> size_of("10GB"), size_of("1.5KiB"), size_of("2k"), size_of("7")
    (10000000000, 1536, 2048, 7)
    """
    return math.floor(_value(text, _SIZES, "a size such as 10GB, 512MiB or 1000000"))


def age_of(text: str) -> float:
    """The seconds that a text says.

    >>> age_of("30d"), age_of("1.5h")
    (2592000, 5400.0)
    """
    return _value(text, _AGES, "an age such as 30d, 12h or 90m")


def key_of(text: str) -> bytes:
    """The key that a text says.

    Raises:
        UsageError: it is none.
    """
    if re.fullmatch(r"[0-9a-fA-F]{32}", text) is None:
        raise UsageError(f"A key is 32 hexadecimal digits; found {text!r}.")
    return bytes.fromhex(text)


def _value(text: str, units: dict[str, Any], expected: str) -> float:
    found = _VALUE.fullmatch(text.strip().lower())
    if found is None or found[2] not in units:  # an age without a unit could be anything
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return float(found[1]) * float(units[found[2]]) if "." in found[1] else int(found[1]) * units[found[2]]
