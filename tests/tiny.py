"""A tiny data set with everything training needs, made in a second: annotations, splits, features, a text tower."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import torch
import yaml
from torch import Tensor

from stale.config import Config, load_config
from stale.data.vocabulary import phrase
from stale.files import write_json, write_text
from stale.model.text import TextEncoder, TextTower, load_text_weights

WIDTH = 64  # of the tower, the embedding and the features
SNIPPETS = 16
SEEN = ("BaseballPitch", "CleanAndJerk", "Diving", "HammerThrow", "LongJump", "Shotput")
UNSEEN = ("GolfSwing", "PoleVault")
NUM_TRAINING, NUM_TEST = 24, 16


def text_tower_weights(
    width: int = WIDTH, layers: int = 2, output_width: int = WIDTH, num_tokens: int = 49408
) -> dict[str, Tensor]:
    """Random weights under the names of OpenAI's state dicts."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int, scale: float = width**-0.5) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    weights = {
        "token_embedding.weight": normal(num_tokens, width, scale=1.0).half(),
        "positional_embedding": normal(77, width, scale=0.1),
        "text_projection": normal(width, output_width),
        "ln_final.weight": torch.ones(width),
        "ln_final.bias": torch.zeros(width),
        "logit_scale": torch.tensor(4.6),
    }
    for layer in range(layers):
        block = {
            "ln_1.weight": torch.ones(width),
            "ln_1.bias": torch.zeros(width),
            "attn.in_proj_weight": normal(3 * width, width),
            "attn.in_proj_bias": normal(3 * width),
            "attn.out_proj.weight": normal(width, width),
            "attn.out_proj.bias": normal(width),
            "ln_2.weight": torch.ones(width),
            "ln_2.bias": torch.zeros(width),
            "mlp.c_fc.weight": normal(4 * width, width),
            "mlp.c_fc.bias": normal(4 * width),
            "mlp.c_proj.weight": normal(width, 4 * width),
            "mlp.c_proj.bias": normal(width),
        }
        weights.update({f"transformer.resblocks.{layer}.{name}": tensor for name, tensor in block.items()})
    return weights


def tiny_tower(num_tokens: int = 49408, layers: int = 2) -> TextTower:
    """The tower of :func:`text_tower_weights`."""
    weights = text_tower_weights(num_tokens=num_tokens, layers=layers)
    del weights["logit_scale"]
    return TextTower.from_weights(weights)


def make_data_set(folder: Path) -> Path:
    """Write the data set into ``folder``.

    Returns:
        Its configuration file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(text_tower_weights(), folder / "text_tower.pt")
    database = _annotations(np.random.default_rng(0))
    write_json(folder / "annotations.json", {"database": database})
    _write_features(folder, database)
    for part, classes in (("train", SEEN), ("test", UNSEEN)):
        write_text(folder / f"splits/train_75_test_25/Tiny/{part}/split_0.list", "\n".join(classes))
    write_text(folder / "tiny.yaml", yaml.safe_dump(_configuration(folder)))
    return folder / "tiny.yaml"


def tiny_config(file: Path, *assignments: str) -> Config:
    """The data set's configuration with some settings changed."""
    return load_config([file], assignments)


def _configuration(folder: Path) -> dict:
    return {
        "data": {
            "dataset": "tiny",
            "annotations": str(folder / "annotations.json"),
            "features": str(folder / "features.h5"),
            "splits": str(folder / "splits"),
            "setting": "75_25",
            "num_snippets": SNIPPETS,
            "train_subset": "validation",
            "test_subset": "test",
        },
        "model": {
            "text": {"weights": str(folder / "text_tower.pt"), "context_tokens": 4},
            "masking": {"queries": 4, "layers": 1},
            "localizer": {"hidden": 16, "bank": 2},
        },
        "train": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "log_interval": 1, "device": "cpu"},
        "detection": {"top_snippets": 20},
    }


def _annotations(rng: np.random.Generator) -> dict:
    """Every class in both subsets; every fourth training video also has an instance of an unseen class."""
    database = {}
    for number in range(NUM_TRAINING + NUM_TEST):
        training = number < NUM_TRAINING
        labels = [(SEEN if training else SEEN + UNSEEN)[number % (len(SEEN) + (0 if training else len(UNSEEN)))]]
        labels *= int(rng.integers(1, 3))
        if training and number % 4 == 0:
            labels.append(UNSEEN[number % 8 // 4])
        duration = float(rng.uniform(20, 60))
        edges = np.sort(rng.uniform(0, duration, 2 * len(labels))).reshape(-1, 2).round(2).tolist()
        database[f"video_{number:03d}"] = {
            "subset": "Validation" if training else "Test",
            "duration": duration,
            "annotations": [{"segment": edge, "label": label} for edge, label in zip(edges, labels, strict=True)],
        }
    return database


def _write_features(folder: Path, database: dict) -> None:
    """Two snippets a second: noise, and inside an instance its class's text embedding besides."""
    encoder = TextEncoder(TextTower.from_weights(load_text_weights(folder / "text_tower.pt")), prompt="template")
    labels = SEEN + UNSEEN
    with torch.no_grad():
        text = encoder(encoder.tokenize([phrase(label) for label in labels]))
    text = torch.nn.functional.normalize(text - text.mean(0), dim=-1).numpy() * WIDTH**0.5
    rng = np.random.default_rng(1)
    with h5py.File(folder / "features.h5", "w") as file:
        for name, entry in database.items():
            features = rng.standard_normal((int(entry["duration"] * 2), WIDTH))
            for item in entry["annotations"]:
                start, end = (round(2 * time) for time in item["segment"])
                features[start : end + 1] += 2 * text[labels.index(item["label"])]
            file[name] = features.astype(np.float16)
