"""`LoadedModel`: inference on single images and texts, or lists of them."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader

from mmbert.data.images import ImageSource, as_image_list
from mmbert.data.processor import MMBertProcessor, pad
from mmbert.data.queries import Query, QueryBatches, as_text_list, pair_up
from mmbert.errors import DataError, UsageError, did_you_mean, quote
from mmbert.evaluation.encoding import encode, pair_scores
from mmbert.inference.capabilities import objectives_of, task_of
from mmbert.inference.loading import load_folder
from mmbert.model.modeling import MMBertForPreTraining, MMBertPreTrainedModel
from mmbert.model.tokens import Fused, Reads, Tokens
from mmbert.runtime import allowed_imports
from mmbert.runtime.signals import StopSignals

if TYPE_CHECKING:
    from mmbert.inference.explanation.explanation import Explanation
    from mmbert.inference.explanation.modality import ModalityShares

BATCH_SIZE = 64
"""Images or texts per forward pass: bounds the memory, changes no result."""


class Answer(NamedTuple):
    """Predicted label with its score."""

    answer: str
    score: float  # vqa: expected official accuracy of this answer; decision: probability, which sum to 1


class Word(NamedTuple):
    """Predicted token at a [MASK]."""

    token: str  # as in the vocabulary: "##ing" continues the word before
    probability: float


class Matches(NamedTuple):
    """Matching scores of texts with an image, in the order of the texts."""

    scores: list[float]
    kind: Literal["probability", "cosine"]  # from the objective itm; from the vectors of itc


class Embeddings(NamedTuple):
    """Contrastive unit vectors of images and texts, on the CPU."""

    images: Tensor | None  # (N, E) fp32; None: not requested
    texts: Tensor | None  # (M, E) fp32


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    *,
    dtype: str | torch.dtype = "float32",
    allow_import: str | Sequence[str] = (),
) -> "LoadedModel":
    """Load a saved model for inference.

    Args:
        path: Folder of the model, RUN/model; or its name on the Hugging Face hub, OWNER/MODEL.
        device: "cpu", "cuda", "cuda:1" ...; None: the GPU if there is one.
        dtype: Of weights and hidden states: "float32"; "bfloat16" or "float16", which take half the memory.
        allow_import: Modules from which a custom fusion may be imported, such as ["my_fusion"].

    Raises:
        UsageError: The folder is not a model of mmbert, its fusion is not allowed, or there is no such device or dtype.
        DataError: Its weights are missing, broken or of another architecture.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"dtype={name!r}: allowed are {', '.join(DTYPES)}.{did_you_mean(name, DTYPES)}")
    allowed_imports.allow_import(*[allow_import] if isinstance(allow_import, str) else allow_import)
    model, processor = load_folder(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(device, DTYPES[name])  # pyright: ignore[reportArgumentType]
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"device={str(device)!r}: {reason}. The CPU is always there: 'cpu'.") from error
    return LoadedModel(model, processor, name=str(path))


