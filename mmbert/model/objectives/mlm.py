"""Masked language modelling."""

import torch.nn.functional as F
from torch import Tensor, nn

from mmbert.model.configuration import MMBertConfig
from mmbert.model.objectives.base import EncodedBatch, Objective, ObjectiveOutput, full_precision, no_autocast
from mmbert.model.tokens import IGNORE_INDEX
from mmbert.runtime.distributed import global_mean


class MaskedLanguageModeling(Objective):
    """Predicts masked words from the rest of the text and the image (BERT, arXiv:1810.04805, Sec. 3.1).

    Only masked positions meet the vocabulary. The output matrix is the word embedding itself, so it is handed in
    rather than owned.
    """

    def __init__(self, config: MMBertConfig):
        super().__init__()
        assert config.text_hidden_size is not None
        self.transform = nn.Linear(config.hidden_size, config.text_hidden_size)
        self.norm = nn.LayerNorm(config.text_hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(Tensor(config.vocab_size).zero_())

    def logits(self, hidden_states: Tensor, word_embeddings: Tensor) -> Tensor:
        """(K, D) states at masked positions and the (V, text width) embedding matrix to (K, V) fp32 logits."""
        hidden_states = self.norm(F.gelu(self.transform(hidden_states)))
        return full_precision(F.linear(hidden_states, word_embeddings)) + self.bias

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Reads `mlm_input_ids` and `mlm_labels` (B, T); labels are `IGNORE_INDEX` where nothing is masked."""
        labels = encoded.batch["mlm_labels"]
        masked = labels != IGNORE_INDEX
        states = encoded.masked_fused.text.hidden_states[masked]  # (K, D)
        logits = self.logits(states, encoded.model.word_embeddings)
        targets = labels[masked]
        with no_autocast(logits):
            total = F.cross_entropy(logits, targets, reduction="sum")
        left_out = (~masked.any(dim=1)).sum()  # rows without a word that could be masked
        return ObjectiveOutput(global_mean(total, masked.sum()), logits.detach(), targets, left_out)
