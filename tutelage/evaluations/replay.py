"""Routes recorded traffic offline: every policy and every baseline over the same rows, and what each would have returned and cost.

Of a replayed row only its prompt and its domain reach a policy; its scores and costs are read afterwards, to judge. Estimates come
from a fit log, or by cross-fitting: each fifth of the prompts is routed by what the others taught. Oracle and baselines are kept apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tutelage.errors import InvalidRequest
from tutelage.evaluations import curves
from tutelage.evaluations.rows import STRONG, WEAK, Log
from tutelage.routing import estimates, promises, selection
from tutelage.routing.promises import PromiseSettings

if TYPE_CHECKING:
    import numpy as np

FOLDS = 5
BOOTSTRAPS = 500
CANDIDATES = 100  # slacks that are tested for a promise
MARGINS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)  # by which another model must be better than a domain's best
PRIOR_ROWS = 5  # rows of all domains that stand behind a domain's mean in the baseline by domain
RESAMPLES, RESAMPLE_ROWS = 100, 1000  # of a promise's check
POLICIES = ("expected", "quality", "budget")


class Embedder(Protocol):
    """What turns texts into embeddings; `tutelage.routing.encoder.Encoder` is one."""

    def encode(self, texts: list[str]) -> np.ndarray:
        """float32 [n, dimension], rows of length 1."""


@dataclass(frozen=True)
class ReplaySettings:
    """`policy`: the default, chosen by what is known when None. `max_cost`: mean cost of a request that `budget` may spend, in US dollars,
    or as a share of strong calls where nothing has a price; half way between the cheapest and the dearest model when None."""

    policy: str | None = None
    promise: PromiseSettings = field(default_factory=PromiseSettings)
    max_cost: float | None = None
    seed: int = 0


@dataclass(eq=False)
class Routes:
    """Model numbers for each row of a log, by name of policy or baseline; `needs`: how much a row needs the strong model."""

    chosen: dict[str, np.ndarray]
    needs: dict[str, np.ndarray]
    probabilities: np.ndarray
    promises: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Plan:
    """What fit rows taught beside estimates: means by model, the reference of a promise, the slack it allows, the price of a budget."""

    model: estimates.QualityModel
    costs: np.ndarray | None  # expected, by model; None: nothing tells the models' costs apart
    means: np.ndarray
    by_domain: dict[str | None, np.ndarray]
    by_length: tuple[np.ndarray, np.ndarray]  # upper ends of tenths of length, best model of each
    slack: float | None
    price: float
    margin: float
    promise: str


Progress = Callable[[str, int, int], None]  # what is being done, done so far, all


def replay(log: Log, fit_log: Log | None, encoder: Embedder, settings: ReplaySettings, progress: Progress) -> dict[str, Any]:
    """The report. Raises InvalidRequest when the logs name different models, a policy is unknown, or there is too little to learn from."""
    if settings.policy not in (None, *POLICIES):
        raise InvalidRequest(f"no policy is called {settings.policy}; policies are {', '.join(POLICIES)}")
    if fit_log is not None and fit_log.models != log.models:
        raise InvalidRequest(
            f"the fit log is of {', '.join(fit_log.models)}, the replayed one of {', '.join(log.models)}; they must be the same"
        )
    routes = route(log, fit_log, encoder, settings, progress)
    default = settings.policy or ("quality" if log.costs is not None else "expected")
    if default not in routes.chosen:
        raise InvalidRequest(f"policy {default} needs prices: give `cost_usd` with each row")
    report: dict[str, Any] = {
        "default": default,
        "n": len(log),
        "models": list(log.models),
        "estimates": "fit log" if fit_log is not None else f"{FOLDS}-fold cross-fitting",
        "fit_rows": len(fit_log) if fit_log is not None else len(log) * (FOLDS - 1) // FOLDS,
        "rows_also_in_fit": len(set(log.prompts) & set(fit_log.prompts)) if fit_log is not None else 0,
        "units": {"cpt50": "percent of requests", "curve": _axes(log), "interval95": "of mean_quality, bootstrap over rows"},
        "policies": {name: _judged(log, routes, name, settings.seed) for name in POLICIES if name in routes.chosen},
        "baselines": {name: _judged(log, routes, name, settings.seed) for name in routes.chosen if name not in POLICIES},
    }
    report["baselines"] |= {"oracle": _oracle(log, settings.seed), "random": _random(log, settings.seed)}
    _compare(report, log, routes, settings.seed)
    if "quality" in routes.chosen:
        report["policies"]["quality"]["promise"] = _promised(log, routes, settings)
    return report


def route(log: Log, fit_log: Log | None, encoder: Embedder, settings: ReplaySettings, progress: Progress) -> Routes:
    """Decide every row. Needs the scores of the fit rows only."""
    import numpy as np

    embeddings = embed(log.prompts, encoder, progress, "encoding")
    names = _names(log)
    routes = Routes({}, {}, np.zeros((len(log), len(log.models))))
    done = 0
    for fit_rows, rows in splits(log, fit_log):
        source = log if fit_log is None else fit_log
        vectors = embeddings if fit_log is None else embed(fit_log.prompts, encoder, progress, "encoding the fit log")
        progress("learning", done, len(log))
        plan = _learn(source, vectors, fit_rows, settings)
        routes.promises.append(plan.promise)
        for row in rows:
            _decide(routes, plan, int(row), log.prompts[row], log.domains[row], embeddings[row], names, len(log))
            done += 1
            progress("routing", done, len(log))
    return routes


def _decide(
    routes: Routes, plan: Plan, row: int, prompt: str, domain: str | None, embedding: np.ndarray, names: Sequence[str], n: int
) -> None:
    """Enter the decisions for one row, from its prompt and its domain alone."""
    import numpy as np

    found = plan.model.probabilities(embedding, prompt, domain)
    probabilities = np.array([found[name].probability if found[name].n else 0.0 for name in names])
    routes.probabilities[row] = probabilities
    costs = plan.costs if plan.costs is not None else np.zeros(len(names))
    offers = [selection.Offer(*offer) for offer in zip(names, probabilities, costs, strict=True)]
    best = int(np.argmax(plan.means))
    prior = plan.by_domain.get(domain, plan.means)
    favourite = names[int(np.argmax(prior))]
    chosen = {"expected": selection.most_able(offers, favourite=favourite, margin=plan.margin).model}
    if plan.costs is not None:
        within = selection.cheapest_within(offers, reference=names[best], slack=plan.slack) if plan.slack is not None else None
        chosen |= {"quality": within.model if within else names[best], "budget": selection.best_value(offers, price=plan.price).model}
    tenth = min(int(np.searchsorted(plan.by_length[0], len(prompt))), len(plan.by_length[1]) - 1)
    chosen |= {"best-single": names[best], "best-per-domain": favourite, "length": names[int(plan.by_length[1][tenth])]}
    chosen |= {f"always-{name}": name for name in names}
    for policy, name in chosen.items():
        routes.chosen.setdefault(policy, np.zeros(n, dtype=np.int64))[row] = names.index(name)
    if len(names) == 2:
        for need, value in {
            "estimates": probabilities[1] - probabilities[0],
            "length": float(len(prompt)),
            "best-per-domain": prior[1] - prior[0],
        }.items():
            routes.needs.setdefault(need, np.zeros(n))[row] = value


def _learn(log: Log, embeddings: np.ndarray, rows: np.ndarray, settings: ReplaySettings) -> Plan:
    import numpy as np

    names, scores = _names(log), _in_names_order(log, log.scores)[rows]
    outcomes = {name: scores[:, i].tolist() for i, name in enumerate(names)}
    prompts, domains = [log.prompts[row] for row in rows], [log.domains[row] for row in rows]
    fitted = estimates.fit(prompts, embeddings[rows], domains, outcomes, seed=settings.seed)
    costs = _expected_costs(log, rows)
    means = scores.mean(axis=0)
    slack, promise, price = None, "nothing tells the models' costs apart", 0.0
    if costs is not None:
        slack, promise = _slack(fitted.held_out, scores, costs, settings.promise)
        price = _price(fitted.held_out, costs, settings.max_cost)
    by_domain = {name: _shrunk(scores[np.array([d == name for d in domains])], means) for name in set(domains)}
    favourites = np.array([int(np.argmax(by_domain[domain])) for domain in domains])
    margin = _margin(fitted.held_out, scores, favourites)
    return Plan(fitted.model, costs, means, by_domain, _by_length(prompts, scores), slack, price, margin, promise)


def _margin(held_out: np.ndarray, scores: np.ndarray, favourites: np.ndarray) -> float:
    """The margin of highest quality on the fit rows' held-out estimates."""
    import numpy as np

    rows = np.flatnonzero(~np.isnan(held_out).any(axis=1))
    if not len(rows):
        return 0.0
    found, kept = held_out[rows], favourites[rows]
    best = found.argmax(axis=1)
    lead = found.max(axis=1) - found[np.arange(len(rows)), kept]
    return max(MARGINS, key=lambda margin: float(scores[rows, np.where(lead > margin, best, kept)].mean()))


