"""Detached read-only mounts: a file or directory of the node, ready to be attached in a sandbox that cannot see the node's files.

In: a path. Out: a descriptor that :meth:`agent.sandbox.local.Sandbox.bind_files` hands to PID 1, which attaches it with ``move_mount``.
Source: open_tree(2), mount_setattr(2), include/uapi/linux/mount.h. Neither call is in Python's library.
"""

from __future__ import annotations

import ctypes
import os

_OPEN_TREE, _MOUNT_SETATTR = 428, 442
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_RDONLY, _NOSUID, _NODEV = 1, 2, 4

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
