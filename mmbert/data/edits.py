"""Edited captions: captions with one content word replaced or two swapped, as negative texts of ITM."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

OPPOSITE = 0.4
"""Fraction of the edits that exchange a word for its opposite, where a caption has such a word."""
SWAP = 0.4
"""Fraction of the other edits that swap two words, where a caption permits it."""
EDGE = -1
"""Stands for what is before the first and after the last token."""


class CaptionEdits:
    """Edits of captions that keep to the word sequences of training captions (cf. NegCLIP, arXiv:2210.01936, Sec. 4.1).

    A content token may come where training captions have it between the same two neighbours, and beside the same two
    tokens on either side. So an edit is plausible without the image, which foils with a blank image check.

    Args:
        captions: Token ids of the training captions.
        content: Content tokens, see `mmbert.data.ngrams.content_units`.
        opposites: Token -> token of the opposite meaning, both ways. It is exchanged for nothing else: what stands in
            the same places may mean the same, as over does for above.
    """

    def __init__(
        self, captions: Iterable[Sequence[int]], content: Collection[int], opposites: Mapping[int, int] | None = None
    ):
        self.opposites = dict(opposites or {})
        self.content = frozenset(content) - self.opposites.keys()
        between: defaultdict[tuple[int, int], Counter[int]] = defaultdict(Counter)
        self._after: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        self._before: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        for ids in captions:
            padded = [EDGE, *ids, EDGE]
            for i in range(2, len(padded) - 2):
                a, left, token, right, b = padded[i - 2 : i + 3]
                if token in self.content:
                    between[left, right][token] += 1
                    self._after[a, left].add(token)
                    self._before[right, b].add(token)
        self._between = {
            key: (np.array([*counts]), np.array([*counts.values()], dtype=np.float64))
            for key, counts in between.items()
            if len(counts) > 1
        }
        self._known = {key: frozenset(tokens.tolist()) for key, (tokens, _) in self._between.items()}

    def __call__(
        self, ids: Sequence[int], own: Collection[tuple[int, ...]], rng: np.random.Generator
    ) -> list[int] | None:
        """Edit one caption.

        Args:
            ids: Its token ids incl. special ones.
            own: All captions of its image, which an edit must not become.
            rng: The sample's generator.

        Returns:
            Edited token ids; None where no edit is possible, as in captions with fewer than two content words.
        """
        places = [i for i in range(1, len(ids) - 1) if ids[i] in self.content]
        if len(places) < 2:
            return None
        edited = self._exchange_opposites(ids, rng)
        edited = self._swap(ids, places, rng) if edited is None and rng.random() < SWAP else edited
        edited = self._replace(ids, places, rng) if edited is None else edited
        return None if edited is None or tuple(edited) in own else edited

    def _exchange_opposites(self, ids: Sequence[int], rng: np.random.Generator) -> list[int] | None:
        places = [i for i in range(1, len(ids) - 1) if ids[i] in self.opposites]
        if not places or rng.random() >= OPPOSITE:
            return None
        edited, place = list(ids), places[rng.integers(len(places))]
        edited[place] = self.opposites[ids[place]]
        return edited

    def _fits(self, ids: Sequence[int], place: int, token: int) -> bool:
        """Whether training captions have `token` in the surroundings of a place."""
        before, after = ids[place - 1], ids[place + 1]
        further = ids[place - 2] if place >= 2 else EDGE, ids[place + 2] if place + 2 < len(ids) else EDGE
        return (
            token in self._known.get((before, after), ())
            and token in self._after[further[0], before]
            and token in self._before[after, further[1]]
        )

    def _swap(self, ids: Sequence[int], places: list[int], rng: np.random.Generator) -> list[int] | None:
        pairs = [
            (i, j)
            for number, i in enumerate(places)
            for j in places[number + 1 :]
            if ids[i] != ids[j] and j - i > 1 and self._fits(ids, i, ids[j]) and self._fits(ids, j, ids[i])
        ]
        if not pairs:
            return None
        i, j = pairs[rng.integers(len(pairs))]
        edited = list(ids)
        edited[i], edited[j] = ids[j], ids[i]
        return edited

    def _replace(self, ids: Sequence[int], places: list[int], rng: np.random.Generator) -> list[int] | None:
        """Draw one word anew (a step of Gibbs sampling); None where the same word comes again.

        Always another word would make rare words more frequent in edits than in captions, and edits could be told by
        their text alone.
        """
        for i in rng.permutation(places).tolist():
            tokens, counts = self._between.get((ids[i - 1], ids[i + 1]), ((), ()))
            fits = [int(token) == ids[i] or self._fits(ids, i, int(token)) for token in tokens]
            if sum(fits) > 1:
                weights = np.array(counts) * fits
                edited = list(ids)
                edited[i] = int(rng.choice(tokens, p=weights / weights.sum()))
                return edited if edited[i] != ids[i] else None
        return None
