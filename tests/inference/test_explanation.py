"""Explanations: the attention rule by hand, every fusion strategy, gradients, Shapley values, the page, bad input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare.browser import CHROMIUM, browser
from data.test_tokenizers import IMAGES, KINDS
from ranking import tiny_model
from tiny import randomize, tiny_batch, tiny_config, tiny_examples, tiny_processor
from torch import Tensor
from transformers import AddedToken

import mmbert
from mmbert import LoadedModel
from mmbert.cli.main import main
from mmbert.data.processor import MMBertProcessor
from mmbert.errors import UsageError
from mmbert.inference.explanation.explain import explain
from mmbert.inference.explanation.explanation import Explanation
from mmbert.inference.explanation.modality import region_grid
from mmbert.inference.explanation.occlusion import shapley_values
from mmbert.inference.explanation.quality import (
    ORDERS,
    Box,
    Case,
    PerturbationCurves,
    overlaps,
    perturbation_curves,
    pointing_game,
)
from mmbert.inference.explanation.relevance import RelevanceRows, attend_relevance, mean_positive_attention
from mmbert.inference.explanation.targets import choose_target
from mmbert.inference.explanation.trace import _Weights, trace
from mmbert.model.fusion import FUSIONS
from mmbert.model.modeling import MMBertForPreTraining, MMBertForTask, MMBertPreTrainedModel
from mmbert.runtime.allowed_imports import allow_import

TEXT = "the small red dog runs"
ALL = {"mlm": 1.0, "itm": 1.0, "itc": {"embedding_size": 8}}
NO_ATTENTION = """
from mmbert import Fused, Fusion

class ProductFusion(Fusion):
    def forward(self, text, image):
        return Fused(text, image, text.first * image.first)
