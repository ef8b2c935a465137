"""From the words of a command line to its status: parse, ask upkeep, print."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from ..errors import ModcacheError
from ..stores.disk import upkeep
from ..stores.disk.upkeep.reports import Report
from .text import text_of
from .words import COMMANDS, key_of, parsed, parting

__all__ = ["main"]

FINE: Final = 0
LEFT: Final = 1
"""Damage, nothing found, or something could not be done."""
USAGE: Final = 2

Progress = Callable[[int, int], None]
Answer = tuple[int, Report]


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command; the status for the shell: 0 fine, 1 damage or nothing found, 2 wrong usage."""
    given = list(sys.argv[1:] if words is None else words)
    try:
        return _status(given)
    except SystemExit as stop:  # argparse has said what is wrong, or has shown the help
        return USAGE if stop.code else FINE
    except upkeep.NoNamespaceError as error:
        _say(f"modcache: {error}", sys.stderr)
        return LEFT
    except ModcacheError as error:
        _say(f"modcache: {error}", sys.stderr)
        return USAGE
    except BrokenPipeError:  # whoever read has seen enough; nothing more can be said on leaving, either
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return LEFT
    except OSError as error:
        place = f": {error.filename}" if error.filename is not None else ""
        _say(f"modcache: {error.strerror or error}{place}", sys.stderr)
        return LEFT
    except KeyboardInterrupt:
        return 130


def _status(given: list[str]) -> int:
    """Does what was asked for, and says it."""
    if not given or given[0] in ("-h", "--help"):
        _say(_overview(), sys.stdout if given else sys.stderr)
        return FINE if given else USAGE
    if given[0] == "--version":
        from importlib.metadata import version

        _say(f"modcache {version('modcache')}", sys.stdout)
        return FINE
    command = COMMANDS.get(given[0])
    if command is None:
        _say(f"modcache: there is no command {given[0]!r}.\n\n{_overview()}", sys.stderr)
        return USAGE
    options = parsed(command, given[1:])
    directory, rest = parting(command, options.words)
    status, report = _RUN[command.name](directory, rest, options)
    _say(json.dumps(report.to_dict(), indent=2) if options.json else text_of(report), sys.stdout)
    return status


def _overview() -> str:
    lines = ["usage: modcache COMMAND [DIRECTORY] ...", ""]
    width = max(len(f"{command.name} {command.words}") for command in COMMANDS.values())
    lines += [f"  {f'{one.name} {one.words}':<{width}}  {one.about}" for one in COMMANDS.values()]
    lines += [
        "",
        "The directory comes first; without one it is the current directory, if that is a cache directory.",
        "A namespace may be given by the beginning of its name. Each command takes --json and --help.",
        "Status: 0 fine; 1 damage, nothing found, or something left to do; 2 wrong usage.",
    ]
    return "\n".join(lines)


# --- the commands ---------------------------------------------------------------------------------------


def _ls(directory: str, rest: list[str], options: Namespace) -> Answer:
    return FINE, upkeep.listing(directory)


def _show(directory: str, rest: list[str], options: Namespace) -> Answer:
    return FINE, upkeep.show(directory, rest[0])


def _stats(directory: str, rest: list[str], options: Namespace) -> Answer:
    return FINE, upkeep.stats(directory)


def _verify(directory: str, rest: list[str], options: Namespace) -> Answer:
    with _bar("B") as progress:
        report = upkeep.verify(directory, repair=options.repair, progress=progress)
    return FINE if report.fine else LEFT, report


def _gc(directory: str, rest: list[str], options: Namespace) -> Answer:
    with _bar(" namespaces") as progress:
        report = upkeep.gc(
            directory,
            max_bytes=options.max_bytes,
            older_than=options.older_than,
            dry_run=options.dry_run,
            progress=progress,
        )
    return LEFT if report.waiting or report.in_use else FINE, report


def _clear(directory: str, rest: list[str], options: Namespace) -> Answer:
    names = [facts.namespace for facts in upkeep.listing(directory).namespaces]
    return FINE, upkeep.clear(directory, upkeep.find_namespace(names, rest[0]))


def _forget(directory: str, rest: list[str], options: Namespace) -> Answer:
    keys = [key_of(word) for word in rest]
    with _bar(" namespaces") as progress:
        report = upkeep.forget(directory, keys, progress=progress)
    return FINE if report.found and report.wiped else LEFT, report


def _export(directory: str, rest: list[str], options: Namespace) -> Answer:
    with _bar("B") as progress:
        report = upkeep.export(directory, rest[0], options.to, progress=progress)
    return LEFT if report.damaged else FINE, report


def _du(directory: str, rest: list[str], options: Namespace) -> Answer:
    return FINE, upkeep.du(directory)


_RUN: Final[dict[str, Callable[[str, list[str], Namespace], Answer]]] = {
    "ls": _ls,
    "show": _show,
    "stats": _stats,
    "verify": _verify,
    "gc": _gc,
    "clear": _clear,
    "forget": _forget,
    "export": _export,
    "du": _du,
}


# --- the terminal ---------------------------------------------------------------------------------------


def _say(text: str, stream: object) -> None:
    assert hasattr(stream, "write")
    stream.write(f"{text}\n")
    stream.flush()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _bar(unit: str) -> Iterator[Progress | None]:
    """A bar on a terminal, and nothing in a file or a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(file=sys.stderr, unit=unit, unit_scale=True, leave=False) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell
