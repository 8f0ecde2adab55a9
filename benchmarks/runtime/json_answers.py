"""Answers under a JSON schema, with forced tokens run together and one by one, in turns.

    python benchmarks/runtime/json_answers.py EXPORT [--threads 2] [--rounds 3]

Prints, for each round's ratio, the median (above 1: together is faster), and whether both gave the same text.
"""

import argparse
import statistics

from reft_edge.runtime import SteeredModel, batch

SCHEMA = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 20},
        "last_name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "occupation": {"type": "string", "maxLength": 30},
        "favourite_colour": {"enum": ["red", "green", "blue"]},
        "is_retired": {"type": "boolean"},
    },
    "required": ["first_name", "last_name", "age", "occupation", "favourite_colour", "is_retired"],
    "additionalProperties": False,
}
PROMPTS = [
    f"Describe {who} as JSON."
    for who in ("an old fisherman from Norway", "a young doctor from Ghana", "the neighbour that you invent")
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("export")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model = SteeredModel(given.export, "cpu", given.threads)
    together = batch._MOST_FORCED
    ratios, alike, tokens = [], 0, 0
    for prompt in PROMPTS:
        model.generate(prompt, schema=SCHEMA)
    for _ in range(given.rounds):
        for prompt in PROMPTS:
            answers = {}
            for most in (0, together):
                batch._MOST_FORCED = most
                answer = model.stream(prompt, schema=SCHEMA)
                answers[most] = answer, answer.text()
            (alone, first), (joined, second) = answers[0], answers[together]
            ratios.append(alone.decode_seconds / joined.decode_seconds)
            alike += first == second
            tokens += len(joined.tokens)
    print(f"decode {statistics.median(ratios):.2f} x (from {min(ratios):.2f} to {max(ratios):.2f}), ", end="")
    print(f"{alike} of {len(ratios)} texts alike, {tokens} tokens")


if __name__ == "__main__":
    main()
