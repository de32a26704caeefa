"""Trees as arrays say what scikit-learn's say, and what they say of a row they did not see."""

from __future__ import annotations

import numpy as np
import pytest

from tutelage.routing.forest import ForestSettings, grow


def crossed(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two outcomes that depend on whether two features agree, which no sum of them tells."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(n, 6)).astype(np.float32)
    agree = rows[:, 0] * rows[:, 1] > 0
    return rows, np.stack([random.random(n) < np.where(agree, 0.9, 0.1), random.random(n) < 0.5], axis=1).astype(float)


def test_the_arrays_say_what_the_grown_trees_say() -> None:
    from sklearn.ensemble import ExtraTreesRegressor

    rows, outcomes = crossed(200, 0)
    settings = ForestSettings(trees=20)
    trees, _ = grow(rows, outcomes, seed=3, settings=settings)
    theirs = ExtraTreesRegressor(20, min_samples_leaf=5, max_features=0.25, bootstrap=True, random_state=3).fit(rows, outcomes)
    asked, _ = crossed(30, 1)
    assert np.stack([trees.predict(row) for row in asked]) == pytest.approx(theirs.predict(asked), abs=1e-6)


def test_trees_learn_what_holds_of_two_features_together() -> None:
    rows, outcomes = crossed(1500, 0)
    trees, unseen = grow(rows, outcomes, seed=0)
    asked, truth = crossed(200, 1)
    found = np.stack([trees.predict(row) for row in asked])[:, 0]
    assert ((found > 0.5) == (truth[:, 0] > 0.5)).mean() > 0.65, "a sum of the two says 0.5"
    assert np.corrcoef(unseen[:, 0], outcomes[:, 0])[0, 1] > 0.3


def test_what_is_said_of_a_row_does_not_know_its_outcome() -> None:
    random = np.random.default_rng(0)
    rows, noise = random.normal(size=(400, 6)).astype(np.float32), random.normal(size=(400, 1))
    _, unseen = grow(rows, noise, seed=0)
    assert abs(np.corrcoef(unseen[:, 0], noise[:, 0])[0, 1]) < 0.15


def test_one_outcome_and_few_rows_are_enough() -> None:
    rows, outcomes = crossed(20, 0)
    trees, unseen = grow(rows, outcomes[:, :1], seed=0)
    assert trees.predict(rows[0]).shape == (1,) and unseen.shape == (20, 1)
