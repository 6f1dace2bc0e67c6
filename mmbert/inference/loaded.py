"""A saved model that is asked about single images and texts, or lists of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmbert.data.images import ImageSource
from mmbert.data.processor import MMBertProcessor, pad
from mmbert.data.queries import Query, QueryBatches, as_text_list, pair_up
from mmbert.errors import DataError, UsageError
from mmbert.evaluation.encoding import encode, pair_scores
from mmbert.inference.capabilities import objectives_of, task_of
from mmbert.inference.loading import load_folder
from mmbert.model.modeling import MMBertForPreTraining, MMBertPreTrainedModel
from mmbert.model.tokens import Fused, Tokens
from mmbert.runtime import allowed_imports
from mmbert.runtime.signals import StopSignals

BATCH_SIZE = 64
"""Images or texts in one call of the model: bounds its memory, changes no result."""


class Answer(NamedTuple):
    """A label of the model, and how sure it is."""

    answer: str
    score: float  # vqa: expected official accuracy, each by itself; decision: probability, all together 1


class Word(NamedTuple):
    """A token that may stand at a [MASK]."""

    token: str  # as the vocabulary has it: "##ing" goes on with the word before
    probability: float


class Matches(NamedTuple):
    """How well each text fits the image, in the order of the texts."""

    scores: list[float]
    kind: Literal["probability", "cosine"]  # of the matching objective itm; of the contrastive vectors of itc


class Embeddings(NamedTuple):
    """Unit vectors of the contrastive space, on the CPU; their products are cosines."""

    images: Tensor | None  # (N, E) fp32; None: not asked for
    texts: Tensor | None  # (M, E) fp32


def load(
    path: str | Path, device: str | torch.device | None = None, *, allow_import: str | Sequence[str] = ()
) -> "LoadedModel":
    """Loads a saved model's folder, RUN/model, to be asked; it computes in fp32.

    Args:
        path: The folder.
        device: "cpu", "cuda", "cuda:1" ...; None: the GPU if there is one.
        allow_import: Modules of yours that the model's fusion may come from, such as ["my_fusion"].

    Raises:
        UsageError: The folder is no model of mmbert, its fusion is not allowed, or there is no such device.
        DataError: Its weights are missing, broken or of another architecture.
    """
    allowed_imports.allow_import(*[allow_import] if isinstance(allow_import, str) else allow_import)
    model, processor = load_folder(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(device)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"device={str(device)!r}: {reason}. The CPU is always there: 'cpu'.") from error
    return LoadedModel(model, processor, name=str(path))


class LoadedModel:
    """A model with its processor; `load` makes it. Which calls it answers depends on what it was trained for.

    Images are paths, file contents, Pillow images or arrays, see `load_image`. Where a list is given the result is a
    list, and holds what single calls give (to 1e-5, since sums round otherwise).

    Args:
        model: In evaluation mode.
        processor: The model's.
        name: What messages call it.
    """

    def __init__(self, model: MMBertPreTrainedModel, processor: MMBertProcessor, *, name: str = "the model"):
        self.model, self.processor, self.name = model, processor, name
        self.core: Any = getattr(model, "mmbert", model)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
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
        """Answers a question about an image.

        Args:
            image: An image, or several: as many as questions, or for one question.
            question: A question or statement, or several: as many as images, or about one image. The tokens that
                `processor.max_text_length` leaves over are not read.
            top_k: Answers wanted; a model with fewer labels gives all.

        Returns:
            The answers, best first; a list of such lists where a list of images or questions was given.

        Raises:
            UsageError: The model was not fine-tuned for a task with one image, or lists do not fit together.
            BadImageError: An image that can't be read.
        """
        asked, single = pair_up(image, question)
        found = dict(row for rows in self.answers(asked, top_k=top_k) for row in rows)
        return found[0] if single else [found[i] for i in range(len(asked))]

    @torch.no_grad()
    def answers(
        self, asked: Sequence[Query], *, top_k: int = 1, batch_size: int = BATCH_SIZE, num_workers: int = 0
    ) -> Iterator[list[tuple[int, list[Answer]]]]:
        """Answers many questions, a batch at a time, those about one image together; see `answer`.

        Args:
            asked: Questions with their images.
            top_k: Answers to each.
            batch_size: Questions in one call of the model.
            num_workers: Processes that decode images.

        Yields:
            For each question of a batch its position in `asked`, and the answers, best first.
        """
        task = task_of(self.model, self.name)
        _check_top_k(top_k)
        for rows, _, fused in self._fused(asked, self.processor.encode, batch_size, num_workers):
            logits = task.logits(fused.pooled)
            found = _best(logits, task.probabilities(logits), top_k)
            yield [(i, [Answer(task.labels[n], p) for n, p in best]) for i, best in zip(rows, found, strict=True)]

    def match(self, image: ImageSource, texts: str | Sequence[str]) -> Matches:
        """Tells how well texts fit an image, which is encoded once.

        Args:
            image: The image.
            texts: One text or several.

        Returns:
            With the objective itm the probability that text and image belong together, each by itself; a model that
            has only itc gives the cosine of their vectors. `kind` says which.

        Raises:
            UsageError: The model has neither, or there is no text.
            BadImageError: The image can't be read.
        """
        objectives = objectives_of(self.model, self.name, "matching", "itm", "itc")
        texts = as_text_list(texts)
        if not texts:
            raise UsageError("no text to match with the image; give at least one.")
        assert isinstance(self.model, MMBertForPreTraining)
        fuses = "itm" in objectives
        encoded = encode(self.model, self.processor, [image], texts, batch_size=BATCH_SIZE, keep_tokens=fuses)
        if not fuses:
            assert encoded.image_vectors is not None and encoded.text_vectors is not None
            scores = encoded.text_vectors @ encoded.image_vectors[0]
            return Matches(scores[encoded.text_index].tolist(), "cosine")
        assert encoded.images is not None
        pairs = torch.tensor([(0, text) for text in range(len(encoded.texts))])
        scores = pair_scores(self.model, encoded.images, encoded.texts, pairs).double().sigmoid()
        return Matches(scores[encoded.text_index].tolist(), "probability")

    @torch.no_grad()
    def embed(
        self,
        *,
        images: ImageSource | Sequence[ImageSource] | None = None,
        texts: str | Sequence[str] | None = None,
    ) -> Embeddings:
        """Gives the contrastive vectors of images, texts or both; one of a kind is a list of one.

        Raises:
            UsageError: The model was not pretrained with itc, or nothing was given.
            BadImageError: An image that can't be read.
        """
        contrast = objectives_of(self.model, self.name, "embedding", "itc")["itc"]
        if images is None and texts is None:
            raise UsageError("nothing to embed; give images, texts or both.")
        of_images = of_texts = None
        if images is not None:
            sources = [*images] if isinstance(images, list | tuple) else [images]
            found = [contrast.embed_image(self._encode_images(part)).cpu() for part in _parts(sources)]  # pyright: ignore
            of_images = torch.cat([torch.empty(0, contrast.image_projection.out_features), *found])
        if texts is not None:
            rows = [self.processor.encode(text) for text in as_text_list(texts)]
            found = [contrast.embed_text(self._encode_texts(part)).cpu() for part in _parts(rows)]
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
        """Guesses the words behind each [MASK] of a text about an image.

        Args:
            image: The image, or several as in `answer`; None: the text alone, which shows what the image adds.
            text: A text with one [MASK] or more, or several such texts.
            top_k: Words wanted for each mask.

        Returns:
            For each mask, in the order of the text, its words, best first; a list of such lists where a list was given.

        Raises:
            UsageError: The model was not pretrained with mlm, or a text has no [MASK] within `max_text_length`.
            BadImageError: An image that can't be read.
        """
        head = objectives_of(self.model, self.name, "filling masks", "mlm")["mlm"]
        _check_top_k(top_k)
        asked, single = pair_up(image, text)
        found: dict[int, list[list[Word]]] = {}
        for rows, ids, fused in self._fused(asked, self.processor.encode_masked, BATCH_SIZE, 0):
            masked = ids.eq(self.processor.mask_token_id)  # (B, T)
            logits = head.logits(fused.text.hidden_states[masked], self.core.word_embeddings)
            logits = logits[:, : len(self.processor.tokenizer)]  # (K, V); the matrix may have rows without a token
            words = iter(_best(logits, logits.softmax(dim=-1), top_k))
            for i, count in zip(rows, masked.sum(dim=1).tolist(), strict=True):
                found[i] = [[Word(self._token(n), p) for n, p in next(words)] for _ in range(count)]
        return found[0] if single else [found[i] for i in range(len(asked))]

    def _token(self, number: int) -> str:
        return str(self.processor.tokenizer.convert_ids_to_tokens(number))

    def _encode_texts(self, rows: Sequence[Sequence[int]]) -> Tokens:
        ids, mask = pad(rows, self.processor.pad_token_id)
        return self.core.encode_text(ids.to(self.device), mask.to(self.device))

    def _encode_images(self, sources: Iterable[ImageSource]) -> Tokens:
        pixels = torch.stack([self.processor.pixel_values(source) for source in sources])
        return self.core.encode_image(self.processor.image_settings.normalize(pixels.to(self.device)))

    @torch.no_grad()
    def _fused(
        self, asked: Sequence[Query], encode: Callable[[str], list[int]], batch_size: int, num_workers: int
    ) -> Iterator[tuple[list[int], Tensor, Fused]]:
        """Positions in `asked`, (B, T) token ids and the fused pairs of each batch."""
        loader = DataLoader(
            QueryBatches(self.processor, asked, encode, batch_size),
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=StopSignals.worker_init_fn(),
            generator=torch.Generator(),  # or asking would advance the caller's random numbers
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
            yield batch.positions, ids, self.core.fuse(text, image)


def _parts(items: list[Any]) -> Iterator[list[Any]]:
    return (items[i : i + BATCH_SIZE] for i in range(0, len(items), BATCH_SIZE))


def _check_top_k(top_k: int) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise UsageError(f"top_k={top_k!r}: a whole number of 1 or more.")


def _best(logits: Tensor, probabilities: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """(number, probability) of the k largest of each row; of equal ones the smaller number comes first."""
    # By logits: probabilities near 0 and 1 round to ties.
    numbers = logits.argsort(dim=-1, descending=True, stable=True)[:, :k]
    found = probabilities.gather(1, numbers)
    return [[*zip(*row, strict=True)] for row in zip(numbers.tolist(), found.tolist(), strict=True)]
