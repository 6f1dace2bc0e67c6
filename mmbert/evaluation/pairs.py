"""Evaluation of a pretrained model on image-text pairs: MLM with the true and a shuffled image, ITM, retrieval.

Outcomes are stored per pair and sorted in the order of the data set before they are summed, so metrics do not depend on
batch size, order of batches or number of processes.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmbert.evaluation.cost import log_fusion_cost
from mmbert.evaluation.coverage import Coverage, log_partial_coverage
from mmbert.evaluation.encoded_images import EncodedImages, digests_of
from mmbert.evaluation.encoding import pack, pair_scores
from mmbert.metrics.outcomes import ItemOutcomes
from mmbert.metrics.ranking import auroc
from mmbert.metrics.retrieval import recall_at_k
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.objectives.base import no_autocast
from mmbert.model.objectives.late_interaction import similarities
from mmbert.model.tokens import IGNORE_INDEX, Reads, Tokens
from mmbert.runtime.distributed import all_gather_list

EXPENSIVE_PASSES = 100_000
"""Ranking with at least so many fusion passes logs a warning with its estimated time."""


def metric_names(objectives: Iterable[str]) -> list[str]:
    """List the metrics of `PairEvaluation.metrics` that a model with these objectives can have."""
    by_objective = {
        "mlm": ["mlm_loss", "mlm_loss_shuffled", "mlm_accuracy", "mlm_accuracy_shuffled", "mlm_image_gain"],
        "itm": ["itm_loss", "itm_accuracy", "itm_auroc"],
    }
    names = [name for objective in objectives for name in by_objective.get(objective, [])]
    if {"itm", "itc"} & set(objectives):
        ranks = [f"R@{k}" for k in (1, 5, 10)]
        names += [f"{way}/{rank}" for way in ("image_to_text", "text_to_image") for rank in [*ranks, "median_rank"]]
        names.append("rsum")
    return names


class PairOutcome(NamedTuple):
    """Hits, losses and logits of one pair, with its image and with a shuffled one."""

    index: int
    num_masked: int
    mlm_hits: int
    mlm_hits_shuffled: int | None  # None: no other image is without this caption
    mlm_loss: float
    mlm_loss_shuffled: float
    itm_logit: float  # 0 without the objective itm
    itm_logit_shuffled: float | None
    image_key: int  # hash, equal for all captions of an image


class EncodedPair(NamedTuple):
    """Encoded image and text of one pair to rank, on the CPU: vectors for itc, tokens for itm."""

    index: int
    text: Tensor  # (E,), of tokens (T, E); or (T, W), see `pack`
    image: Tensor  # (E,), of tokens (P, E); or (P, W)
    text_key: int
    image_text_keys: frozenset[int]
    image_key: int


@dataclass
class PairEvaluation:
    """Evaluation of one split, batch by batch.

    Args:
        model: In evaluation mode.
        retrieval_indices: Pairs whose images and captions are ranked against each other, one caption per image.
        scorer: "itc", "itm", or "auto": itc if the model has it.
        num_samples: Pairs in the split; None: unknown, taken for those seen.
    """

    model: MMBertForPreTraining
    retrieval_indices: frozenset[int]
    scorer: str = "auto"
    num_samples: int | None = None
    pairs: list[PairOutcome] = field(default_factory=list)
    encoded: list[EncodedPair] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Choose the scorer."""
        self._images = EncodedImages(self.model.mmbert)
        if self.scorer == "auto":
            self.scorer = self.model.scorer
        if self.scorer not in self.model.objectives:
            self.retrieval_indices = frozenset()

    @torch.no_grad()
    def step(self, batch: dict[str, Tensor]) -> None:
        """Evaluate one batch.

        Args:
            batch: As `mmbert.data.pairs.Collate` makes it for evaluation: with wrong images, which equal
                the right ones where a pair has none.
        """
        if "skipped" in batch:
            self.skipped.update(batch["skipped"].tolist())
        if len(batch["index"]) == 0:
            return
        model = self.model.mmbert
        image, shuffled = self._images.encode(batch), self._images.encode(batch, prefix="wrong_")
        has_shuffled = (digests_of(batch) != digests_of(batch, "wrong_")).tolist()
        size = len(has_shuffled)
        num_masked, hits, hits_shuffled = [0] * size, [0] * size, [0] * size
        loss, loss_shuffled = [0.0] * size, [0.0] * size
        if "mlm" in self.model.objectives:
            text = model.encode_text(batch["mlm_input_ids"], batch["attention_mask"])
            num_masked, hits, loss = self._mlm(text, image, batch["mlm_labels"])
            _, hits_shuffled, loss_shuffled = self._mlm(text, shuffled, batch["mlm_labels"])
        logit, logit_shuffled = [0.0] * size, [0.0] * size
        text = model.encode_text(batch["input_ids"], batch["attention_mask"])
        if "itm" in self.model.objectives:
            logit = self.model.match_scores(text, image).tolist()
            logit_shuffled = self.model.match_scores(text, shuffled).tolist()
        for row, index in enumerate(batch["index"].tolist()):
            valid = has_shuffled[row]
            self.pairs.append(
                PairOutcome(
                    index, num_masked[row], hits[row], hits_shuffled[row] if valid else None, loss[row],
                    loss_shuffled[row], logit[row], logit_shuffled[row] if valid else None,
                    int(batch["image_key"][row]),
                )
            )  # fmt: skip
        self._keep_for_retrieval(batch, text, image)

    def _mlm(self, text: Tokens, image: Tokens, labels: Tensor) -> tuple[list[int], list[int], list[float]]:
        """Number of masked tokens, hits among them and summed loss (nats), each a list of B."""
        objective = self.model.objectives["mlm"]
        positions = labels != IGNORE_INDEX
        states = self.model.mmbert.fuse(text, image, reads=Reads(text=True)).text.hidden_states[positions]
        logits = objective.logits(states, self.model.mmbert.word_embeddings)  # pyright: ignore
        with no_autocast(logits):
            losses = F.cross_entropy(logits, labels[positions], reduction="none")
        hits = logits.argmax(dim=-1) == labels[positions]
        row = positions.nonzero()[:, 0]
        zeros = torch.zeros(len(labels), dtype=torch.float64, device=row.device)
        counted = [zeros.index_add(0, row, x.double()) for x in (torch.ones_like(losses), hits, losses)]
        return counted[0].int().tolist(), counted[1].int().tolist(), counted[2].tolist()

    def _keep_for_retrieval(self, batch: dict[str, Tensor], text: Tokens, image: Tokens) -> None:
        rows = [row for row, index in enumerate(batch["index"].tolist()) if index in self.retrieval_indices]
        if not rows:
            return
        if self.scorer == "itc":
            head = self.model.objectives["itc"]
            texts = head.embed_text(text).cpu()  # pyright: ignore
            images = head.embed_image(image).cpu()  # pyright: ignore
        else:
            texts, images = pack(text).cpu(), pack(image).cpu()
        lengths = text.mask.sum(dim=1).tolist()
        for row in rows:
            image_text_keys = frozenset(k for k in batch["image_text_keys"][row].tolist() if k >= 0)
            encoded_text = texts[row] if self.scorer == "itc" else texts[row, : lengths[row]].clone()
            self.encoded.append(
                EncodedPair(
                    int(batch["index"][row]), encoded_text, images[row].clone(), int(batch["text_key"][row]),
                    image_text_keys, int(batch["image_key"][row]),
                )
            )  # fmt: skip

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Compute the metrics of the split over all processes: fractions, and nats for losses."""
        results = self._merged_pairs()
        encoded = sorted({e.index: e for e in all_gather_list(self.encoded)}.values(), key=lambda e: e.index)
        out: dict[str, float] = {}
        num_masked = sum(r.num_masked for r in results)
        if num_masked:
            out["mlm_loss"] = sum(r.mlm_loss for r in results) / num_masked
            out["mlm_accuracy"] = sum(r.mlm_hits for r in results) / num_masked
            both = [r for r in results if r.mlm_hits_shuffled is not None]
            num_shuffled = sum(r.num_masked for r in both)
            if num_shuffled:
                accuracy_shuffled = sum(r.mlm_hits_shuffled or 0 for r in both) / num_shuffled
                out["mlm_accuracy_shuffled"] = accuracy_shuffled
                out["mlm_loss_shuffled"] = sum(r.mlm_loss_shuffled for r in both) / num_shuffled
                out["mlm_image_gain"] = sum(r.mlm_hits for r in both) / num_shuffled - accuracy_shuffled
        pairs = [(r.itm_logit, r.itm_logit_shuffled) for r in results if r.itm_logit_shuffled is not None]
        if "itm" in self.model.objectives and pairs:
            positive, negative = torch.tensor(pairs, dtype=torch.float64).T
            out["itm_loss"] = float((F.softplus(-positive) + F.softplus(negative)).mean() / 2)
            out["itm_accuracy"] = float(((positive > 0).double() + (negative <= 0).double()).mean() / 2)
            labels = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)])
            out["itm_auroc"] = auroc(torch.cat([positive, negative]), labels)
            out["itm_left_out"] = float(len(results) - len(pairs))
        if len(encoded) > 1:
            out |= self._retrieval(encoded)
        return out

    def coverage(self) -> Coverage:
        """Count the pairs that all processes have seen, and those of the split."""
        seen = {r.index for r in self._merged_pairs()} | set(all_gather_list([*self.skipped]))
        return Coverage(len(seen), len(seen) if self.num_samples is None else self.num_samples)

    def log_warnings(self, split: str) -> None:
        """Log a warning if the metrics are over a part of the split; a collective call."""
        log_partial_coverage(self.coverage(), split)

    def _merged_pairs(self) -> list[PairOutcome]:
        """Pairs of all processes, each once, in the order of the data set."""
        return sorted({r.index: r for r in all_gather_list(self.pairs)}.values())

    def outcomes(self) -> dict[str, ItemOutcomes]:
        """Per-item outcomes by metric: of each pair (`itm_accuracy`) or masked token (`mlm_...`)."""
        results = self._merged_pairs()
        both = [r for r in results if r.itm_logit_shuffled is not None]
        image_numbers = {key: i for i, key in enumerate(dict.fromkeys(r.image_key for r in results))}
        out = {}
        if "itm" in self.model.objectives and both:
            accuracies = [((r.itm_logit > 0) + (r.itm_logit_shuffled <= 0)) / 2 for r in both]  # pyright: ignore
            out["itm_accuracy"] = ItemOutcomes(accuracies, [image_numbers[r.image_key] for r in both])
        if "mlm" in self.model.objectives:
            # Which tokens of a pair were hits is not stored: statistics resample pairs, not tokens.
            for name, rows, hits in (
                ("mlm_accuracy", results, [r.mlm_hits for r in results]),
                ("mlm_accuracy_shuffled", both, [r.mlm_hits_shuffled or 0 for r in both]),
            ):
                tokens = [float(i < hit) for r, hit in zip(rows, hits, strict=True) for i in range(r.num_masked)]
                out[name] = ItemOutcomes(
                    tokens, [image_numbers[r.image_key] for r in rows for _ in range(r.num_masked)]
                )
        return {name: found for name, found in out.items() if found.values}

    def _retrieval(self, encoded: list[EncodedPair]) -> dict[str, float]:
        relevant = torch.tensor(
            [[t.text_key in i.image_text_keys or t.image_key == i.image_key for t in encoded] for i in encoded]
        )
        if self.scorer == "itc":
            texts = pad_sequence([e.text for e in encoded], batch_first=True)  # of tokens, padded with zeros
            scores = similarities(torch.stack([e.image for e in encoded]), texts)
        else:
            numbers = torch.arange(len(encoded))
            images, texts = torch.stack([e.image for e in encoded]), [e.text for e in encoded]
            pairs = torch.cartesian_prod(numbers, numbers)
            if len(pairs) >= EXPENSIVE_PASSES:
                name = f"ranking {len(encoded):,} images with as many captions by itm"
                hint = "evaluation.val_images and test_images set how many, scorer itc needs no fusion"
                log_fusion_cost(name, self.model, images, texts, pairs, len(pairs), level=logging.WARNING, hint=hint)
            scores = pair_scores(self.model, images, texts, pairs)
            scores = scores.view(len(encoded), len(encoded))
        out = recall_at_k(scores, torch.arange(len(encoded)), relevant=relevant)
        chance = float(relevant.double().mean())
        return {**out, "retrieval_images": float(len(encoded)), "retrieval_chance_R@1": chance}
