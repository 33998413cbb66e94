"""Segments: what is made, what is believed of a peer's, and that no name and no mapping outlives its use."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import stat
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import SHM_PREFIX

from fastsplit.errors import AddressError, ArenaFull, RemoteProtocolError
from fastsplit.wire.shm import segment as module
from fastsplit.wire.shm.segment import Memfd, Named, Segment, new_token, why_no_memfd
from fastsplit.wire.transport.scheme import check_prefix

NBYTES = 64 * 1024
TOKEN, PEER_TOKEN = "0123456789abcdef", "fedcba9876543210"
memfd = pytest.mark.skipif(why_no_memfd() is not None, reason=str(why_no_memfd()))


def _mapped(inode: int) -> bool:
    return any(f" {inode} " in line for line in Path("/proc/self/maps").read_text().splitlines())


# ---- memfd -----------------------------------------------------------------------------------------------------------


@memfd
def test_memfd_is_shared_sealed_and_reserved() -> None:
    memory, fd, name = Memfd().create(NBYTES)
    assert name == "" and len(memory) == NBYTES and not os.get_inheritable(fd)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert os.fstat(fd).st_blocks * 512 >= NBYTES
    for size in (0, 2 * NBYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    other = Memfd().attach(os.dup(fd), "", NBYTES)
    memory[5] = 7
    assert other[5] == 7
    other[NBYTES - 1] = 9
    assert memory[NBYTES - 1] == 9
    os.close(fd)
    memory[6] = 8  # the mapping needs no descriptor
    assert other[6] == 8


def _fd(nbytes: int, *, seals: int = 0, reserve: bool = True) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    if reserve:
        os.posix_fallocate(fd, 0, nbytes)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


@memfd
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: _fd(NBYTES), "segment, seals: 0x0, expected one against shrinking"),
        (lambda: _fd(NBYTES, seals=fcntl.F_SEAL_GROW), "segment, seals: 0x4, expected one against shrinking"),
        (
            lambda: _fd(NBYTES - 4096, seals=fcntl.F_SEAL_SHRINK),
            f"segment, size: {NBYTES - 4096} bytes, expected {NBYTES}, as announced",
        ),
        (
            lambda: _fd(NBYTES + 4096, seals=fcntl.F_SEAL_SHRINK),
            f"segment, size: {NBYTES + 4096} bytes, expected {NBYTES}, as announced",
        ),
        (
            lambda: _fd(NBYTES, seals=fcntl.F_SEAL_SHRINK, reserve=False),
            f"segment, size: 0 bytes are reserved, expected {NBYTES}",
        ),
        (_pipe, "segment, descriptor: Invalid argument, expected a memfd"),
        (lambda: os.open(__file__, os.O_RDONLY), "segment, descriptor: Invalid argument, expected a memfd"),
    ],
    ids=["no seals", "another seal", "too small", "too large", "sparse", "a pipe", "a file"],
)
def test_memfd_of_a_peer_that_lies(make: object, text: str) -> None:
    fd = make()  # type: ignore[operator]
    with pytest.raises(RemoteProtocolError) as caught:
        Memfd().attach(fd, "", NBYTES)
    assert str(caught.value) == text
    with pytest.raises(OSError, match="Bad file descriptor"):  # closed, whatever it was
        os.fstat(fd)


@memfd
def test_memfd_with_the_wrong_things() -> None:
    with pytest.raises(RemoteProtocolError, match="segment: no descriptor came with it, expected one"):
        Memfd().attach(None, "", NBYTES)
    fd = _fd(NBYTES, seals=fcntl.F_SEAL_SHRINK)
    with pytest.raises(RemoteProtocolError, match="segment, name: '/dev/shm/x', expected none, since descriptors were"):
        Memfd().attach(fd, "/dev/shm/x", NBYTES)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@memfd
def test_a_read_only_memfd_is_refused() -> None:
    fd = _fd(NBYTES, seals=fcntl.F_SEAL_SHRINK)
    other = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    with pytest.raises(PermissionError):
        Memfd().attach(other, "", NBYTES)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(other)


# ---- shortage --------------------------------------------------------------------------------------------------------


def _fail(code: int) -> object:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("kind", ["memfd", "named"])
@pytest.mark.parametrize(
    ("call", "code"),
    [("ftruncate", errno.EFBIG), ("posix_fallocate", errno.ENOSPC), ("open", errno.EMFILE)],
)
def test_shortage_is_an_error_here_and_leaves_nothing(
    kind: str, call: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """no_leaks sees the descriptor and the name."""
    factory = Memfd() if kind == "memfd" else Named(SHM_PREFIX, TOKEN, PEER_TOKEN)
    if call == "open" and kind == "memfd":
        call = "memfd_create"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, _fail(code))
        with pytest.raises(ArenaFull) as caught:
            factory.create(NBYTES)
    assert str(caught.value).startswith(f"no shared memory for a segment of {NBYTES} bytes: {os.strerror(code)}")
    memory, fd, _ = factory.create(NBYTES)  # and the next one works
    if fd is not None:
        os.close(fd)
    memory[0] = 1
    factory.close()


def test_a_files_largest_size_is_a_shortage_too() -> None:
    """In a process of its own, since the limit cannot be taken back there."""
    program = (
        "import resource, signal\n"
        "from fastsplit.errors import ArenaFull\n"
        "from fastsplit.wire.shm.segment import Memfd\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "Memfd().create(65536)\n"
        "try:\n"
        "    Memfd().create(65537)\n"
        "except ArenaFull as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.stdout == "no shared memory for a segment of 65537 bytes: File too large\n", run.stderr


# ---- named -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def owner() -> Iterator[Named]:
    owner = Named(SHM_PREFIX, TOKEN, PEER_TOKEN)
    yield owner
    owner.close()


@pytest.fixture
def peer() -> Iterator[Named]:
    peer = Named(SHM_PREFIX, PEER_TOKEN, TOKEN)
    yield peer
    peer.close()


def test_named_is_private_and_its_name_lives_until_the_peer_has_it(owner: Named, peer: Named) -> None:
    before = os.umask(0o777)
    try:
        memory, fd, path = owner.create(NBYTES)
    finally:
        os.umask(before)
    assert fd is None and path.startswith(f"{SHM_PREFIX}-{PEER_TOKEN}") and len(path) == len(SHM_PREFIX) + 1 + 32
    found = os.stat(path)
    assert stat.S_IMODE(found.st_mode) == 0o600 and found.st_size == NBYTES and found.st_blocks * 512 >= NBYTES
    other = peer.attach(None, path, NBYTES)
    assert not os.path.exists(path)
    memory[3] = 4
    assert other[3] == 4
    with pytest.raises(RemoteProtocolError, match=f"segment, name: '{path}': No such file or directory"):
        peer.attach(None, path, NBYTES)


def test_names_that_the_peer_never_took_are_removed(owner: Named, peer: Named) -> None:
    paths = [owner.create(NBYTES)[2] for _ in range(3)]
    peer.attach(None, paths[1], NBYTES)
    owner.close()
    assert not any(map(os.path.exists, paths))
    owner.close()


def test_descriptors_of_names_are_closed_once_they_are_taken(owner: Named, peer: Named) -> None:
    _, _, path = owner.create(NBYTES)
    assert list(owner._made) == [path]
    peer.attach(None, path, NBYTES)
    _, _, second = owner.create(NBYTES)
    assert list(owner._made) == [second]


def _other_mode(path: str) -> None:
    os.chmod(path, 0o640)


def _symlink(path: str) -> None:
    os.rename(path, path[:-16] + "0" * 16)
    os.symlink(path[:-16] + "0" * 16, path)


def _fifo(path: str) -> None:
    os.unlink(path)
    os.mkfifo(path, 0o600)


def _directory(path: str) -> None:
    os.unlink(path)
    os.mkdir(path, 0o700)


def _sparse(path: str) -> None:
    os.truncate(path, 0)
    os.truncate(path, NBYTES)


def _short(path: str) -> None:
    os.truncate(path, NBYTES - 1)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (_other_mode, "is of uid {uid} with mode 0o100640, expected a file of uid {uid} with mode 0600"),
        (_symlink, ": Too many levels of symbolic links"),
        (_fifo, "is of uid {uid} with mode 0o10600, expected a file of uid {uid} with mode 0600"),
        (_directory, ": Is a directory"),
        (_sparse, "segment, size: 0 bytes are reserved, expected 65536"),
        (_short, "segment, size: 65535 bytes, expected 65536, as announced"),
    ],
)
def test_named_of_a_peer_that_lies(owner: Named, peer: Named, spoil: object, text: str) -> None:
    _, _, path = owner.create(NBYTES)
    spoil(path)  # type: ignore[operator]
    try:
        with pytest.raises(RemoteProtocolError) as caught:
            peer.attach(None, path, NBYTES)
        assert text.format(uid=os.geteuid()) in str(caught.value)
    finally:
        if os.path.isdir(path):
            os.rmdir(path)
        elif os.path.lexists(path):
            os.unlink(path)
        rest = path[:-16] + "0" * 16
        if os.path.exists(rest):
            os.unlink(rest)


@pytest.mark.parametrize(
    "name",
    [
        f"{SHM_PREFIX}-{TOKEN}{'0' * 16}",  # the owner's own token, not the one that the receiver chose
        f"{SHM_PREFIX}-{PEER_TOKEN}{'0' * 15}",
        f"{SHM_PREFIX}-{PEER_TOKEN}{'0' * 17}",
        f"{SHM_PREFIX}-{PEER_TOKEN}{'0' * 15}G",
        f"{SHM_PREFIX}-{PEER_TOKEN}/{'0' * 15}",
        f"{SHM_PREFIX}-{PEER_TOKEN}{'0' * 16}\n",
        f"{SHM_PREFIX}2-{PEER_TOKEN}{'0' * 16}",
        "/etc/passwd",
        "",
    ],
)
def test_names_that_a_peer_may_not_give(peer: Named, name: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        peer.attach(None, name, NBYTES)
    expected = f"{SHM_PREFIX}-{PEER_TOKEN} and 16 hexadecimal digits"
    assert str(caught.value) == f"segment, name: {name!r}, expected {expected}"


def test_a_descriptor_where_names_were_agreed_on(peer: Named) -> None:
    fd = _pipe()
    with pytest.raises(RemoteProtocolError, match="a descriptor came with it, expected none, since names were agreed"):
        peer.attach(fd, "", NBYTES)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_sweep_removes_what_dead_owners_left(owner: Named) -> None:
    old = time.time() - 60
    _, _, live = owner.create(NBYTES)
    os.utime(live, (old, old))
    others = {
        "stale": f"{SHM_PREFIX}-{'1' * 32}",
        "young": f"{SHM_PREFIX}-{'2' * 32}",
        "another name": f"{SHM_PREFIX}-{'3' * 31}",
        "another prefix": f"{SHM_PREFIX}x-{'4' * 32}",
        "link": f"{SHM_PREFIX}-{'5' * 32}",
    }
    for what, path in others.items():
        if what == "link":
            os.symlink(others["another name"], path)
        else:
            Path(path).write_bytes(b"x")
        if what != "young":
            os.utime(path, (old, old), follow_symlinks=False)
    try:
        assert owner.sweep() == 1
        assert [what for what, path in others.items() if not os.path.lexists(path)] == ["stale"]
        assert os.path.exists(live)
        owner.close()
        assert owner.sweep() == 0
    finally:
        for path in others.values():
            if os.path.lexists(path):
                os.unlink(path)


def test_a_killed_owners_name_is_swept(owner: Named) -> None:
    program = (
        "import os, signal, sys\n"
        "from fastsplit.wire.shm.segment import Named\n"
        f"owner = Named(sys.argv[1], {TOKEN!r}, {PEER_TOKEN!r})\n"
        "memory, _, path = owner.create(4096)\n"
        "os.utime(path, (1, 1))\n"
        "print(path, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, SHM_PREFIX], capture_output=True, text=True, timeout=60)
    path = run.stdout.strip()
    assert os.path.exists(path), run.stderr
    assert owner.sweep() == 1 and not os.path.exists(path)


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "0" * 100])
def test_prefixes(name: str) -> None:
    assert check_prefix(f"/dev/shm/{name}") == f"/dev/shm/{name}"


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "a", "/dev/shm/", "/dev/shm/.a", "/dev/shm/-a", "/dev/shm/a b", "/dev/shm/a/b", "/dev/shm/../a"),
        *("/tmp/a", "/dev/shm/ä", "/dev/shm/" + "a" * 101, "/dev/shm/a\n", "dev/shm/a", "/dev/shm//a"),
    ],
)
def test_prefixes_that_are_none(prefix: str) -> None:
    with pytest.raises(AddressError) as caught:
        check_prefix(prefix)
    assert str(caught.value) == (f"shm: {prefix!r}, expected /dev/shm/NAME with letters, digits and . _ - in NAME")
    with pytest.raises(AddressError):
        Named(prefix, TOKEN, PEER_TOKEN)


def test_tokens_differ() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100 and all(len(token) == 16 and int(token, 16) >= 0 for token in tokens)


def test_why_no_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "memfd_create", _fail(errno.ENOSYS))
    assert why_no_memfd() == "memfd_create: Function not implemented"
    monkeypatch.delattr(os, "memfd_create")
    assert why_no_memfd() == "this system has no memfd_create"


# ---- mappings --------------------------------------------------------------------------------------------------------


@memfd
def test_a_mapping_lives_as_long_as_what_lies_in_it_and_the_hook_brackets_it() -> None:
    calls: list[tuple[str, int, int]] = []

    def hook(address: int, nbytes: int) -> object:
        calls.append(("map", address, nbytes))
        return lambda: calls.append(("unmap", address, nbytes))

    memory, fd, _ = Memfd().create(NBYTES)
    inode = os.fstat(fd).st_ino
    os.close(fd)
    made = Segment(7, memory, hook)  # type: ignore[arg-type]
    assert (made.id, made.nbytes) == (7, NBYTES) and made.address == np.frombuffer(memory, np.uint8).ctypes.data
    assert calls == [("map", made.address, NBYTES)]
    view = np.ndarray(10, np.uint8, made.memory, 100)
    gone, address = weakref.ref(made), made.address
    del memory
    assert _mapped(inode)
    del made
    gc.collect()
    assert gone() is None and calls[1:] == [("unmap", address, NBYTES)]
    view[:] = 3  # whoever unregisters a segment keeps none of its views: the arena's leases keep the segment itself
    assert _mapped(inode)
    del view
    gc.collect()
    assert not _mapped(inode)


def test_a_hook_may_give_nothing_to_call() -> None:
    made = Segment(1, mmap.mmap(-1, 4096), lambda address, nbytes: None)
    assert made.nbytes == 4096


def test_a_hook_that_fails_is_the_makers_error() -> None:
    def hook(address: int, nbytes: int) -> None:
        raise RuntimeError("cannot register")

    with pytest.raises(RuntimeError, match="cannot register"):
        Segment(1, mmap.mmap(-1, 4096), hook)


def test_old_kernels_and_kernels_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that cannot be touched in advance are reserved all the same."""

    class Old(mmap.mmap):
        def madvise(self, option: int, *_: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(module.mmap, "mmap", Old)
    memory, fd, _ = Memfd().create(4 * 1024**2)
    assert os.fstat(fd).st_blocks * 512 >= 4 * 1024**2
    other = Memfd().attach(fd, "", 4 * 1024**2)
    memory[9] = 1
    assert other[9] == 1
