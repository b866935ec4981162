"""A checkpoint as huggingface_hub keeps it: files under their checksums, and a snapshot of links with their names."""

import hashlib
import shutil
from pathlib import Path

from huggingface_hub.file_download import _create_symlink


def as_hub_cache(folder: Path, cache: Path) -> Path:
    """Puts a copy of a folder into a cache, with the library's own links; returns the snapshot."""
    repository = cache / "models--someone--something"
    snapshot = repository / "snapshots" / hashlib.sha1(folder.name.encode()).hexdigest()
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    for path in folder.rglob("*"):
        if path.is_file():
            blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copy(path, blob)
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            _create_symlink(str(blob), str(link))
            assert link.is_symlink()
    return snapshot
