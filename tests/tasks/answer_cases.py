"""Questions, contexts and options, and the answers that transformers 4.57.1's pipeline gives.

`python -m tests.tasks.answer_cases FOLDER` prints them: FOLDER holds the model of `save`, and a
transformers before 5 must be installed, for later ones have no such pipeline.
"""

import json
import sys
from pathlib import Path
from typing import Any

CONTEXT = (
    "Ada Lovelace wrote the first program in London. Grace Hopper found a moth in Harvard. "
    "The Analytical Engine weaves algebraic patterns, just as the loom weaves flowers."
)
LONG = " ".join([CONTEXT, "Was it good or was it bad? wörld 日本 unbelievably 1843!"] * 3)
WHERE, WHO = "Where was the moth found?", "Who wrote?"
CASES: list[tuple[str, str, dict[str, Any]]] = [
    (WHERE, CONTEXT, {}),
    (WHO, CONTEXT, {"top_k": 4}),
    (WHO, "Ada.", {"top_k": 3}),
    (WHERE, LONG, {}),
    (WHO, LONG, {"top_k": 5}),
    (WHO, LONG, {"top_k": 3, "max_seq_len": 40, "doc_stride": 8}),
    (WHERE, LONG, {"top_k": 4, "max_seq_len": 48, "doc_stride": 12, "max_answer_len": 3}),
    (WHO, CONTEXT, {"handle_impossible_answer": True, "top_k": 20}),
    (WHERE, LONG, {"handle_impossible_answer": True, "max_answer_len": 40, "top_k": 60}),
    (WHO, CONTEXT, {"align_to_words": False, "top_k": 5}),
    (WHO, LONG, {"align_to_words": False, "max_answer_len": 1, "top_k": 6}),
]


def main(folder: Path) -> None:
    from transformers import pipeline

    answer = pipeline("question-answering", model=str(folder), device="cpu")
    answer.tokenizer.model_max_length = 64
    rows = []
    for question, context, options in CASES:
        found = answer(question=question, context=context, **options)
        found = [found] if isinstance(found, dict) else found
        rows.append([[one["answer"], one["start"], one["end"], one["score"]] for one in found])
    print(json.dumps(rows, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