def _slack(held_out: np.ndarray, scores: np.ndarray, costs: np.ndarray, settings: PromiseSettings) -> tuple[float | None, str]:
    """The largest slack whose promise holds on the fit rows' held-out estimates; None keeps to the reference."""
    import numpy as np

    judged = ~np.isnan(held_out).any(axis=1)
    found, real, best = held_out[judged], scores[judged], int(np.argmax(scores.mean(axis=0)))
    if not len(found):
        return None, "too few outcomes to estimate from"
    cheaper = [i for i in range(len(costs)) if i != best and costs[i] <= costs[best]]
    if not cheaper:
        return None, "no model is cheaper than the reference"
    gaps = found[:, [best]] - found[:, cheaper]
    slacks = np.unique(np.quantile(gaps.min(axis=1), np.linspace(0.0, 1.0, CANDIDATES + 1)))
    order = np.array(sorted(cheaper, key=lambda i: costs[i]))
    routed, moved = [], []
    for slack in slacks:
        able = found[:, [best]] - found[:, order] <= slack
        routed.append(real[np.arange(len(real)), np.where(able.any(axis=1), order[np.argmax(able, axis=1)], best)])
        moved.append(float(able.any(axis=1).mean()))
    promise = promises.keep(np.stack(routed, axis=1), real[:, best], np.array(moved), settings)
    return (None if promise.candidate is None else float(slacks[promise.candidate])), promise.reason


