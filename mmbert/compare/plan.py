"""Plan of a comparison: strategies x seeds x fractions of the data, and the training stages of each arm."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from mmbert.compare.budget import RULES
from mmbert.errors import UsageError, did_you_mean
from mmbert.runtime.import_policy import restrict_imports
from mmbert.training.config_files import flat, with_bases
from mmbert.training.option_checks import explain_parser_error

PRETRAIN = "pretrain"
TOWERS = "towers"
"""Strategy of the arms that train the towers; their stage is `PRETRAIN`."""
RESERVED_OPTIONS = (
    "seed_everything", "data.train_fraction", "data.eval_seed", "trainer.max_steps", "trainer.max_epochs",
    "trainer.default_root_dir", "name", "threads", "resume", "ckpt_path", "config", "base",
)  # fmt: skip
"""Options of `fit` that a comparison sets itself: from its seeds, fractions, steps and threads, and for its folder."""
RETRIEVAL_METRICS = [
    *(f"retrieval/{way}/{of}" for way in ("text_to_image", "image_to_text") for of in ("R@1", "R@5", "R@10")),
    *("retrieval/text_to_image/median_rank", "retrieval/image_to_text/median_rank", "retrieval/rsum"),
]
"""Results of the retrieval evaluation."""
TEXT_SHARE = "shares/text"
"""Result of the evaluation of shares: the mean share of the text."""


@dataclass(kw_only=True)
class Stage:
    """Options of one training run of an arm, or of the towers."""

    run: str = ""
    """Configuration of `fit`: a YAML file, relative to the working directory, or the name of a preset."""
    steps: int = 0
    """Optimizer steps; in an arm those of the reference strategy, as the budget determines those of the others."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of `fit` that override it, {data.batch_size: 64}."""


@dataclass(kw_only=True)
class Retrieval:
    """Options of the retrieval evaluation of the pretrained model."""

    split: str = "test"
    """Split of the pretraining data."""
    images: int = 0
    """Number of images, from the start of the split. 0: no retrieval evaluation."""
    captions: int = 1
    """Largest number of captions per image."""
    scorer: str = "itm"
    """itm fuses every image with every caption and works with every strategy; itc and two_stage require the contrastive
    objective."""
    k: int = 32
    """Shortlist size of two_stage."""
    itc_weight: float = 0.0
    """Factor of the contrastive logit that two_stage adds to the matching score; choose it on validation."""
    equal_texts: bool = False
    """Count a caption as correct for every image that has an equal caption."""


@dataclass(kw_only=True)
class Foils:
    """Options of the foil evaluation: true captions against false ones, in SugarCrepe's format."""

    files: list[str] = field(default_factory=list)
    """Files of foils. Empty: no foil evaluation."""
    images: str = ""
    """Folder of the images."""


@dataclass(kw_only=True)
class Shares:
    """Options of the shares of text and image in the scores (MM-SHAP), see `mmbert evaluate shares`."""

    pairs: int = 0
    """Images of the split, chosen at random, each with one caption. 0: no shares."""
    split: str = "test"
    """Split of the pretraining data."""
    target: str = "itm"
    """Score: itm or itc."""
    samples: int = 16
    """Permutations of tokens and image regions for each pair."""


