"""Mounts that are nowhere: a file or directory of the node, to be attached in a sandbox that cannot see it; a folder in memory.

In: a path, or nothing. Out: a descriptor. :meth:`agent.sandbox.local.LocalSandbox.furnish` hands those of the node to PID 1, which attaches
them with ``move_mount``. Source: open_tree(2), mount_setattr(2), fsopen(2), fsmount(2), include/uapi/linux/mount.h. None of the calls is in
Python's library.
"""

from __future__ import annotations

import ctypes
import os

_OPEN_TREE, _FSOPEN, _FSCONFIG, _FSMOUNT, _MOUNT_SETATTR = 428, 430, 431, 432, 442
_FSOPEN_CLOEXEC, _FSCONFIG_CMD_CREATE, _FSMOUNT_CLOEXEC = 1, 6, 1
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_RDONLY, _NOSUID, _NODEV, _NOEXEC = 1, 2, 4, 8

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    """``struct mount_attr``."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


_READ_ONLY = _MountAttributes(_RDONLY | _NOSUID | _NODEV, 0, 0, 0)


def detached(path: str) -> int:
    """A private copy of the mount at ``path``, read-only, without devices and set-user-id; the caller closes the descriptor.

    Raises:
        OSError: there is no such path, or the kernel refuses.
    """
    fd = _libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC)
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)
    if _libc.syscall(_MOUNT_SETATTR, fd, b"", _AT_EMPTY_PATH, ctypes.byref(_READ_ONLY), ctypes.sizeof(_READ_ONLY)):
        error = ctypes.get_errno()
        os.close(fd)
        raise OSError(error, os.strerror(error), path)
    return int(fd)


def memory_folder() -> int:
    """A folder in memory that no path leads to; it goes with the last copy of the descriptor.

    Raises:
        OSError: the kernel refuses.
    """
    context = _checked(_libc.syscall(_FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC))
    try:
        _checked(_libc.syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0))
        mount = _checked(_libc.syscall(_FSMOUNT, context, _FSMOUNT_CLOEXEC, _NOSUID | _NODEV | _NOEXEC))
    finally:
        os.close(context)
    try:
        return os.open(f"/proc/self/fd/{mount}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(mount)


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "tmpfs")
    return result
