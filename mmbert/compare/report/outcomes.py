"""Scores of a comparison by strategy and measure, read from the rows and items of its arms."""

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

ABLATED_INPUT = {"blank": "image", "shuffled": "image", "no_text": "text"}
"""Ablation, the last part of a measure's name -> the input that is ablated."""
ABLATIONS = tuple(ABLATED_INPUT)
SEEN_SPLITS = ("seen", "unseen")
"""Part of a measure's name: whether training had pairs of the kind."""


def number(value: object) -> float:
    """Convert to a finite float; NaN for everything else: None, text, infinity."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or not math.isfinite(value):
        return math.nan
    return float(value)


def measure_title(measure: str) -> str:
    """Readable name of a measure: "retrieval/image_to_text/R@1" -> "retrieval image to text R@1"."""
    return measure.replace("/", " ").replace("_", " ")


def single_line(text: str) -> str:
    """Join the lines of a text, and escape characters that can't be printed."""
    return "".join(map(printable, " ".join(text.split())))


def mean_of(values: Sequence[float]) -> float:
    """Mean of the finite values, NaN if there are none."""
    finite = [v for v in values if math.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else math.nan


class Outcomes:
    """Rows and items of a comparison, by strategy and measure.

    Args:
        rows: One per arm; of two rows of one arm the later one is used.
        items: Arm -> measure -> outcomes (items,), and "<measure>:image" -> image numbers (items,).
        comparison: Content of comparison.json: name, strategies, seeds, arms, towers, exploratory, budget_rule,
            primary, dataset, command. With `arms`, rows of other arms are ignored.
    """

    def __init__(self, rows: Sequence[Row], items: ItemOutcomes, comparison: Mapping[str, Any]) -> None:
        arms, towers = comparison.get("arms"), comparison.get("towers", ())
        self.towers = list({str(row["arm"]): row for row in rows if row["arm"] in towers}.values())
        """Rows of the towers that the arms start from, which are no arms of a strategy."""
        rows = list({str(row["arm"]): row for row in rows if arms is None or row["arm"] in arms}.values())
        named = [*comparison.get("strategies", ()), *(row["strategy"] for row in rows)]
        self.strategies: list[str] = list(dict.fromkeys(map(str, named)))
        """Names in the order of the comparison, which determines their colors."""
        order = {name: i for i, name in enumerate(self.strategies)}
        self.rows = sorted(rows, key=lambda r: (order[str(r["strategy"])], -_fraction(r), r.get("seed", 0)))
        self.done = [row for row in self.rows if row.get("status") == "done"]
        self.failed = [row for row in self.rows if row.get("status") != "done"]
        self.fractions = sorted({_fraction(row) for row in self.rows})
        self.full = self.fractions[-1] if self.fractions else 1.0
        """Largest fraction of the training pairs; everything but the low-data curve uses its arms."""
        self.items = items
        self.comparison = comparison
        exploratory = comparison.get("exploratory")
        self.exploratory = any(row.get("exploratory") for row in rows) if exploratory is None else bool(exploratory)
        self._intervals: dict[tuple[str, str, float, str | None], Interval | None] = {}

    def arms(self, strategy: str, fraction: float | None = None) -> list[Row]:
        """Finished rows of a strategy, one per seed."""
        fraction = self.full if fraction is None else fraction
        return [row for row in self.done if row["strategy"] == strategy and _fraction(row) == fraction]

    def machines(self) -> list[str]:
        """Machines of the finished arms, if known."""
        return sorted({str(row["cost"]["machine"]) for row in self.done if (row.get("cost") or {}).get("machine")})

    def values(self, strategy: str, measure: str, fraction: float | None = None) -> dict[int, float]:
        """Seed -> score, of the seeds with a finite one."""
        found = {
            row.get("seed", 0): number(row.get("results", {}).get(measure)) for row in self.arms(strategy, fraction)
        }
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def outcomes(self, strategy: str, measure: str, fraction: float | None = None) -> dict[int, np.ndarray]:
        """Seed -> per-item outcomes (items,), of the seeds with finite outcomes of all items."""
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
                    f"{clusters.shape}, as in the other arms: every arm has the same items in the same order",
                )
            found[row.get("seed", 0)] = of_items
        return found

    def clusters(self, measure: str) -> np.ndarray | None:
        """Image number of each item of a measure (items,); an ablation without its own has those of its measure."""
        parent, _, last = measure.rpartition("/")
        if last in ABLATIONS and not any(f"{measure}:image" in found for found in self.items.values()):
            measure = parent
        for row in self.done:
            found = self.items.get(row["arm"], {}).get(f"{measure}:image")
            if found is not None:
                return np.asarray(found)
        return None

    def interval(
        self, strategy: str, measure: str, fraction: float | None = None, *, minus: str | None = None
    ) -> Interval | None:
        """Mean over seeds with its confidence interval, of a measure or of its paired difference to another.

        Without items of every seed it is an interval over seeds alone (`over_items`). None without a score.
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
            # Mapped to 0 to 1, the range of the statistics, and back below.
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

    def difference(self, strategy: str, first: str, second: str) -> Interval | None:
        """Difference between two measures of a strategy whose items are about different images."""
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
        """Names of all results, primary measures first."""
        found = sorted({name for row in self.done for name in row.get("results", {})})
        return list(dict.fromkeys([*(name for name in self.named_primary() if name in found), *found]))

    def measures(self) -> list[str]:
        """Names of overall results: without ablations, seen and unseen splits, categories and baselines."""
        categories = {name for names in self.categories().values() for name in names}
        return [n for n in self.names() if n not in categories and _is_overall(n) and not is_baseline(n)]

    def named_primary(self) -> list[str]:
        """Measures that the comparison named as primary, measured or not."""
        return list(self.comparison.get("primary") or ())

    def primary(self) -> list[str]:
        """Primary measures that were measured. Others never replace one that was not."""
        return [name for name in self.named_primary() if name in self.names()]

    def leading_measures(self) -> list[str]:
        """Measures that are reported first: primary ones, otherwise those with items, otherwise the first three."""
        measures = self.measures()
        scores = [m for m in measures if is_score(m) and self.clusters(m) is not None]
        return self.primary() or scores or measures[:3]

    def leading_scores(self) -> list[str]:
        """Leading measures, then the other scores that have items."""
        scores = [m for m in self.measures() if is_score(m) and self.clusters(m) is not None]
        return list(dict.fromkeys([*self.leading_measures(), *scores]))

    def data_gain(self, strategy: str, measure: str, more: float, less: float) -> Interval | None:
        """Gain of a larger fraction of the training pairs over a smaller one; None without items of two seeds."""
        runs = {str(fraction): list(self.outcomes(strategy, measure, fraction).values()) for fraction in (more, less)}
        clusters = self.clusters(measure)
        if clusters is None or min(map(len, runs.values())) < 2:
            return None
        (found,) = statistics.compare_pairs(runs, clusters, measure=measure, resamples=0)
        return Interval(found.difference, found.low, found.high, math.nan, min(found.seeds))

    def categories(self) -> dict[str, list[str]]:
        """Measure -> its categories: siblings of an "overall", or names below a measure."""
        names, found = self.names(), {}
        for name in names:
            parent, _, last = name.rpartition("/")
            overall = f"{parent}/overall" if f"{parent}/overall" in names else parent
            if (
                overall in names
                and overall != name
                and last not in ABLATIONS
                and _is_overall(name)
                and not is_baseline(name)
            ):
                found.setdefault(overall, []).append(name)
        return found

    def ablations(self) -> dict[str, list[str]]:
        """Score -> its ablations, without those of its categories."""
        names = set(self.names())
        scores = [measure for measure in self.measures() if is_score(measure)]
        found = {measure: [a for a in ABLATIONS if f"{measure}/{a}" in names] for measure in scores}
        return {measure: ablations for measure, ablations in found.items() if ablations}

    def seen_unseen(self) -> dict[str, dict[str, str]]:
        """Measure -> "seen" or "unseen" -> name of its result on that split."""
        found: dict[str, dict[str, str]] = {}
        for name in self.names():
            words = name.split("/")
            part = next((word for word in words if word in SEEN_SPLITS), None)
            if part and words[-1] not in ABLATIONS and not is_baseline(name):
                found.setdefault("/".join(word for word in words if word != part), {})[part] = name
        return found

    def baseline(self, measure: str) -> float:
        """Score without a model: the mean of its "chance_..." or "prior..." results, otherwise computed.

        NaN if unknown.
        """
        task, last = measure.split("/")[0], measure.rsplit("/", 1)[-1]
        wanted = [f"{task}/chance_{last}", f"{task}/chance"]
        if last == "accuracy":
            wanted += [f"{task}/prior_text", f"{task}/prior"]
        name = next((name for name in wanted if name in self.names()), None)
        if name is None:
            return self._computed_chance(measure)
        return mean_of([number(row.get("results", {}).get(name)) for row in self.done if _fraction(row) == self.full])

    def _computed_chance(self, measure: str) -> float:
        task, *direction, last = measure.split("/")
        if task == "foils" or last in ("itm_accuracy", "itm_auroc"):  # one true and one false caption or pair
            return 0.5
        if last == "rsum":
            return 100 * sum(self.baseline(f"{task}/{w}/R@{k}") for w in DIRECTIONS for k in (1, 5, 10))
        found, first = self.candidates(), re.fullmatch(r"R@(\d+)", last)
        if task != "retrieval" or direction not in ([w] for w in DIRECTIONS) or first is None or found is None:
            return math.nan
        images, captions = found
        if any(_retrieval_options(row).get("equal_texts") for row in self.done) or captions % images:
            return math.nan  # the number of correct captions is not stored
        k, own = int(first[1]), captions // images
        if direction == ["text_to_image"]:
            return min(1.0, k / images)
        k = min(k, captions)
        return 1 - math.comb(captions - own, k) / math.comb(captions, k)

    def candidates(self) -> tuple[int, int] | None:
        """Number of images and captions of the retrieval evaluation, None if not stored."""
        for row in self.done:
            cost, options = row.get("cost") or {}, _retrieval_options(row)
            images = number(cost.get("search_images", options.get("images")))
            captions = number(cost.get("search_texts", images * number(options.get("captions", 1))))
            if images > 0 and captions > 0:
                return int(images), int(captions)
        return None

    def scorers(self, task: str) -> dict[str, list[str]]:
        """Scorer that ranked a task's images and captions -> strategies for which it is stored."""
        found: dict[str, list[str]] = {}
        for row in self.done:
            options = _retrieval_options(row) if task == "retrieval" else {}
            scorer = (row.get("scorers") or {}).get(task, options.get("scorer"))
            name = f"two_stage with k={options['k']}" if scorer == "two_stage" and "k" in options else scorer
            if name and row["strategy"] not in found.setdefault(str(name), []):
                found[str(name)].append(str(row["strategy"]))
        return found


DIRECTIONS = ("image_to_text", "text_to_image")
"""Directions of retrieval."""


def is_ranking(name: str) -> bool:
    """Whether a result is a recall at k."""
    return re.search(r"/R@\d+$", name) is not None


def is_baseline(name: str) -> bool:
    """Whether a result is a baseline without a model."""
    return name.rsplit("/", 1)[-1].startswith(("chance", "prior", "retrieval_chance"))


def is_score(name: str) -> bool:
    """Whether higher is better: not so for losses, ranks, and the share of the text."""
    return not name.endswith(("loss", "rank")) and not name.startswith("shares/")


def comparative(measure: str) -> str:
    """Word for a strategy with the higher value: "better" on scores; "higher" on losses, ranks and shares."""
    return "better" if is_score(measure) else "higher"


def _is_overall(name: str) -> bool:
    words = name.split("/")
    return words[-1] not in ABLATIONS and not any(part in words for part in SEEN_SPLITS)


def _retrieval_options(row: Row) -> Mapping[str, Any]:
    return (row.get("config") or {}).get("retrieval") or {}


def _fraction(row: Row) -> float:
    return float(row.get("fraction", 1.0))
