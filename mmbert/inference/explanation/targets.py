"""Scores that explanations and modality shares are about: ITM, ITC, a label of a task, or a masked word."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmbert.data.images import ImageSource
from mmbert.data.processor import MMBertProcessor
from mmbert.errors import UsageError, did_you_mean, quote
from mmbert.inference.capabilities import objectives_of, task_of
from mmbert.model.modeling import MMBertForTask, MMBertPreTrainedModel
from mmbert.model.objectives.late_interaction import pair_similarities
from mmbert.model.tasks.label_losses import SoftmaxLoss
from mmbert.model.tokens import Fused, Reads, Tokens

PAIR_OBJECTIVES = ("itm", "itc")


class Target(NamedTuple):
    """One score of a model for a text and an image."""

    name: str  # "itm", "itc", "label 'red'", "word 'red'"
    kind: str  # what `display` returns: "probability" or "cosine"
    input_ids: list[int]  # of the text, with [MASK] in place of a word to predict
    score: Callable[[Tokens, Tokens], Tensor]  # encoded texts and images -> (B,) log-odds, log-probability or cosine
    display: Callable[[Tensor], Tensor]  # scores -> probabilities or cosines


def target_of(model: Any, image: ImageSource, text: str, target: str | None) -> Target:
    """Find the score that `target` names; None stands for the best answer, or the best word at a [MASK], too.

    Args:
        model: Result of `mmbert.load`.
        image: The image.
        text: The text.
        target: See `choose_target`.

    Raises:
        UsageError: See `choose_target`.
        BadImageError: The image can't be read.
    """
    if target is None and text.strip():
        if isinstance(model.model, MMBertForTask):
            task_of(model.model, model.name, one_image=True)
            target = model.answer(image, text)[0].answer
        elif model.processor.has_mask(text):
            target = model.fill_mask(image, text, top_k=1)[0][0].token
    return choose_target(model.model, model.processor, model.name, text, target)


def choose_target(
    model: MMBertPreTrainedModel, processor: MMBertProcessor, name: str, text: str, target: str | None
) -> Target:
    """Find the score that `target` names.

    Args:
        model: A model with heads.
        processor: The model's.
        name: Name of the model in messages.
        text: The text.
        target: "itm"; "itc"; a word of the text, which is masked; any word if the text has a [MASK]; for a fine-tuned
            model one of its labels. None: itm, else itc.

    Raises:
        UsageError: An empty text, a target that the model lacks, or a word that is not in the text.
    """
    if not text.strip():
        raise UsageError("the text is empty; give at least one word.")
    if isinstance(model, MMBertForTask):
        return _label_target(model, processor.encode(text), name, target)
    wanted = PAIR_OBJECTIVES if target is None else (target,)
    if wanted[0] in PAIR_OBJECTIVES:
        heads = objectives_of(model, name, "explaining this score", *wanted)
        return _pair_target(model, heads, next(x for x in wanted if x in heads), processor.encode(text))
    return _word_target(model, processor, name, text, wanted[0])


def _pair_target(model: Any, heads: dict[str, Any], objective: str, ids: list[int]) -> Target:
    head = heads[objective]

    def cosine(text: Tokens, image: Tokens) -> Tensor:
        return pair_similarities(head.embed_text(text), head.embed_image(image))

    if objective == "itm":
        return Target("itm", "probability", ids, model.match_scores, torch.sigmoid)
    return Target("itc", "cosine", ids, cosine, torch.clone)


def _label_target(model: MMBertForTask, ids: list[int], name: str, label: str | None) -> Target:
    task, core = task_of(model, name, one_image=True), model.mmbert
    if label not in task.labels:
        known = ", ".join(map(repr, task.labels[:5])) + (" ..." if len(task.labels) > 5 else "")
        hint = did_you_mean(str(label), task.labels)
        raise UsageError(f"target={quote(label)} is no label of '{name}'; it has {len(task.labels)}: {known}.{hint}")
    number, is_softmax = task.labels.index(label), isinstance(task.label_loss, SoftmaxLoss)

    def score(text: Tokens, image: Tokens) -> Tensor:
        logits = task.logits(task.pooled(core, text, image))
        return (logits.log_softmax(dim=-1) if is_softmax else logits)[:, number]

    return Target(f"label {label!r}", "probability", ids, score, torch.exp if is_softmax else torch.sigmoid)


def _word_target(model: Any, processor: MMBertProcessor, name: str, text: str, word: str) -> Target:
    head = objectives_of(model, name, f"explaining the word {quote(word)}", "mlm")["mlm"]
    pieces = processor.encode(word)[1:-1]
    if not pieces:
        raise UsageError(f"target={quote(word)} has no token; give itm, itc or a word.")
    if processor.has_mask(text):
        ids = processor.encode_masked(text)
        start = ids.index(processor.mask_token_id)
        ids = [*ids[:start], *[processor.mask_token_id] * len(pieces), *ids[start + 1 :]]
    else:
        ids = processor.encode(text)
        places = [i for i in range(len(ids)) if ids[i : i + len(pieces)] == pieces]
        if not places:
            raise UsageError(
                f"target={quote(word)} is no word of the text {quote(text)}; give one of its words, write [MASK] in "
                "the text, or explain itm or itc."
            )
        start = places[0]
        ids[start : start + len(pieces)] = [processor.mask_token_id] * len(pieces)
    core, places = model.mmbert, slice(start, start + len(pieces))

    def score(text: Tokens, image: Tokens) -> Tensor:
        fused: Fused = core.fuse(text, image, reads=Reads(text=True))
        states = fused.text.hidden_states[:, places]  # (B, pieces, D)
        logits = head.logits(states.flatten(0, 1), core.word_embeddings)[:, : len(processor.tokenizer)]
        wanted = torch.tensor(pieces, device=logits.device).repeat(len(states))
        chosen = logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
        return chosen.reshape(len(states), -1).sum(dim=1)

    return Target(f"word {word!r}", "probability", ids, score, torch.exp)