@dataclass(kw_only=True)
class Comparison:
    """Options of a comparison: strategies, seeds, budget, training stages and evaluations."""

    name: str = "comparison"
    """Name of the report, and of its folder if --out is not given."""
    about: str = ""
    """Description of the data, for the report."""
    strategies: list[str] | dict[str, dict[str, Any]] = field(default_factory=list)
    """Names in `mmbert.model.fusion.FUSIONS`; or name -> options of `fit` of the strategy, {gated: {model.fusion:
    my_fusion.GatedFusion}}, where `seeds: [0, 1]` gives it other seeds than the rest."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds; each strategy is trained once per seed."""
    fractions: list[float] = field(default_factory=lambda: [1.0])
    """Fractions of the training pairs, [0.1, 0.3, 1] for a low-data curve; each arm is trained with each."""
    match: str = "flops"
    """Budget that is equal for all strategies: flops or time (matched by the number of steps), parameters (matched by
    depth and width of the fusion module), or steps."""
    cached_encoder: bool = False
    """Charge a frozen image encoder as its cache (`data.cache`) computes it: once for each training image. False: in
    every step, as without a cache."""
    reference: str | None = None
    """Strategy whose budget the others are matched to. None: the first."""
    towers: Stage = field(default_factory=Stage)
    """Training of the encoders that all strategies of a seed start from, before the arms and once per seed, with the
    keys of `pretrain`: any objectives and any fusion. No budget contains it. Without it every arm trains its own."""
    pretrain: Stage = field(default_factory=Stage)
    """Pretraining of every arm."""
    finetune: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> fine-tuning of the pretrained model for a task, with the keys of `pretrain`: {vqa: {run: ..., steps:
    500}}."""
    retrieval: Retrieval = field(default_factory=Retrieval)
    """Retrieval evaluation of the pretrained model."""
    foils: Foils = field(default_factory=Foils)
    """Foil evaluation of the pretrained model."""
    shares: Shares = field(default_factory=Shares)
    """Shares of text and image in the scores of the pretrained model."""
    primary: list[str] = field(default_factory=list)
    """Primary measures, named before the results are known: [foils/overall, retrieval/text_to_image/R@1]. Their tests
    are corrected together, so each further measure lowers the power of all."""
    threads: int = 1
    """CPU threads per arm."""

    def check(self) -> None:
        """Validate all options.

        Raises:
            UsageError: A value out of range, or a missing option.
        """
        if len(self.names) < 2:
            raise UsageError(f"strategies={self.strategies}: expected two or more strategies.")
        if len(set(self.names)) < len(self.names):
            raise UsageError(f"strategies={self.strategies}: expected each strategy once.")
        if TOWERS in self.names:
            raise UsageError(f"strategies: the name '{TOWERS}' is reserved for `{TOWERS}:`; give it another one.")
        seed_lists = {"seeds": self.seeds, **{f"strategies.{name}.seeds": self._seeds(name) for name in self.names}}
        for where, seeds in seed_lists.items():
            integers = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
            if not integers or not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
                raise UsageError(f"{where}={seeds}: expected a list of one or more different integers from 0.")
        if self.threads < 1:
            raise UsageError(f"threads={self.threads}: expected CPU threads per arm, 1 or more.")
        if not self.name.strip():
            raise UsageError(f"name={self.name!r}: expected a name for the report and its folder.")
        fractions = self.fractions
        if not fractions or any(not 0 < x <= 1 for x in fractions) or len(set(fractions)) < len(fractions):
            raise UsageError(
                f"fractions={fractions}: expected different fractions of the training pairs, above 0, up to 1."
            )
        if self.match not in RULES:
            raise UsageError(f"match='{self.match}'; allowed are {', '.join(RULES)}.{did_you_mean(self.match, RULES)}")
        if self.reference is not None and self.reference not in self.names:
            raise UsageError(f"reference='{self.reference}' is not one of the strategies {', '.join(self.names)}.")
        for name, values in self.finetune.items():  # jsonargparse would import a class that a mapping holds by its name
            known = [f.name for f in fields(Stage)]
            for key in values:
                if key not in known:
                    raise UsageError(f"finetune.{name}.{key}: unknown option.{did_you_mean(key, known)}")
        for name in (PRETRAIN, TOWERS):
            if name in self.finetune:
                raise UsageError(f"finetune.{name}: this name is reserved for `{name}:`.")
        for name, stage in self.runs.items():
            where = name if name in (PRETRAIN, TOWERS) else f"finetune.{name}"
            if not stage.run:
                raise UsageError(
                    f"{where}.run is missing: expected a configuration of fit, such as quickstart or my_run.yaml."
                )
            if type(stage.steps) is not int or stage.steps < 1:
                expected = f"the optimizer steps of the {TOWERS if name == TOWERS else 'reference'}, 1 or more"
                raise UsageError(f"{where}.steps={stage.steps}: expected {expected}.")
            _check_reserved(f"{where}.options", stage.options, *self.reserved_of(name))
        for name in self.names:
            reserved = [key for key in self.reserved_of(PRETRAIN) if key != "model.fusion"]
            _check_reserved(f"strategies.{name}", self.strategy_options(name), *reserved)
        retrieval = self.retrieval
        if retrieval.images < 0 or retrieval.captions < 1 or retrieval.k < 1:
            raise UsageError(f"{retrieval}: expected images from 0 (no retrieval), captions and k from 1.")
        if not 0 <= retrieval.itc_weight < math.inf:
            raise UsageError(f"retrieval.itc_weight={retrieval.itc_weight}: expected a number of 0 or more.")
        if self.foils.files and not self.foils.images:
            raise UsageError("foils.images is missing: expected the folder of the foils' images.")
        if self.foils.images and not self.foils.files:
            raise UsageError("foils.files is missing: expected the files of the foils.")
        shares = self.shares
        if shares.pairs < 0 or shares.samples < 4 or shares.target not in ("itm", "itc"):
            raise UsageError(f"{shares}: expected pairs from 0 (no shares), samples from 4, and the target itm or itc.")
        self._check_primary()

    def _check_primary(self) -> None:
        """Raise on measures that no stage or evaluation produces; those of a stage's test are only known after it."""
        evaluations = {
            "retrieval": self.retrieval.images > 0,
            "foils": bool(self.foils.files),
            "shares": self.shares.pairs > 0,
        }
        sources = [*self.stages, *(name for name, requested in evaluations.items() if requested)]
        for measure in self.primary:
            source = measure.partition("/")[0]
            if source in evaluations and source not in sources:
                raise UsageError(
                    f"primary: '{measure}', but there is no {source} evaluation: add the section {source}."
                )
            if source not in sources or source == measure:
                raise UsageError(
                    f"primary: '{measure}' is not a result; those of this comparison begin with "
                    f"{', '.join(f'{name}/' for name in sources)}.{did_you_mean(source, sources)}"
                )
            known = {"retrieval": RETRIEVAL_METRICS, "shares": [TEXT_SHARE]}.get(source, [measure])
            if measure not in known:
                raise UsageError(f"primary: '{measure}'; allowed are {', '.join(known)}.{did_you_mean(measure, known)}")

    @property
    def names(self) -> list[str]:
        """Names of the strategies, in order."""
        return [*self.strategies]

    @property
    def stages(self) -> dict[str, Stage]:
        """Name -> training stage of an arm, in order."""
        return {PRETRAIN: self.pretrain, **{name: Stage(**values) for name, values in self.finetune.items()}}

    @property
    def has_towers(self) -> bool:
        """Whether the strategies of a seed start from common towers."""
        return self.towers != Stage()

    @property
    def runs(self) -> dict[str, Stage]:
        """Name -> training run: that of the towers, if there are any, then the stages of an arm."""
        return {**({TOWERS: self.towers} if self.has_towers else {}), **self.stages}

    def reserved_of(self, run: str) -> list[str]:
        """Options of `fit` that the comparison sets in one of its `runs`, besides `RESERVED_OPTIONS`."""
        if run == TOWERS:
            return []
        if run == PRETRAIN:
            return ["model.fusion", *(["model.pretrained", "model.pretrained_parts"] if self.has_towers else [])]
        return ["model.pretrained"]

    def strategy_options(self, strategy: str) -> dict[str, Any]:
        """Options of `fit` that define the strategy."""
        given = self.strategies.get(strategy, {}) if isinstance(self.strategies, dict) else {}
        return {"model.fusion": strategy, **{k: v for k, v in (given or {}).items() if k != "seeds"}}

    def seeds_of(self, strategy: str) -> list[int]:
        """Seeds of a strategy."""
        return list(self._seeds(strategy))

    @property
    def min_seeds(self) -> int:
        """Smallest number of seeds of any strategy."""
        return min(len(self.seeds_of(name)) for name in self.names)

    def _seeds(self, strategy: str) -> Any:
        given = self.strategies.get(strategy, {}) if isinstance(self.strategies, dict) else {}
        return (given or {}).get("seeds", self.seeds)


