"""Notes of what a reading changed or left out without refusing it: counted, and said once with the first place."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)


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

    def tell(self, what: str) -> None:
        """Log one warning per sentence. ``what``: where the rows are from."""
        for sentence, count in self._count.items():
            rows = f"{count} row{'s' if count > 1 else ''}"
            logger.warning("%s: %s %s (the first is %s)", what, rows, sentence, self._first[sentence])
