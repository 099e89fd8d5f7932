"""Notes of what a reading changed or left out without refusing it: counted, and said once with the first place."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Notes:
    """Counts by sentence. ``place`` is the row that is being read."""

    place: str = ""
    _count: dict[str, int] = field(default_factory=dict)
    _first: dict[str, str] = field(default_factory=dict)

    def add(self, sentence: str) -> None:
        """Count one row that ``sentence`` is true of; it reads "N rows SENTENCE"."""
        self._count[sentence] = self._count.get(sentence, 0) + 1
        self._first.setdefault(sentence, self.place)

    def counts(self) -> dict[str, int]:
        """Return how many rows each sentence is true of."""
        return dict(self._count)

    def sentences(self, what: str) -> list[str]:
        """Return what is to be said, a sentence each. ``what``: where the rows are from."""
        return [
            f"{what}: {count} {_rows(sentence, count)} (the first is {self._first[sentence]})"
            for sentence, count in self._count.items()
        ]


def _rows(sentence: str, count: int) -> str:
    """Put the sentence's verb, its first word, into the singular where there is one row."""
    verb, _, rest = sentence.partition(" ")
    singular = {"have": "has", "are": "is"}.get(verb, f"{verb}s")
    return f"rows {sentence}" if count > 1 else f"row {singular} {rest}"