class LoadedModel:
    """Saved model with its processor, as `load` returns it. Which methods it supports depends on its heads.

    Images are paths, file contents, Pillow images or arrays, see `load_image`. For a list the result is a list of what
    single calls return (to 1e-5, because floating-point sums are batched differently).

    Args:
        model: In evaluation mode.
        processor: The model's.
        name: Name in messages.
    """

    def __init__(self, model: MMBertPreTrainedModel, processor: MMBertProcessor, *, name: str = "the model"):
        self.model, self.processor, self.name = model, processor, name
        self.core: Any = getattr(model, "mmbert", model)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.core.word_embeddings.device

    @overload
    def answer(self, image: ImageSource, question: str, top_k: int = 1) -> list[Answer]: ...
    @overload
    def answer(self, image: Any, question: Sequence[str], top_k: int = 1) -> list[list[Answer]]: ...
    @overload
    def answer(self, image: Sequence[ImageSource], question: str, top_k: int = 1) -> list[list[Answer]]: ...
    def answer(
        self,
        image: ImageSource | Sequence[ImageSource],
        question: str | Sequence[str],
        top_k: int = 1,
    ) -> list[Answer] | list[list[Answer]]:
        """Answer questions about images.

        Args:
            image: One image, or a list: one per question, or several for one question. For a model with two images per
                text (NLVR2) a list of two, or a list of such lists.
            question: One question or statement, or a list: one per image, or several about one image. Tokens beyond
                `processor.max_text_length` are truncated.
            top_k: Number of answers per question; all labels if the model has fewer.

        Returns:
            Answers, best first; a list of such lists for a list of images or questions.

        Raises:
            UsageError: The model was not fine-tuned for a task with images, or the lengths of the lists differ.
            BadImageError: An image can't be read.
        """
        queries, single = pair_up(image, question, num_images=task_of(self.model, self.name).num_images)
        found = dict(row for rows in self.answers(queries, top_k=top_k) for row in rows)
        return found[0] if single else [found[i] for i in range(len(queries))]

    @torch.no_grad()
    def answers(
        self, queries: Sequence[Query], *, top_k: int = 1, batch_size: int = BATCH_SIZE, num_workers: int = 0
    ) -> Iterator[list[tuple[int, list[Answer]]]]:
        """Answer many questions in batches, those about one image together; see `answer`.

        Args:
            queries: Questions with their images.
            top_k: Number of answers per question.
            batch_size: Questions per forward pass.
            num_workers: Processes that decode images.

        Yields:
            For each question of a batch its index in `queries`, and the answers, best first.
        """
        task = task_of(self.model, self.name)
        _check_top_k(top_k)
        for query in queries:
            if len(query.images) != task.num_images:
                place = query.place or f"the text {quote(query.text)}"
                raise DataError(place, f"{len(query.images)} images", f"{task.num_images}, as '{self.name}' takes")
        for rows, _, text, image in self._encoded(queries, self.processor.encode, batch_size, num_workers):
            logits = task.logits(task.pooled(self.core, text, image))
            found = _best(logits, task.probabilities(logits), top_k)
            yield [(i, [Answer(task.labels[n], p) for n, p in best]) for i, best in zip(rows, found, strict=True)]

    @overload
    def match(self, image: str | os.PathLike[str] | bytes | Image, texts: str | Sequence[str]) -> Matches: ...
    @overload
    def match(self, image: Any, texts: str | Sequence[str]) -> Any: ...
    def match(self, image: ImageSource | Sequence[ImageSource], texts: str | Sequence[str]) -> Matches | list[Matches]:
        """Score how well texts match an image, or each of several; every image and every text is encoded once.

        Args:
            image: The image, or a list of images.
            texts: One text, or a list.

        Returns:
            With the objective itm the probability that each pair matches; with itc alone the cosine of their vectors.
            `kind` tells which. For a list of images a list, each with the scores of all texts.

        Raises:
            UsageError: The model has neither, or there is no text.
            BadImageError: An image can't be read.
        """
        objectives = objectives_of(self.model, self.name, "matching", "itm", "itc")
        texts, (images, is_single) = as_text_list(texts), as_image_list(image)
        if not texts:
            raise UsageError("no text to match with the image; give at least one.")
        if not images:
            return []
        assert isinstance(self.model, MMBertForPreTraining)
        fuses = "itm" in objectives
        encoded = encode(self.model, self.processor, images, texts, batch_size=BATCH_SIZE, keep_tokens=fuses)
        if fuses:
            assert encoded.images is not None
            shape = (len(images), len(encoded.texts))
            pairs = torch.cartesian_prod(*map(torch.arange, shape))
            scores = pair_scores(self.model, encoded.images, encoded.texts, pairs).double().sigmoid().reshape(shape)
        else:
            scores = encoded.similarities()
        kind = "probability" if fuses else "cosine"
        found = [Matches(row.tolist(), kind) for row in scores[:, encoded.text_index]]
        return found[0] if is_single else found

    @torch.no_grad()
    def embed(
        self,
        *,
        images: ImageSource | Sequence[ImageSource] | None = None,
        texts: str | Sequence[str] | None = None,
    ) -> Embeddings:
        """Compute contrastive vectors of images, texts or both; a single one counts as a list of one.

        Raises:
            UsageError: The model was not pretrained with itc, or has vectors of tokens; or nothing was given.
            BadImageError: An image can't be read.
        """
        contrast = objectives_of(self.model, self.name, "embedding", "itc")["itc"]
        contrast.check_one_vector("embedding")
        if images is None and texts is None:
            raise UsageError("nothing to embed; give images, texts or both.")
        of_images = of_texts = None
        if images is not None:
            sources = as_image_list(images)[0]
            found = [contrast.embed_image(self._encode_images(part)).cpu() for part in _batches(sources)]
            of_images = torch.cat([torch.empty(0, contrast.image_projection.out_features), *found])
        if texts is not None:
            rows = [self.processor.encode(text) for text in as_text_list(texts)]
            found = [contrast.embed_text(self._encode_texts(part)).cpu() for part in _batches(rows)]
            of_texts = torch.cat([torch.empty(0, contrast.text_projection.out_features), *found])
        return Embeddings(of_images, of_texts)

    @overload
    def fill_mask(self, image: ImageSource | None, text: str, top_k: int = 5) -> list[list[Word]]: ...
    @overload
    def fill_mask(self, image: Any, text: Sequence[str], top_k: int = 5) -> list[list[list[Word]]]: ...
    @overload
    def fill_mask(self, image: Sequence[ImageSource], text: str, top_k: int = 5) -> list[list[list[Word]]]: ...
    @torch.no_grad()
    def fill_mask(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        text: str | Sequence[str],
        top_k: int = 5,
    ) -> list[list[Word]] | list[list[list[Word]]]:
        """Predict the tokens at each [MASK] of texts about images.

        Args:
            image: One image, or a list as in `answer`; None: the text only.
            text: A text with at least one [MASK], or a list of them.
            top_k: Number of tokens per mask.

        Returns:
            For each mask, in the order of the text, its tokens, best first; a list of such lists for a list of texts.

        Raises:
            UsageError: The model was not pretrained with mlm, or a text has no [MASK] within `max_text_length`.
            BadImageError: An image can't be read.
        """
        head = objectives_of(self.model, self.name, "filling masks", "mlm")["mlm"]
        _check_top_k(top_k)
        queries, single = pair_up(image, text)
        found: dict[int, list[list[Word]]] = {}
        for rows, ids, encoded, pixels in self._encoded(queries, self.processor.encode_masked, BATCH_SIZE, 0):
            fused: Fused = self.core.fuse(encoded, pixels, reads=Reads(text=True))
            masked = ids.eq(self.processor.mask_token_id)  # (B, T)
            logits = head.logits(fused.text.hidden_states[masked], self.core.word_embeddings)
            logits = logits[:, : len(self.processor.tokenizer)]  # (K, V); the matrix may have rows without a token
            words = iter(_best(logits, logits.softmax(dim=-1), top_k))
            for i, count in zip(rows, masked.sum(dim=1).tolist(), strict=True):
                found[i] = [[Word(self._token(n), p) for n, p in next(words)] for _ in range(count)]
        return found[0] if single else [found[i] for i in range(len(queries))]

    def explain(
        self,
        image: ImageSource,
        text: str,
        target: str | None = None,
        *,
        method: Literal["attention", "gradient", "integrated_gradients"] | None = None,
        links: bool = True,
    ) -> "Explanation":
        """Explain one score: relevance of every token and image patch, for any fusion strategy.

        Args:
            image: The image.
            text: The text.
            target: "itm" or "itc"; a word of the text, which is masked, or any word if the text has a [MASK]; for a
                fine-tuned model one of its labels. None: itm, else itc; the best answer, or the best word at [MASK].
            method: "attention": the rule of arXiv:2103.15679 for self-, co- and cross-attention; "gradient": gradient
                x input; "integrated_gradients" (arXiv:1703.01365, needs captum). The gradient methods are relative to a
                text of [MASK] and an image of one color. None: attention where it connects the modalities, else
                gradient (late fusion, itc, a custom fusion without attention).
            links: Also compute the interaction of each token with each patch, which the HTML page shows; takes one pass
                per patch.

        Raises:
            UsageError: An empty text, a target that the model lacks, or a word that is not in the text.
            BadImageError: The image can't be read.
        """
        from mmbert.inference.explanation.explain import explain
        from mmbert.inference.explanation.targets import target_of

        chosen = target_of(self, image, text, target)
        pixels = self.processor.pixel_values(image)
        return explain(self.core, self.processor, chosen, pixels, text=text, method=method, links=links)

    def modality_shares(
        self, image: ImageSource, text: str, target: str | None = None, *, samples: int = 64, seed: int = 0
    ) -> "ModalityShares":
        """Compute the shares of text and image in one score by Shapley values (MM-SHAP, arXiv:2212.08158).

        Args:
            image: The image, in regions about as many as the text has tokens.
            text: The text.
            target: As in `explain`.
            samples: Permutations to sample, an even number; few parts are enumerated instead.
            seed: Seed of the permutations.

        Raises:
            UsageError: See `explain`; fewer than 4 samples; or a text without a token besides a masked word.
            BadImageError: The image can't be read.
        """
        from mmbert.inference.explanation.modality import compute_shares
        from mmbert.inference.explanation.targets import target_of

        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 4:
            raise UsageError(f"samples={samples!r}: must be a whole number of 4 or more.")
        chosen = target_of(self, image, text, target)
        pixels = self.processor.pixel_values(image)
        return compute_shares(self.core, self.processor, chosen, pixels, samples=samples, seed=seed)

    def _token(self, number: int) -> str:
        return str(self.processor.tokenizer.convert_ids_to_tokens(number))

    def _encode_texts(self, rows: Sequence[Sequence[int]]) -> Tokens:
        ids, mask = pad(rows, self.processor.pad_token_id)
        return self.core.encode_text(ids.to(self.device), mask.to(self.device))

    def _encode_images(self, sources: Iterable[ImageSource]) -> Tokens:
        pixels = torch.stack([self.processor.pixel_values(source) for source in sources])
        return self.core.encode_image(self.processor.image_settings.normalize(pixels.to(self.device)))

    @torch.no_grad()
    def _encoded(
        self, queries: Sequence[Query], encode: Callable[[str], list[int]], batch_size: int, num_workers: int
    ) -> Iterator[tuple[list[int], Tensor, Tokens, Tokens]]:
        """Yield indices in `queries`, (B, T) token ids, and the encoded texts and images of each batch."""
        loader = DataLoader(
            QueryBatches(self.processor, queries, encode, batch_size),
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=StopSignals.worker_init_fn(),
            generator=torch.Generator(),  # else the loader would draw from the caller's generator
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            ids = batch.input_ids.to(self.device)
            text = self.core.encode_text(ids, batch.attention_mask.to(self.device))
            if batch.images is None:
                image = Tokens.absent(len(ids), text.hidden_states.shape[-1], like=text.hidden_states)
            else:
                pixels = self.processor.image_settings.normalize(batch.images.to(self.device))
                image = self.core.encode_image(pixels).rows(batch.image_of.to(self.device))
            yield batch.positions, ids, text, image


def _batches(items: list[Any]) -> Iterator[list[Any]]:
    return (items[i : i + BATCH_SIZE] for i in range(0, len(items), BATCH_SIZE))


def _check_top_k(top_k: int) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise UsageError(f"top_k={top_k!r}: must be a whole number of 1 or more.")


def _best(logits: Tensor, probabilities: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """Return (index, probability) of the k largest logits of each row; the smaller index first among equal ones."""
    # By logits, because probabilities near 0 and 1 round to ties.
    numbers = logits.argsort(dim=-1, descending=True, stable=True)[:, :k]
    found = probabilities.gather(1, numbers)
    return [[*zip(*row, strict=True)] for row in zip(numbers.tolist(), found.tolist(), strict=True)]
