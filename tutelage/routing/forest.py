"""Trees that guess outcomes from a prompt's numbers: extremely randomised ones, grown with scikit-learn, kept as arrays, walked with numpy.

They see what a sum of kernels does not: that length matters in one kind of request and not in another. Knows nothing of prompts, models
or calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ARRAYS = ("roots", "feature", "threshold", "children", "value", "depth")


@dataclass(frozen=True)
class ForestSettings:
    """`leaf`: fewest rows in a leaf, of which there are at most about `leaves` a tree; `share` of the features is tried at each split."""

    trees: int = 600
    leaf: int = 5
    leaves: int = 300
    share: float = 0.25


@dataclass(frozen=True, eq=False)
class Forest:
    """All trees' nodes in one row: int32 `roots` [trees]; `feature` int32 [nodes] and float32 `threshold` [nodes]; int32 `children`
    [nodes, 2], the first for values up to the threshold, in a leaf both itself; float32 `value` [nodes, outcomes], the mean of the rows
    that end there; `depth` int32 [1], steps from a root to the deepest leaf."""

    roots: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    children: np.ndarray
    value: np.ndarray
    depth: np.ndarray

    def predict(self, row: np.ndarray) -> np.ndarray:
        """Float32 [features] to [outcomes]: the mean of the leaves that it falls into, in all trees at once, level by level."""
        import numpy as np

        at, following = self.roots, self.children.ravel()
        for _ in range(int(self.depth[0])):  # a leaf leads to itself, so that no tree need be asked whether it is done
            # `take` costs a third less than brackets for so few
            at = following.take(2 * at + (row.take(self.feature.take(at)) > self.threshold.take(at)))
        return np.asarray(self.value.take(at, axis=0).mean(axis=0))


DEFAULTS = ForestSettings()


def grow(rows: np.ndarray, outcomes: np.ndarray, *, seed: int, settings: ForestSettings = DEFAULTS) -> tuple[Forest, np.ndarray]:
    """From float32 [n, features] and outcomes [n, outcomes]; and for each row what the trees say that did not see it, [n, outcomes].

    Geurts, Ernst and Wehenkel (2006), on bootstrap samples, so that about a third of the trees has not seen a row.
    """
    import numpy as np
    from sklearn.ensemble import ExtraTreesRegressor

    leaf = max(settings.leaf, len(rows) // settings.leaves)
    grown = ExtraTreesRegressor(
        settings.trees, min_samples_leaf=leaf, max_features=settings.share, bootstrap=True, oob_score=True, random_state=seed
    ).fit(rows, outcomes if outcomes.shape[1] > 1 else outcomes[:, 0])
    trees = [one.tree_ for one in grown.estimators_]
    starts = np.cumsum([0, *(tree.node_count for tree in trees)])
    leaves = [tree.children_left < 0 for tree in trees]
    children = []
    for tree, leaf_here, start in zip(trees, leaves, starts, strict=False):
        both, itself = np.stack([tree.children_left, tree.children_right], axis=1), np.arange(tree.node_count)[:, None]
        children.append(np.where(leaf_here[:, None], itself, both) + start)
    forest = Forest(
        starts[:-1].astype(np.int32),
        np.concatenate([np.maximum(tree.feature, 0) for tree in trees]).astype(np.int32),
        np.concatenate([tree.threshold for tree in trees]).astype(np.float32),
        np.ascontiguousarray(np.concatenate(children), dtype=np.int32),
        np.concatenate([tree.value[:, :, 0] for tree in trees]).astype(np.float32),
        np.array([max(tree.max_depth for tree in trees)], dtype=np.int32),
    )
    return forest, np.asarray(grown.oob_prediction_).reshape(outcomes.shape)
