"""What a pretrained model can do: masked words with the right and a wrong image, matching, retrieval.

Results are kept per pair and put in the order of the data set before they are summed, so they do not depend on batch
size, order or number of processes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbert.evaluation.encoding import pack, pair_scores
from mmbert.metrics.outcomes import ItemOutcomes
from mmbert.metrics.ranking import auroc
from mmbert.metrics.retrieval import recall_at_k
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.objectives.base import no_autocast
from mmbert.model.tokens import IGNORE_INDEX, Tokens
from mmbert.runtime.distributed import all_gather_list


def metric_names(objectives: Iterable[str]) -> list[str]:
    """What `PairEvaluation.metrics` can give for a model with these objectives."""
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


class PairResult(NamedTuple):
    """What is known of one pair after one step."""

    index: int
    masked: int
    right_hits: int
    wrong_hits: int | None  # None: no image is a valid wrong one
    mlm_loss: float
    mlm_loss_wrong: float
    right_score: float
    wrong_score: float | None
    image_key: int  # the same for all captions of an image


class EncodedPair(NamedTuple):
    """One pair of the retrieval sample, on the CPU: vectors for itc, tokens for itm."""

    index: int
    text: Tensor  # (E,) or (T, W), see `pack`
    image: Tensor  # (E,) or (P, W)
    text_key: int
    image_text_keys: frozenset[int]
    image_key: int


@dataclass
class PairEvaluation:
    """Collects the results of one split.

    Args:
        model: The model, in evaluation mode.
        retrieval_indices: Pairs whose images and captions are ranked against each other.
        scorer: "itc", "itm", or "auto": itc where the model has it.
    """

    model: MMBertForPreTraining
    retrieval_indices: frozenset[int]
    scorer: str = "auto"
    results: list[PairResult] = field(default_factory=list)
    encoded: list[EncodedPair] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Chooses the scorer."""
        if self.scorer == "auto":
            self.scorer = self.model.scorer
        if self.scorer not in self.model.objectives:
            self.retrieval_indices = frozenset()

    @torch.no_grad()
    def step(self, batch: dict[str, Tensor]) -> None:
        """Evaluates one batch that holds `wrong_pixel_values`; a row is without a wrong image where the two agree."""
        if len(batch["index"]) == 0:
            return
        model = self.model.mmbert
        image, wrong = (
            model.encode_image(batch["pixel_values"]),
            model.encode_image(batch["wrong_pixel_values"]),
        )
        has_wrong = (batch["pixel_values"] != batch["wrong_pixel_values"]).flatten(1).any(dim=1).tolist()
        size = len(has_wrong)
        masked, right_hits, wrong_hits = [0] * size, [0] * size, [0] * size
        loss, wrong_loss = [0.0] * size, [0.0] * size
        if "mlm" in self.model.objectives:
            text = model.encode_text(batch["mlm_input_ids"], batch["attention_mask"])
            masked, right_hits, loss = self._mlm(text, image, batch["mlm_labels"])
            _, wrong_hits, wrong_loss = self._mlm(text, wrong, batch["mlm_labels"])
        right_score, wrong_score = [0.0] * size, [0.0] * size
        text = model.encode_text(batch["input_ids"], batch["attention_mask"])
        if "itm" in self.model.objectives:
            head = self.model.objectives["itm"]
            right_score = head.score(model.fuse(text, image).pooled).tolist()  # pyright: ignore
            wrong_score = head.score(model.fuse(text, wrong).pooled).tolist()  # pyright: ignore
        for row, index in enumerate(batch["index"].tolist()):
            valid = has_wrong[row]
            self.results.append(
                PairResult(
                    index, masked[row], right_hits[row], wrong_hits[row] if valid else None, loss[row], wrong_loss[row],
                    right_score[row], wrong_score[row] if valid else None, int(batch["image_key"][row]),
                )
            )  # fmt: skip
        self._keep_for_retrieval(batch, text, image)

    def _mlm(self, text: Tokens, image: Tokens, labels: Tensor) -> tuple[list[int], list[int], list[float]]:
        """(B,) lists: masked positions, hits among them, summed loss."""
        objective = self.model.objectives["mlm"]
        positions = labels != IGNORE_INDEX
        states = self.model.mmbert.fuse(text, image).text.hidden_states[positions]
        logits = objective.logits(states, self.model.mmbert.word_embeddings)  # pyright: ignore
        with no_autocast(logits):
            losses = F.cross_entropy(logits, labels[positions], reduction="none")
        hits = logits.argmax(dim=-1) == labels[positions]
        row = positions.nonzero()[:, 0]
        zeros = torch.zeros(len(labels), dtype=torch.float64, device=row.device)
        counted = [zeros.index_add(0, row, x.double()) for x in (torch.ones_like(losses), hits, losses)]
        return counted[0].int().tolist(), counted[1].int().tolist(), counted[2].tolist()

    def _keep_for_retrieval(self, batch: dict[str, Tensor], text: Tokens, image: Tokens) -> None:
        chosen = [row for row, index in enumerate(batch["index"].tolist()) if index in self.retrieval_indices]
        if not chosen:
            return
        if self.scorer == "itc":
            head = self.model.objectives["itc"]
            texts = head.embed_text(text).cpu()  # pyright: ignore
            images = head.embed_image(image).cpu()  # pyright: ignore
        else:
            texts, images = pack(text).cpu(), pack(image).cpu()
        lengths = text.mask.sum(dim=1).tolist()
        for row in chosen:
            carried = frozenset(k for k in batch["image_text_keys"][row].tolist() if k >= 0)
            own = texts[row] if self.scorer == "itc" else texts[row, : lengths[row]].clone()
            self.encoded.append(
                EncodedPair(
                    int(batch["index"][row]), own, images[row].clone(), int(batch["text_key"][row]), carried,
                    int(batch["image_key"][row]),
                )
            )  # fmt: skip

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """The flat results of the split; fractions, nats for losses."""
        results = sorted({r.index: r for r in all_gather_list(self.results)}.values())
        encoded = sorted({e.index: e for e in all_gather_list(self.encoded)}.values(), key=lambda e: e.index)
        out: dict[str, float] = {}
        masked = sum(r.masked for r in results)
        if masked:
            out["mlm_loss"] = sum(r.mlm_loss for r in results) / masked
            out["mlm_accuracy"] = sum(r.right_hits for r in results) / masked
            both = [r for r in results if r.wrong_hits is not None]
            shuffled = sum(r.masked for r in both)
            if shuffled:
                wrong = sum(r.wrong_hits or 0 for r in both) / shuffled
                out["mlm_accuracy_shuffled"] = wrong
                out["mlm_loss_shuffled"] = sum(r.mlm_loss_wrong for r in both) / shuffled
                out["mlm_image_gain"] = sum(r.right_hits for r in both) / shuffled - wrong
        pairs = [(r.right_score, r.wrong_score) for r in results if r.wrong_score is not None]
        if "itm" in self.model.objectives and pairs:
            right, wrong_scores = torch.tensor(pairs, dtype=torch.float64).T
            out["itm_loss"] = float((F.softplus(-right) + F.softplus(wrong_scores)).mean() / 2)
            out["itm_accuracy"] = float(((right > 0).double() + (wrong_scores <= 0).double()).mean() / 2)
            labels = torch.cat([torch.ones_like(right), torch.zeros_like(wrong_scores)])
            out["itm_auroc"] = auroc(torch.cat([right, wrong_scores]), labels)
            out["itm_left_out"] = float(len(results) - len(pairs))
        if len(encoded) > 1:
            out |= self._retrieval(encoded)
        return out

    def outcomes(self) -> dict[str, ItemOutcomes]:
        """What became of each pair (`itm_accuracy`) or masked word (`mlm_...`), under the result that is their mean."""
        results = sorted({r.index: r for r in all_gather_list(self.results)}.values())
        both = [r for r in results if r.wrong_score is not None]
        number = {key: i for i, key in enumerate(dict.fromkeys(r.image_key for r in results))}
        out = {}
        if "itm" in self.model.objectives and both:
            right = [((r.right_score > 0) + (r.wrong_score <= 0)) / 2 for r in both]  # pyright: ignore
            out["itm_accuracy"] = ItemOutcomes(right, [number[r.image_key] for r in both])
        if "mlm" in self.model.objectives:
            # Which word of a pair was hit is not kept: statistics draw pairs, not words.
            for name, rows, hits in (
                ("mlm_accuracy", results, [r.right_hits for r in results]),
                ("mlm_accuracy_shuffled", both, [r.wrong_hits or 0 for r in both]),
            ):
                words = [float(i < hit) for r, hit in zip(rows, hits, strict=True) for i in range(r.masked)]
                out[name] = ItemOutcomes(words, [number[r.image_key] for r in rows for _ in range(r.masked)])
        return {name: found for name, found in out.items() if found.values}

    def _retrieval(self, encoded: list[EncodedPair]) -> dict[str, float]:
        relevant = torch.tensor(
            [[t.text_key in i.image_text_keys or t.image_key == i.image_key for t in encoded] for i in encoded]
        )
        if self.scorer == "itc":
            scores = torch.stack([e.image for e in encoded]) @ torch.stack([e.text for e in encoded]).T
        else:
            numbers = torch.arange(len(encoded))
            images, texts = torch.stack([e.image for e in encoded]), [e.text for e in encoded]
            scores = pair_scores(self.model, images, texts, torch.cartesian_prod(numbers, numbers))
            scores = scores.view(len(encoded), len(encoded))
        out = recall_at_k(scores, torch.arange(len(encoded)), relevant=relevant)
        chance = float(relevant.double().mean())
        return {**out, "retrieval_images": float(len(encoded)), "retrieval_chance_R@1": chance}
