"""What this process or its system has run out of: descriptors, memory, threads. Named with the limit and its value.

Rule. A shortage of ours is a ResourceError or an ArenaFull, never the peer's fault.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import threading

from ..errors import ResourceError

__all__ = ["import_shortage", "no_descriptor", "no_memory", "shortage", "start", "why"]


def no_descriptor() -> str:
    """That there is no descriptor left, and the limit."""
    return f"no file descriptor left: RLIMIT_NOFILE is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} (ulimit -n)"


def no_memory() -> str:
    """That there is no memory left, and the limits that are set."""
    return f"{os.strerror(errno.ENOMEM)}{_memory_limits()}"


def shortage(error: OSError) -> str | None:
    """What is short here, if that is why a system call failed; None for any other reason."""
    if isinstance(error, socket.gaierror):  # a resolver that could not open its files only says that it failed
        return _descriptor_shortage()
    if error.errno == errno.EMFILE:
        return f"{error.strerror}: {no_descriptor()}"
    if error.errno == errno.ENFILE:
        return f"{error.strerror}: the system has no file descriptor left: fs.file-max is {_setting('fs/file-max')}"
    if error.errno == errno.ETOOMANYREFS:
        return f"{error.strerror}: too many descriptors under way: {no_descriptor()}"
    if error.errno == errno.ENOMEM:
        return no_memory()
    return None


def import_shortage(error: ImportError | OSError) -> str | None:
    """The same for a module that could not be imported."""
    return shortage(error) if isinstance(error, OSError) else _descriptor_shortage()


def _descriptor_shortage() -> str | None:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return shortage(error)
    return None


def why(error: OSError) -> str:
    """Why a system call failed; of a shortage, the limit."""
    return shortage(error) or error.strerror or str(error)


def start(thread: threading.Thread) -> None:
    """Starts a thread. Raises ResourceError if the system has none left."""
    try:
        thread.start()
    except RuntimeError as error:
        limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        named = "RLIMIT_NPROC is " + ("unlimited" if limit == resource.RLIM_INFINITY else f"{limit} (ulimit -u)")
        most = _setting("kernel/threads-max")
        raise ResourceError(f"no thread left: {error}: {named}, threads-max is {most}") from None


def _memory_limits() -> str:
    """Limits that memory may have run into, of those that are set."""
    found = []
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        found.append(f"RLIMIT_AS is {limit} bytes (ulimit -v)")
    with contextlib.suppress(OSError, ValueError):
        most = int(_setting("vm/max_map_count"))
        with open("/proc/self/maps", "rb") as maps:
            mappings = sum(1 for _ in maps)
        if mappings > most * 0.9:
            found.append(f"{mappings} mappings, vm.max_map_count is {most}")
    return ": " + ", ".join(found) if found else ""


def _setting(name: str) -> str:
    try:
        with open(f"/proc/sys/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:  # not mounted, or no descriptor for it
        return "not known"