def _check_reserved(where: str, options: Mapping[str, Any], *more: str) -> None:
    """Raise on options of `fit` that the comparison sets itself, and name the option to use instead."""
    instead = {"seed_everything": "seeds", "data.train_fraction": "fractions", "trainer.max_steps": "steps",
               "trainer.max_epochs": "steps", "threads": "threads", "model.fusion": "strategies"}  # fmt: skip
    for key in flat(options):
        if key in (*RESERVED_OPTIONS, *more):
            fix = f"use {instead[key]}" if key in instead else "remove it"
            raise UsageError(f"{where}.{key}: set by the comparison: {fix}.")


class Arm(NamedTuple):
    """One strategy, or the towers, trained once: strategy x seed x fraction of the training pairs."""

    strategy: str
    seed: int
    fraction: float

    @property
    def name(self) -> str:
        """Name of its folder and row."""
        fraction = "" if self.fraction == 1 else f"-{100 * self.fraction:g}pct"
        return f"{self.strategy}-seed{self.seed}{fraction}".replace("/", "_")

    @property
    def towers(self) -> "Arm":
        """The arm that trains the towers of its seed and fraction."""
        return self._replace(strategy=TOWERS)


def list_arms(comparison: Comparison) -> list[Arm]:
    """List all arms, seed by seed, so that all strategies can be compared after the first seed.

    The towers of a seed, if the comparison has towers, come before its strategies.
    """
    rounds = max(len(comparison.seeds_of(name)) for name in comparison.names)
    arms = [
        Arm(strategy, comparison.seeds_of(strategy)[number], fraction)
        for number in range(rounds)
        for fraction in sorted(comparison.fractions, reverse=True)
        for strategy in comparison.names
        if number < len(comparison.seeds_of(strategy))
    ]
    return [*dict.fromkeys(x for arm in arms for x in (arm.towers, arm))] if comparison.has_towers else arms


