"""JSON of strangers: bounded, without repeated keys, every failure a ValueError."""

import json
import math
from collections import Counter
from typing import Any

from reft_edge.errors import AdapterFileError


def parse_json(text: str, what: str) -> dict[str, Any]:
    """A stranger's JSON object, without repeated names or numbers that are not finite. Raises AdapterFileError."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        if repeated := [name for name, count in counts.most_common(3) if count > 1]:
            raise AdapterFileError(f"its {what} names {repeated} twice")
        return dict(pairs)

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise AdapterFileError(f"its {what} holds {text}, which is not a finite number")
        return number

    try:
        parsed = json.loads(
            text, object_pairs_hook=without_repeats, parse_constant=finite, parse_float=finite
        )
        json.dumps(parsed, ensure_ascii=False).encode()  # no half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"its {what} is not valid JSON") from error
    if not isinstance(parsed, dict):
        raise AdapterFileError(f"its {what} is not a JSON object")
    return parsed
