"""Headline-like data made by a program: what happened to a price, in a newspaper's words. Seeded; it refuses to read real data."""

from __future__ import annotations

import random

VERBS = {
    "up": ("climbs", "rises", "gains", "jumps", "edges higher", "rallies", "closes higher", "adds"),
    "down": ("falls", "slips", "drops", "loses", "edges lower", "tumbles", "ends lower", "sheds"),
}
QUIET = ("holds steady", "ends flat", "little changed", "treads water")
OTHER = ("miners sign a new labour agreement", "exchange extends its trading hours", "refiners report a change of management")
METALS = ("gold", "silver", "copper", "june gold", "spot gold", "palladium")
REASONS = ("on jobs data", "as the dollar moves", "ahead of the Fed", "amid trade talks", "after a quiet session", "on profit-taking", "")


def rows(count: int, *, seed: int) -> list[dict[str, str]]:
    """`count` rows {"prompt", "label"} with label up, down, neutral or none."""
    rng = random.Random(seed)
    return [_row(rng) for _ in range(count)]


def _row(rng: random.Random) -> dict[str, str]:
    label = rng.choices(("up", "down", "neutral", "none"), weights=(42, 36, 4, 18))[0]
    metal, reason = rng.choice(METALS).capitalize(), rng.choice(REASONS)
    price = f"${rng.randint(9, 19)}{rng.randint(10, 99)}.{rng.randint(0, 9)}0"
    if label in VERBS:
        text = f"{metal} {rng.choice(VERBS[label])} ${rng.randint(1, 30)}.{rng.randint(0, 9)}0 to {price} an ounce {reason}"
    elif label == "neutral":
        text = f"{metal} {rng.choice(QUIET)} near {price} an ounce {reason}"
    else:
        text = f"{metal}: {rng.choice(OTHER)} {reason}"
    return {"prompt": text.strip(), "label": label}
