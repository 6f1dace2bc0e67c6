"""Retrieval: scores, shortlists, fusion passes, folds, and independence of batch size, workers and processes."""

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from processes import in_processes
from ranking import CAPTIONS, encoded_with, tiny_model
from tiers import tier
from tiny import tiny_examples, tiny_processor
from torch import Tensor

from mmbert.errors import UsageError
from mmbert.evaluation import encoding, retrieval
from mmbert.evaluation.encoding import EncodedCandidates, pair_scores
from mmbert.evaluation.options import RETRIEVAL_SCORERS
from mmbert.evaluation.retrieval import (
    REQUIRED_OBJECTIVES,
    SCORERS,
    Candidates,
    choose_scorer,
    default_scorers,
    rank_candidates,
)
from mmbert.metrics.retrieval import recall_at_k
from mmbert.model.fusion import FUSIONS
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.tokens import Tokens
from mmbert.runtime.memory import peak_memory, reset_peak_memory


@pytest.fixture
def candidates(tmp_path: Path) -> Candidates:
    return Candidates.from_examples(tiny_examples(tmp_path, CAPTIONS))


def metrics_of(model: MMBertForPreTraining, encoded: EncodedCandidates, *arguments: Any, **options: Any) -> Any:
    return rank_candidates(model, encoded, *arguments, **options).metrics


def one_by_one(model: MMBertForPreTraining, candidates: Candidates) -> dict[str, Tensor]:
    """Scores of every image with every text, each pair encoded and fused alone."""
    processor = tiny_processor()
    scores = {name: torch.empty(len(candidates.images), len(candidates.texts)) for name in ("itm", "itc")}
    for i, image in enumerate(candidates.images):
        for j, text in enumerate(candidates.texts):
            prepared = processor(text=text, images=image)
            words = model.mmbert.encode_text(prepared["input_ids"], prepared["attention_mask"])
            patches = model.mmbert.encode_image(prepared["pixel_values"])
            itm, itc = (model.objectives[name] for name in ("itm", "itc"))
            scores["itm"][i, j] = itm.score(model.mmbert.fuse(words, patches).pooled)  # pyright: ignore
            scores["itc"][i, j] = itc.embed_text(words)[0] @ itc.embed_image(patches)[0]  # pyright: ignore
    return scores


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_scores_equal_those_of_every_pair_computed_alone(
    fusion: str, candidates: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "PAIRS_PER_CHUNK", 25)  # 2 of 7 images with 11 texts each
    monkeypatch.setattr(encoding, "PAIRS_PER_BATCH", 5)
    # Both encoders are narrower than the fusion layers, and deep enough for strategies that read lower layers.
    model = tiny_model(fusion, text_layers=3, image_layers=2, fusion_layers=3, text_hidden_size=16)
    encoded = encoded_with(model, candidates, batch_size=3)
    assert (len(encoded.texts), len(encoded.text_index)) == (11, 13), "equal texts are encoded once"
    for name, expected in one_by_one(model, candidates).items():
        found = SCORERS[name](model, encoded, 1, 0.0)
        torch.testing.assert_close(found.scores[:, encoded.text_index], expected, rtol=1e-5, atol=1e-5)
        assert found.fusion_passes == {"itm": 77, "itc": 0}[name]
        metrics = metrics_of(model, encoded, candidates, name)
        for key, value in recall_at_k(expected, candidates.image_of_text).items():
            # Equal texts tie to the bit here; encoded alone they may differ in the last bit, but not in their images.
            assert metrics[key] == pytest.approx(value), key


class CountedRows:
    """Packed tokens of images that count the rows that are gathered."""

    def __init__(self, images: Tensor):
        self.images, self.shape, self.gathered = images, images.shape, 0

    def __getitem__(self, rows: Tensor) -> Tensor:
        self.gathered += len(rows)
        return self.images[rows]


