"""Class embeddings of any vision-language model, from a file in place of a text encoder.

* ``.npz`` or HDF5 with ``embeddings``, K × C or templates × K × C, and ``classes``, K names;
* JSON ``{"name": vector or list of vectors}``, or HDF5 with such a dataset a class.

Several vectors of a class, of its templates or phrases, are averaged, each of unit length. K classes, C width.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from stale.data.classes import phrase
from stale.data.features import Backbone, load_array, open_hdf5, require_same_backbone
from stale.errors import StaleError, name_some
from stale.io import clean_name, read_json, refuse_zip_bomb


class EmbeddingTable:
    """Embeddings (K, C) float32 of K named classes, from ``source``; ``backbone`` is their model's image encoder."""

    backbone = Backbone()

    def __init__(self, names: Sequence[str], vectors: np.ndarray, source: str) -> None:
        self.names, self.vectors, self.source = tuple(names), vectors, source
        self._rows = {_key(name): row for row, name in enumerate(names)}
        if len(self._rows) < len(names):
            twice = [name for row, name in enumerate(names) if self._rows[_key(name)] != row]
            raise StaleError(f"{source}: one class under two names: {name_some(twice)}")

    @classmethod
    def of(cls, classes: Mapping[str, Any], source: str = "class embeddings") -> "EmbeddingTable":
        """The table of name → vector (C) or several vectors (n, C); a StaleError if they cannot be used."""
        vectors: list[np.ndarray] = []
        for name, value in classes.items():
            try:
                rows = np.atleast_2d(np.asarray(value, dtype=np.float64))  # n × C
                norms = np.linalg.norm(rows, axis=-1, keepdims=True)
                sound = rows.ndim == 2 and rows.size > 0 and np.isfinite(norms).all() and (norms > 0).all()
            except (TypeError, ValueError):
                sound = False
            if not sound or (vectors and rows.shape[1] != len(vectors[0])):
                wanted = f"a vector {len(vectors[0])} wide" if vectors else "a vector"
                raise StaleError(f"{source}: class '{name}': {wanted} of finite numbers that are not all 0 is expected")
            vectors.append((rows / norms).mean(0))
        if not vectors:
            raise StaleError(f"{source}: no class")
        return cls([str(name) for name in classes], np.array(vectors, dtype=np.float32), source)

    def find(self, names: Iterable[str]) -> list[int]:
        """The row of each class, by its label or phrase; one StaleError that names all missing ones and near names."""
        names = list(names)
        missing = [name for name in names if _key(name) not in self._rows]
        if missing:
            near = [", ".join(difflib.get_close_matches(_key(name), self._rows, n=2)) for name in missing]
            hints = [f"{name!r} (near: {found or 'none'})" for name, found in zip(missing, near, strict=True)]
            raise StaleError(f"{self.source}: no embedding of {name_some(hints)}; embed them by embed_classes.py")
        return [self._rows[_key(name)] for name in names]

    def require_model_of(self, features: Backbone) -> None:
        """Raise a StaleError if the embeddings are known to be of another model than ``features``."""
        require_same_backbone(features, self.backbone, self.source, "the features are of")


def read_embeddings(path: str | Path) -> EmbeddingTable:
    """Load class embeddings in any of the layouts above; a StaleError if there are none."""
    path, source = Path(path), f"class embeddings {path}"
    content: Any
    if path.suffix == ".json":
        content = read_json(path, "class embeddings")
    else:
        refuse_zip_bomb(path, "class embeddings")
        try:
            if h5py.is_hdf5(path):
                with open_hdf5(path, "class embeddings") as file:
                    content = {name: load_array(file[name], f"'{name}'") for name in file}
            else:
                with np.load(path, allow_pickle=False) as archive:
                    content = dict(archive)
        except Exception as error:  # numpy and h5py fail in whichever layer meets the damage first
            reason = str(error).partition("\n")[0]
            raise StaleError(f"{source}: no .npz, HDF5 or JSON file of embeddings, or damaged ({reason})") from None
    if not isinstance(content, dict):
        raise StaleError(f"{source}: name → vector is expected")
    backbone = Backbone()
    if "embeddings" in content and "classes" in content:
        vectors, names = np.asarray(content["embeddings"]), np.asarray(content["classes"]).ravel().tolist()
        names = [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names]
        if vectors.ndim not in (2, 3) or vectors.shape[-2] != len(names) or len(set(names)) < len(names):
            raise StaleError(
                f"{source}: embeddings of shape {vectors.shape} and {len(names)} classes; K × C or templates × K × C "
                "and K different names are expected"
            )
        backbone = Backbone.of(content)
        content = dict(zip(names, np.moveaxis(vectors, -2, 0), strict=True))
    table = EmbeddingTable.of(content, source)
    table.backbone = backbone
    return table


def require_text_width(features: int, text: int) -> None:
    """Raise a StaleError if features and text have different widths, and hence do not share a space."""
    if features != text:
        raise StaleError(
            f"the features are {features} wide but the text embedding is {text}: use features and text of the same "
            "model, or learn a projection by model.visual_projection=true, which gives up their alignment"
        )


def _key(name: str) -> str:
    """What a label and its phrase have in common."""
    return phrase(clean_name(name)).lower()
