"""Masked language modelling."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.objectives.base import EncodedBatch, Objective, ObjectiveOutput, full_precision, no_autocast
from mmbert.model.tokens import IGNORE_INDEX, Reads
from mmbert.runtime.distributed import global_mean


class MaskedLanguageModeling(Objective):
    """Masked language modelling (MLM): predict masked tokens from text and image (BERT, arXiv:1810.04805, Sec. 3.1).

    Logits are computed at masked positions only. The output matrix is tied to the word embeddings, so it is an argument
    of `logits` rather than a parameter of this module; untied, it is `decoder`.
    """

    reads: Mapping[str, Reads] = {"masked": Reads(text=True)}
    has_soft_targets = True

    def __init__(self, config: MMBertConfig, *, tied: bool = True, initial_bias: str = "zero"):
        """Build the head.

        Args:
            config: The model's configuration.
            tied: Use the word embeddings as output matrix; False: a matrix of its own.
            initial_bias: "prior": a run starts a new head with `start_at_prior`; "zero": its bias is 0.
        """
        super().__init__()
        self.check_options(tied=tied, initial_bias=initial_bias)
        self.initial_bias = initial_bias
        assert config.text_hidden_size is not None
        self.transform = nn.Linear(config.hidden_size, config.text_hidden_size)
        self.norm = nn.LayerNorm(config.text_hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(Tensor(config.vocab_size).zero_())
        self.decoder = None if tied else nn.Linear(config.text_hidden_size, config.vocab_size, bias=False)

    @classmethod
    def check_options(cls, *, tied: Any = True, initial_bias: Any = "zero") -> None:
        """Check the values of the options.

        Raises:
            UsageError: A value that is not allowed.
        """
        if not isinstance(tied, bool):
            raise UsageError(f"objectives.mlm.tied={tied!r}; allowed are true, false.")
        if initial_bias not in ("prior", "zero"):
            raise UsageError(f"objectives.mlm.initial_bias={initial_bias!r}; allowed are prior, zero.")

    @torch.no_grad()
    def start_at_prior(self, counts: Tensor) -> float:
        """Start the bias at the log-frequencies of tokens, so that the hidden states need not learn them.

        An optimizer step changes a bias by about the learning rate at most, which is too little in a short run.

        Args:
            counts: (V,) how often each token of the captions may be masked; half is added, so that no bias is infinite.

        Returns:
            Mean loss of these tokens by the bias alone, in nats; the first loss is near it.
        """
        counts = counts.to(torch.float64)
        logs = ((counts + 0.5) / (counts + 0.5).sum()).log()
        self.bias.copy_(logs)
        return float(-(counts * logs).sum() / counts.sum())

    def logits(self, hidden_states: Tensor, word_embeddings: Tensor) -> Tensor:
        """Compute logits over the vocabulary.

        Args:
            hidden_states: (K, D) fused states at masked positions.
            word_embeddings: (V, text width); not read where the head has a matrix of its own.

        Returns:
            (K, V) fp32.
        """
        hidden_states = self.norm(F.gelu(self.transform(hidden_states)))
        matrix = word_embeddings if self.decoder is None else self.decoder.weight
        return full_precision(F.linear(hidden_states, matrix)) + self.bias

    def masked_logits(self, encoded: EncodedBatch) -> Tensor:
        """Compute the logits at the K masked positions of a batch, row by row: (K, V) fp32."""
        states = encoded.masked_fused.text.hidden_states[encoded.batch["mlm_labels"] != IGNORE_INDEX]  # (K, D)
        return self.logits(states, encoded.model.word_embeddings)

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Compute the loss; reads `mlm_input_ids` and `mlm_labels` (B, T), `IGNORE_INDEX` at unmasked positions."""
        labels = encoded.batch["mlm_labels"]
        masked = labels != IGNORE_INDEX
        logits = self.masked_logits(encoded)
        encoded.mlm_logits = logits.detach()
        targets = labels[masked]
        with no_autocast(logits):
            total = F.cross_entropy(logits, targets, reduction="sum")
            if encoded.soft_targets is not None:
                (of_teacher,) = encoded.soft_targets.predictions["mlm"]
                soft = F.cross_entropy(logits, of_teacher.softmax(dim=1), reduction="sum")
                total = encoded.soft_targets.mix(total, soft)
        left_out = (~masked.any(dim=1)).sum()  # rows without a masked token
        return ObjectiveOutput(global_mean(total, masked.sum()), logits.detach(), targets, left_out)

    def predictions(self, encoded: EncodedBatch) -> tuple[Tensor, ...]:
        """Return the logits over the vocabulary at masked positions, (K, V) fp32."""
        return (self.masked_logits(encoded),)
