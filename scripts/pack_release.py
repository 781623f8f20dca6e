"""Pack a trained run with its features and text encoder into one file, to be
published: whoever has it can repeat the run's results.

    python scripts/pack_release.py runs/captions_0 thumos14_captions.zip
    python scripts/prepare_data.py captions --root data --from thumos14_captions.zip

Features and text weights must each be a single file (features.h5, and not a
name such as ViT-B/16). The second command unpacks and checks it. Annotations are not packed: they come
from prepare_data.py. stale.load("thumos14_captions.zip") takes the file itself.
"""

import json
import zipfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from stale.commands import CommandParser
from stale.errors import StaleError, run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder; its checkpoint best.pt is packed")
    parser.add_argument("output", type=Path, metavar="OUTPUT.zip", help="the package")
    options = parser.parse_args(arguments)

    from stale.data.features import open_features  # after parsing: --help answers at once
    from stale.io import atomic_path, file_sha256
    from stale.release import FEATURES, FILES, MANIFEST, RUN, TEXT_ENCODER
    from stale.run_folder import RunFolder
    from stale.version import __version__

    config = RunFolder(options.run).load_config()
    sources = {FEATURES: config.data.features, TEXT_ENCODER: config.model.text.weights}
    for key, path in zip(("data.features", "model.text.weights"), sources.values(), strict=True):
        if not isinstance(path, str) or not Path(path).is_file():
            raise StaleError(f"{options.run}: {key} is {path or 'not set'}; a package needs a single file there")
    if Path(weights := config.model.text.weights).suffix == ".safetensors":
        raise StaleError(f"{options.run}: {weights} cannot be packed: save it as .pt and train with that")
    files = {name: Path(str(sources.get(name, options.run / name.removeprefix(f"{RUN}/")))) for name in FILES}
    files = {name: path for name, path in files.items() if path.is_file()}
    if not (best := RunFolder(options.run).checkpoint("best")).is_file():
        raise StaleError(f"no {best}: train the run first")
    if config.data.localizer_features:
        raise StaleError(f"{options.run}: data.localizer_features cannot be packed")
    digests = {name: file_sha256(path) for name, path in files.items()}
    store = open_features(files[FEATURES])
    arrays = {name: store.read(name) for name in sorted(store.ids)}
    videos = [
        {"id": name, "snippets": len(array), "sha256": sha256(array.tobytes()).hexdigest()}
        for name, array in arrays.items()
    ]
    manifest = {"stale": __version__, "dataset": config.data.dataset, "files": digests, "videos": videos}
    with atomic_path(options.output) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr(MANIFEST, json.dumps(manifest, indent=1))
        for name, path in files.items():
            archive.write(path, name)
    print(f"{options.output}: {len(files)} files, {len(videos):,} videos, {options.output.stat().st_size >> 20:,} MiB")


if __name__ == "__main__":
    run_command(main)
