"""How long an answer stays true: not at all for what is personal or of the moment, long for facts, a while for the rest.

Patterns over the last words of the user, in English, German, French and Spanish; they err towards not keeping. A pure rule. It refuses to
know where answers are kept.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Kind = Literal["private", "time-bound", "personal", "factual", "general"]
FACTUAL_SECONDS = 7 * 86_400
LONGEST_LOOK = 4_000  # characters: what makes a question personal or of the moment stands at its beginning or end


class Freshness(NamedTuple):
    """`seconds` 0: not to be kept."""

    kind: Kind
    seconds: int
    reason: str


TIME_BOUND = re.compile(
    r"""\b(
      today|tonight|tomorrow|yesterday|right\ now|at\ the\ moment|currently|as\ of\ now|up[- ]to[- ]date|latest|newest|most\ recent
    | recently|breaking
    | this\ (morning|afternoon|evening|week|weekend|month|quarter|year|season)
    | (last|next|past)\ (night|week|weekend|month|quarter|year|few\ days)
    | what\ time\ is\ it | what('s|\ is)\ the\ (date|time|day)
    | current\ (\w+\ )?(price|rate|time|date|weather|president|status|version|news|score|temperature|ceo)
    | (stock|share|exchange|bitcoin|crypto)\s(price|rate|quote)s? | weather|forecast|headlines|traffic\ (jam|report) | news\b
    | live\ score | \d+\ (minutes|hours|days)\ ago
    | how\ (long|many\ days|much\ time)\ (until|till|is\ left)
    | heute|gestern|morgen\ (früh|abend)|jetzt|derzeit|aktuell\w*|momentan|neueste[nrs]?
    | diese\ woche|dieses\ jahr|wetter|nachrichten|wie\ spät
    | aujourd'hui|hier\ soir|demain|maintenant|actuellement|dernières?\ nouvelles|cette\ semaine|cette\ année|météo|quelle\ heure
    | hoy|ayer|mañana|ahora|actualmente|últimas?\ noticias|esta\ semana|este\ año|el\ tiempo\ en|qué\ hora
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
PERSONAL = re.compile(
    r"""\b(
      my|mine|our|ours|i'm|i\ am|i\ have|i've|i\ was|i\ need|i\ want|i'd|i\ can't|i\ forgot|myself | where\ is\ the\ order
    | mein\w*|unser\w*|ich\ (bin|habe|brauche|will|möchte|kann)
    | mon|ma|mes|notre|nos|je\ (suis|veux|voudrais)|j'ai
    | mi|mis|nuestr[oa]s?|tengo|estoy|necesito|quiero
    )\b
    | [\w.+-]+@[\w-]+\.\w+ | \b(order|invoice|ticket|account|customer|policy|tracking)\s*(no\.?|number|id|\#|:)?\s*[A-Z]{0,4}-?\d{3,}
    | \+\d[\d ()-]{8,}\d""",
    re.IGNORECASE | re.VERBOSE,
)
# at least one of these is in whatever the two patterns find: to look words up is ten times faster than to search
TELLING = {
    "today", "tonight", "tomorrow", "yesterday", "now", "moment", "currently", "date", "latest", "newest", "recent", "recently",
    "breaking", "this", "last", "next", "past", "time", "day", "current", "price", "prices", "rate", "rates", "quote", "quotes",
    "weather", "forecast", "headlines", "traffic", "news", "live", "ago", "long", "days", "much", "heute", "gestern", "morgen", "jetzt",
    "derzeit", "momentan", "neueste", "neuesten", "neuester", "neuestes", "diese", "dieses", "wetter", "nachrichten", "wie", "aujourd",
    "hier", "demain", "maintenant", "actuellement", "nouvelles", "cette", "météo", "quelle", "hoy", "ayer", "mañana", "ahora",
    "actualmente", "noticias", "esta", "este", "tiempo", "qué", "my", "mine", "our", "ours", "i", "myself", "order", "ich", "mon", "ma",
    "mes", "notre", "nos", "je", "j", "mi", "mis", "tengo", "estoy", "necesito", "quiero", "invoice", "ticket", "account", "customer",
    "policy", "tracking",
}  # fmt: skip
PARTS = ("@", "+", "aktuell", "mein", "unser", "nuestr")  # or one of these, the last four as beginnings of words
WORDS = re.compile(r"[^\W\d_]+")
FACTUAL = re.compile(
    r"""\W*(
      who\ (was|is|were|wrote|invented|discovered|painted|founded) | what\ (is|are|was|were|does) | when\ (was|did|were)
    | where\ (is|was|are) | which | define | definition\ of | explain | how\ (many|far|tall|old|big|does|do|is|are)
    | why\ (is|are|do|does|did)
    | what('s|s)\ the | translate | convert | name\ the | capital\ of
    | wer\ (war|ist) | was\ (ist|sind|bedeutet) | wann\ (war|wurde) | wo\ (ist|liegt) | wie\ (viele|hoch|groß|alt) | erkläre | übersetze
    | qui\ (est|était|a) | qu'est-ce\ que | quand | où\ (est|se) | quelle?\ est | combien | expliquez? | traduis
    | quién\ (es|fue) | qué\ (es|son|significa) | cuándo | dónde\ está | cuál\ es | cuántos | explica | traduce
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)


def _may_tell(text: str) -> bool:
    lowered = text.lower()
    return not TELLING.isdisjoint(WORDS.findall(lowered)) or any(part in lowered for part in PARTS)


def freshness(text: str, *, default_seconds: int) -> Freshness:
    """The class of a question by the last words of the user; `default_seconds` for what is neither here nor there."""
    looked = text if len(text) <= LONGEST_LOOK else text[: LONGEST_LOOK // 2] + "\n" + text[-LONGEST_LOOK // 2 :]
    if _may_tell(looked):
        if found := TIME_BOUND.search(looked):
            return Freshness("time-bound", 0, f"{found[0].strip()!r}: the answer is true for a moment only")
        if found := PERSONAL.search(looked):
            return Freshness("personal", 0, f"{found[0].strip()!r}: the answer may be somebody's own")
    if default_seconds <= 0:
        return Freshness("general", 0, "this tenant keeps no answers")
    found = FACTUAL.match(looked)
    if found:
        return Freshness("factual", max(default_seconds, FACTUAL_SECONDS), f"{found[0].strip()!r}: a question of fact")
    return Freshness("general", default_seconds, "an ordinary question")