@pytest.mark.parametrize("free", [1 << 40, 400_000])
def test_pair_scores_gather_an_image_once_for_its_texts_and_fit_the_free_memory(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 images with 30 of 100 texts each, of 3 to 8 tokens; by text, each of 600 pairs would gather an image."""
    model, sizes = tiny_model("early"), []
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(20, 5, 32, generator=generator)
    texts = [torch.randn(3 + i % 6, 32, generator=generator) for i in range(100)]
    pairs = torch.stack([torch.arange(20).repeat(30), torch.randperm(600, generator=generator) % 100], dim=1)
    expected = torch.cat([pair_scores(model, images, texts, pair[None]) for pair in pairs])
    original = model.match_scores

    def counting(text: Tokens, image: Tokens) -> Tensor:
        sizes.append(len(text.mask))
        return original(text, image)

    monkeypatch.setattr(encoding, "free_memory", lambda device: free)
    monkeypatch.setattr(model, "match_scores", counting)
    counted = CountedRows(images)
    found = pair_scores(model, counted, texts, pairs)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    tokens, largest = 5 + 8, max(sizes)
    assert largest == min(128, free // 2 // (4 * tokens * (16 * 32 + 4 * tokens)))
    classes = 6  # of text lengths, each of which takes all images in turn
    assert counted.gathered <= classes * 20 + len(sizes) < len(pairs) / 2


@torch.no_grad()
def test_tokens_in_half_precision_take_half_the_memory_and_keep_the_ranks(candidates: Candidates) -> None:
    model = tiny_model()
    exact, half = (encoded_with(model, candidates, half_tokens=x) for x in (False, True))
    assert exact.images is not None and half.images is not None
    assert half.images.nbytes == exact.images.nbytes // 2 and half.texts[0].dtype == torch.float16
    scores = [SCORERS["itm"](model, encoded, 1, 0.0).scores for encoded in (exact, half)]
    assert scores[1].dtype == torch.float32
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-3)
    assert torch.equal(scores[0].argsort(dim=1), scores[1].argsort(dim=1))


def test_tokens_that_do_not_fit_the_memory_are_kept_in_a_temporary_file(
    candidates: Candidates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, expected = tiny_model(), encoded_with(tiny_model(), candidates)
    monkeypatch.setattr(encoding, "free_memory", lambda device: 1_000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = {*tmp_path.iterdir()}
    with caplog.at_level("INFO"):
        found = encoded_with(model, candidates)
    assert "are kept in a temporary file" in caplog.text
    assert found.images is not None and expected.images is not None
    assert torch.equal(found.images, expected.images), "every row is where it was written"
    assert {*tmp_path.iterdir()} == before, "the file's name is gone at once, so a kill leaves nothing"
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UsageError, match="set TMPDIR to a larger disk, or rank with --scorer itc"):
        encoded_with(model, candidates)


@torch.no_grad()
def test_two_stage_with_every_image_in_the_shortlist_is_exhaustive(candidates: Candidates) -> None:
    model = tiny_model()
    encoded = encoded_with(model, candidates)
    exhaustive, shortlist = (SCORERS[name](model, encoded, 7, 0.0) for name in ("itm", "two_stage"))
    assert torch.equal(exhaustive.scores.double(), shortlist.scores)
    assert exhaustive.fusion_passes == shortlist.fusion_passes


@torch.no_grad()
def test_two_stage_fuses_both_shortlists_and_ranks_other_pairs_below_by_itc(candidates: Candidates) -> None:
    model = tiny_model()
    encoded = encoded_with(model, candidates)
    near, exact = (SCORERS[name](model, encoded, 0, 0.0).scores for name in ("itc", "itm"))
    for k in (1, 2, 5):
        chosen = torch.zeros_like(near, dtype=torch.bool)
        for i in range(7):
            chosen[i, near[i].argsort(descending=True)[:k]] = True
        for j in range(11):
            chosen[near[:, j].argsort(descending=True)[:k], j] = True
        scores, passes = SCORERS["two_stage"](model, encoded, k, 0.0)
        assert passes == int(chosen.sum()) <= k * (7 + 11)
        torch.testing.assert_close(scores[chosen].float(), exact[chosen], rtol=1e-5, atol=1e-5)
        assert scores[~chosen].max() < scores[chosen].min()
        assert torch.equal(scores[~chosen].argsort(), near[~chosen].argsort())


def test_every_image_and_text_is_encoded_once(candidates: Candidates) -> None:
    model = tiny_model()
    counts: Counter[str] = Counter()
    core = model.mmbert
    core.image_encoder.register_forward_hook(lambda _, args, out: counts.update(image=len(out.mask)))
    core.text_encoder.register_forward_hook(lambda _, args, out: counts.update(text=len(out.mask)))
    core.fusion.register_forward_hook(lambda _, args, out: counts.update(fusion=len(out.pooled)))
    encoded = encoded_with(model, candidates, batch_size=4)
    reports = [metrics_of(model, encoded, candidates, name, k=2) for name in SCORERS]
    assert (counts["image"], counts["text"]) == (7, 11)
    assert counts["fusion"] == sum(report["fusion_passes"] for report in reports)
    for report in reports:
        assert (report["image_passes"], report["text_passes"], report["num_texts"]) == (7, 11, 13)
        assert report["scoring_seconds"] > 0 and report["peak_memory"] > 1e6


def comparable(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without times and memory."""
    return {name: value for name, value in metrics.items() if name not in ("scoring_seconds", "peak_memory")}


def test_results_do_not_depend_on_batch_size_or_workers(candidates: Candidates) -> None:
    model = tiny_model()
    whole = encoded_with(model, candidates)
    for options in ({"batch_size": 1}, {"batch_size": 5}, {"num_workers": 2, "batch_size": 2}):
        encoded = encoded_with(model, candidates, **options)
        for name in SCORERS:
            expected = metrics_of(model, whole, candidates, name, k=2, equal_texts=True)
            found = metrics_of(model, encoded, candidates, name, k=2, equal_texts=True)
            assert comparable(found) == comparable(expected)


def test_two_processes_give_the_scores_of_one_to_the_bit(
    candidates: Candidates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 images in batches of 3 and 77 pairs in batches of 10: neither divides evenly."""
    monkeypatch.setattr(encoding, "PAIRS_PER_BATCH", 10)
    model = tiny_model()

    def work(rank: int) -> list[Any]:
        encoded = encoded_with(model, candidates, batch_size=3)
        scores = [SCORERS[name](model, encoded, 2, 0.0) for name in SCORERS]
        reports = [comparable(metrics_of(model, encoded, candidates, name, k=2, folds=2)) for name in SCORERS]
        return [[*scored] for scored in scores] + reports

    torch.set_num_threads(1)
    expected = work(0)
    for found in in_processes(2, work, tmp_path):
        for (scores, passes), (expected_scores, expected_passes) in zip(found[:3], expected[:3], strict=True):
            assert torch.equal(scores, expected_scores) and passes == expected_passes
        assert found[3:] == expected[3:]


def test_folds_are_the_mean_over_consecutive_images(candidates: Candidates) -> None:
    model = tiny_model()
    whole = SCORERS["itm"](model, encoded := encoded_with(model, candidates), 0, 0.0).scores[:, encoded.text_index]
    # 7 images in 2 folds: 0 to 2 with texts 0 to 5, 3 to 6 with texts 6 to 12.
    parts = [
        recall_at_k(whole[:3, :6], [0, 0, 0, 1, 1, 2]),
        recall_at_k(whole[3:, 6:], [0, 0, 0, 1, 1, 2, 3]),
    ]
    report = metrics_of(model, encoded, candidates, "itm", folds=2)
    for name in parts[0]:
        assert report[name] == pytest.approx((parts[0][name] + parts[1][name]) / 2), name
    assert report["fusion_passes"] == 3 * 5 + 4 * 7, "the first fold has 'a red cat' twice"


def test_equal_texts_count_as_correct_with_the_option(candidates: Candidates) -> None:
    model = tiny_model()
    encoded = encoded_with(model, candidates)
    scores = SCORERS["itm"](model, encoded, 0, 0.0).scores[:, encoded.text_index]
    relevant = torch.tensor(candidates.image_of_text) == torch.arange(7)[:, None]
    for image in (0, 1, 3):
        relevant[image, [0, 4, 8]] = True
    expected = recall_at_k(scores, candidates.image_of_text, relevant=relevant)
    found = metrics_of(model, encoded, candidates, "itm", equal_texts=True)
    assert {name: found[name] for name in expected} == expected
    # Three images have it: without the option at most one of its three copies can be correct.
    assert found["rsum"] > metrics_of(model, encoded, candidates, "itm")["rsum"]


@pytest.mark.parametrize("folds", [1, 2])
def test_outcomes_are_the_hits_that_recall_at_1_is_the_mean_of(candidates: Candidates, folds: int) -> None:
    model = tiny_model()
    metrics, outcomes = rank_candidates(model, encoded_with(model, candidates), candidates, "itm", folds=folds)
    assert outcomes["image_to_text/R@1"].images == list(range(len(candidates.images)))
    assert outcomes["text_to_image/R@1"].images == list(candidates.image_of_text)
    if folds == 1:
        for name, found in outcomes.items():
            assert 0 < metrics[name] < 1, "or any hits would do"
            assert sum(found.values) / len(found.values) == metrics[name]


def test_scorer_is_chosen_by_the_objectives_of_the_model() -> None:
    assert choose_scorer(tiny_model()) == "two_stage" and default_scorers(tiny_model()) == ["itc", "two_stage"]
    only = {name: tiny_model(objectives={name: 1.0}) for name in ("itm", "itc", "mlm")}
    for name in ("itm", "itc"):
        assert choose_scorer(only[name]) == name and default_scorers(only[name]) == [name]
    with pytest.raises(UsageError, match="mlm can't rank: train one with itm, itc or both"):
        choose_scorer(only["mlm"])
    with pytest.raises(UsageError, match="needs the objectives itc and itm, but the model has itm; allowed are itm"):
        choose_scorer(only["itm"], "two_stage")
    shallow = tiny_model("early", objectives={"itm": 1.0}, text_layers=0, image_layers=0)
    with pytest.raises(UsageError, match=r"itc is impossible with text_layers=0 and image_layers=0\); allowed are itm"):
        choose_scorer(shallow, "two_stage")


def test_options_out_of_range_raise(candidates: Candidates) -> None:
    model = tiny_model()
    encoded = encoded_with(model, candidates)
    with pytest.raises(UsageError, match="k=0"):
        metrics_of(model, encoded, candidates, "two_stage", k=0)
    for folds in (0, 8):
        with pytest.raises(UsageError, match=f"folds={folds}: allowed are 1 to 7, the number of images"):
            metrics_of(model, encoded, candidates, "itc", folds=folds)


def test_option_module_lists_the_scorers() -> None:
    """The command line reads the names there, without importing torch."""
    assert RETRIEVAL_SCORERS == tuple(SCORERS) == tuple(REQUIRED_OBJECTIVES)


def test_protocol_names_the_captions_per_image(candidates: Candidates) -> None:
    assert candidates.captions_per_image() == "1 to 3 captions per image"
    assert Candidates(["a", "b"], ["x", "y"], [0, 1]).captions_per_image() == "1 caption per image"
    assert Candidates(["a", "b"], ["x"] * 10, [0, 1] * 5).captions_per_image() == "5 captions per image"
    assert Candidates(["a", "b"], ["x", "y"], [0, 0]).captions_per_image() == "0 to 2 captions per image"


def test_without_tokens_only_vectors_are_kept(candidates: Candidates) -> None:
    encoded = encoded_with(tiny_model(), candidates, keep_tokens=False)
    assert encoded.images is None and not encoded.texts
    assert encoded.image_vectors is not None and encoded.image_vectors.shape == (7, 8)
    image = Image.new("RGB", (16, 16))
    assert encoded_with(tiny_model(), Candidates([image], ["a cat"], [0])).images is not None


@torch.no_grad()
def test_cosines_are_fp32_under_autocast(candidates: Candidates) -> None:
    """In bf16 near cosines would tie, and ties rank last."""
    model = tiny_model()
    encoded = encoded_with(model, candidates)
    expected = SCORERS["itc"](model, encoded, 1, 0.0).scores
    with torch.autocast("cpu", torch.bfloat16):
        found = SCORERS["itc"](model, encoded, 1, 0.0).scores
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@torch.no_grad()
def test_two_stage_adds_the_contrastive_logit_of_shortlisted_pairs(candidates: Candidates) -> None:
    """By hand from the scores of both heads; a large weight keeps the order of the shortlist."""
    model = tiny_model()
    encoded = encoded_with(model, candidates)
    cosines, fused = (SCORERS[name](model, encoded, 2, 0.0).scores.double() for name in ("itc", "itm"))
    plain = SCORERS["two_stage"](model, encoded, 2, 0.0).scores
    is_listed = plain > plain.max() - (fused.max() - fused.min()) - 1e-6
    added = SCORERS["two_stage"](model, encoded, 2, 0.5).scores
    scale = model.objectives["itc"].scale
    torch.testing.assert_close(added[is_listed], (fused + 0.5 * scale * cosines)[is_listed])
    assert added[~is_listed].max() < added[is_listed].min(), "the others rank below"
    ordered = metrics_of(model, encoded, candidates, "two_stage", k=2, itc_weight=1e6)
    by_itc = metrics_of(model, encoded, candidates, "itc")
    assert {key: ordered[key] for key in ordered if "R@1" in key} == {
        key: by_itc[key] for key in ordered if "R@1" in key
    }
    assert ordered["itc_weight"] == 1e6 and by_itc["itc_weight"] == 0


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weight_out_of_range_is_named(weight: float, candidates: Candidates) -> None:
    model = tiny_model()
    encoded = encoded_with(model, candidates)
    with pytest.raises(UsageError, match=f"itc_weight={weight}: must be a number of 0 or more"):
        rank_candidates(model, encoded, candidates, "two_stage", itc_weight=weight)


@torch.no_grad()
def test_ranking_takes_20_bytes_for_each_image_and_text() -> None:
    """As docs/evaluation.md says; the full tier has the size of COCO's test split."""
    num_images, num_texts, model = tier(500, 5_000), tier(2_500, 25_000), tiny_model()
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(count, 8, generator=generator) for count in (num_images, num_texts)]
    images = torch.randn(num_images, 5, 32, generator=generator)
    texts = [torch.randn(4 + i % 3, 32, generator=generator) for i in range(num_texts)]
    units = [torch.nn.functional.normalize(found, dim=1) for found in vectors]
    encoded = EncodedCandidates(images, texts, *units, torch.arange(num_texts), num_images, num_texts)
    names = [[f"{i}" for i in range(count)] for count in (num_images, num_texts)]
    candidates = Candidates(*names, [i * num_images // num_texts for i in range(num_texts)])
    reset_peak_memory()
    before = peak_memory()
    found = rank_candidates(model, encoded, candidates, "two_stage", k=2).metrics
    assert 2 * num_texts < found["fusion_passes"] <= 2 * (num_images + num_texts)
    assert found["peak_memory"] - before < 20 * num_images * num_texts + 200e6


def test_pairs_off_the_shortlist_keep_the_order_of_their_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosines that differ by 6e-8 stay apart below a matching score of -90, where neighbours in fp32 differ by 8e-6."""
    near = 0.9 * torch.eye(3) + 0.5 * (1 - torch.eye(3))
    near[0, 1] = near[0, 1].nextafter(torch.tensor(1.0))
    monkeypatch.setattr(retrieval, "contrastive", lambda *_: retrieval.ScoreMatrix(near, 0))
    monkeypatch.setattr(retrieval, "fuse_selected", lambda *_, **__: torch.full((3,), -90.0))  # the diagonal
    scores: Any = SCORERS["two_stage"](tiny_model(), cast(Any, None), 1, 0.0).scores
    assert scores.diagonal().tolist() == [-90.0] * 3
    assert scores[0, 2] < scores[0, 1] < -90
