"""Closed form of ITC's projections: their start before the first optimizer step, and the refit before validations."""

import logging
import time

import torch

from mmbert.data.datamodule import PairsDataModule
from mmbert.data.pairs import Pairs
from mmbert.errors import UsageError
from mmbert.evaluation.closed_form import (
    PooledFeatures,
    choose_pairs,
    pooled_features,
    solve_closed_form,
    unit_vectors,
)
from mmbert.evaluation.encoding import LoadImage
from mmbert.metrics.retrieval import recall_at_k
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.objectives.base import no_autocast
from mmbert.model.objectives.closed_form import LinearMaps
from mmbert.model.objectives.itc import ImageTextContrast
from mmbert.runtime.distributed import rank
from mmbert.training.sharding import copy_full, full_tensor, gather_shards, spread_shards

log = logging.getLogger("mmbert")


def _itc(model: torch.nn.Module) -> ImageTextContrast | None:
    """Return the model's objective itc; None without it."""
    itc = model.objectives["itc"] if isinstance(model, MMBertForPreTraining) and "itc" in model.objectives else None
    return itc if isinstance(itc, ImageTextContrast) else None


def wants_closed_form(model: torch.nn.Module) -> bool:
    """Whether the model's ITC starts from its closed form: the option is set, and its projections are new."""
    itc = _itc(model)
    return itc is not None and itc.init == "closed_form" and not itc.is_trained


def start_from_closed_form(model: MMBertForPreTraining, data: PairsDataModule, *, val_images: int, seed: int) -> None:
    """Solve ITC's projections from training pairs, set them, and log what this changes on validation.

    Args:
        model: On its device, possibly sharded; its training mode is kept.
        data: Its training pairs are used, with the augmented views that the encoder cache holds, else without any.
        val_images: Images of the validation split, with one caption each, that are ranked before and after.
        seed: Seed of the sample of pairs.

    Raises:
        UsageError: More pairs requested than there are, or too few for the width of the common space.
    """
    started = time.perf_counter()
    itc, was_training, workers = _itc(model), model.training, data.options.num_workers
    assert itc is not None
    model.eval()
    gather_shards(model)
    maps, count = _solve(model, data, seed)
    val, positions = data.val_samples, []
    features = None
    if val is not None and val_images > 1:
        positions = sorted(val.image_sample(val_images))
        features = pooled_features(
            model,
            data.processor,
            [val.examples[i].image for i in positions],
            [val.examples[i].captions[0] for i in positions],
            pooling=itc.pooling,
            num_workers=workers,
            skip_unreadable=data.skip_unreadable,
            load=image_loader(val),
        )
    spread_shards(model)
    model.train(was_training)
    sides = itc.text_projection, itc.image_projection
    own = LinearMaps(*(full_tensor(x.detach()).cpu().double() for p in sides for x in (p.weight, p.bias)))
    with torch.no_grad():
        for parameter, value in zip((x for p in sides for x in (p.weight, p.bias)), maps, strict=True):
            copy_full(parameter, value)
    if itc.refit:
        itc.set_refit(maps)
    change = ""
    if val is not None and features is not None:
        before, after = (recall_at_1(x, features, val, positions) for x in (own, maps))
        ways = ("image to text", before[0], after[0]), ("text to image", before[1], after[1])
        change = f"; R@1 of {len(positions)} validation images: " + ", ".join(
            f"{way} {old:.3f} before, {new:.3f} after" for way, old, new in ways
        )
    if rank() == 0:
        log.info(
            "objectives.itc.init=closed_form: %d directions from %s training pairs in %.1f s%s",
            itc.text_projection.out_features,
            f"{count:,}",
            time.perf_counter() - started,
            change,
        )


def wants_refit(model: torch.nn.Module) -> bool:
    """Whether the closed form of the model's ITC is solved again before each validation."""
    itc = _itc(model)
    return itc is not None and itc.refit


def check_refit(model: torch.nn.Module) -> None:
    """Check that a saved model whose ITC is evaluated by a refit has one.

    Raises:
        UsageError: It was trained without `refit`, and evaluation never solves it.
    """
    itc = _itc(model)
    if itc is not None and itc.refit and not bool(itc.get_buffer("refit_text_weight").any()):
        raise UsageError(
            "objectives.itc.refit=true: this model was trained without it, so it has no projections of a refit, and "
            "only fit solves them; leave refit out, or train with it."
        )


@torch.no_grad()
def refit_closed_form(model: MMBertForPreTraining, data: PairsDataModule, *, seed: int) -> None:
    """Solve the closed form on the encoders as they are now, for evaluation; training keeps its projections.

    Args:
        model: In evaluation mode, on its device, with its weights gathered.
        data: Its training pairs are used, as by `start_from_closed_form`.
        seed: Seed of the sample of pairs.
    """
    started, itc = time.perf_counter(), _itc(model)
    assert itc is not None
    maps, count = _solve(model, data, seed)
    itc.set_refit(maps)
    if rank() == 0:
        log.info(
            "objectives.itc.refit: closed form of %s training pairs solved again in %.1f s",
            f"{count:,}",
            time.perf_counter() - started,
        )


def _solve(model: MMBertForPreTraining, data: PairsDataModule, seed: int) -> tuple[LinearMaps, int]:
    """Solve the closed form of the training pairs; return it with their number."""
    itc, examples = _itc(model), data.examples["train"]
    assert itc is not None
    pairs = choose_pairs(examples, itc.init_samples, seed=seed)
    maps = solve_closed_form(
        model,
        data.processor,
        examples,
        pairs,
        pooling=itc.pooling,
        directions=itc.text_projection.out_features,
        ridge=itc.ridge,
        num_workers=data.options.num_workers,
        skip_unreadable=data.skip_unreadable,
        load=image_loader(data.train_samples),
        views_of=data.train_samples.cached_views,
    )
    return maps, len(pairs)


def image_loader(samples: Pairs) -> LoadImage:
    """Choose what loads the images: the encoder cache, if there is one."""
    return samples.processor.pixel_values if samples.cache is None else samples.cache.hidden_states


def recall_at_1(maps: LinearMaps, features: PooledFeatures, val: Pairs, positions: list[int]) -> tuple[float, float]:
    """R@1 of both directions among the readable validation images, image to text first."""
    kept = features.is_readable.nonzero()[:, 0]
    images = unit_vectors(features.images[kept], maps.image_weight, maps.image_bias)
    texts = unit_vectors(features.texts[kept], maps.text_weight, maps.text_bias)
    rows = [positions[i] for i in kept.tolist()]
    texts_of, image_of = val.text_keys, val.image_keys
    relevant = torch.tensor([[texts_of[t][0] in texts_of[i] or image_of[t] == image_of[i] for t in rows] for i in rows])
    with no_autocast(images):
        scores = images @ texts.T
    found = recall_at_k(scores, torch.arange(len(rows)), relevant=relevant)
    return found["image_to_text/R@1"], found["text_to_image/R@1"]
