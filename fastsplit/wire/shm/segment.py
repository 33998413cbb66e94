"""Segments: pieces of shared memory that one side makes and both map.

Two kinds. `Memfd`: memory without a name, whose descriptor crosses the unix socket; sealed against shrinking, gone with
the last process that has it. `Named`: a file in /dev/shm, for hosts without memfd or descriptor passing; its name is
random, its mode 0600, and the receiver removes the name as soon as it has opened the file.

Rules. A segment's memory is reserved when it is made, so that shortage is an ArenaFull here and never a SIGBUS later. A
receiver checks everything: the descriptor must be of memory that cannot shrink (a named file: of our own user, with
mode 0600), of the announced size, and reserved. A mapping lives as long as anything that lies in it, whatever happens
to the connection.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Callable

from ...errors import ArenaFull, RemoteProtocolError
from ...system.shortage import shortage, why
from ..transport.scheme import SHM_DIRECTORY, check_prefix

__all__ = ["Hook", "Memfd", "Named", "Segment", "make_private", "new_token", "why_no_memfd"]

Hook = Callable[[int, int], Callable[[], None] | None]
"""`hook(address, nbytes)` is called for each segment that was mapped. It may return a function, which is called before
the segment is unmapped."""

_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # Linux 5.14; not in the mmap module
_HUGE_PAGE_NBYTES = 2 * 1024**2
_MAP_FIXED = 0x10  # not in the mmap module
_STALE_S = 1.0
"""A file without a lock and older than this has lost its owner. A younger one may be about to be locked."""


class Segment:
    """One mapping. `address`: of its first byte. `memory`: the mmap, which arrays over it keep alive."""

    __slots__ = ("__weakref__", "_pid", "_unmapping", "address", "id", "memory", "nbytes")

    def __init__(self, segment_id: int, memory: mmap.mmap, hook: Hook | None) -> None:
        self.id = segment_id
        self.memory = memory
        self.nbytes = len(memory)
        self._pid = os.getpid()
        self._unmapping: Callable[[], None] | None = None
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if hook is not None:
            self._unmapping = hook(self.address, self.nbytes)

    def __del__(self) -> None:
        unmapping = getattr(self, "_unmapping", None)
        if unmapping is not None and os.getpid() == self._pid:  # the hook was called in the parent alone
            unmapping()


def why_no_memfd() -> str | None:
    """Why this system cannot make memfd segments; None if it can."""
    if not hasattr(os, "memfd_create") or not hasattr(fcntl, "F_ADD_SEALS"):
        return "this system has no memfd_create"
    try:
        os.close(os.memfd_create("fastsplit", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except OSError as error:
        return f"memfd_create: {why(error)}"
    return None


class Memfd:
    """Makes and opens segments without names."""

    kind = "memfd"

    def create(self, nbytes: int) -> tuple[mmap.mmap, int, str]:
        """New memory, its descriptor (the caller's, to send and close), and an empty name. Raises ArenaFull."""
        try:
            fd = os.memfd_create("fastsplit", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise _full(nbytes, error, "") from None
        try:
            os.ftruncate(fd, nbytes)
            # No seal against writing, since both sides write. Punching holes cannot be sealed: see docs/security.md.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return _map_reserved(fd, nbytes), fd, ""
        except OSError as error:
            os.close(fd)
            raise _full(nbytes, error, "") from None
        except BaseException:  # Ctrl-C: large memory takes a while
            os.close(fd)
            raise

    def attach(self, fd: int | None, name: str, nbytes: int) -> mmap.mmap:
        """Maps a segment of the peer's; closes the descriptor. Raises RemoteProtocolError, OSError."""
        if fd is None:
            raise RemoteProtocolError("segment: no descriptor came with it, expected one")
        try:
            if name:
                raise RemoteProtocolError(f"segment, name: {name!r}, expected none, since descriptors were agreed on")
            try:
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            except OSError as error:
                raise RemoteProtocolError(f"segment, descriptor: {error.strerror}, expected a memfd") from None
            if not seals & fcntl.F_SEAL_SHRINK:
                raise RemoteProtocolError(f"segment, seals: {seals:#x}, expected one against shrinking")
            return _map_checked(fd, nbytes)
        finally:
            os.close(fd)

    def close(self) -> None:
        """As Named.close: nothing to remove."""

    def leave(self) -> None:
        """As Named.leave: nothing to close."""


def new_token() -> str:
    """16 hexadecimal digits that cannot be guessed."""
    return secrets.token_hex(8)


class Named:
    """Makes and opens segments with names: `prefix`, a dash, a token of the receiver's, 16 random digits.

    The receiver chose the token for this connection: a peer cannot make it open a file of another connection.
    """

    kind = "named"

    def __init__(self, prefix: str, own_token: str, peer_token: str) -> None:
        self._made: dict[str, int] = {}  # path -> descriptor, whose lock says that the owner lives
        self.prefix = check_prefix(prefix)
        self._own_token = own_token
        self._peer_token = peer_token

    def create(self, nbytes: int) -> tuple[mmap.mmap, None, str]:
        """New memory, None instead of a descriptor, and its path. Raises ArenaFull."""
        self._settle()
        path = f"{self.prefix}-{self._peer_token}{new_token()}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _full(nbytes, error, SHM_DIRECTORY) from None
        self._made[path] = fd
        try:
            with contextlib.suppress(OSError):  # without locks stale names are not swept, see `sweep`
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.fchmod(fd, 0o600)  # the umask may have taken some away
            os.ftruncate(fd, nbytes)
            return _map_reserved(fd, nbytes), None, path
        except OSError as error:
            self._forget(path)
            raise _full(nbytes, error, SHM_DIRECTORY) from None
        except BaseException:
            self._forget(path)
            raise

    def attach(self, fd: int | None, name: str, nbytes: int) -> mmap.mmap:
        """Maps a segment of the peer's and removes its name. Raises RemoteProtocolError, OSError."""
        if fd is not None:
            os.close(fd)
            raise RemoteProtocolError("segment: a descriptor came with it, expected none, since names were agreed on")
        start = f"{self.prefix}-{self._own_token}"
        if not name.startswith(start) or not re.fullmatch("[0-9a-f]{16}", name[len(start) :]):
            raise RemoteProtocolError(f"segment, name: {name!r}, expected {start} and 16 hexadecimal digits")
        try:
            fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if shortage(error):
                raise
            raise RemoteProtocolError(f"segment, name: {name!r}: {error.strerror}") from None
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) != 0o600:
                raise RemoteProtocolError(
                    f"segment, name: {name!r} is of uid {found.st_uid} with mode {found.st_mode:#o}, "
                    f"expected a file of uid {os.geteuid()} with mode 0600"
                )
            os.unlink(name)
            return _map_checked(fd, nbytes)
        finally:
            os.close(fd)

    def _settle(self) -> None:
        """Forgets the names that the peer has taken."""
        for path in list(self._made):
            if not os.path.exists(path):
                self._forget(path)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Removes the names that the peer has not taken."""
        for path in list(self._made):
            self._forget(path)

    def leave(self) -> None:
        """For a forked child, which does not own the names: closes the descriptors."""
        while self._made:
            os.close(self._made.popitem()[1])

    def sweep(self) -> int:
        """Removes the names that dead owners left behind. Returns how many. A living owner holds a lock on its file."""
        swept = 0
        directory, _, name = self.prefix.rpartition("/")
        pattern = re.compile(re.escape(name) + "-[0-9a-f]{32}")
        try:
            entries = [entry for entry in os.listdir(directory) if pattern.fullmatch(entry)]
        except OSError:
            return 0
        for entry in entries:
            path = f"{directory}/{entry}"
            with contextlib.suppress(OSError):  # gone meanwhile, another user's, in use, or no locks here
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    found = os.fstat(fd)
                    if found.st_uid == os.geteuid() and time.time() - found.st_mtime > _STALE_S:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        os.unlink(path)
                        swept += 1
                finally:
                    os.close(fd)
        return swept

    def _forget(self, path: str) -> None:
        fd = self._made.pop(path, None)
        if fd is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            os.close(fd)


def make_private(memory: mmap.mmap) -> None:
    """Puts a private copy, with the present content, in the place of shared memory."""
    content = memory[:]
    replace = ctypes.PyDLL(None).mmap
    replace.restype, word = ctypes.c_void_p, ctypes.c_ssize_t
    at = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    flags = _MAP_FIXED | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if replace(at, word(len(memory)), mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, word(0)) == at.value:
        memory[:] = content


def _full(nbytes: int, error: OSError, directory: str) -> ArenaFull:
    """`directory`: of the file system that the segment was to lie in, empty for a memfd."""
    if error.errno in (errno.ENOSPC, errno.EFAULT):  # EFAULT: a page that cannot be filled
        reason, may_wait = f"{os.strerror(errno.ENOSPC)}: {_left(directory)}", True
    else:
        reason, may_wait = why(error), error.errno == errno.ENOMEM
    return ArenaFull(f"no shared memory for a segment of {nbytes} bytes: {reason}", may_wait=may_wait)


def _left(directory: str) -> str:
    """How much memory is left where segments are made."""
    if not directory:
        return "the system has no memory left for it, or this process's control group may have no more"
    try:
        found = os.statvfs(directory)
    except OSError as error:
        return f"{directory}: {why(error)}"
    free, size = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    return f"{directory} is full: {free} of its {size} bytes are free"


def _map(fd: int, nbytes: int) -> mmap.mmap:
    if sys.version_info >= (3, 13):
        memory = mmap.mmap(fd, nbytes, trackfd=False)  # else the mmap keeps a descriptor of its own
    else:
        memory = mmap.mmap(fd, nbytes)
    if nbytes >= _HUGE_PAGE_NBYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: smaller pages do, more slowly
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _map_reserved(fd: int, nbytes: int) -> mmap.mmap:
    """Maps new memory, with all its pages there. Raises OSError if there are not enough."""
    memory = _map(fd, nbytes)
    # Page faults first, since only these give huge pages; then posix_fallocate, which older kernels have, too. Both are
    # errors, not signals, where memory is short.
    _populate(memory, _MADV_POPULATE_WRITE)
    os.posix_fallocate(fd, 0, nbytes)
    return memory


def _map_checked(fd: int, nbytes: int) -> mmap.mmap:
    found = os.fstat(fd)
    if found.st_size != nbytes or nbytes <= 0:
        raise RemoteProtocolError(f"segment, size: {found.st_size} bytes, expected {nbytes}, as announced")
    if found.st_blocks * 512 < nbytes:
        # Touching it could take memory of our own control group, or end this process by a signal.
        raise RemoteProtocolError(f"segment, size: {found.st_blocks * 512} bytes are reserved, expected {nbytes}")
    memory = _map(fd, nbytes)
    _populate(memory, _MADV_POPULATE_READ)
    return memory


def _populate(memory: mmap.mmap, advice: int) -> None:
    try:
        memory.madvise(advice)
    except OSError as error:
        if error.errno != errno.EINVAL:  # an older kernel: pages are mapped when they are touched
            raise
