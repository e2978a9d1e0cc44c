"""Whether all ranks can fill the same files together: on one host, in one folder of a local file system."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

from .. import storage
from .peers import Peers

LOCAL_FILE_SYSTEMS = frozenset(
    {"apfs", "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "tmpfs", "xfs", "zfs"}
)
"""Those whose pages all processes of a host share, and that write at any place as fast as at the end. Network file
systems and mounted buckets are neither to be relied on."""

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def share_local_folder(url: str, peers: Peers) -> bool:
    """True on every rank when rank 0's folder `url` is local, and every rank runs on its host and sees the very file
    that it puts there; collective."""
    name = f".ftlaunch-shared-{uuid.uuid4().hex}"
    with peers.together("looking for a shared folder"):
        if peers.rank == 0 and storage.is_local(url):
            storage.write_bytes(storage.join(url, name), b"which ranks see this file?\n")
    seen = peers.gather(_seen(url, peers.broadcast(name)))
    with peers.together("looking for a shared folder"):
        if peers.rank == 0 and storage.is_local(url):
            storage.delete_tree(storage.join(url, name))
    return seen[0] is not None and all(other == seen[0] for other in seen)


def _seen(url: str, name: str) -> tuple[str, ...] | None:
    """What tells a host and a file from any other; None where the file is not seen, or not on a local disk."""
    if not storage.is_local(url) or file_system(storage.local_path(url)) not in LOCAL_FILE_SYSTEMS:
        return None
    try:
        found = (storage.local_path(url) / name).stat()
    except OSError:
        return None
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    return socket.gethostname(), boot, str(found.st_dev), str(found.st_ino)


def file_system(folder: Path) -> str:
    """The type of the file system that holds a folder."""
    import psutil

    place = os.path.realpath(folder)
    mounts: dict[str, str] = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
    while place not in mounts and place != os.path.dirname(place):  # noqa: PTH120 - text, as the mounts are
        place = os.path.dirname(place)  # noqa: PTH120
    return mounts.get(place, "")
