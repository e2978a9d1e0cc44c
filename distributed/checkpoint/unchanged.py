"""Files of a checkpoint that the next one takes over, because none of their tensors is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...recipes.errors import FtlaunchError
from .. import storage
from .manifest import FileRecord


@dataclass(frozen=True)
class Unchanged:
    """Files of the checkpoint in `directory`, by their path there."""

    directory: str = ""
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    def link_into(self, directory: str) -> dict[str, FileRecord]:
        """Bring them into another checkpoint's directory without moving a byte through this process: the same file
        under a second name, or the store's own copy. Those that are no longer as they were are left out."""
        return {path: record for path, record in self.files.items() if self._link(record, directory)}

    def _link(self, record: FileRecord, directory: str) -> bool:
        source, target = (storage.join(place, record.path) for place in (self.directory, directory))
        try:
            return storage.info(source).size == record.size and storage.link(source, target)
        except FtlaunchError:
            return False
