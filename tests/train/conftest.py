"""Runs that nothing happened to, for the tests that end others: each is taken once."""

import functools

import pytest


@pytest.fixture(scope="module")
def whole(runs, phantoms, tmp_path_factory):
    """What ``runs.start`` with these options ends with: (weights, rows, folder, summary)."""

    @functools.cache
    def run(*options):
        out = tmp_path_factory.mktemp("whole") / "run"
        trainer = runs.start(phantoms, out, **dict(options))
        summary = trainer.fit()
        return runs.weights(trainer), runs.metrics(out), out, summary

    return lambda **options: run(*sorted(options.items()))
