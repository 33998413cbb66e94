"""Models that several files of end-to-end tests share: made once for each file."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from split import CONFIGS, Named, load_hf, make_model

from fastsplit.models import open_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Named]:
    """A model of `split.CONFIGS` by its name."""
    made: dict[str, Named] = {}

    def get(name: str) -> Named:
        if name not in made:
            directory = tmp_path_factory.mktemp("models") / "model"
            make_model(directory, CONFIGS[name])
            made[name] = open_model(str(directory)), load_hf(directory)
        return made[name]

    return get


@pytest.fixture(scope="module")
def llama(models: Callable[[str], Named]) -> Named:
    return models("grouped heads")
