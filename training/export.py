"""Export: rows for others to train on: OpenAI's chat and preference files, Parquet, or JSONL as it is.

Every row is scrubbed once more, for what leaves cannot be called back. It refuses to know where rows come from.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training import cleaning, examples
from training.examples import Example
from tutelage.errors import TrafficUnreadable

FORMATS = ("jsonl", "openai", "preference", "parquet")
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
LEAST_ROWS = 10  # what OpenAI's fine-tuning takes
MORE = ("weight", "rationale", "targets", "chosen", "rejected")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="interactions, curated or distilled JSONL")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--format", choices=FORMATS, default="jsonl")
    arguments = parser.parse_args()
    counts = export(arguments.data, arguments.out, form=arguments.format)
    left = ", ".join(f"{count} {reason}" for reason, count in counts.items() if reason != "rows")
    print(f"export: {counts['rows']} rows as {arguments.format} in {arguments.out}" + (f"; left out: {left}" if left else ""))


def export(data: Path, out: Path, *, form: str) -> dict[str, int]:
    """Write `data` to `out` as one of FORMATS; how many rows were written and, by reason, left out.

    Raises TrafficUnreadable when a row cannot be read, or the format can hold none of them.
    """
    if form not in FORMATS:
        raise TrafficUnreadable(f"format {form!r} is unknown; allowed: {', '.join(FORMATS)}")
    rows, left_out = read(data)
    written: dict[str, Callable[[Sequence[Mapping[str, Any]]], list[Any]]] = {"openai": chat_rows, "preference": preference_rows}
    lines = written.get(form, list)(rows)
    if not lines:
        needs = " (preferences need `chosen` and `rejected`: see training.distill)" if form == "preference" else ""
        raise TrafficUnreadable(f"{data}: no row can be written as {form}{needs}")
    out.parent.mkdir(parents=True, exist_ok=True)
    if form == "parquet":
        _write_parquet(lines, out)
    else:
        out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    left_out.update({"without_preference": len(rows) - len(lines)} if len(lines) < len(rows) else {})
    return {"rows": len(lines), **dict(sorted(left_out.items()))}


def read(data: Path) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows with their distilled extras, scrubbed; and the count of those left out by reason. Raises TrafficUnreadable by line."""
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for number, line in examples.lines(data):
        try:
            example = cleaning.normalise(examples.parse(line))
        except TrafficUnreadable as broken:
            raise TrafficUnreadable(f"{data} line {number}: {broken.message}") from broken
        cleaned = cleaning.scrub(example, personal="redact")
        reason = "control_tokens" if cleaning.has_control_tokens(example) else cleaned.reason
        if reason is not None:
            left_out[reason] += 1
            continue
        rows.append({**_row(cleaned.example), **_more(json.loads(line))})
    return rows, left_out


def chat_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI chat fine-tuning: `{"messages": […]}` that ends with the assistant's turn. Raises TrafficUnreadable by row."""
    lines = [{"messages": [_message(number, m) for m in row["messages"]]} for number, row in enumerate(rows, start=1)]
    for number, line in enumerate(lines, start=1):
        if line["messages"][-1]["role"] != "assistant" or not any(m["role"] == "user" for m in line["messages"]):
            raise TrafficUnreadable(f"row {number} does not end with an assistant's answer to a user; it teaches nothing")
    return lines


def preference_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI preference (DPO) rows of those that have a worse answer: the request, the better output and the worse one."""
    return [
        {
            "input": {"messages": [_message(number, m) for m in row["messages"][:-1]]},
            "preferred_output": [{"role": "assistant", "content": row["chosen"]}],
            "non_preferred_output": [{"role": "assistant", "content": row["rejected"]}],
        }
        for number, row in enumerate(rows, start=1)
        if row.get("chosen") and row.get("rejected")
    ]


def _message(number: int, message: Mapping[str, Any]) -> dict[str, str]:
    role = ROLES.get(message["role"])
    if role is None or not message["content"].strip():
        raise TrafficUnreadable(f"row {number}: a turn of {message['role']!r} that is empty or of an unknown role; drop the row")
    return {"role": role, "content": message["content"]}


def _row(example: Example) -> dict[str, Any]:
    metadata = {name: value for name, value in example.metadata.items() if name != "embedding"}
    return {**example.row(), "metadata": metadata}


def _more(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in MORE if row.get(name) is not None}


def _write_parquet(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Messages as a list of structs; what differs from row to row (metadata, targets) as JSON text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    columns = {
        "messages": pa.array([row["messages"] for row in rows], turns),
        "label": pa.array([row["label"] for row in rows], pa.string()),
        "weight": pa.array([float(row.get("weight", 1.0)) for row in rows], pa.float64()),
        **{name: pa.array([row.get(name) for row in rows], pa.string()) for name in ("rationale", "chosen", "rejected")},
        **{name: pa.array([_json(row.get(name)) for row in rows], pa.string()) for name in ("targets", "metadata")},
    }
    pq.write_table(pa.table(columns), out)


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, sort_keys=True)


if __name__ == "__main__":
    main()