def _price(held_out: np.ndarray, costs: np.ndarray, most: float | None) -> float:
    """The least price of a unit of cost at which the mean cost on the fit rows is within the budget, by bisection."""
    import numpy as np

    found = held_out[~np.isnan(held_out).any(axis=1)]
    limit = (float(costs.min()) + float(costs.max())) / 2 if most is None else most

    def spent(price: float) -> float:
        return float(costs[np.argmin(price * costs - found, axis=1)].mean())

    if not len(found) or spent(0.0) <= limit:
        return 0.0
    low, high = 0.0, 1.0 / max(float(np.diff(np.unique(costs)).min()), 1e-12)  # at `high` the cheapest model always wins
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= limit else (middle, high)
    return high


def _expected_costs(log: Log, rows: np.ndarray) -> np.ndarray | None:
    """Mean cost by model; of two models without prices the weak is 0 and the strong 1."""
    import numpy as np

    if log.costs is not None:
        return np.asarray(_in_names_order(log, log.costs)[rows].mean(axis=0))
    return np.array([0.0, 1.0]) if len(log.models) == 2 else None


def _shrunk(scores: np.ndarray, means: np.ndarray) -> np.ndarray:
    shrunk: np.ndarray = (scores.sum(axis=0) + PRIOR_ROWS * means) / (len(scores) + PRIOR_ROWS)
    return shrunk


