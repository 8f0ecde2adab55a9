"""Files of strangers opened once and safely; files written so that a failed write leaves the old ones in place."""

import codecs
import contextlib
import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from reft_edge.errors import ReftEdgeError
from reft_edge.unfinished import PREFIX, held, remove, unfinished

_PIECE = 1 << 20


def open_regular(path: Path, follow: bool = True) -> BinaryIO:
    """Open a regular file for reading. What `os.fstat` says of the result is what is read, whatever the name becomes.

    Nothing is waited for: a FIFO, a device or a folder is refused at once, and so is a link unless `follow`.
    Raises OSError, whose `strerror` says which it was.
    """
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY", *(() if follow else ("O_NOFOLLOW",))):
        flags |= getattr(os, name, 0)
    if not follow and not hasattr(os, "O_NOFOLLOW") and path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link", str(path))
    try:
        handle = os.open(path, flags)
    except OSError as error:
        if not follow and error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link", str(path)) from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_text(path: Path, name: object = None) -> str:
    """A text file that the user named, as `decode_text` reads it. Raises ReftEdgeError if it cannot be read, too.

    `name` is what errors call it, by default its path.
    """
    name = path if name is None else name
    return decode_text(read_content(path, name), name)


def read_content(path: Path, name: object) -> bytes:
    """The bytes of a file, or of a pipe, that the user named. Raises ReftEdgeError, which names `name`, if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReftEdgeError(f"cannot read {name}: {error.strerror}") from error


def decode_text(content: bytes, name: object) -> str:
    """UTF-8, with or without a byte order mark, as text whose lines end with a newline alone.

    Raises ReftEdgeError, which names `name`, for UTF-16 and UTF-32, for bytes that are not UTF-8, and for zero bytes.
    """
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise ReftEdgeError(f"{name} is UTF-32 text; save it as UTF-8")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 2 * content[:100].count(0) >= max(
        len(content[:100]) - 1, 1
    ):
        raise ReftEdgeError(f"{name} is UTF-16 text; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ReftEdgeError(
            f"{name} is not UTF-8 text: line {line} has the byte 0x{content[error.start]:02x}; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ReftEdgeError(f"{name} holds a zero byte, so it is no text; expected UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_place(path: Path, room: int = 1) -> None:
    """Raise ReftEdgeError if a file of `room` bytes cannot be written here: to be called before long work whose result it holds.

    It is tried, since neither permissions nor free space alone tell: read-only disks, quotas, an administrator's account.
    """
    try:
        if not path.parent.is_dir():
            raise ReftEdgeError(f"the folder of {path} does not exist; make it first")
        _mode_to_keep(path)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=PREFIX) as probe:
            for start in range(0, room, _PIECE):
                probe.write(bytes(min(_PIECE, room - start)))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise ReftEdgeError(f"cannot write {path}: {error.strerror}; choose another place") from error


def check_apart(output: Path, *inputs: Path | None) -> None:
    """Raise ReftEdgeError if a file to be written is one of those that are read."""
    for given in inputs:
        if given is not None and same_file(output, given):
            raise ReftEdgeError(f"{output} is read as {given}, and would be replaced; give another name")


def same_file(one: Path, other: Path) -> bool:
    """Whether two names stand for one file, which need not be there yet."""
    try:
        return one.samefile(other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def write_atomically(
    path: Path, content: bytes | Iterable[bytes | memoryview], mode: int | None = None
) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename.

    `content`: all of it, or its pieces one after the other. `mode`: its permissions, by default those of the file that it replaces.

    Raises ReftEdgeError if the folder is missing or cannot be written, or if `path` is something else than a file; it is
    then as it was before.
    """
    try:
        kept = _mode_to_keep(path) if mode is None else mode
        temporary = unfinished(path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        handle = os.open(temporary, flags, 0o666 if kept is None else kept)
    except OSError as error:
        raise ReftEdgeError(f"cannot write {path}: {error.strerror}; choose another place") from error
    try:
        with held(temporary), os.fdopen(handle, "wb") as file:
            file.writelines((content,) if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        if kept is not None:
            temporary.chmod(kept)
        os.replace(temporary, path)
    except OSError as error:
        raise ReftEdgeError(f"cannot write {path}: {error.strerror}") from error
    finally:
        remove(temporary)


def _mode_to_keep(path: Path) -> int | None:
    """The permissions of an existing file; None if there is none. Raises OSError if `path` is something else."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return stat.S_IMODE(mode)


def replace_file(path: Path, content: bytes, temporary: Path, mode: int = 0o666) -> None:
    """Write a file so that after a power cut, too, it has its old content or the new one: flushed to disk before and after
    it gets its name. Missing folders are made.

    `mode` are its permissions, before the user's umask. `temporary` is on the same file system and always the same one for
    the same writers, who take turns: whatever becomes of them, there is never more than one left over. Raises ReftEdgeError
    if `path` cannot be written; it is then as it was.
    """
    try:
        make_folder(path.parent)
        # never written through: it may be a link, or another name of `path`
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ReftEdgeError(f"cannot write {path}: {error.strerror}") from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it where they are missing, to last. Raises OSError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk, where the system has a way to. Raises OSError."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def name_to_store(path: Path) -> str:
    """A file's name for an adapter's description: at most 200 characters, and UTF-8 whatever bytes the name has."""
    return path.name[:200].encode(errors="replace").decode()


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
