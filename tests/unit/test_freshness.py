"""How long an answer stays true, by what was asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.gateway import freshness as rule
from tutelage.gateway.freshness import FACTUAL_SECONDS, freshness

TIME_BOUND = [
    "what is the weather in Berlin", "Summarise today's standup", "what's the date?", "is it right now open", "most recent release",
    "latest version", "current CEO of Acme", "current mortgage rate", "bitcoin price", "stock quotes", "traffic report",
    "news about Mars", "live score of the match", "it failed 3 hours ago", "how long until Easter", "how many days is left",
    "what time is it", "this week in numbers", "the last few days", "as of now", "an up-to-date list", "breaking: markets", "tomorrow",
    "yesterday", "Wie ist das Wetter heute", "aktuelle Zahlen", "die neuesten Zahlen", "wie spät ist es", "diese woche", "morgen früh",
    "quelle heure est-il", "cette semaine", "les dernières nouvelles", "aujourd'hui", "hier soir", "qué hora es", "este año",
    "las últimas noticias", "el tiempo en Lima",
]  # fmt: skip
PERSONAL = [
    "what is my balance", "I'm locked out", "I've lost it", "where is the order", "where is order #A-12345", "write to jo@example.com",
    "call +49 30 1234567", "invoice no. 4711", "our contract", "mein Konto", "unsere Daten", "ich brauche Hilfe", "mon compte",
    "j'ai perdu", "je veux", "mi cuenta", "nuestras cuentas", "necesito ayuda", "ticket 12345",
]  # fmt: skip
FACTUAL = [
    "What is the capital of France?", "who wrote Faust", "Translate to German: tree", "wer war Kant", "où est Lyon",
    "¿Quién es Borges?", "explain TLS",
]  # fmt: skip
GENERAL = [
    "Write a haiku about rain", "Sort these: b, a", "Compose a limerick of frogs",
]  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "kind"), [(TIME_BOUND, "time-bound"), (PERSONAL, "personal"), (FACTUAL, "factual"), (GENERAL, "general")]
)
def test_each_class_by_examples(texts: list[str], kind: str) -> None:
    found = {text: freshness(text, default_seconds=60).kind for text in texts}
    assert found == dict.fromkeys(texts, kind)


def test_facts_last_longer_and_what_is_personal_or_of_the_moment_is_not_kept() -> None:
    assert freshness("What is the capital of France?", default_seconds=60).seconds == FACTUAL_SECONDS
    assert freshness("Write a haiku about rain", default_seconds=60).seconds == 60
    assert freshness("what is my balance", default_seconds=60).seconds == 0
    assert freshness("what is the weather", default_seconds=60).seconds == 0
    assert freshness("What is the capital of France?", default_seconds=0).seconds == 0  # a tenant that keeps nothing


def test_a_long_document_is_looked_at_where_questions_stand() -> None:
    filler = "lorem ipsum " * 10_000
    assert freshness(filler + "what is my balance", default_seconds=60).kind == "personal"
    assert freshness("what is my balance " + filler, default_seconds=60).kind == "personal"


@given(
    st.lists(st.sampled_from([*TIME_BOUND, *PERSONAL, *GENERAL, "my", "+", "@", "a", "12", "ago", "Mein", "nuestro"]), max_size=6).map(
        " ".join
    )
)
def test_looking_words_up_first_hides_nothing_from_the_patterns(text: str) -> None:
    if rule.TIME_BOUND.search(text) or rule.PERSONAL.search(text):
        assert freshness(text, default_seconds=60).seconds == 0
