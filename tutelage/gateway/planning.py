"""From a request and what the worker knows to a plan: who may answer it, what each would cost, and which strategy and policy decide.

It refuses to know how strategies decide (`routing/strategies.py`) and to call any model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from tutelage.fleet.backends import list_price
from tutelage.gateway import openai
from tutelage.gateway.exchange import Asked, Placed
from tutelage.gateway.models import Models
from tutelage.gateway.snapshot import TenantView
from tutelage.records import Strategy, Tier
from tutelage.routing.estimates import Estimate, Estimator
from tutelage.routing.exploration import Exploration, explore
from tutelage.routing.policy import Policy
from tutelage.routing.strategies import Candidate, Plan, Situation, plan
from tutelage.settings import ModelEntry, Price, RoutingSettings


class Planned(NamedTuple):
    """What is done, what would be done if nothing were drawn by chance, and by which policy."""

    plan: Plan
    undrawn: Plan
    exploration: Exploration
    policy: Policy


class Planning:
    """Plans the requests of one worker. `estimators`, by tenant, may be added to and replaced while requests run."""

    def __init__(self, routing: RoutingSettings, *, estimators: Mapping[str, Estimator], randomness: random.Random) -> None:
        self._estimators = estimators
        self._random = randomness
        self.change(routing)

    def change(self, routing: RoutingSettings) -> None:
        self.routing = routing
        self._configured = Policy(0, routing.threshold, routing.similarity)
        self._exploration = Exploration(routing.explore, routing.explore_floor)

    def policy(self, view: TenantView) -> Policy:
        return view.policy or self._configured

    def strategy(self, asked: Asked) -> Strategy:
        return asked.options.strategy or asked.caller.strategy

    def key(self, asked: Asked, view: TenantView) -> str:
        """What decides who answers, beside the models themselves: the same question under another policy is another one. The threshold is
        not in it: an answer that was kept says which ones it meets."""
        if asked.request.model != "auto":
            return ""
        similarity = self.policy(view).similarity
        return f"{similarity}:{self.routing.max_student_tokens}:{self.strategy(asked)}:{_most(asked)}:{_promised(asked)}"

    def plan(self, asked: Asked, view: TenantView, placed: Placed, models: Models) -> Planned:
        """Of a request that leaves it to us who answers."""
        policy, strategy = self.policy(view), self.strategy(asked)
        if len(models.configured) == 1 and _most(asked) is None and not any(s.domain == placed.domain for s in view.students):
            entry = models.configured[0][0]  # nobody else could answer, whatever it costs
            able = not entry.domains or placed.domain in entry.domains
            found = _only(strategy, placed.domain, entry.name if able else None, entry.tier, policy)
            return Planned(found, found, self._exploration, policy)
        situation = self._situation(asked, view, placed, models, policy)
        undrawn = plan(strategy, situation)
        wishes = asked.options
        # who says how the request is to be answered, or is promised a quality, is not experimented with
        stated = wishes.strategy or _promised(asked) is not None or wishes.max_microusd is not None
        if stated or not self._exploration.share:
            return Planned(undrawn, undrawn, Exploration(0.0, self._exploration.floor), policy)
        drawn = explore(undrawn, self._exploration, drawn=self._random.random(), which=self._random.random())
        return Planned(drawn, undrawn, self._exploration, policy)

    def _situation(self, asked: Asked, view: TenantView, placed: Placed, models: Models, policy: Policy) -> Situation:
        estimates = self._estimates(asked, placed)
        entries = models.answering(placed.domain)
        # what context costs is in no estimate: who states a maximum cost gets none
        recalled = placed.known.assured if placed.known is not None and _most(asked) is None else 0.0
        students = tuple(
            Candidate(s.name, s.tier, self.routing.student_microusd, estimates.get(s.name), s)
            for s in view.students
            if s.domain == placed.domain
        )
        return Situation(
            placed.domain,
            placed.similarity,
            tuple(
                Candidate(
                    e.name,
                    e.tier,
                    self.cost(e, asked.request),
                    estimates.get(e.name),
                    recalled=0.0 if e.tier == "teacher" else recalled,
                )
                for e in entries
            ),
            students,
            policy,
            max(policy.threshold, _promised(asked) or 0.0),
            _most(asked),
            self.routing.most_parallel,
            _promised(asked),
        )

    def _estimates(self, asked: Asked, placed: Placed) -> dict[str, Estimate]:
        estimator = self._estimators.get(asked.caller.tenant_id)
        if estimator is None or placed.embedding is None:
            return {}
        import numpy as np

        embedding = np.frombuffer(placed.embedding, dtype=np.float32)
        return estimator.probabilities(embedding, asked.request.prompt, placed.domain)

    def cost(self, entry: ModelEntry, request: openai.Chat) -> int:
        """Micro-dollars of one answer of the length that the client allows, or of one as long as answers are."""
        answers = (request.longest or self.routing.answer_tokens) * request.n
        return math.ceil(list_price(entry.price, prompt_tokens(request), answers) * 1e6)


@lru_cache(maxsize=1024)
def _only(strategy: Strategy, domain: str | None, name: str | None, tier: Tier, policy: Policy) -> Plan:
    models = (Candidate(name, tier, 0),) if name is not None else ()
    return plan(strategy, Situation(domain, None, models, (), policy, policy.threshold))


def _most(asked: Asked) -> int | None:
    """The least of what the request and its tenant allow, in micro-dollars."""
    given = [most for most in (asked.options.max_microusd, asked.caller.max_cost_microusd) if most is not None]
    return min(given, default=None)


def _promised(asked: Asked) -> float | None:
    """The highest of what the request and its tenant state as their least quality; None: neither does."""
    stated = [least for least in (asked.options.min_confidence, asked.caller.min_confidence) if least is not None]
    return max(stated, default=None)


def prompt_tokens(request: openai.Chat) -> int:
    """As admission counts them: every third character a token."""
    return request.characters // 3 + 1


def affordable(price: Price | None, request: openai.Chat, most_microusd: int | None) -> int | None:
    """How many tokens each answer may have for this money, 0 for none; None: as many as it likes."""
    if most_microusd is None or price is None or not price.output_per_mtok:
        return None
    left = most_microusd - prompt_tokens(request) * price.input_per_mtok  # a dollar for a million tokens is a micro-dollar for one
    return max(0, int(left / price.output_per_mtok / request.n))
