"""Packages of a release: features, their text encoder and a trained run in one file, as ``pack_release.py`` makes them.

The manifest lists every file with its SHA-256, and every video with its id, snippets and the SHA-256 of its features.
"""

import json
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from stale.config import load_config, save_config
from stale.errors import StaleError, name_some
from stale.io import atomic_path, file_sha256, refuse_zip_bomb
from stale.run_folder import RunFolder

MANIFEST = "manifest.json"
FEATURES, TEXT_ENCODER, RUN = "features.h5", "text_encoder.pt", "run"
RUN_FILES = ("config.yaml", "split.json", "model_card.md", "metrics.json", "checkpoints/best.pt")
FILES = (FEATURES, TEXT_ENCODER, *(f"{RUN}/{name}" for name in RUN_FILES))


def is_package(path: Path) -> bool:
    """Whether ``path`` is a package; a checkpoint is a zip archive too."""
    with suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        return MANIFEST in archive.namelist()
    return False


def unpack(package: Path, folder: Path, only: str = "") -> dict[str, Any]:
    """Unpack the files whose names begin with ``only`` below ``folder``, where the run's configuration then finds them.

    Returns the manifest. A file that is not as the manifest says, or that is no package's, is a StaleError.
    """
    if not is_package(package):
        raise StaleError(f"{package} is not a package of this project, as scripts/pack_release.py makes them")
    refuse_zip_bomb(package, "package", ratio=2)  # nothing in it is compressed
    try:
        with zipfile.ZipFile(package) as archive:
            manifest = json.loads(archive.read(MANIFEST))
            if foreign := manifest["files"].keys() - {*FILES}:
                raise StaleError(f"package {package}: no file of a package: {name_some(foreign)}: refused")
            for name, digest in manifest["files"].items():
                if not name.startswith(only):
                    continue
                with atomic_path(folder / name) as temporary:
                    with archive.open(name) as source, temporary.open("wb") as target:
                        shutil.copyfileobj(source, target)
                    if file_sha256(temporary) != digest:
                        raise StaleError(f"package {package}: {name} is damaged: fetch the package again")
    except (zipfile.BadZipFile, RuntimeError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise StaleError(f"package {package} is damaged ({error}): fetch it again") from None
    run = RunFolder(folder / RUN)
    paths = (f"data.features={folder / FEATURES}", f"model.text.weights={folder / TEXT_ENCODER}")
    save_config(load_config([run.config], paths), run.config)
    return manifest
