"""The grid searches that `qjam-bench joblib` measures."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, NamedTuple

SEARCHES = ("short fits", "large array", "tiny")


class Searched(NamedTuple):
    """One search: its seconds, and the mean score of every candidate."""

    seconds: float
    scores: list[float]


def search(entered: Callable[..., AbstractContextManager[Any]], name: str) -> Searched:
    """Do a grid search. `entered`: as of a Searcher, and part of what is timed; `name`: one of SEARCHES."""
    from sklearn.model_selection import GridSearchCV

    estimator, grid, folds, x, y = _search(name)
    found = GridSearchCV(estimator, grid, cv=folds, refit=False)
    began = time.perf_counter()
    with entered(x, y):
        found.fit(x, y)
    return Searched(time.perf_counter() - began, [float(score) for score in found.cv_results_["mean_test_score"]])


@lru_cache
def _search(name: str) -> tuple[Any, dict[str, list[Any]], int, Any, Any]:
    """Give the estimator, its grid, the number of folds, and the data."""
    from sklearn.datasets import make_classification
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    if name == "large array":
        x, y = make_classification(20_000, 50, n_informative=20, random_state=0)
        return LogisticRegression(max_iter=200), {"C": [10.0**power for power in range(-4, 4)]}, 3, x, y
    tiny = name == "tiny"
    x, y = make_classification(100 if tiny else 300, 20, random_state=0)
    powers = range(2 if tiny else 6)
    return SVC(), {"C": [2.0**p for p in powers], "gamma": [0.5**p for p in powers]}, 2 if tiny else 5, x, y
