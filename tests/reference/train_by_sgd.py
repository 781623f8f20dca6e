"""train.py by plain gradient descent, whose weights tell what the gradients were.

Adam divides by their size, so that where there are none it makes whole steps of rounding.
"""

import runpy
from pathlib import Path

import torch

from stale.config import TrainConfig
from stale.model.stale import Stale
from stale.training import trainer


def build_sgd(model: Stale, config: TrainConfig) -> torch.optim.Optimizer:
    """In place of the trainer's own."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], config.learning_rate)


if __name__ == "__main__":
    trainer.build_optimizer = build_sgd
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "train.py"), run_name="__main__")
