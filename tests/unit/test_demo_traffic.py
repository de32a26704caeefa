"""The requests of a demo: nothing seen twice across the split, and a log's faults named by file and line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tutelage.demo import traffic
from tutelage.demo.traffic import Item, Task, Traffic, default_traffic, normalise, read_traffic
from tutelage.errors import TrafficUnreadable

SEEDS = st.integers(min_value=0, max_value=2**63)


def keys(items: tuple[Item, ...]) -> set[object]:
    return {item.key for item in items}


def write_log(path: Path, rows: list[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, before=st.integers(1, 30), after=st.integers(1, 15))
def test_default_traffic_never_shares_or_repeats_a_prompt_and_is_as_large_as_asked(seed: int, before: int, after: int) -> None:
    made = default_traffic(seed=seed, per_domain_before=before, per_domain_after=after)

    assert not keys(made.before) & keys(made.after)
    assert len(keys(made.before)) == len(made.before)
    assert len(keys(made.after)) == len(made.after)
    assert Counter(item.task for item in made.before) == {task.name: before for task in traffic.TASKS}
    assert Counter(item.task for item in made.after) == {task.name: after for task in traffic.TASKS}
    assert made.notes == ()


def test_default_traffic_is_the_same_for_a_seed_and_another_for_another() -> None:
    made = [default_traffic(seed=seed, per_domain_before=20, per_domain_after=5) for seed in (3, 3, 4)]

    assert made[0] == made[1]
    assert len(keys(made[0].before) & keys(made[2].before)) < len(made[0].before) / 2


def test_default_traffic_is_interleaved_and_names_what_a_small_student_cannot_learn() -> None:
    made = default_traffic(seed=1, per_domain_before=40, per_domain_after=10)

    assert {item.task for item in made.before[:40]} == {task.name for task in traffic.TASKS}
    assert made.learnable == {"aiw", "number_sequence", "family_relationships", "chain_sum"}
    assert "spell_backward" in made.tasks


def test_a_task_that_runs_out_gives_what_it_has_in_proportion_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    one_digit = Task("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    monkeypatch.setattr(traffic, "TASKS", (one_digit,))

    made = default_traffic(seed=0, per_domain_before=3000, per_domain_after=1000)

    found = len(made.before) + len(made.after)
    assert 100 < found < 400
    assert len(made.after) == pytest.approx(found / 4, abs=1)
    assert not keys(made.before) & keys(made.after)
    assert made.notes == (f"chain_sum has {found} different prompts where 4000 were asked for",)


def test_case_spacing_and_width_of_letters_do_not_make_another_prompt() -> None:
    assert normalise("  How MANY\n apples? ") == normalise("how many apples?") == normalise("ｈｏｗ many apples?")
    assert normalise("how many apples?") != normalise("how many apple?")


LOG_ROWS = st.lists(
    st.tuples(st.integers(0, 25), st.sampled_from(["up", "down"]), st.sampled_from([None, "gold", "oil"])), min_size=1, max_size=80
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=LOG_ROWS, seed=SEEDS, share=st.floats(0.05, 0.9))
def test_a_log_is_split_without_losing_a_row_or_letting_a_prompt_straddle(
    tmp_path: Path, rows: list[tuple[int, str, str | None]], seed: int, share: float
) -> None:
    log = write_log(
        tmp_path / "log.jsonl",
        # the same prompt in two spellings: still one prompt
        [
            {"prompt": f"{'gold' if i % 2 else 'GOLD'} at {p}", "label": label} | ({"domain": d} if d else {})
            for i, (p, label, d) in enumerate(rows)
        ],
    )
    try:
        made, again = (read_traffic([log], seed=seed, after_share=share) for _ in range(2))
    except TrafficUnreadable:
        prompts = Counter(p for p, _, _ in rows)
        several_domains = len({d for _, _, d in rows}) > 1
        assert several_domains or len(prompts) == 1 or min(prompts.values()) > round(share * len(rows)), "there was room for a prompt"
        return
    assert len(made.before) + len(made.after) == len(rows)
    assert Counter(normalise(i.prompt) for i in (*made.before, *made.after)) == Counter(f"gold at {p}" for p, _, _ in rows)
    assert not keys(made.before) & keys(made.after)
    assert made.before
    assert made.after
    assert len(made.after) <= share * len(rows) + 3 * 0.5  # rounding, once a domain
    assert made == again


def test_repeats_in_a_log_stay_in_the_traffic_to_learn_from(tmp_path: Path) -> None:
    rows = [{"prompt": f"rare {i}", "label": "a"} for i in range(20)] + [{"prompt": "often", "label": "b"}] * 20

    made = read_traffic([write_log(tmp_path / "log.jsonl", list(rows))], seed=0, after_share=0.25)

    assert sum(item.prompt == "often" for item in made.before) == 20
    assert len(made.after) == 10
    assert made.notes == ("19 rows repeat an earlier prompt; a prompt's rows are all on one side",)


def test_the_log_names_the_tasks_and_rows_without_a_domain_are_all_one(tmp_path: Path) -> None:
    gold = write_log(tmp_path / "gold.jsonl", [{"prompt": f"g {i}", "label": "up", "domain": "gold"} for i in range(20)])
    rest = write_log(tmp_path / "rest.jsonl", [{"prompt": f"r {i}", "label": "up", "id": i} for i in range(20)])

    made = read_traffic([gold, rest], seed=0, after_share=0.2)

    assert made.tasks == ("all", "gold")
    assert Counter(item.task for item in made.after) == {"gold": 4, "all": 4}
    assert made.learnable == {"all", "gold"}
    assert made.source == "gold.jsonl, rest.jsonl"


def test_conversations_are_read_up_to_the_last_user_turn(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    rows: list[object] = [
        {"messages": [*turns, {"role": "user", "content": f"And {i}?"}, {"role": "assistant", "content": f"{i}"}]} for i in range(9)
    ]
    rows.append({"messages": [*turns, {"role": "user", "content": "And 9?"}], "label": "nine"})

    made = read_traffic([write_log(tmp_path / "log.jsonl", rows)], seed=0, after_share=0.2)

    items = {item.prompt: item for item in (*made.before, *made.after)}
    assert items["And 3?"].label == "3"
    assert items["And 9?"].label == "nine"
    assert items["And 3?"].messages() == [*turns, {"role": "user", "content": "And 3?"}]


def test_the_same_question_after_another_conversation_is_another_prompt() -> None:
    assert Item("And then?", "x", "all", (("user", "A"),)).key != Item("And then?", "x", "all", (("user", "B"),)).key


BAD_ROWS = [
    ("{not json", "text that is not JSON"),
    ("[" * 100_000, "text that is not JSON"),
    ("[1, 2]", "a list in place of an object"),
    ('"text"', "in place of an object"),
    ({"question": "q", "answer": "a"}, "neither prompt nor messages (its keys: 'question', 'answer')"),
    ({"prompt": "q"}, "nothing as its label"),
    ({"prompt": "q", "label": 5}, "a number as its label"),
    ({"prompt": "q", "label": "  "}, "empty text as its label"),
    ({"prompt": ["q"], "label": "a"}, "a list as its prompt"),
    ({"prompt": "", "label": "a"}, "empty text as its prompt"),
    ({"prompt": "q", "label": "a", "domain": 7}, "a number as its domain"),
    ('{"prompt": "\\ud800", "label": "a"}', "half of a surrogate pair"),
    ({"messages": "hello", "label": "a"}, "messages that are not a list of objects"),
    ({"messages": [{"role": "robot", "content": "q"}], "label": "a"}, "role 'robot'"),
    ({"messages": [{"content": "q"}], "label": "a"}, "role None"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "without a user turn"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}], "label": "a"}, "a list as its prompt"),
    ({"messages": [{"role": "user", "content": "q"}]}, "nothing as its label"),
]


@pytest.mark.parametrize(("row", "found"), BAD_ROWS)
def test_a_bad_row_is_refused_with_its_file_its_line_and_what_is_expected(tmp_path: Path, row: object, found: str) -> None:
    log = write_log(tmp_path / "log.jsonl", [{"prompt": "q", "label": "a"}, "", row, {"prompt": "r", "label": "a"}])

    with pytest.raises(TrafficUnreadable) as refused:
        read_traffic([log], seed=0, after_share=0.2)

    assert refused.value.message.startswith(f"{log} line 3: found ")
    assert found in refused.value.message
    assert '{"prompt": text, "label"' in refused.value.message


def test_bytes_that_are_no_text_are_refused_by_line_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    marked, binary = tmp_path / "marked.jsonl", tmp_path / "binary.jsonl"
    rows = b"".join(b'{"prompt": "q%d", "label": "a"}\r\n' % i for i in range(10))
    marked.write_bytes(b"\xef\xbb\xbf" + rows)
    binary.write_bytes(rows + b'{"prompt": "caf\xe9", "label": "a"}\n')

    assert len(read_traffic([marked], seed=0, after_share=0.2).after) == 2
    with pytest.raises(TrafficUnreadable, match=r"binary\.jsonl line 11: found bytes that are not UTF-8"):
        read_traffic([binary], seed=0, after_share=0.2)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "found no readable file"), ("\n\n", "found no rows"), ('{"prompt": "q", "label": "a"}', "too few")]
)
def test_a_file_that_is_missing_empty_or_too_small_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    log = tmp_path / "log.jsonl"
    if content is not None:
        log.write_text(content)

    with pytest.raises(TrafficUnreadable, match=message):
        read_traffic([log], seed=0, after_share=0.2)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 7.0])
def test_a_share_that_leaves_one_side_empty_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        read_traffic([Path("unread.jsonl")], seed=0, after_share=share)


def test_traffic_lists_its_tasks_once_each_in_order() -> None:
    made = Traffic((Item("p", "l", "b"), Item("q", "l", "a")), (Item("r", "l", "b"),), frozenset(), "test")

    assert made.tasks == ("a", "b")
