"""The encoder and a routing decision on one core: `python -m benchmarks.encoder --encoder DIR`; figures in FIGURES.md beside it.

Measures encodes a second by prompt length, a whole decision (encode, find the domain, estimate every model, select) at a steady rate, and
what looking a domain up costs with many interactions behind the index. It refuses to measure anything over a network.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from tutelage.routing import estimates, selection
from tutelage.routing.domains import Domain, DomainIndex
from tutelage.routing.encoder import Encoder

LENGTHS = (8, 32, 128, 256)  # tokens
MODELS = ("small", "middle", "large")
WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", type=Path, required=True, help="what `python -m inference.encoder_export --out DIR` wrote")
    parser.add_argument("--seconds", type=float, default=20.0, help="of decisions at the rate")
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    encoder = Encoder(arguments.encoder, threads=1, cache_size=0)
    few, many = lookup(10_000), lookup(1_000_000)
    decision = decisions(encoder, arguments.rate, arguments.seconds)
    report = {
        "encodes_per_second": {length: encodes(encoder, length) for length in LENGTHS},
        "decision_ms": decision,
        "lookup_us": {"10000": few, "1000000": many},
        "decision_growth": (1000 * decision["cpu_p50"] + many - few) / (1000 * decision["cpu_p50"]),
    }
    print(json.dumps(report, indent=1))
    if arguments.report:
        arguments.report.write_text(json.dumps(report, indent=1) + "\n")


def prompt(random: np.random.Generator, tokens: int) -> str:
    """So many tokens: common words are one each, and two mark the ends."""
    return " ".join(random.choice(WORDS, tokens - 2))


def encodes(encoder: Encoder, tokens: int, *, seconds: float = 4.0) -> float:
    """Prompts of this length encoded a second, one by one."""
    random, done, began = np.random.default_rng(0), 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        encoder.encode([prompt(random, tokens)])
        done += 1
    return done / (time.perf_counter() - began)


def decisions(encoder: Encoder, rate: float, seconds: float) -> dict[str, float]:
    """Percentiles of one decision, in milliseconds from when the request was due: a queue counts, and whatever else runs here.

    `cpu_…` is the time of ours alone, which another program's load on the machine touches less.
    """
    decide, random = router(encoder), np.random.default_rng(1)
    prompts = [prompt(random, 32) for _ in range(int(rate * seconds))]
    took, spent, began = [], [], time.perf_counter() + 0.1
    for i, text in enumerate(track(prompts, description="decisions", console=Console(stderr=True), transient=True)):
        due = began + i / rate
        time.sleep(max(due - time.perf_counter(), 0.0))
        before = time.process_time()
        decide(text)
        spent.append(1000 * (time.process_time() - before))
        took.append(1000 * (time.perf_counter() - due))
    wall = {f"p{part}": float(np.percentile(took, part)) for part in (50, 95)}
    return wall | {f"cpu_p{part}": float(np.percentile(spent, part)) for part in (50, 95)} | {"n": len(took)}


def router(encoder: Encoder) -> Callable[[str], Any]:
    """A router as a gateway holds it: 20 domains, three models with 1,000 outcomes each."""
    random = np.random.default_rng(2)
    texts = [prompt(random, 32) for _ in range(1000)]
    outcomes = {name: random.integers(0, 2, len(texts)).tolist() for name in MODELS}
    embeddings = encoder.encode(texts)
    names = [f"domain-{i % 20}" for i in range(len(texts))]
    model = estimates.fit(texts, embeddings, names, outcomes, seed=0).model
    index = DomainIndex([Domain(f"domain-{i}", embeddings[i * 50 : i * 50 + 16], 50, -1.0) for i in range(20)])

    def decide(text: str) -> selection.Selection:
        embedding = encoder.encode([text])[0]
        found = model.probabilities(embedding, text, index.assign(embedding).domain)
        offers = [selection.Offer(name, estimate.probability, cost) for cost, (name, estimate) in enumerate(found.items())]
        return selection.cheapest_within(offers, reference="large", slack=0.05)

    return decide


def lookup(interactions: int, *, times: int = 2000) -> float:
    """Microseconds to place one embedding when so many interactions are behind the index.

    The index holds the centroids of domains, at most 16 each, never the interactions; a domain needs 1 % of a tenant's traffic, so a
    tenant has at most 100 of them, however much it asks. Here: as many domains as there are thousands of interactions, up to that.
    """
    random = np.random.default_rng(3)
    count = min(interactions // 1000, 100)
    rows = random.normal(size=(count * 16, 384)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    index = DomainIndex([Domain(f"d{i}", rows[16 * i : 16 * i + 16], interactions // count, 0.5) for i in range(count)])
    asked = rows[random.integers(0, len(rows), times)]
    began = time.perf_counter()
    for embedding in asked:
        index.assign(embedding)
    return 1e6 * (time.perf_counter() - began) / times


if __name__ == "__main__":
    main()