"""


def saved(folder: Path, model: MMBertPreTrainedModel) -> None:
    randomize(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # so that scores depend on image and text
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explanation")
    for fusion in FUSIONS:
        saved(folder / fusion, tiny_model(fusion, objectives=ALL, fusion_layers=2))
    saved(folder / "vqa", MMBertForTask(tiny_config(task="vqa", labels=["red", "blue", "two", "yes"], objectives={})))
    tiny_examples(folder, [("x",)] * 2, side=20)
    return folder


@pytest.fixture(scope="module")
def image(folder: Path) -> Path:
    return folder / "0.png"


@pytest.fixture(scope="module")
def hybrid(folder: Path) -> LoadedModel:
    return mmbert.load(folder / "hybrid", device="cpu")


def test_rule_by_hand_on_two_tokens_of_each_modality() -> None:
    weights, gradients = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]]), torch.tensor([[[2.0, -1.0]], [[1.0, 3.0]]])
    assert mean_positive_attention(weights, gradients).tolist() == [[1.0, 0.0]]  # ((1, 0) + (1, 0)) / 2

    identity = torch.eye(4)
    text, image = RelevanceRows(identity[:2], identity[:2]), RelevanceRows(identity[2:], identity[2:])
    a = torch.tensor([[0.5, 0.25], [0.0, 1.0]])
    text = attend_relevance(text, text, a, 2)
    assert text.relevance.tolist() == [[1.5, 0.25, 0, 0], [0, 2, 0, 0]]  # Eq. 6: R_tt + A R_tt
    b = torch.tensor([[0.2, 0.4], [0.0, 0.6]])
    image = attend_relevance(image, image, b, 2)
    assert image.relevance.tolist() == pytest.approx(torch.tensor([[0, 0, 1.2, 0.4], [0, 0, 0, 1.6]])), "Eq. 6"

    c = torch.tensor([[1.0, 0.0], [0.0, 0.5]])  # the text attends to the image
    after = attend_relevance(text, image, c, 2)
    # Eq. 8 and 9: R_tt - I = [[0.5, 0.25], [0, 1]] has row sums 0.75 and 1; R_ii - I = [[0.2, 0.4], [0, 0.6]].
    text_bar = np.array([[1 + 2 / 3, 1 / 3], [0, 2]])
    image_bar = np.array([[1 + 1 / 3, 2 / 3], [0, 2]])
    expected = text_bar.T @ c.numpy() @ image_bar  # Eq. 10
    assert after.relevance[:, 2:].numpy() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(after.relevance[:, :2], text.relevance[:, :2]), "Eq. 11 adds 0: no text in the image's rows yet"

    back = attend_relevance(image, after, c.T, 2)  # Eq. 11: R_ii + A R_ti
    assert back.relevance[:, 2:].numpy() == pytest.approx(image.relevance[:, 2:].numpy() + c.numpy().T @ expected)


def normalized(r: Tensor) -> Tensor:
    added = r - torch.eye(len(r))
    return added / added.sum(dim=1, keepdim=True) + torch.eye(len(r))


@pytest.mark.parametrize("fusion", ["early", "hybrid", "hybrid_cross"])
def test_traced_relevance_equals_the_four_maps_of_the_paper(fusion: str, folder: Path) -> None:
    model: Any = mmbert.load(folder / fusion, device="cpu").model
    core, batch = model.mmbert, tiny_batch(1)

    def run() -> Tensor:
        text, image = core.encode_text(batch["input_ids"]), core.encode_image(batch["pixel_values"])
        return model.objectives["itm"].score(core.fuse(text, image).pooled)[0]

    first = _Weights(core)
    with first.hooks():
        score = run()
    gradients = torch.autograd.grad(score, first.weights)  # pyright: ignore
    maps = [(w[0] * g[0]).clamp(min=0).mean(0).detach() for w, g in zip(first.weights, gradients, strict=True)]  # pyright: ignore
    of_text, of_image, *rest = maps  # one layer in each encoder
    num_text, num_image = len(of_text), len(of_image)
    tt, ii = torch.eye(num_text) + of_text, torch.eye(num_image) + of_image
    ti, it = torch.zeros(num_text, num_image), torch.zeros(num_image, num_text)
    if fusion == "early":
        joint = torch.block_diag(tt, ii)
        for a in rest:
            joint = joint + a @ joint
        expected = joint[0] - torch.eye(num_text + num_image)[0]
    else:
        for i in range(0, len(rest), 4 if fusion == "hybrid" else 2):
            old_ti, old_tt, old_ii, old_it = ti, tt, ii, it
            a, c = rest[i : i + 2]
            ti, tt = ti + a @ ti, tt + a @ tt
            ti, tt = ti + normalized(tt).T @ c @ normalized(old_ii), tt + c @ old_it
            if fusion == "hybrid":
                a, c = rest[i + 2 : i + 4]
                it, ii = old_it + a @ old_it, old_ii + a @ old_ii
                it, ii = it + normalized(ii).T @ c @ normalized(old_tt), ii + c @ old_ti
        expected = torch.cat([tt[0], ti[0]]) - torch.eye(num_text + num_image)[0]
        if fusion == "hybrid":  # the joint vector reads the first row of both streams
            of_class = torch.cat([it[0], ii[0]]) - torch.eye(num_text + num_image)[num_text]
            fused = core.fuse(core.encode_text(batch["input_ids"]), core.encode_image(batch["pixel_values"]))
            states = [part.hidden_states.detach().requires_grad_() for part in (fused.text, fused.image)]
            score = model.objectives["itm"].score(core.fusion.pooler(states[0][:, 0], states[1][:, 0]))
            a, b = (gradient[0, 0].norm() for gradient in torch.autograd.grad(score.sum(), states))
            expected = (a * expected + b * of_class) / (a + b)
    found = trace(core, run)
    torch.testing.assert_close(torch.cat([found.text, found.image]), expected, atol=1e-6, rtol=1e-4)
    assert found.is_cross_modal
    of_read_rows = trace(core, lambda: model.match_scores(*encoded(core, batch))[0])  # not all of the last layer
    torch.testing.assert_close(torch.cat([of_read_rows.text, of_read_rows.image]), expected, atol=1e-6, rtol=1e-4)


def encoded(core: Any, batch: dict[str, Tensor]) -> tuple[Any, Any]:
    return core.encode_text(batch["input_ids"]), core.encode_image(batch["pixel_values"])


def test_every_fusion_is_explained(folder: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "product_fusion.py").write_text(NO_ATTENTION)
    monkeypatch.syspath_prepend(tmp_path)
    allow_import("product_fusion")
    saved(tmp_path / "custom", tiny_model("product_fusion.ProductFusion", objectives=ALL))
    for place in (*(folder / fusion for fusion in FUSIONS), tmp_path / "custom"):
        model = mmbert.load(place, device="cpu")
        has_attention = place.name not in ("late", "late_bilinear", "custom")
        for target in ("itm", "itc", "red"):
            found = model.explain(image, TEXT, target)
            assert found.tokens == (
                "[CLS]",
                *TEXT.replace("red", "[MASK]" if target == "red" else "red").split(),
                "[SEP]",
            )
            assert found.token_relevance.shape == (7,) and found.patch_relevance.shape == (2, 2)
            assert found.links is not None and found.links.shape == (7, 2, 2)
            assert np.isfinite(found.links).all() and np.isfinite(found.patch_relevance).all()
            method = "attention" if has_attention and target != "itc" else "gradient"
            assert found.method == method, (place.name, target)
            reads_image = has_attention or target != "red"
            assert np.any(found.patch_relevance) == np.any(found.links) == reads_image, (place.name, target)
        assert model.explain(image, TEXT, "itc", method="attention", links=False).patch_relevance.min() >= 0
        assert found.score == pytest.approx(
            next(
                w for w in model.fill_mask(image, TEXT.replace("red", "[MASK]"), 99)[0] if w.token == "red"
            ).probability,
            abs=1e-5,
        )
        assert model.explain(image, TEXT, links=False).score == pytest.approx(
            model.match(image, TEXT).scores[0], abs=1e-5
        )


def word_model(processor: MMBertProcessor, best: str) -> LoadedModel:
    """A model that predicts one token at every mask."""
    model = MMBertForPreTraining(tiny_config(vocab_size=len(processor.tokenizer), objectives={"mlm": 1.0})).eval()
    randomize(model)
    mlm: Any = model.objectives["mlm"]
    with torch.no_grad():
        mlm.bias[processor.tokenizer.convert_tokens_to_ids(best)] += 50
    return LoadedModel(model, processor)


@pytest.mark.parametrize(
    ("kind", "token"),
    [("byte-level BPE", "Ġcat"), ("byte-level BPE", "able"), ("Metaspace without splitting", "▁cat"), ("", "##ing")],
)
def test_best_token_at_a_mask_is_explained_with_its_probability(kind: str, token: str, image: Path) -> None:
    processor = MMBertProcessor(KINDS[kind](), IMAGES, max_text_length=16) if kind else tiny_processor()
    model, text = word_model(processor, token), f"a {processor.tokenizer.mask_token}"
    for target in (None, token):  # as predicted, and as a user copies it
        found = model.explain(image, text, target, links=False)
        assert found.target == f"word {token!r}" and found.tokens.count(str(processor.tokenizer.mask_token)) == 1
        assert found.score == pytest.approx(model.fill_mask(image, text)[0][0].probability, abs=1e-5)
        assert found.score > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_word_of_a_text_is_found_whatever_marks_its_tokens(kind: str) -> None:
    processor = MMBertProcessor(KINDS[kind](), IMAGES, max_text_length=32)
    model, text = word_model(processor, "<s>").model, "a unbelievable cat red"
    ids, mask = processor.encode(text), processor.mask_token_id
    words = [0, *np.cumsum([not more for more in processor.encode_words(text)[1]])]  # of the token after each
    for number, word in enumerate(text.split(), start=2):
        own = [i for i in range(len(ids)) if words[i + 1] == number]
        for given in (word, f" {word}"):
            expected = [mask if i in own else token for i, token in enumerate(ids)]
            assert choose_target(model, processor, "m", text, given).input_ids == expected, given
    two = choose_target(model, processor, "m", text, "cat red").input_ids
    assert two == [mask if words[i + 1] in (4, 5) else token for i, token in enumerate(ids)]
    for part in ("believable", "ca", "cat unbelievable"):
        with pytest.raises(UsageError, match="is no word of the text"):
            choose_target(model, processor, "m", text, part)


def test_word_behind_a_space_is_explained_at_a_mask_that_takes_the_space() -> None:
    tokenizer = KINDS["byte-level BPE"]()
    tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True, special=True)})  # as RoBERTa's
    processor = MMBertProcessor(tokenizer, IMAGES, max_text_length=16)
    model = word_model(processor, "Ġcat").model
    ids = choose_target(model, processor, "m", "a <mask>", "cat").input_ids
    assert ids == processor.encode_masked("a <mask>"), "one mask for Ġcat"
    assert choose_target(model, processor, "m", "a<mask>", "cat").input_ids.count(processor.mask_token_id) == 3


def test_explained_answer_is_the_best_unless_given(folder: Path, image: Path) -> None:
    model = mmbert.load(folder / "vqa", device="cpu")
    best, *_, worst = model.answer(image, TEXT, top_k=4)
    assert model.explain(image, TEXT).target == f"label {best.answer!r}"
    found = model.explain(image, TEXT, worst.answer)
    assert found.target == f"label {worst.answer!r}" and found.score == pytest.approx(worst.score, abs=1e-5)


def test_frozen_and_half_precision_models_are_explained(folder: Path, image: Path, hybrid: LoadedModel) -> None:
    expected = hybrid.explain(image, TEXT).patch_relevance
    frozen = mmbert.load(folder / "hybrid", device="cpu")
    frozen.model.requires_grad_(False)
    assert np.array_equal(frozen.explain(image, TEXT).patch_relevance, expected)
    model = MMBertForPreTraining.from_pretrained(folder / "hybrid", dtype=torch.bfloat16).eval()
    half = LoadedModel(model, hybrid.processor).explain(image, TEXT).patch_relevance
    assert np.abs(half - expected).max() < 0.3 * expected.max()


def test_explaining_leaves_the_model_as_it_was(image: Path, hybrid: LoadedModel) -> None:
    before = hybrid.match(image, TEXT)
    hybrid.explain(image, TEXT)
    assert hybrid.match(image, TEXT) == before
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in hybrid.model.modules())
    assert all(parameter.grad is None for parameter in hybrid.model.parameters())


def test_integrated_gradients_sum_to_the_difference_from_the_baseline(image: Path, hybrid: LoadedModel) -> None:
    pytest.importorskip("captum", reason="needs captum, the extra explain")
    found = hybrid.explain(image, TEXT, method="integrated_gradients", links=False)
    difference = hybrid.modality_shares(image, TEXT).difference  # the same baseline: all tokens and patches removed
    assert found.token_relevance.sum() + found.patch_relevance.sum() == pytest.approx(difference, rel=0.05)


def test_missing_captum_is_one_sentence(image: Path, hybrid: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    with pytest.raises(UsageError, match=r"needs captum.*pip install 'mmbert\[explain\]'"):
        hybrid.explain(image, TEXT, method="integrated_gradients")


def test_shapley_values_by_hand() -> None:
    def value(coalitions: np.ndarray) -> np.ndarray:  # 2 a + 6 a b + c: b and a share what they make together
        a, b, c = coalitions.T.astype(float)
        return 2 * a + 6 * a * b + c + 10

    found, is_exact = shapley_values(value, 3, samples=100)
    assert is_exact and found.shape == (1, 3) and found[0] == pytest.approx([5, 3, 1])
    sampled, is_exact = shapley_values(value, 3, samples=1)
    assert not is_exact and sampled.sum(axis=1) == pytest.approx([9, 9]), "each permutation sums to the difference"
    assert sampled.mean(axis=0) == pytest.approx([5, 3, 1]), "a permutation and its reverse: exact for pairs"


@pytest.mark.parametrize(("text", "target"), [("\u200b", None), ("red", "red"), ("[MASK]", None)])
def test_text_without_a_token_has_no_shares(text: str, target: str | None, image: Path, hybrid: LoadedModel) -> None:
    with pytest.raises(UsageError, match=r"no token whose share in the score (itm|word '.*') could be computed"):
        hybrid.modality_shares(image, text, target)


def test_shares_sum_to_one_and_values_to_the_difference(folder: Path, image: Path, hybrid: LoadedModel) -> None:
    exact = hybrid.modality_shares(image, "red dog")  # 2 tokens and 4 regions: 64 coalitions
    assert exact.standard_error == 0 and exact.text + exact.image == pytest.approx(1)
    assert [*exact.token_values] == [1, 2] and exact.region_values.shape == (2, 2)
    assert sum(exact.token_values.values()) + exact.region_values.sum() == pytest.approx(exact.difference)
    sampled = hybrid.modality_shares(image, "red dog", samples=8, seed=1)
    assert sampled.difference == pytest.approx(exact.difference) and sampled.standard_error > 0
    assert abs(sampled.text - exact.text) < 6 * sampled.standard_error + 0.02
    assert hybrid.modality_shares(image, "red dog", samples=8, seed=1).text == sampled.text
    assert mmbert.load(folder / "late", device="cpu").modality_shares(image, TEXT, "red").image == 0
    assert (
        region_grid((14, 14), 20) == (2, 2)
        and region_grid((14, 14), 49) == (7, 7)
        and region_grid((4, 4), 16) == (4, 4)
    )


def test_page_escapes_its_values_and_loads_nothing(image: Path, hybrid: LoadedModel) -> None:
    from mmbert.inference.explanation.page import render

    found = hybrid.explain(image, TEXT)
    hostile = "</script><script>alert(1)</script>{{ 7*7 }}\n<img src=x onerror=alert(1)>"
    values = {**found.__dict__, "text": hostile, "tokens": (hostile,) * 7, "target": hostile, "fusion": hostile}
    page = render(Explanation(**values))
    assert page.count("<script") == 2 and "<img src=x" not in page and "alert(1)</script>" not in page
    assert "{{ 7*7 }}" in page and "http" not in page.replace("http://www.w3.org", "")


def test_page_links_tokens_and_patches(image: Path, hybrid: LoadedModel, tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    found = hybrid.explain(image, TEXT)
    assert found.links is not None
    file = found.save(tmp_path / "map.html")
    with browser(tmp_path / "profile") as tab:
        for width, scheme in ((1200, "light"), (390, "dark")):
            tab.open(file, width=width, scheme=scheme)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert all(url.startswith(("file:", "data:")) for url in tab.requests)
        colors = "getComputedStyle({}).backgroundColor"
        cell = "document.querySelectorAll('.cells button')[{}]"
        token = "document.querySelectorAll('.tokens button')[{}]"
        strongest = int(np.abs(found.links[3]).argmax())
        before = tab.evaluate(colors.format(cell.format(strongest)))
        tab.evaluate(token.format(3) + ".dispatchEvent(new Event('mouseenter'))")
        assert "red" in tab.evaluate("document.getElementById('caption').textContent")
        assert tab.evaluate(colors.format(cell.format(strongest))).endswith("0.75)"), "the strongest link"
        tab.evaluate(token.format(3) + ".dispatchEvent(new Event('mouseleave'))")
        assert tab.evaluate(colors.format(cell.format(strongest))) == before
        tab.evaluate(cell.format(0) + ".dispatchEvent(new Event('mouseenter'))")
        word = int(np.abs(found.links[:, 0, 0]).argmax())
        assert tab.evaluate(colors.format(token.format(word))).endswith("0.55)")


def test_files_by_ending(image: Path, hybrid: LoadedModel, tmp_path: Path) -> None:
    found = hybrid.explain(image, TEXT)
    assert found.save(tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(found.save(tmp_path / "map.json").read_text())
    assert numbers["tokens"] == [*found.tokens] and numbers["probability"] == found.score
    figure: Any = found.show()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_bad_input_is_one_sentence(
    folder: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text_file = tmp_path / "text.jpg"
    text_file.write_text("no image")
    hybrid, vqa = str(folder / "hybrid"), str(folder / "vqa")
    saved(tmp_path / "matching", tiny_model("early", objectives={"itm": 1.0}))
    capsys.readouterr()
    for code, message, *arguments in (
        (1, "text.jpg: not an image", hybrid, text_file, TEXT),
        (2, "the text is empty", hybrid, image, " "),
        (2, "target='cat' is no word of the text", hybrid, image, TEXT, "--target", "cat"),
        (
            2,
            "needs a model that was pretrained with the objective itc",
            tmp_path / "matching",
            image,
            TEXT,
            "--target",
            "itc",
        ),
        (
            2,
            "needs a model that was pretrained with the objective mlm",
            tmp_path / "matching",
            image,
            TEXT,
            "--target",
            "red",
        ),
        (2, "target='itm' is no label of", vqa, image, TEXT, "--target", "itm"),
        (2, "ends in .png, .svg, .pdf, .html or .json", hybrid, image, TEXT, "--out", "map.gif"),
        (2, "does not exist", hybrid, image, TEXT, "--out", tmp_path / "absent" / "map.png"),
        (2, "samples=2", hybrid, image, TEXT, "--samples", "2"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["explain", *map(str, arguments)])
        errors = capsys.readouterr().err.splitlines()
        assert stopped.value.code == code and len(errors) == 1 and message in errors[0], errors


def test_command_prints_json(
    folder: Path, image: Path, capsys: pytest.CaptureFixture[str], hybrid: LoadedModel
) -> None:
    main(["explain", str(folder / "hybrid"), str(image), TEXT, "--json", "--device", "cpu"])
    found = json.loads(capsys.readouterr().out)
    assert found["patch_relevance"] == hybrid.explain(image, TEXT).patch_relevance.tolist()
    assert found["modality_shares"]["text"] == hybrid.modality_shares(image, TEXT).text
    main(["explain", str(folder / "hybrid"), str(image), TEXT])
    assert capsys.readouterr().out.startswith("itm: probability 0.")


def test_unknown_method_is_an_error(image: Path, hybrid: LoadedModel) -> None:
    target = choose_target(hybrid.model, hybrid.processor, "m", TEXT, "itm")
    with pytest.raises(UsageError, match="method='rollout': allowed are attention, gradient, integrated_gradients"):
        explain(hybrid.core, hybrid.processor, target, hybrid.processor.pixel_values(image), method="rollout")


def test_perturbation_curves_and_pointing_by_hand(image: Path, hybrid: LoadedModel) -> None:
    case = Case(image, TEXT, "itm", Box(0.6, 0.1, 0.9, 0.4))
    relevance = np.array([[0.1, 0.9], [0.3, 0.2]])
    found = perturbation_curves(hybrid, [case], [relevance]).curves
    assert {name: curve.shape for name, curve in found.items()} == {order: (1, 5) for order in ORDERS}
    first, last = found["most_relevant_first"][0], found["least_relevant_first"][0]
    assert first[0] == last[0] == pytest.approx(hybrid.match(image, TEXT).scores[0], abs=1e-5)
    assert first[-1] == last[-1] == pytest.approx(found["random"][0, -1], abs=1e-6), "nothing is left"
    pixels = hybrid.processor.pixel_values(image).clone()
    median = pixels.flatten(1).float().median(dim=1).values.to(torch.uint8)
    pixels[:, :8, 8:] = median[:, None, None]  # the most relevant patch, of 8 x 8 pixels
    removed = pixels.permute(1, 2, 0).numpy()
    assert first[1] == pytest.approx(hybrid.match(removed, TEXT).scores[0], abs=1e-5)

    areas = PerturbationCurves({order: np.array([[1, 0.5, 0], [1, 1, 1]]) for order in ORDERS}).areas()
    assert areas["random"].mean == pytest.approx((0.5 + 1) / 2)
    assert overlaps((2, 2), Box(0.6, 0.1, 0.9, 0.4)).tolist() == [[False, True], [False, False]]
    assert overlaps((2, 2), Box(0.4, 0.1, 0.9, 0.5)).tolist() == [[True, True], [False, False]], "a box may touch"
    game = pointing_game([case, case], [relevance, relevance.T])
    assert game.hits.tolist() == [True, False] and game.chance == 0.25 and game.accuracy().mean == 0.5
