"""Token masking for masked language modelling (MLM)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmbert.model.tokens import IGNORE_INDEX


@dataclass(frozen=True)
class Masking:
    """BERT's masking rule (arXiv:1810.04805, Sec. 3.1): 15 % of tokens, of these 80/10/10 mask/random/unchanged."""

    mask_token_id: int | None
    """None: the tokenizer has no [MASK], so nothing is masked."""
    ordinary_ids: np.ndarray
    """Ids that may replace a token: the vocabulary without special tokens, (V',) int64."""
    special_ids: frozenset[int]
    probability: float = 0.15
    """Fraction of tokens (or of words, with `whole_word`) to predict."""
    whole_word: bool = False
    """Mask all pieces of a word together."""
    content_ids: frozenset[int] | None = None
    """Tokens that say something about the image: only units with one of them are masked, where a text has any."""

    def __call__(
        self, ids: Sequence[int], continues: Sequence[bool], rng: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        """Mask one text.

        At least one token is predicted unless all are special. The number of masked units (tokens, or words with
        `whole_word`) is drawn so that its mean is exact for texts of at least 1 / probability units.

        Args:
            ids: Token ids incl. special ones.
            continues: True where a token continues the word of the token before it; used by `whole_word` only.
            rng: The sample's generator.

        Returns:
            Ids with some replaced, and labels: the original id where predicted, else `IGNORE_INDEX`.
        """
        if self.mask_token_id is None:
            return list(ids), [IGNORE_INDEX] * len(ids)
        units: list[list[int]] = []
        for position, token in enumerate(ids):
            if token in self.special_ids:
                continue
            if self.whole_word and continues[position] and units and units[-1][-1] == position - 1:
                units[-1].append(position)
            else:
                units.append([position])
        if self.content_ids is not None:
            content = [unit for unit in units if any(ids[position] in self.content_ids for position in unit)]
            units = content or units
        masked, labels = list(ids), [IGNORE_INDEX] * len(ids)
        if not units:
            return masked, labels
        count = max(1, int(self.probability * len(units) + rng.random()))
        for unit in rng.choice(len(units), size=min(count, len(units)), replace=False):
            for position in units[unit]:
                labels[position] = ids[position]
                kind = rng.random()
                if kind < 0.8:
                    masked[position] = self.mask_token_id
                elif kind < 0.9:
                    masked[position] = int(rng.choice(self.ordinary_ids))
        return masked, labels
