"""`mmbert.load`: single questions, lists of them, and the errors where a model lacks the requested head."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranking import tiny_model
from tiny import SPECIAL, WORDS, randomize, tiny_config, tiny_examples, tiny_processor

import mmbert
from mmbert import LoadedModel
from mmbert.cli.command_line import utf8_text
from mmbert.cli.main import main
from mmbert.data.images import BadImageError
from mmbert.data.queries import Query, QueryBatches
from mmbert.errors import DataError, UsageError
from mmbert.model.modeling import MMBertForPreTraining, MMBertForTask, MMBertModel, MMBertPreTrainedModel

LABELS = ["red", "blue", "two", "yes"]
QUESTIONS = ["a cat", "the small red dog runs in the big green street", "a", "two birds on the left", "playing"]
"""Of different lengths."""
MASKED = ["a [MASK] cat", "[MASK]", "the big [MASK] runs in the [MASK] street", "two"]
ALL = {"mlm": 1.0, "itm": 1.0, "itc": {"embedding_size": 8}}


def saved(folder: Path, model: MMBertPreTrainedModel) -> str:
    randomize(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # so that the best answer depends on image and text
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


def task_model(task: str = "vqa", **settings: Any) -> MMBertForTask:
    return MMBertForTask(tiny_config(task=task, **{"labels": LABELS, "objectives": {}, **settings}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models called pretrained, contrastive, vqa and decision, and five images."""
    folder = tmp_path_factory.mktemp("inference")
    saved(folder / "pretrained", tiny_model(objectives=ALL))
    saved(folder / "contrastive", tiny_model("late", objectives={"itc": {"embedding_size": 8}}))
    for task in ("vqa", "decision"):
        saved(folder / task, task_model(task))
    tiny_examples(folder, [("x",)] * 5, side=20)
    return folder


@pytest.fixture(scope="module")
def images(folder: Path) -> list[Path]:
    return [folder / f"{i}.png" for i in range(5)]


@pytest.fixture(scope="module")
def vqa(folder: Path) -> LoadedModel:
    return mmbert.load(folder / "vqa")


@pytest.fixture(scope="module")
def pretrained(folder: Path) -> LoadedModel:
    return mmbert.load(folder / "pretrained", device="cpu")


def sources(image: Path) -> list[Any]:
    """One image in every accepted form."""
    opened = Image.open(image)
    return [image, str(image), image.read_bytes(), opened, np.asarray(opened)]


def test_all_kinds_of_images_give_the_same(vqa: LoadedModel, pretrained: LoadedModel, images: list[Path]) -> None:
    for ask in (
        lambda image: vqa.answer(image, "a cat", top_k=4),
        lambda image: pretrained.match(image, "a cat"),
        lambda image: pretrained.fill_mask(image, "a [MASK]"),
        lambda image: pretrained.embed(images=image).images.tolist(),  # pyright: ignore
    ):
        found = [ask(source) for source in sources(images[0])]
        assert all(other == found[0] for other in found)
        assert ask(images[1]) != found[0]


@pytest.mark.parametrize("task", ["vqa", "decision"])
@torch.no_grad()
def test_answers_are_the_scores_of_the_head(task: str, folder: Path, images: list[Path]) -> None:
    model = mmbert.load(folder / task)
    assert isinstance(model.model, MMBertForTask)
    inputs = model.processor(text="a red cat", images=images[0])
    logits = model.model.task.head(model.model.mmbert.encode_and_fuse(**inputs).pooled)[0]
    by_hand = dict(zip(LABELS, (logits.sigmoid() if task == "vqa" else logits.softmax(0)).tolist(), strict=True))
    found = model.answer(images[0], "a red cat", top_k=9)
    assert {answer: pytest.approx(score, abs=1e-6) for answer, score in found} == by_hand, "9 of 4: all"
    assert [a for a, _ in found] == sorted(by_hand, key=lambda a: -by_hand[a]), "best first"
    assert model.answer(images[0], "a red cat", top_k=2) == found[:2]
    assert model.answer(images[0], "a red cat") == found[:1]


