"""The table of facts of each data set."""

from __future__ import annotations

import pytest

from stale.config import load_config
from stale.data.datasets import DATASETS, facts
from tests.helpers import REPOSITORY


@pytest.mark.parametrize("spelling", ["thumos14", "THUMOS14", "THUMOS-14", "thumos", "thumos14_i3d"])
def test_a_data_set_is_found_in_any_spelling(spelling: str) -> None:
    assert facts(spelling) is DATASETS["thumos14"]
    assert facts(spelling).tious == (0.3, 0.4, 0.5, 0.6, 0.7)
    assert facts("mine").tious == facts("activitynet").tious == tuple(x / 100 for x in range(50, 100, 5))
    assert (facts("mine").title, facts("mine").counts) == ("mine", {})


@pytest.mark.parametrize("name", DATASETS)
def test_the_configurations_agree(name: str) -> None:
    data = load_config([REPOSITORY / "configs" / f"{name}.yaml"]).data
    assert data.num_snippets == facts(name).num_snippets
    assert (data.train_subset, data.test_subset) == facts(name).subsets