def load_comparison(config: str | os.PathLike[str] | Mapping[str, Any], changes: Sequence[str] = ()) -> Comparison:
    """Read a comparison from a YAML file or a mapping.

    Args:
        config: YAML file, which may build on other files with `base:`, name of a preset, or the content of such a file.
        changes: Options that override it, KEY=VALUE with dots in the key and YAML as value.

    Raises:
        UsageError: An unknown option, or a value of the wrong type.
        DataError: A file that is not a YAML mapping.
    """
    restrict_imports([], lightning=False)  # no value may name a class
    content: dict[str, Any] = {}
    if isinstance(config, Mapping):
        content, place = copy.deepcopy(dict(config)), "comparison"
    else:
        place = os.fspath(config)
        for path in with_bases(place):
            # A file lists all strategies, so its list replaces that of its base, in either form.
            _update(content, yaml.safe_load(path.read_text(encoding="utf-8")) or {}, replaced=["strategies"])
        content.pop("base", None)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise UsageError(f"--set {change}: expected KEY=VALUE, such as seeds=[0,1].")
        parts = key.split(".")
        if "options" in parts:  # the rest is one option of fit, such as optim.lr
            at = parts.index("options") + 1
            parts = [*parts[:at], *filter(None, [".".join(parts[at:])])]
        nested: Any = yaml.safe_load(value)
        for part in reversed(parts):
            nested = {part: nested}
        known = content.get("strategies")
        if key.startswith("strategies.") and isinstance(known, list):
            content["strategies"] = {name: {} for name in known}
        _update(content, nested, replaced=["strategies"] if key == "strategies" else [])
    content = _without_empty(content)
    for key in (TOWERS, PRETRAIN):
        if not isinstance(content.get(key, {}), Mapping):
            raise UsageError(f"{place}: {key}: expected a mapping with run, steps and options. Got: {content[key]!r}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Comparison)
    try:
        found = parser.instantiate_classes(parser.parse_object(content))
    except (ArgumentError, TypeError, ValueError) as error:
        raise UsageError(f"{place}: {explain_parser_error(str(error), [a.dest for a in parser._actions])}") from error
    for section, size in (("retrieval", "images"), ("shares", "pairs")):
        if content.get(section) and size not in content[section]:
            raise UsageError(f"{section}.{size} is missing: expected the number of {size}.")
    comparison = Comparison(**{key: getattr(found, key) for key in content})
    comparison.check()
    return comparison


def _update(content: dict[str, Any], more: Mapping[str, Any], *, replaced: Sequence[str] = ()) -> None:
    """Merge `more` into nested mappings; keys in `replaced` are not merged but replaced."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict) and key not in replaced:
            _update(content[key], value)
        else:
            content[key] = value


def _without_empty(content: Mapping[str, Any]) -> dict[str, Any]:
    """Drop keys without a value, which mean the default; strategies and tasks without options are kept."""
    given = {key: value for key, value in content.items() if value is not None}
    for key in (TOWERS, PRETRAIN):
        if isinstance(given.get(key), dict):
            given[key] = {name: value for name, value in given[key].items() if value is not None}
    for key in ("strategies", "finetune"):
        if isinstance(given.get(key), dict):
            given[key] = {name: {} if options is None else options for name, options in given[key].items()}
    return given


def comparison_from(content: Mapping[str, Any]) -> Comparison:
    """Inverse of `dataclasses.asdict` for a comparison."""
    parts: dict[str, Any] = dict(content)
    parts |= {name: Stage(**parts.get(name, {})) for name in (TOWERS, PRETRAIN)}
    for name, kind in (("retrieval", Retrieval), ("foils", Foils), ("shares", Shares)):
        parts[name] = kind(**parts.get(name, {}))
    return Comparison(**parts)
