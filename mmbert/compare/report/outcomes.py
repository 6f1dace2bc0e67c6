"""What the arms of a comparison left behind, asked for by strategy and measure instead of by row."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmbert.compare import statistics
from mmbert.compare.statistics import Interval
from mmbert.errors import DataError, printable

Row = Mapping[str, Any]
ItemOutcomes = Mapping[str, Mapping[str, np.ndarray]]

VARIANTS = ("blank", "shuffled", "no_text")
"""Last part of a measure's name that tells what was taken away from the model."""
TAKEN = {"blank": "image", "shuffled": "image", "no_text": "text"}
"""Variant -> what was taken away."""
PARTS = ("seen", "unseen")
"""Part of a name that tells whether training had pairs of the kind."""


def number(value: object) -> float:
    """`value` as a finite float, or NaN for whatever is none: None, text, infinity."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or not math.isfinite(value):
        return math.nan
    return float(value)


def title(measure: str) -> str:
    """A measure's name as people read it: "retrieval/image_to_text/R@1" -> "retrieval image to text R@1"."""
    return measure.replace("/", " ").replace("_", " ")


def plain(text: str) -> str:
    """`text` on one line, with what cannot be shown escaped."""
    return "".join(map(printable, " ".join(text.split())))


def mean_of(values: Sequence[float]) -> float:
    """Mean of what is finite, NaN of nothing."""
    finite = [v for v in values if math.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else math.nan


class Outcomes:
    """The rows and items of a comparison.

    Args:
        rows: One a finished arm; of two rows of one arm the later counts.
        items: Arm -> measure -> outcomes (items,), and "<measure>:image" -> image numbers (items,).
        comparison: What was compared: name, strategies, seeds, arms, exploratory, budget_rule, primary, dataset,
            command. With `arms` rows of others are left out.
    """

    def __init__(self, rows: Sequence[Row], items: ItemOutcomes, comparison: Mapping[str, Any]) -> None:
        asked = comparison.get("arms")
        rows = list({str(row["arm"]): row for row in rows if asked is None or row["arm"] in asked}.values())
        named = [*comparison.get("strategies", ()), *(row["strategy"] for row in rows)]
        self.strategies: list[str] = list(dict.fromkeys(map(str, named)))
        """In the comparison's order, which gives each its colour."""
        order = {name: i for i, name in enumerate(self.strategies)}
        self.rows = sorted(rows, key=lambda r: (order[str(r["strategy"])], -_fraction(r), r.get("seed", 0)))
        self.done = [row for row in self.rows if row.get("status") == "done"]
        self.failed = [row for row in self.rows if row.get("status") != "done"]
        self.fractions = sorted({_fraction(row) for row in self.rows})
        self.full = self.fractions[-1] if self.fractions else 1.0
        """The largest share of the training pairs; all but the low-data table tell of it."""
        self.items = items
        self.comparison = comparison
        exploratory = comparison.get("exploratory")
        self.exploratory = any(row.get("exploratory") for row in rows) if exploratory is None else bool(exploratory)
        self._intervals: dict[tuple[str, str, float, str | None], Interval | None] = {}

    def arms(self, strategy: str, fraction: float | None = None) -> list[Row]:
        """Finished rows of a strategy, one a seed."""
        fraction = self.full if fraction is None else fraction
        return [row for row in self.done if row["strategy"] == strategy and _fraction(row) == fraction]

    def machines(self) -> list[str]:
        """Where the finished arms ran, as far as it is known."""
        return sorted({str(row["cost"]["machine"]) for row in self.done if (row.get("cost") or {}).get("machine")})

    def values(self, strategy: str, measure: str, fraction: float | None = None) -> dict[int, float]:
        """Seed -> value, of the seeds where it is a number."""
        found = {
            row.get("seed", 0): number(row.get("results", {}).get(measure)) for row in self.arms(strategy, fraction)
        }
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def outcomes(self, strategy: str, measure: str, fraction: float | None = None) -> dict[int, np.ndarray]:
        """Seed -> outcomes (items,), of the seeds that have them whole."""
        clusters = self.clusters(measure)
        found = {}
        for row in self.arms(strategy, fraction):
            of_items = np.asarray(self.items.get(row["arm"], {}).get(measure, ()), dtype=float)
            if clusters is None or not of_items.size or not np.isfinite(of_items).all():
                continue
            if of_items.shape != clusters.shape:
                raise DataError(
                    f"items/{row['arm']}.npz:{measure}",
                    f"shape {of_items.shape}",
                    f"{clusters.shape}, as in the other arms: every arm answers the same items in the same order",
                )
            found[row.get("seed", 0)] = of_items
        return found

    def clusters(self, measure: str) -> np.ndarray | None:
        """Which image each item of a measure is about (items,); a variant may leave it to its measure."""
        parent, _, last = measure.rpartition("/")
        if last in VARIANTS and not any(f"{measure}:image" in found for found in self.items.values()):
            measure = parent
        for row in self.done:
            found = self.items.get(row["arm"], {}).get(f"{measure}:image")
            if found is not None:
                return np.asarray(found)
        return None

    def interval(
        self, strategy: str, measure: str, fraction: float | None = None, *, minus: str | None = None
    ) -> Interval | None:
        """Mean over seeds with its interval, of a measure or of its paired difference to another.

        Without items of every seed it is one over seeds alone (`over_items`). None without a value.
        """
        fraction = self.full if fraction is None else fraction
        key = (strategy, measure, fraction, minus)
        if key not in self._intervals:
            self._intervals[key] = self._interval(*key)
        return self._intervals[key]

    def _interval(self, strategy: str, measure: str, fraction: float, minus: str | None) -> Interval | None:
        values = self.values(strategy, measure, fraction)
        outcomes = self.outcomes(strategy, measure, fraction)
        if minus is not None:
            others = self.values(strategy, minus, fraction)
            values = {seed: value - others[seed] for seed, value in values.items() if seed in others}
            paired = self.outcomes(strategy, minus, fraction)
            # Into 0 to 1, where statistics work, and back below.
            same = {s for s, o in outcomes.items() if s in paired and o.shape == paired[s].shape}
            outcomes = {s: (1 + o - paired[s]) / 2 for s, o in outcomes.items() if s in same}
        if not values:
            return None
        clusters = self.clusters(measure)
        if clusters is not None and outcomes.keys() == values.keys():
            found = statistics.interval(list(outcomes.values()), clusters)
            if minus is None:
                return found
            return Interval(2 * found.mean - 1, 2 * found.low - 1, 2 * found.high - 1, 2 * found.spread, found.seeds)
        return statistics.interval_over_seeds(list(values.values()))

    def gap(self, strategy: str, first: str, second: str) -> Interval | None:
        """How much more a strategy has of one measure than of another that is about other images."""
        values, others = self.values(strategy, first), self.values(strategy, second)
        seeds = [seed for seed in values if seed in others]
        found = [self.outcomes(strategy, first), self.outcomes(strategy, second)]
        images = [self.clusters(first), self.clusters(second)]
        if not seeds:
            return None
        if images[0] is None or images[1] is None or any(seed not in runs for runs in found for seed in seeds):
            return statistics.interval_over_seeds([values[seed] - others[seed] for seed in seeds])
        one, other = ([runs[seed] for seed in seeds] for runs in found)
        return statistics.difference_between_items(one, images[0], other, images[1])

    def names(self) -> list[str]:
        """Every name of a result, those of the primary measures first."""
        found = sorted({name for row in self.done for name in row.get("results", {})})
        return list(dict.fromkeys([*(name for name in self.named() if name in found), *found]))

    def measures(self) -> list[str]:
        """Names of results that judge the whole model: no variants, parts, categories, and no chance."""
        categories = {name for names in self.categories().values() for name in names}
        return [n for n in self.names() if n not in categories and _is_plain(n) and not is_reference(n)]

    def named(self) -> list[str]:
        """What the comparison named as primary, measured or not."""
        return list(self.comparison.get("primary") or ())

    def primary(self) -> list[str]:
        """The measures that were named as primary. No other takes the place of one that was never measured."""
        return [name for name in self.named() if name in self.names()]

    def leading(self) -> list[str]:
        """What is told first: the primary measures; without one those that have items, or else the first ones."""
        measures = self.measures()
        return self.primary() or [m for m in measures if self.clusters(m) is not None] or measures[:3]

    def leading_scores(self) -> list[str]:
        """The leading measures, then the other scores that have items."""
        scores = [m for m in self.measures() if is_score(m) and self.clusters(m) is not None]
        return list(dict.fromkeys([*self.leading(), *scores]))

    def gain(self, strategy: str, measure: str, more: float, less: float) -> Interval | None:
        """What a larger share of the training pairs gives beside a smaller one; None without items of two seeds."""
        runs = {str(share): list(self.outcomes(strategy, measure, share).values()) for share in (more, less)}
        clusters = self.clusters(measure)
        if clusters is None or min(map(len, runs.values())) < 2:
            return None
        (found,) = statistics.compare_pairs(runs, clusters, measure=measure, resamples=0)
        return Interval(found.difference, found.low, found.high, math.nan, min(found.seeds))

    def categories(self) -> dict[str, list[str]]:
        """Measure -> names of its parts: siblings of an "overall", or what stands below a measure."""
        names, found = self.names(), {}
        for name in names:
            parent, _, last = name.rpartition("/")
            whole = f"{parent}/overall" if f"{parent}/overall" in names else parent
            if whole in names and whole != name and last not in VARIANTS and _is_plain(name) and not is_reference(name):
                found.setdefault(whole, []).append(name)
        return found

    def variants(self) -> dict[str, list[str]]:
        """Score -> which of `VARIANTS` it was also taken under, without those of its categories."""
        names = set(self.names())
        scores = [measure for measure in self.measures() if is_score(measure)]
        found = {measure: [v for v in VARIANTS if f"{measure}/{v}" in names] for measure in scores}
        return {measure: variants for measure, variants in found.items() if variants}

    def parts(self) -> dict[str, dict[str, str]]:
        """Name without its part -> "seen" / "unseen" -> the full name."""
        found: dict[str, dict[str, str]] = {}
        for name in self.names():
            words = name.split("/")
            part = next((word for word in words if word in PARTS), None)
            if part and words[-1] not in VARIANTS and not is_reference(name):
                found.setdefault("/".join(word for word in words if word != part), {})[part] = name
        return found

    def reference(self, measure: str) -> float:
        """What a model gets that knows nothing: the mean of its "chance_..." or "prior...", else as counted.

        NaN if unknown.
        """
        task, last = measure.split("/")[0], measure.rsplit("/", 1)[-1]
        wanted = [f"{task}/chance_{last}", f"{task}/chance"]
        if last == "accuracy":
            wanted += [f"{task}/prior_text", f"{task}/prior"]
        name = next((name for name in wanted if name in self.names()), None)
        if name is None:
            return self._counted_chance(measure)
        return mean_of([number(row.get("results", {}).get(name)) for row in self.done if _fraction(row) == self.full])

    def _counted_chance(self, measure: str) -> float:
        task, *way, last = measure.split("/")
        if task == "foils" or last in ("itm_accuracy", "itm_auroc"):  # one right and one wrong
            return 0.5
        if last == "rsum":
            return 100 * sum(self.reference(f"{task}/{w}/R@{k}") for w in WAYS for k in (1, 5, 10))
        found, first = self.candidates(), re.fullmatch(r"R@(\d+)", last)
        if task != "retrieval" or way not in ([w] for w in WAYS) or first is None or found is None:
            return math.nan
        images, captions = found
        if any(_retrieval(row).get("equal_texts") for row in self.done) or captions % images:
            return math.nan  # how many of the captions are right is not written down
        k, own = int(first[1]), captions // images
        if way == ["text_to_image"]:
            return min(1.0, k / images)
        k = min(k, captions)
        return 1 - math.comb(captions - own, k) / math.comb(captions, k)

    def candidates(self) -> tuple[int, int] | None:
        """Images and captions that "retrieval" ranks, None where that was not written down."""
        for row in self.done:
            cost, asked = row.get("cost") or {}, _retrieval(row)
            images = number(cost.get("search_images", asked.get("images")))
            captions = number(cost.get("search_texts", images * number(asked.get("captions", 1))))
            if images > 0 and captions > 0:
                return int(images), int(captions)
        return None

    def scorers(self, task: str) -> dict[str, list[str]]:
        """What ranked a task's images and captions -> strategies of which it is written down."""
        found: dict[str, list[str]] = {}
        for row in self.done:
            asked = _retrieval(row) if task == "retrieval" else {}
            scorer = (row.get("scorers") or {}).get(task, asked.get("scorer"))
            name = f"two_stage with k={asked['k']}" if scorer == "two_stage" and "k" in asked else scorer
            if name and row["strategy"] not in found.setdefault(str(name), []):
                found[str(name)].append(str(row["strategy"]))
        return found


WAYS = ("image_to_text", "text_to_image")
"""Of searching."""


def is_ranking(name: str) -> bool:
    """Whether it comes from ranking candidates."""
    return re.search(r"/R@\d+$", name) is not None


def is_reference(name: str) -> bool:
    """Whether it tells what knowing nothing gives."""
    return name.rsplit("/", 1)[-1].startswith(("chance", "prior", "retrieval_chance"))


def is_score(name: str) -> bool:
    """Whether more of it is better."""
    return not name.endswith(("loss", "rank"))


def _is_plain(name: str) -> bool:
    words = name.split("/")
    return words[-1] not in VARIANTS and not any(part in words for part in PARTS)


def _retrieval(row: Row) -> Mapping[str, Any]:
    """Its options."""
    return (row.get("config") or {}).get("retrieval") or {}


def _fraction(row: Row) -> float:
    return float(row.get("fraction", 1.0))
