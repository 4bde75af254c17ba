"""Rows of tokens for rows.py and peers/*.py, so that every method sees the same ones.

    python benchmarks/make_rows.py MODEL TEXT CALIBRATION EVALUATION LENGTH OUT.json [SKIP]

TEXT is a file (.txt, or .json/.jsonl with one document per entry: each gets what the tokenizer
begins it with) or "stdlib". Documents follow one another in one stream of tokens; the first
CALIBRATION rows of LENGTH tokens are for tuning, the last EVALUATION rows for judging. With SKIP,
the last SKIP rows are left out first: choose between settings on one set, report on another.
OUT.calib.txt gets the text of the first rows.
"""

from __future__ import annotations

import json
import sys

from lowbit.model.calibration import evaluation_windows
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.tokenizer import load_tokenizer


def main() -> None:
    model, text, calibration, evaluation, length, out, *skip = sys.argv[1:]
    rows = evaluation_windows(text, load_tokenizer(Checkpoint(model)), int(length))
    rows = rows[: len(rows) - int(skip[0])] if skip else rows
    first, last = int(calibration), int(evaluation)
    if len(rows) < first + last:
        raise SystemExit(
            f"{text} has {len(rows)} rows of {length} tokens, {first + last} are needed."
        )
    json.dump(
        {"calibration": rows[:first].tolist(), "evaluation": rows[-last:].tolist()}, open(out, "w")
    )
    tokenizer = load_tokenizer(Checkpoint(model))
    text_of = [tokenizer.decode(row, skip_special_tokens=True) for row in rows[:first].tolist()]
    # For tools that take text.
    open(out.removesuffix(".json") + ".calib.txt", "w").write("".join(text_of))
    print(f"{first} rows to tune on, {last} to judge by, of {len(rows)}")


if __name__ == "__main__":
    main()
