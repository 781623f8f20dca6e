"""What was prepared, out of what: SHA-256 of every file, recorded when first seen and compared ever after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stale.errors import StaleError
from stale.files import read_json, write_json
from stale.preparation.downloads import sha256_of

NAME = "manifest.json"


class Manifest:
    """The file ``manifest.json`` of a data root: entries by the path below the root.

    It holds no times, so that preparing again what is prepared leaves it byte for byte as it was.
    """

    def __init__(self, root: str | Path) -> None:
        """Read the manifest of ``root``, if it has one.

        Raises:
            StaleError: it is damaged.
        """
        self.root = Path(root)
        self.path = self.root / NAME
        content = read_json(self.path, "manifest") if self.path.exists() else {}
        entries = content.get("files", {}) if isinstance(content, dict) else None
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise StaleError(f"manifest {self.path} is damaged; delete it, and all is checked and recorded anew")
        self.entries: dict[str, dict[str, Any]] = entries

    def holds(self, name: str, sha256: str | None = None) -> bool:
        """Whether ``name`` is there as recorded.

        Args:
            sha256: of its present content; by default that of the file ``name`` below the root.

        Raises:
            StaleError: it is there, but is not what was recorded.
        """
        path = self.root / name
        if name not in self.entries or not path.exists():
            return False
        if (sha256 or sha256_of(path)) != self.entries[name].get("sha256"):
            raise StaleError(
                f"{path} is not the file that {self.path} records; delete it to have it made or fetched again, "
                f"or delete its entry there to keep it"
            )
        return True

    def record(self, name: str, sha256: str, **notes: Any) -> None:
        """Record ``name``, and write the manifest if that changes it.

        Raises:
            StaleError: something else was recorded under this name.
        """
        known = self.entries.get(name, {}).get("sha256", sha256)
        if known != sha256:
            raise StaleError(
                f"{name}: SHA-256 {sha256}, but {self.path} records {known}: it has changed where it comes from, "
                f"or is damaged; to accept the new one delete the entry"
            )
        entry = {"sha256": sha256, **notes}
        if self.entries.get(name) != entry:
            self.entries[name] = entry
            write_json(self.path, {"version": 1, "files": dict(sorted(self.entries.items()))}, indent=1)