def _by_length(prompts: Sequence[str], scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    tenths = [tenth for tenth in np.array_split(order, 10) if len(tenth)]
    ends = np.array([len(prompts[tenth[-1]]) for tenth in tenths])
    return ends, np.array([int(np.argmax(scores[tenth].mean(axis=0))) for tenth in tenths])


def splits(log: Log, fit_log: Log | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """(fit rows, routed rows): all at once with a fit log, else by fifths in which equal prompts stand together."""
    import numpy as np

    if fit_log is not None:
        return [(np.arange(len(fit_log)), np.arange(len(log)))]
    digests = [hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest() for prompt in log.prompts]
    rank = {digest: i for i, digest in enumerate(sorted(set(digests)))}
    folds = np.array([rank[digest] % FOLDS for digest in digests])
    if len(rank) < FOLDS * 10:
        raise InvalidRequest(
            f"{len(rank)} different prompts are too few to cross-fit; give at least {FOLDS * 10}, or a log to fit on with --fit"
        )
    return [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in range(FOLDS)]


def embed(prompts: Sequence[str], encoder: Embedder, progress: Progress, doing: str) -> np.ndarray:
    import numpy as np

    parts = []
    for start in range(0, len(prompts), 64):
        parts.append(encoder.encode(list(prompts[start : start + 64])))
        progress(doing, min(start + 64, len(prompts)), len(prompts))
    return np.concatenate(parts)


def _names(log: Log) -> tuple[str, ...]:
    """The models in the order they are counted in: weak before strong."""
    return (WEAK, STRONG) if set(log.models) == {WEAK, STRONG} else log.models


def _in_names_order(log: Log, values: np.ndarray) -> np.ndarray:
    return values[:, [log.models.index(name) for name in _names(log)]]


# --- judging: from here on the rows' own scores and costs are read ----------------------------------------------------


def _judged(log: Log, routes: Routes, name: str, seed: int) -> dict[str, Any]:
    import numpy as np

    chosen, names = routes.chosen[name], _names(log)
    scores = _in_names_order(log, log.scores)
    rows = np.arange(len(log))
    quality = scores[rows, chosen]
    found = {
        "mean_quality": float(quality.mean()),
        "mean_cost_usd": None if log.costs is None else float(_in_names_order(log, log.costs)[rows, chosen].mean()),
        "share": {model: float((chosen == i).mean()) for i, model in enumerate(names)},
        "interval95": _interval(quality, seed),
    }
    need = routes.needs.get("estimates" if name in POLICIES else name)
    if need is not None:
        return found | _ranked(need, scores, seed)
    return found | {"curve": _advantage_curve(log, routes) if name in POLICIES else [[found["mean_cost_usd"], found["mean_quality"]]]}


def _ranked(need: np.ndarray, scores: np.ndarray, seed: int) -> dict[str, Any]:
    """Curve and figures of an order of two models' rows, weak first."""
    import numpy as np

    ranking = curves.rank(need, scores[:, 0], scores[:, 1], seed=seed)
    shares, qualities = curves.sweep(ranking)
    figures = curves.figures(shares, qualities)
    at = np.linspace(0.0, 1.0, 101)
    drawn = [[float(share), float(quality)] for share, quality in zip(at, np.interp(at, shares, qualities), strict=True)]
    random = np.random.default_rng(seed)
    again = [_resampled_apgr(ranking, random) for _ in range(BOOTSTRAPS)]
    return {
        "curve": drawn,
        "apgr": figures.apgr,
        "cpt50": figures.cpt50,
        "cpt80": figures.cpt80,
        "apgr_interval95": curves.intervals(np.array(again)),
    }


def _resampled_apgr(ranking: curves.Ranking, random: np.random.Generator) -> float:
    import numpy as np

    n = len(ranking.order)
    return curves.figures(*curves.sweep(ranking, np.bincount(random.integers(0, n, n), minlength=n))).apgr


def _advantage_curve(log: Log, routes: Routes) -> list[list[float]]:
    """[cost, quality] with prices, else [share moved off the best single model, quality], rows of largest expected gain first."""
    import numpy as np

    scores = _in_names_order(log, log.scores)
    costs = None if log.costs is None else _in_names_order(log, log.costs)
    rows, single, best = np.arange(len(log)), routes.chosen["best-single"], routes.chosen["expected"]
    gain = routes.probabilities[rows, best] - routes.probabilities[rows, single]
    order = np.argsort(-gain, kind="stable")
    points = []
    for share in np.linspace(0.0, 1.0, 21):
        moved = np.zeros(len(log), dtype=bool)
        moved[order[: round(share * len(log))]] = True
        chosen = np.where(moved, best, single)
        x = float(share) if costs is None else float(costs[rows, chosen].mean())
        points.append([x, float(scores[rows, chosen].mean())])
    return points


def _oracle(log: Log, seed: int) -> dict[str, Any]:
    """The best answer of each row, by the cheapest model that gave it. It sees the scores: a bound, not a policy."""
    import numpy as np

    scores = _in_names_order(log, log.scores)
    mean_costs = _expected_costs(log, np.arange(len(log)))
    costs = np.zeros(scores.shape[1]) if mean_costs is None else mean_costs
    order = np.argsort(costs, kind="stable")
    chosen = order[np.argmax(scores[:, order], axis=1)]
    routes = Routes({"oracle": chosen}, {}, scores)
    if scores.shape[1] == 2:
        routes.needs["oracle"] = scores[:, 1] - scores[:, 0]
    return _judged(log, routes, "oracle", seed)


def _random(log: Log, seed: int) -> dict[str, Any]:
    import numpy as np

    random = np.random.default_rng(seed)
    routes = Routes({"random": random.integers(0, len(log.models), len(log))}, {}, log.scores)
    if len(log.models) == 2:
        routes.needs["random"] = random.random(len(log))
    return _judged(log, routes, "random", seed)


def _compare(report: dict[str, Any], log: Log, routes: Routes, seed: int) -> None:
    """Paired differences of the default policy from the baselines it must beat, over the same resampled rows."""
    import numpy as np

    scores, rows = _in_names_order(log, log.scores), np.arange(len(log))
    ours = report["policies"][report["default"]]
    ours["against"] = {}
    for name in ("best-single", "best-per-domain", "length"):
        difference = scores[rows, routes.chosen[report["default"]]] - scores[rows, routes.chosen[name]]
        ours["against"][name] = {"mean_quality": float(difference.mean()), "interval95": _interval(difference, seed)}
        if name in routes.needs:
            ours["against"][name] |= _paired_apgr(routes, name, scores, seed)


def _paired_apgr(routes: Routes, name: str, scores: np.ndarray, seed: int) -> dict[str, Any]:
    import numpy as np

    ours, theirs = (curves.rank(routes.needs[need], scores[:, 0], scores[:, 1], seed=seed) for need in ("estimates", name))
    random, n = np.random.default_rng(seed), len(scores)
    differences = []
    for _ in range(BOOTSTRAPS):
        counts = np.bincount(random.integers(0, n, n), minlength=n)
        differences.append(curves.figures(*curves.sweep(ours, counts)).apgr - curves.figures(*curves.sweep(theirs, counts)).apgr)
    whole = curves.figures(*curves.sweep(ours)).apgr - curves.figures(*curves.sweep(theirs)).apgr
    return {"apgr": whole, "apgr_interval95": curves.intervals(np.array(differences))}


def _promised(log: Log, routes: Routes, settings: ReplaySettings) -> dict[str, Any]:
    """Whether the promise was kept: relative loss against the reference over resamples of the replayed rows."""
    import numpy as np

    scores, rows = _in_names_order(log, log.scores), np.arange(len(log))
    routed, reference = scores[rows, routes.chosen["quality"]], scores[rows, routes.chosen["best-single"]]
    at_reference = routes.chosen["quality"] == routes.chosen["best-single"]
    random = np.random.default_rng(settings.seed)
    losses, shares = [], []
    for _ in range(RESAMPLES):
        sample = random.choice(len(log), min(RESAMPLE_ROWS, len(log)), replace=True)
        losses.append(1.0 - routed[sample].mean() / reference[sample].mean() if reference[sample].mean() else 0.0)
        shares.append(at_reference[sample].mean())
    return {
        "loss": settings.promise.loss,
        "risk": settings.promise.risk,
        "window": settings.promise.window,
        "chosen": routes.promises,
        "resamples": RESAMPLES,
        "resample_rows": min(RESAMPLE_ROWS, len(log)),
        "share_above_promise": float(np.mean(np.array(losses) > settings.promise.loss)),
        "mean_loss": float(np.mean(losses)),
        "mean_reference_share": float(np.mean(shares)),
    }


def _interval(values: np.ndarray, seed: int) -> list[float]:
    import numpy as np

    random, n = np.random.default_rng(seed), len(values)
    return curves.intervals(np.array([values[random.integers(0, n, n)].mean() for _ in range(BOOTSTRAPS)]))


def _axes(log: Log) -> list[str]:
    if len(log.models) == 2:
        return ["share of strong calls", "mean quality"]
    return ["mean cost in US dollars" if log.costs is not None else "share moved off the best single model", "mean quality"]
