"""Text for tests."""

from __future__ import annotations

import random


def pseudo_text(characters: int, seed: int = 0) -> str:
    """Lines of made-up words: letters depend on the ones before, so that there is something to learn."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("aeioulnrst") for _ in range(rng.randint(2, 7))) for _ in range(60)]
    lines, length = [], 0
    while length < characters:
        lines.append(" ".join(rng.choice(words) for _ in range(8)).capitalize() + ".")
        length += len(lines[-1]) + 1
    return "\n".join(lines)[:characters]
