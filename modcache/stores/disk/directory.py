"""Open, list and unlink files in a cache directory so that nothing else is ever touched."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ...errors import FormatVersionError, UsageError
from .frames import FORMAT, LOG_MAGIC, LOG_START_BYTES, ROWS_HEAD_BYTES, ROWS_MAGIC
from .locks import is_locked, locked
from .names import (
    FORMAT_FILE,
    MANIFEST,
    ROWS_FOLDER,
    WRITERS_FOLDER,
    SegmentName,
    is_folder,
    is_writer,
    new_writer,
    segment_of,
)

__all__ = ["Directory"]

_NO_FOLLOW: Final = getattr(os, "O_NOFOLLOW", 0)
# A pipe that somebody put in a file's place must not block whoever opens it.
_SAFE: Final = _NO_FOLLOW | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"))
_MOST_FORMAT_BYTES: Final = 1 << 16
_NOTHING_OF_OURS: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL)


class Directory:
    """A cache directory: what lies in it by our names, and nothing else.

    No symbolic link inside of it is followed, and only regular files of our names are opened. Files that
    somebody else put there are neither listed nor touched.

    Args:
        path: of the directory, which need not exist; it may be reached through links.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.realpath(path))

    # --- the directory as a whole ---------------------------------------------------------------------

    def check(self) -> None:
        """Raises what keeps the directory from being used at all.

        Raises:
            UsageError: it is a file.
            FormatVersionError: it was written in a format that is not known here.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(
                f"{str(self.path)!r} is a file. Give the path of a directory, or one that is not there yet."
            )
        version = self.format()
        if version is not None and version > FORMAT:
            raise FormatVersionError(
                f"The cache directory {str(self.path)!r} has format {version}, and this modcache knows "
                f"format {FORMAT}. Update modcache, or use another directory."
            )

    def is_writable(self) -> bool:
        """Whether files may be made there, or where it would be made; where that cannot be known, they may."""
        try:
            place = self.path
            while not place.exists() and place != place.parent:
                place = place.parent
            return os.access(place, os.W_OK | os.X_OK)
        except OSError:  # then writing will tell
            return True

    def format(self) -> int | None:
        """The number of the format that the directory has; None where it does not say."""
        try:
            with self.opened((), FORMAT_FILE) as file:
                facts = json.loads(os.read(file, _MOST_FORMAT_BYTES))
            found = facts["format"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return found if type(found) is int else None

    def prepare(self, made_with: str = "modcache") -> None:
        """Makes the directory and its folders, private to the user, and writes down the format.

        Raises:
            OSError: it cannot be written.
        """
        if not self.path.is_dir():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
        for name in (ROWS_FOLDER, WRITERS_FOLDER):
            self.make_folder((name,))
        if not os.path.lexists(self.path / FORMAT_FILE):
            text = json.dumps({"format": FORMAT, "made_with": made_with}, indent=2) + "\n"
            # Two processes may do this at once: each writes a file of its own, and the first name stays.
            beside = f"{FORMAT_FILE}.{new_writer()}"
            with self.opened((), beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
                os.write(file, text.encode("ascii"))
            os.replace(self.path / beside, self.path / FORMAT_FILE)

    def make_folder(self, parts: tuple[str, ...]) -> None:
        """Makes a folder within the directory if it is not there.

        Raises:
            OSError: it cannot be made, or something else has its name.
        """
        place = self.path.joinpath(*parts)
        with contextlib.suppress(FileExistsError):
            os.mkdir(place, 0o700)
        if not stat.S_ISDIR(os.lstat(place).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "a cache directory has something else in the place of", str(place))

    # --- namespaces and segments ----------------------------------------------------------------------

    def folders(self) -> list[str]:
        """The folders of namespaces, sorted."""
        return [
            name
            for name in sorted(filter(is_folder, self._listed((ROWS_FOLDER,))))
            if _is_real_folder(self.place_of(name))
        ]

    def place_of(self, folder: str) -> Path:
        """The path of the folder of a namespace."""
        return self.path / ROWS_FOLDER / folder

    def segments(self, folder: str) -> list[SegmentName]:
        """The segments of which at least one file is there, sorted."""
        return sorted(set(self.names_in(folder).values()))

    def names_in(self, folder: str) -> dict[str, SegmentName]:
        """The files of segments that are there, by their names."""
        found = ((name, segment_of(name)) for name in self._listed((ROWS_FOLDER, folder)))
        return {name: segment for name, segment in found if segment is not None}

    @contextlib.contextmanager
    def opened_segment(self, folder: str, name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
        """A file of a segment as a descriptor for the time of the block."""
        with self.opened((ROWS_FOLDER, folder), name, flags) as file:
            yield file

    def open_segment(self, folder: str, name: str, flags: int = os.O_RDONLY) -> int:
        """A descriptor of a file of a segment, which the caller closes.

        Raises:
            OSError: it cannot be opened, or is no regular file.
        """
        return self.open((ROWS_FOLDER, folder), name, flags)

    def files_of(self, folder: str, segment: SegmentName) -> dict[str, bool]:
        """The files of a segment that are there, each with whether it is ours.

        It is if it begins as ours do, is too short to tell, or lost its beginning: a system that lost power may
        leave zeros in a file. What begins otherwise is somebody else's.

        Raises:
            OSError: one cannot be opened.
        """
        found = {name: self._is_ours(folder, name) for name in (segment.log, segment.rows)}
        return {name: ours for name, ours in found.items() if ours is not None}

    def _is_ours(self, folder: str, name: str) -> bool | None:
        try:
            with self.opened_segment(folder, name) as file:
                return _begins_as_ours(name, file)
        except OSError as error:
            if error.errno in _NOTHING_OF_OURS:
                return None
            raise

    def remove_segment(self, folder: str, segment: SegmentName) -> int:
        """Unlinks the files of a segment that are ours; the bytes that they had.

        A file that is not ours stays. The log goes first: rows without a log are believed by nobody.

        Raises:
            OSError: a file cannot be unlinked.
        """
        freed = 0
        for name in (segment.log, segment.rows):
            if self._is_ours(folder, name):
                place = self.place_of(folder) / name
                with contextlib.suppress(FileNotFoundError):
                    size = os.lstat(place).st_size
                    os.unlink(place)
                    freed += size
        return freed

    def remove_segments(self, folder: str) -> None:
        """Unlinks all files of segments in a folder that are ours.

        Raises:
            OSError: a file cannot be unlinked; all others are.
        """
        with contextlib.ExitStack() as removing:  # which goes on after an error
            for segment in self.segments(folder):
                removing.callback(self.remove_segment, folder, segment)

    def remove_folder(self, folder: str) -> bool:
        """Removes the folder of a namespace with its manifest if nothing else is in it; whether it is gone."""
        with contextlib.suppress(OSError):
            if not self._is_within((ROWS_FOLDER, folder)):
                return not os.path.lexists(self.place_of(folder))
            if set(self._listed((ROWS_FOLDER, folder))) <= {MANIFEST}:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.place_of(folder) / MANIFEST)
            os.rmdir(self.place_of(folder))
            return True
        return not os.path.lexists(self.place_of(folder))

    # --- writers --------------------------------------------------------------------------------------

    def writers(self) -> list[str]:
        """The writing processes that left a trace, dead or alive, sorted."""
        return sorted(filter(is_writer, self._listed((WRITERS_FOLDER,))))

    def sign_in(self, writer: str) -> int:
        """Notes that a writer lives, for as long as the descriptor that comes back stays open.

        Raises:
            OSError: the directory cannot be written.
        """
        while True:
            file = self.open((WRITERS_FOLDER,), writer, os.O_RDWR | os.O_CREAT)
            with contextlib.suppress(OSError):  # a file system without locks; then it counts as alive for good
                locked(file, wait=True)
            with contextlib.suppress(OSError):
                if os.fstat(file).st_nlink:  # else somebody took it for dead before it was locked
                    return file
            os.close(file)

    def sign_out(self, writer: str, file: int) -> None:
        """Notes that a writer writes no more."""
        with contextlib.suppress(OSError):
            os.unlink(self.path / WRITERS_FOLDER / writer)
        with contextlib.suppress(OSError):
            os.close(file)

    def is_alive(self, writer: str) -> bool:
        """Whether a writer may still write; where that cannot be known, it may."""
        try:
            with self.opened((WRITERS_FOLDER,), writer, os.O_RDONLY) as file:
                return is_locked(file)
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def forget_writer(self, writer: str) -> None:
        """Removes the trace of a dead writer."""
        with contextlib.suppress(OSError):
            os.unlink(self.path / WRITERS_FOLDER / writer)

    # --- files ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def opened(self, parts: tuple[str, ...], name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
        """A regular file in a folder of the directory as a descriptor for the time of the block."""
        file = self.open(parts, name, flags)
        try:
            yield file
        finally:
            os.close(file)

    def open(self, parts: tuple[str, ...], name: str, flags: int = os.O_RDONLY) -> int:
        """A descriptor of a regular file in a folder of the directory, without following a link.

        Raises:
            OSError: it cannot be opened, a folder on the way is no folder, or it is no regular file.
        """
        if os.open not in os.supports_dir_fd:
            return _opened(self.path.joinpath(*parts, name), flags)
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in parts:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | _NO_FOLLOW, dir_fd=folder)
                # In this order: an interrupt may leak a descriptor, but must never close one twice.
                outer, folder = folder, inner
                os.close(outer)
            return _opened(name, flags, folder)
        finally:
            os.close(folder)

    def _is_within(self, parts: tuple[str, ...]) -> bool:
        """Whether a folder is in the directory, and not behind a link."""
        return all(_is_real_folder(self.path.joinpath(*parts[: end + 1])) for end in range(len(parts)))

    def _listed(self, parts: tuple[str, ...]) -> list[str]:
        try:
            return os.listdir(self.path.joinpath(*parts)) if self._is_within(parts) else []
        except OSError:
            return []


def _is_real_folder(place: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(place).st_mode)
    except OSError:
        return False


def _begins_as_ours(name: str, file: int) -> bool:
    least = LOG_START_BYTES if name.endswith(".log") else ROWS_HEAD_BYTES
    head = os.pread(file, least, 0)
    # Either beginning: the two files of a segment may have changed places.
    return len(head) < least or head.startswith((LOG_MAGIC, ROWS_MAGIC)) or not any(head)


def _opened(path: str | Path, flags: int, folder: int | None = None) -> int:
    try:
        file = os.open(path, flags | _SAFE, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP):  # a socket, or a device that is not there
            raise OSError(errno.EINVAL, "not a regular file", str(path)) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    except BaseException:
        os.close(file)
        raise
    return file
