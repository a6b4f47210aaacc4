"""A prefix for the little model, tuned by PEFT as tests/peft does it.

usage: python bench/evaluation/tune_prefix.py FOLDER        (by vLLM's Python, which has PEFT)

Leaves PEFT's files in FOLDER, and in facts.json the questions that the prefix was tuned for, each
with its answer.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/peft"))

import test_kv_prefix as peft_test  # noqa: E402

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    peft_test.tune(peft_test.load(), folder)
    facts = [[fact.question(), fact.answer()] for fact in peft_test.FACTS]
    (folder / "facts.json").write_text(json.dumps(facts))