def test_lists_give_what_single_calls_give(
    vqa: LoadedModel, pretrained: LoadedModel, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmbert.inference.loaded.BATCH_SIZE", 2)
    crossed = [(images[i % 2], question) for i, question in enumerate(QUESTIONS)]  # reordered by image on the way
    for sources, texts in (
        ([p for p, _ in crossed], QUESTIONS),
        (images, QUESTIONS),
        (images[0], QUESTIONS),
        (images, QUESTIONS[1]),
    ):
        single_images = sources if isinstance(sources, list) else [sources] * 5
        single_texts = texts if isinstance(texts, list) else [texts] * 5
        found: list[Any] = vqa.answer(sources, texts, top_k=4)  # pyright: ignore
        for one, image, text in zip(found, single_images, single_texts, strict=True):
            alone = vqa.answer(image, text, top_k=4)
            assert [a for a, _ in one] == [a for a, _ in alone]
            assert [s for _, s in one] == pytest.approx([s for _, s in alone], abs=1e-5)

    filled = pretrained.fill_mask(images[:3], MASKED[:3], top_k=3)
    assert [len(words) for words in filled] == [1, 1, 2]
    for one, image, text in zip(filled, images, MASKED[:3], strict=False):
        for words, alone in zip(one, pretrained.fill_mask(image, text, top_k=3), strict=True):
            assert [w for w, _ in words] == [w for w, _ in alone]
            assert [p for _, p in words] == pytest.approx([p for _, p in alone], abs=1e-5)

    together = pretrained.match(images[0], [*QUESTIONS, QUESTIONS[0]])
    assert together.scores[-1] == together.scores[0]
    alone = [pretrained.match(images[0], question).scores[0] for question in QUESTIONS]
    assert together.scores[:-1] == pytest.approx(alone, abs=1e-5)

    vectors = pretrained.embed(images=images, texts=QUESTIONS)
    for i in range(5):
        alone = pretrained.embed(images=images[i], texts=QUESTIONS[i])
        for batched, one in zip(vectors, alone, strict=True):
            torch.testing.assert_close(batched[i : i + 1], one, atol=1e-5, rtol=0)


def test_matching_several_images_gives_one_result_each(
    pretrained: LoadedModel, folder: Path, images: list[Path]
) -> None:
    for model in (pretrained, mmbert.load(folder / "contrastive", device="cpu")):
        found = model.match(images[:3], [*QUESTIONS, QUESTIONS[0]])
        for one, image in zip(found, images, strict=False):
            assert one.scores == pytest.approx(model.match(image, [*QUESTIONS, QUESTIONS[0]]).scores, abs=1e-5)
        assert model.match([images[1]], "a cat")[0].scores == pytest.approx(found[1].scores[:1], abs=1e-5)
        assert model.match([], "a cat") == []


@torch.no_grad()
def test_two_images_per_text_are_one_question(images: list[Path], tmp_path: Path) -> None:
    model = mmbert.load(saved(tmp_path / "pairs", task_model("decision", num_images=2)), device="cpu")
    inputs = model.processor(text=["a red cat"] * 2, images=[images[0], images[1]])
    pooled = model.core.encode_and_fuse(**inputs).pooled.reshape(1, -1)
    expected = model.model.task.logits(pooled).softmax(dim=-1)[0]  # pyright: ignore
    found = model.answer([images[0], images[1]], "a red cat", top_k=4)
    assert dict(found) == pytest.approx(dict(zip(LABELS, expected.tolist(), strict=True)), abs=1e-6)
    swapped = [images[1], images[0]]
    assert model.answer(swapped, "a red cat", top_k=4) != found
    several: list[Any] = model.answer([[images[0], images[1]], swapped], ["a red cat", "a dog"], top_k=4)
    assert dict(several[0]) == pytest.approx(dict(found), abs=1e-5)
    assert dict(several[1]) == pytest.approx(dict(model.answer(swapped, "a dog", top_k=4)), abs=1e-5)
    about_one: list[Any] = model.answer([images[0], images[1]], ["a red cat", "a dog"], top_k=4)
    assert dict(about_one[0]) == pytest.approx(dict(found), abs=1e-5)
    with pytest.raises(UsageError, match="3 images for a text; this model takes 2"):
        model.answer(images[:3], "a")
    with pytest.raises(DataError, match="the text 'a': 1 images; expected 2, as"):
        next(model.answers([Query(images[0], "a")]))
    with pytest.raises(UsageError, match=r"2 images per text; explaining needs a model .* one image per text"):
        model.explain(images[0], "a cat")


def test_dtype_of_a_loaded_model(folder: Path, images: list[Path], pretrained: LoadedModel) -> None:
    half = mmbert.load(folder / "pretrained", "cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.match(images[0], "a cat").scores == pytest.approx(pretrained.match(images[0], "a cat").scores, abs=0.05)
    with pytest.raises(UsageError, match="dtype='int8': allowed are float32, bfloat16, float16"):
        mmbert.load(folder / "pretrained", dtype="int8")


def test_random_numbers_of_the_caller_stay_as_they_were(
    vqa: LoadedModel, pretrained: LoadedModel, images: list[Path]
) -> None:
    before = torch.get_rng_state()
    vqa.answer(images, "a cat")
    pretrained.match(images[0], "a cat")
    assert torch.equal(torch.get_rng_state(), before)


def test_empty_inputs_give_empty_outputs(vqa: LoadedModel, pretrained: LoadedModel, images: list[Path]) -> None:
    assert vqa.answer([], []) == vqa.answer(images[0], []) == vqa.answer([], "a cat") == []
    found = pretrained.embed(texts=[], images=[])
    assert found.texts is not None and found.texts.shape == (0, 8) and found.images is not None


def test_any_iterable_of_images_is_embedded(pretrained: LoadedModel, images: list[Path]) -> None:
    expected = pretrained.embed(images=images).images
    names = [str(image) for image in images]
    arrays = np.stack([np.asarray(Image.open(image)) for image in images])
    for given in (tuple(names), iter(names), dict.fromkeys(names).keys(), np.array(names), arrays):
        found = pretrained.embed(images=given).images
        assert found is not None and expected is not None and torch.equal(found, expected)


def test_models_in_bfloat16_match_and_embed(folder: Path, images: list[Path]) -> None:
    model = MMBertForPreTraining.from_pretrained(folder / "pretrained", dtype=torch.bfloat16).eval()
    half, full = LoadedModel(model, tiny_processor()), mmbert.load(folder / "pretrained", device="cpu")
    for text in QUESTIONS[:2]:
        assert half.match(images[0], text).scores == pytest.approx(full.match(images[0], text).scores, abs=0.05)
    assert half.fill_mask(images[0], "a [MASK]")[0][0].probability > 0
    found, expected = half.embed(images=images).images, full.embed(images=images).images
    assert found is not None and expected is not None and (found - expected).abs().max() < 0.05


def test_each_image_is_decoded_once_a_batch(images: list[Path]) -> None:
    processor, decoded = tiny_processor(), []
    processor.pixel_values = lambda source: decoded.append(source) or torch.zeros(3, 16, 16)  # type: ignore
    asked = [Query(images[i % 2], question) for i, question in enumerate(QUESTIONS)]
    batches = QueryBatches(processor, asked, processor.encode, 4)
    found = [batches[i] for i in range(len(batches))]
    assert [batch.positions for batch in found] == [[0, 2, 4, 1], [3]]
    assert sorted(decoded) == [images[0], images[1], images[1]]
    assert [len(batch.images) for batch in found] == [2, 1]  # pyright: ignore
    assert found[0].image_of[:3].unique().numel() == 1 and found[0].image_of[3] != found[0].image_of[0]


@torch.no_grad()
def test_matching_and_vectors_by_hand(pretrained: LoadedModel, folder: Path, images: list[Path]) -> None:
    model: Any = pretrained.model
    inputs = pretrained.processor(text=QUESTIONS, images=[images[0]] * 5)
    scores = model.objectives["itm"].head(model.mmbert.encode_and_fuse(**inputs).pooled).softmax(dim=-1)[:, 1]
    found = pretrained.match(images[0], QUESTIONS)
    assert found.kind == "probability" and found.scores == pytest.approx(scores.tolist(), abs=1e-5)

    contrastive = mmbert.load(folder / "contrastive")
    core, itc = contrastive.core, contrastive.model.objectives["itc"]  # pyright: ignore
    image = itc.image_projection(core.encode_image(inputs["pixel_values"]).first)
    text = itc.text_projection(core.encode_text(inputs["input_ids"], inputs["attention_mask"]).first)
    cosines = torch.nn.functional.cosine_similarity(image, text)
    found = contrastive.match(images[0], QUESTIONS)
    assert found.kind == "cosine" and found.scores == pytest.approx(cosines.tolist(), abs=1e-5)
    vectors = contrastive.embed(images=images[0], texts=QUESTIONS)
    assert vectors.images is not None and vectors.texts is not None
    assert vectors.images.shape == (1, 8) and not vectors.images.requires_grad
    assert (vectors.texts @ vectors.images[0]).tolist() == pytest.approx(found.scores, abs=1e-5)
    assert vectors.texts.norm(dim=-1).tolist() == pytest.approx([1.0] * 5)
    assert contrastive.embed(texts="a cat").images is None and contrastive.embed(images=images[0]).texts is None


@torch.no_grad()
def test_masks_by_hand(pretrained: LoadedModel, images: list[Path]) -> None:
    model: Any = pretrained.model
    processor, text = pretrained.processor, "The big[MASK]runs, in the [MASK] street"
    ids = processor.encode("the big cat runs, in the red street")
    places = [ids.index(processor.tokenizer.convert_tokens_to_ids(word)) for word in ("cat", "red")]  # pyright: ignore
    for place in places:
        ids[place] = processor.mask_token_id
    assert processor.encode_masked(text) == ids

    seen = {}
    for name, image in (("image", images[0]), ("alone", None)):
        pixels = {} if image is None else {"pixel_values": processor(images=image)["pixel_values"]}
        fused = model.mmbert.encode_and_fuse(input_ids=torch.tensor([ids]), **pixels)
        states = fused.text.hidden_states[0, places]
        logits = model.objectives["mlm"].logits(states, model.mmbert.word_embeddings)
        chances = logits[:, : len((*SPECIAL, *WORDS))].softmax(dim=-1)
        found = pretrained.fill_mask(image, text, top_k=100)
        assert len(found) == 2
        for words, row in zip(found, chances, strict=True):
            expected = row.sort(descending=True)
            assert [p for _, p in words] == pytest.approx(expected.values.tolist(), abs=1e-6)
            assert [w for w, _ in words] == processor.tokenizer.convert_ids_to_tokens(expected.indices.tolist())
        assert pretrained.fill_mask(image, text) == [words[:5] for words in found]
        seen[name] = found
    assert seen["image"] != seen["alone"], "the answer depends on the image"


def test_only_the_mask_is_special() -> None:
    processor = tiny_processor()
    ids = processor.encode_masked("a [SEP] [MASK] [PAD] [mask]")
    special = {processor.tokenizer.sep_token_id, processor.pad_token_id, processor.mask_token_id}
    assert [i for i in ids if i in special] == [processor.mask_token_id, processor.tokenizer.sep_token_id]
    assert processor.mask_token_id not in processor.encode("a [MASK]")
    cut = processor.encode_masked("a [MASK]" + " cat" * 40)
    assert len(cut) == 16 and cut[-1] == processor.tokenizer.sep_token_id
    assert processor.encode_masked("cat " * 13 + "[MASK]")[-2] == processor.mask_token_id, "the last that is read"
    for text, message in (
        ("a cat", "the text 'a cat' has no [MASK]"),
        ("cat " * 14 + "[MASK]", "has 17 tokens, of which 16 are read: a [MASK] would be cut off"),
        ("[MASK] \ud800", "no valid Unicode"),
    ):
        with pytest.raises(UsageError) as error:
            processor.encode_masked(text)
        assert message in str(error.value)


def test_wrong_arguments_are_errors(vqa: LoadedModel, pretrained: LoadedModel, images: list[Path]) -> None:
    def error_message(ask: Any) -> str:
        with pytest.raises(UsageError) as error:
            ask()
        return str(error.value)

    for top_k in (0, -1, 1.5, True):
        assert error_message(lambda k=top_k: vqa.answer(images[0], "a", top_k=k)).startswith(
            f"top_k={top_k!r}: must be a whole"
        )
        assert "top_k" in error_message(lambda k=top_k: pretrained.fill_mask(None, "[MASK]", top_k=k))
    assert "5 images and 2 texts: give as many of both" in error_message(lambda: vqa.answer(images, ["a", "b"]))
    assert "5 images and 1 texts" in error_message(lambda: vqa.answer(images, ["a"])), "a list of one is a list"
    assert "7 is a int; expected a text" in error_message(lambda: vqa.answer(images[0], 7))  # pyright: ignore
    assert "None is a NoneType" in error_message(lambda: pretrained.match(images[0], ["a", None]))  # pyright: ignore
    assert "no text to match" in error_message(lambda: pretrained.match(images[0], []))
    assert "nothing to embed" in error_message(lambda: pretrained.embed())
    assert "has no [MASK]" in error_message(lambda: pretrained.fill_mask(images[0], MASKED))
    with pytest.raises(BadImageError, match=r"absent\.png: no such file"):
        vqa.answer("absent.png", "a cat")
    with pytest.raises(BadImageError, match="an array of shape 3"):
        pretrained.embed(images=np.zeros(3))


def test_missing_device_is_an_error(folder: Path) -> None:
    for device in ("cuda:77", "gpu"):
        with pytest.raises(UsageError, match=f"device='{device}': "):
            mmbert.load(folder / "vqa", device=device)


def test_missing_head_is_an_error_that_names_the_training(
    folder: Path, vqa: LoadedModel, pretrained: LoadedModel, images: list[Path], tmp_path: Path
) -> None:
    def error_message(model: LoadedModel, name: str, *arguments: Any, **named: Any) -> str:
        with pytest.raises(UsageError) as error:
            getattr(model, name)(*arguments, **named)
        return str(error.value)

    assert error_message(pretrained, "answer", images[0], "a") == (
        f"'{folder / 'pretrained'}' was pretrained with mlm, itm, itc; answering needs a model that was fine-tuned "
        "with model.task=vqa or decision and images per text: see configs/finetune/."
    )
    trained = f"'{folder / 'vqa'}' was fine-tuned with model.task=vqa and one image per text; "
    assert error_message(vqa, "match", images[0], "a").startswith(
        trained + "matching needs a model that was pretrained with"
    )
    assert "embedding needs a model that was pretrained with the objective itc" in error_message(
        vqa, "embed", texts="a"
    )
    contrastive = mmbert.load(folder / "contrastive")
    assert "was pretrained with itc; filling masks needs" in error_message(contrastive, "fill_mask", None, "[MASK]")
    pairs = mmbert.load(saved(tmp_path / "pairs", task_model("decision", num_images=2)))
    assert error_message(pairs, "answer", images[0], "a") == "1 image for a text; this model takes 2: [image, image]."
    bare = mmbert.load(saved(tmp_path / "bare", MMBertModel(tiny_config())))
    assert "holds a MMBertModel, which has no heads; matching needs" in error_message(bare, "match", images[0], "a")


def test_commands_print_best_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(folder / "0.png")

    def printed(*arguments: str) -> list[str]:
        main([*arguments])
        return capsys.readouterr().out.splitlines()

    answers = mmbert.load(folder / "vqa").answer(image, "a red cat", top_k=4)
    lines = [f"{score:.4f}  {answer}" for answer, score in answers]
    assert printed("ask", str(folder / "vqa"), image, "a red cat") == lines
    assert printed("ask", str(folder / "vqa"), image, "a red cat", "--top_k", "1", "--device", "cpu") == lines[:1]

    texts = ["a cat", "the big dog", "two\nbirds"]
    scores, kind = mmbert.load(folder / "pretrained").match(image, texts)
    found = printed("match", str(folder / "pretrained"), image, *texts)
    rows = sorted(zip(scores, ["a cat", "the big dog", "two\\nbirds"], strict=True), reverse=True)
    assert found == [kind, *(f"{score:.4f}  {text}" for score, text in rows)]
    assert printed("match", str(folder / "contrastive"), image, "a cat")[0] == "cosine"


def test_commands_print_json_and_read_lists(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, other = str(folder / "0.png"), str(folder / "1.png")

    def printed(*arguments: str, lines: str = "") -> Any:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        main([*arguments])
        return json.loads(capsys.readouterr().out)

    model = mmbert.load(folder / "pretrained")
    texts = ["a cat", "the größe"]
    found = printed("match", str(folder / "pretrained"), image, "-", "--json", lines="a cat\n\nthe größe\n")
    assert found["kind"] == "probability" and found["image"] == image
    assert {row["text"]: row["score"] for row in found["scores"]} == pytest.approx(
        dict(zip(texts, model.match(image, texts).scores, strict=True))
    )
    several = printed("match", str(folder / "pretrained"), "-", *texts, "--json", lines=f"{image}\n{other}")
    assert [row["image"] for row in several] == [image, other] and len(several[1]["scores"]) == 2
    main(["match", str(folder / "pretrained"), image, "a cat", "--dtype", "bfloat16"])
    assert capsys.readouterr().out.startswith("probability")

    answers = printed("ask", str(folder / "vqa"), image, "a red cat", "--json", "--top_k", "2")
    best = mmbert.load(folder / "vqa").answer(image, "a red cat", top_k=2)
    assert answers == {"question": "a red cat", "answers": [{"answer": a, "score": s} for a, s in best]}
    assert [row["question"] for row in printed("ask", str(folder / "vqa"), image, "-", "--json", lines="a\nb")] == [
        "a",
        "b",
    ]
    saved(folder / "pairs", task_model("decision", num_images=2))
    capsys.readouterr()
    assert len(printed("ask", str(folder / "pairs"), image, other, "a cat", "--json")["answers"]) == 4


def test_mistakes_on_the_command_line_are_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(folder / "0.png")
    for code, message, *arguments in (
        (2, "answering needs a model that was fine-tuned", "ask", str(folder / "pretrained"), image, "a"),
        (2, "no mmbert model folder", "ask", str(folder), image, "a"),
        (2, "top_k=0: must be a whole number of 1 or more", "ask", str(folder / "vqa"), image, "a", "--top_k", "0"),
        (1, "absent.png: no such file", "ask", str(folder / "vqa"), "absent.png", "a"),
        (2, "required: QUESTION", "ask", str(folder / "vqa"), image),
        (2, "required: TEXT", "match", str(folder / "pretrained"), image),
        (2, "matching needs a model", "match", str(folder / "vqa"), image, "a"),
        (2, "IMAGE '' is empty: give one, or -", "match", str(folder / "pretrained"), "", "a"),
        (2, "TEXT ' ' is empty: give one, or -", "match", str(folder / "pretrained"), image, "a", " "),
        (2, "QUESTION '' is empty: give one, or -", "ask", str(folder / "vqa"), image, ""),
        (2, "IMAGE '' is empty: give an image file", "ask", str(folder / "vqa"), "", "a"),
        (2, f"2 images: '{folder / 'vqa'}' takes 1 for a text", "ask", str(folder / "vqa"), image, image, "a"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        errors = capsys.readouterr().err.splitlines()
        assert stopped.value.code == code and len(errors) == 1 and message in errors[0], errors


def test_texts_of_the_command_line_are_utf8_in_any_locale() -> None:
    in_c_locale = "größe".encode().decode("ascii", "surrogateescape")
    assert [utf8_text(text) for text in ("größe", in_c_locale, "a cat")] == ["größe", "größe", "a cat"]
