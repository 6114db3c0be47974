"""Counters of what image encoders compute."""

import pytest
from image_caches import Rows


@pytest.fixture
def rows():
    made = []

    def count(model):
        made.append(Rows(model))
        return made[-1]

    yield count
    for counter in made:
        counter.patch.undo()
