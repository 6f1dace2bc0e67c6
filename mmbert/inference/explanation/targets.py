"""Scores that explanations and modality shares are about: ITM, ITC, a label of a task, or a masked word."""

from collections.abc import Callable
from itertools import combinations
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
    token: int | None = None
    if target is None and text.strip():
        if isinstance(model.model, MMBertForTask):
            task_of(model.model, model.name, one_image=True)
            target = model.answer(image, text)[0].answer
        elif model.processor.has_mask(text):
            target = model.fill_mask(image, text, top_k=1)[0][0].token
            token = int(model.processor.tokenizer.convert_tokens_to_ids(target))
    return choose_target(model.model, model.processor, model.name, text, target, token=token)


def choose_target(
    model: MMBertPreTrainedModel,
    processor: MMBertProcessor,
    name: str,
    text: str,
    target: str | None,
    *,
    token: int | None = None,
) -> Target:
    """Find the score that `target` names.

    Args:
        model: A model with heads.
        processor: The model's.
        name: Name of the model in messages.
        text: The text.
        target: "itm"; "itc"; a word of the text, which is masked; any word or token of the vocabulary ("##ing", "Ġcat")
            if the text has a [MASK]; for a fine-tuned model one of its labels. None: itm, else itc.
        token: Token id of a predicted word, whose token `target` is; None: `target` is tokenized.

    Raises:
        UsageError: An empty text, a target that the model lacks, or a word that is not in the text.
    """
    if not text.strip():
        raise UsageError("the text is empty; give at least one word.")
    if isinstance(model, MMBertForTask):
        return _label_target(model, processor.encode(text), name, target)
    wanted = PAIR_OBJECTIVES if target is None else (target,)
    if wanted[0] in PAIR_OBJECTIVES and token is None:
        heads = objectives_of(model, name, "explaining this score", *wanted)
        return _pair_target(model, heads, next(x for x in wanted if x in heads), processor.encode(text))
    return _word_target(model, processor, name, text, wanted[0], token)


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


def _word_target(model: Any, processor: MMBertProcessor, name: str, text: str, word: str, token: int | None) -> Target:
    head = objectives_of(model, name, f"explaining the word {quote(word)}", "mlm")["mlm"]
    pieces = _tokens_at_mask(processor, text, word) if token is None else [token]
    if not pieces:
        raise UsageError(f"target={quote(word)} has no token; give itm, itc or a word.")
    if processor.has_mask(text):
        ids = processor.encode_masked(text)
        start, stop = ids.index(processor.mask_token_id), ids.index(processor.mask_token_id) + 1
    else:
        ids = processor.encode(text)
        start, stop = _find_word(processor, text, word)
        pieces = ids[start:stop]
        if not pieces:
            raise UsageError(
                f"target={quote(word)} is no word of the text {quote(text)}; give one of its words, write [MASK] in "
                "the text, or explain itm or itc."
            )
    ids = [*ids[:start], *[processor.mask_token_id] * len(pieces), *ids[stop:]]
    core, places = model.mmbert, slice(start, start + len(pieces))

    def score(text: Tokens, image: Tokens) -> Tensor:
        fused: Fused = core.fuse(text, image, reads=Reads(text=True))
        states = fused.text.hidden_states[:, places]  # (B, pieces, D)
        logits = head.logits(states.flatten(0, 1), core.word_embeddings)[:, : len(processor.tokenizer)]
        wanted = torch.tensor(pieces, device=logits.device).repeat(len(states))
        chosen = logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
        return chosen.reshape(len(states), -1).sum(dim=1)

    return Target(f"word {word!r}", "probability", ids, score, torch.exp)


def _tokens_at_mask(processor: MMBertProcessor, text: str, word: str) -> list[int]:
    """Tokenize a word as the tokenizer would in place of the first [MASK]; a token of the vocabulary is itself."""
    tokenizer: Any = processor.tokenizer
    before, mask, _ = text.partition(str(tokenizer.mask_token))
    mask_token = tokenizer.added_tokens_decoder.get(tokenizer.mask_token_id)
    # Byte-level BPE: the space before the mask belongs to the word, as in `encode_masked`.
    takes_space = mask and before[-1:].isspace() and getattr(mask_token, "lstrip", False)
    pieces = processor.encode(f" {word.lstrip()}" if takes_space else word)[1:-1]
    known = tokenizer.get_vocab().get(word) if len(pieces) > 1 else None
    return pieces if known is None else [known]


def _find_word(processor: MMBertProcessor, text: str, word: str) -> tuple[int, int]:
    """Find the first place of a word, or of several, in a text: its first token, and the one after its last.

    The word is compared as text, by the offsets of its tokens, since byte-level BPE has other tokens for a word behind
    a space. Both are 0 where it is not in the text.
    """
    wanted, word = processor.encode(word.strip())[1:-1], word.strip()
    ids, continues = processor.encode_words(text)
    if not processor.tokenizer.is_fast:
        places = [i for i in range(1, len(ids)) if wanted and ids[i : i + len(wanted)] == wanted]
        return (places[0], places[0] + len(wanted)) if places else (0, 0)
    options: Any = {"truncation": True, "max_length": processor.max_text_length, "split_special_tokens": True}
    offsets: Any = processor.tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"]
    borders = [i for i in range(1, len(ids)) if i == len(ids) - 1 or not continues[i]]
    for start, stop in combinations(borders, 2):
        found = text[offsets[start][0] : offsets[stop - 1][1]].strip()
        if len(found) == len(word) and (found == word or processor.encode(found)[1:-1] == wanted):
            return start, stop
    return 0, 0
