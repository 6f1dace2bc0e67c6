"""What is compared: strategies x seeds x fractions of the data, and the stages that each arm goes through."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from mmbert.compare.budget import RULES
from mmbert.errors import UsageError, did_you_mean
from mmbert.runtime.import_policy import restrict_imports
from mmbert.training.config_files import expand_bases, flat
from mmbert.training.option_checks import explain_parser_error

PRETRAIN = "pretrain"
OURS = (
    "seed_everything", "data.train_fraction", "data.eval_seed", "trainer.max_steps", "trainer.max_epochs",
    "trainer.default_root_dir", "name", "threads", "resume", "ckpt_path", "config", "base",
)  # fmt: skip
"""Options of `fit` that a comparison sets by itself."""
RANKED = [
    *(f"retrieval/{way}/{of}" for way in ("text_to_image", "image_to_text") for of in ("R@1", "R@5", "R@10")),
    *("retrieval/text_to_image/median_rank", "retrieval/image_to_text/median_rank", "retrieval/rsum"),
]
"""Results of ranking a split."""


@dataclass(kw_only=True)
class Stage:
    """One training of an arm."""

    run: str = ""
    """Configuration of `fit`, as a path from where the command runs."""
    steps: int = 0
    """Optimizer steps of the reference strategy; those of the others follow from the budget."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of `fit` on top of it, {data.batch_size: 64}."""


@dataclass(kw_only=True)
class Retrieval:
    """How images and captions of a split of the pretraining data are ranked."""

    split: str = "test"
    """Split that is ranked, all captions of its images."""
    images: int = 0
    """Images of the split, from its start, that are ranked. 0: nothing is ranked."""
    captions: int = 1
    """Captions of each image, at most."""
    scorer: str = "itm"
    """itm fuses every image with every caption, which every strategy can; itc and two_stage need the contrastive
    objective."""
    k: int = 32
    """Shortlist of two_stage."""
    equal_texts: bool = False
    """Count a caption as right for every image that carries an equal one."""


@dataclass(kw_only=True)
class Foils:
    """True captions against false ones, in SugarCrepe's format."""

    files: list[str] = field(default_factory=list)
    """The files. None: no foils."""
    images: str = ""
    """Folder of their images."""


@dataclass(kw_only=True)
class Comparison:
    """What is compared, under which budget, and how it is judged."""

    name: str = "comparison"
    """Names the report, and its folder where --out is not given."""
    about: str = ""
    """A sentence about the data, for the report."""
    strategies: list[str] | dict[str, dict[str, Any]] = field(default_factory=list)
    """Names in `mmbert.model.fusion.FUSIONS`; or name -> options of `fit` in which it differs, {gated: {model.fusion:
    my_fusion.GatedFusion}}, where `seeds: [0, 1]` stands for fewer seeds than the others have."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each strategy is trained once with each."""
    fractions: list[float] = field(default_factory=lambda: [1.0])
    """Shares of the training pairs that arms are trained with, [0.1, 0.3, 1]: the low-data curve."""
    match: str = "flops"
    """What strategies have in common: flops or time (solved by the number of steps), parameters (solved by the fusion
    part's depth and width), or steps."""
    reference: str | None = None
    """Strategy whose budget the others get. None: the first."""
    pretrain: Stage = field(default_factory=Stage)
    """How every arm is pretrained."""
    finetune: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> how the pretrained model is then fine-tuned for a task, with the keys of `pretrain`: {vqa: {run: ...,
    steps: 500}}."""
    retrieval: Retrieval = field(default_factory=Retrieval)
    foils: Foils = field(default_factory=Foils)
    primary: list[str] = field(default_factory=list)
    """Results that the verdicts are about, [foils/overall, retrieval/text_to_image/R@1]; the more, the stricter each
    test."""
    threads: int = 1
    """CPU threads of an arm."""

    def check(self) -> None:
        """Refuses what can't be meant.

        Raises:
            UsageError: A value out of range, or something missing.
        """
        if len(self.names) < 2:
            raise UsageError(f"strategies={self.strategies}: name two or more to compare.")
        if len(set(self.names)) < len(self.names):
            raise UsageError(f"strategies={self.strategies}: each once.")
        own = {"seeds": self.seeds, **{f"strategies.{name}.seeds": self._seeds(name) for name in self.names}}
        for where, seeds in own.items():
            whole = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
            if not whole or not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
                raise UsageError(f"{where}={seeds}: a list of one or more different whole numbers from 0.")
        if self.threads < 1:
            raise UsageError(f"threads={self.threads}: CPU threads of an arm, 1 or more.")
        if not self.name.strip():
            raise UsageError(f"name={self.name!r}: names the report and its folder.")
        fractions = self.fractions
        if not fractions or any(not 0 < x <= 1 for x in fractions) or len(set(fractions)) < len(fractions):
            raise UsageError(f"fractions={fractions}: different shares of the training pairs, above 0, up to 1.")
        if self.match not in RULES:
            raise UsageError(f"match='{self.match}'; allowed are {', '.join(RULES)}.{did_you_mean(self.match, RULES)}")
        if self.reference is not None and self.reference not in self.names:
            raise UsageError(f"reference='{self.reference}' is none of the strategies {', '.join(self.names)}.")
        for name, values in self.finetune.items():  # jsonargparse would import a class that a mapping holds by its name
            known = [f.name for f in fields(Stage)]
            for key in values:
                if key not in known:
                    raise UsageError(f"finetune.{name}.{key}: there is no such key.{did_you_mean(key, known)}")
        for name, stage in self.stages.items():
            where = name if name == PRETRAIN else f"finetune.{name}"
            if not stage.run:
                raise UsageError(
                    f"{where}.run is missing: name a configuration of fit, such as configs/quickstart.yaml."
                )
            if stage.steps < 1:
                raise UsageError(
                    f"{where}.steps={stage.steps}: how many optimizer steps the reference takes, 1 or more."
                )
            _check_reserved(
                f"{where}.options", stage.options, "model.fusion" if name == PRETRAIN else "model.pretrained"
            )
        for name in self.names:
            _check_reserved(f"strategies.{name}", self.differences(name))
        ranked = self.retrieval
        if ranked.images < 0 or ranked.captions < 1 or ranked.k < 1:
            raise UsageError(f"{ranked}: images from 0 (nothing is ranked), captions and k from 1.")
        if PRETRAIN in self.finetune:
            raise UsageError(f"finetune.{PRETRAIN}: this name is taken by the pretraining.")
        if self.foils.files and not self.foils.images:
            raise UsageError("foils.images is missing: the folder of the foils' images.")
        if self.foils.images and not self.foils.files:
            raise UsageError("foils.files is missing: the files of the foils.")
        self._check_primary()

    def _check_primary(self) -> None:
        """Refuses measures that nothing asked for gives; what a stage's own test gives is known when it has run."""
        judged = {"retrieval": self.retrieval.images > 0, "foils": bool(self.foils.files)}
        sources = [*self.stages, *(name for name, asked in judged.items() if asked)]
        for measure in self.primary:
            source = measure.partition("/")[0]
            if source in judged and source not in sources:
                raise UsageError(f"primary: '{measure}', but {source} is not asked for: give the key {source}.")
            if source not in sources or source == measure:
                raise UsageError(
                    f"primary: '{measure}' is no result; those of this comparison begin with "
                    f"{', '.join(f'{name}/' for name in sources)}.{did_you_mean(source, sources)}"
                )
            if source == "retrieval" and measure not in RANKED:
                raise UsageError(
                    f"primary: '{measure}'; allowed are {', '.join(RANKED)}.{did_you_mean(measure, RANKED)}"
                )

    @property
    def names(self) -> list[str]:
        """The strategies, in order."""
        return [*self.strategies]

    @property
    def stages(self) -> dict[str, Stage]:
        """Every training of an arm, in order."""
        return {PRETRAIN: self.pretrain, **{name: Stage(**values) for name, values in self.finetune.items()}}

    def differences(self, strategy: str) -> dict[str, Any]:
        """Options of `fit` that make the strategy."""
        given = self.strategies.get(strategy, {}) if isinstance(self.strategies, dict) else {}
        return {"model.fusion": strategy, **{k: v for k, v in (given or {}).items() if k != "seeds"}}

    def seeds_of(self, strategy: str) -> list[int]:
        """The seeds that the strategy is trained with."""
        return list(self._seeds(strategy))

    @property
    def fewest_seeds(self) -> int:
        """Of the strategy that has the fewest."""
        return min(len(self.seeds_of(name)) for name in self.names)

    def _seeds(self, strategy: str) -> Any:
        given = self.strategies.get(strategy, {}) if isinstance(self.strategies, dict) else {}
        return (given or {}).get("seeds", self.seeds)


def _check_reserved(where: str, options: Mapping[str, Any], *more: str) -> None:
    """Refuses options of `fit` that the comparison sets by itself, with the key that stands for them."""
    own = {"seed_everything": "seeds", "data.train_fraction": "fractions", "trainer.max_steps": "steps",
           "model.fusion": "strategies"}  # fmt: skip
    for key in flat(options):
        if key in (*OURS, *more):
            instead = f"use {own[key]}" if key in own else "leave it out"
            raise UsageError(f"{where}.{key}: set by the comparison: {instead}.")


class Arm(NamedTuple):
    """One strategy, trained once."""

    strategy: str
    seed: int
    fraction: float

    @property
    def name(self) -> str:
        """Names its folder and its row."""
        share = "" if self.fraction == 1 else f"-{100 * self.fraction:g}pct"
        return f"{self.strategy}-seed{self.seed}{share}".replace("/", "_")


def arms_of(comparison: Comparison) -> list[Arm]:
    """All arms: seed by seed, so that after the first round there is something to look at."""
    rounds = max(len(comparison.seeds_of(name)) for name in comparison.names)
    return [
        Arm(strategy, comparison.seeds_of(strategy)[number], fraction)
        for number in range(rounds)
        for fraction in sorted(comparison.fractions, reverse=True)
        for strategy in comparison.names
        if number < len(comparison.seeds_of(strategy))
    ]


def load_comparison(file: str, changes: Sequence[str] = ()) -> Comparison:
    """Reads a comparison from YAML, which may build on other files by `base:`.

    Args:
        file: The file.
        changes: KEY=VALUE each, with dots in the key and YAML as value.

    Raises:
        UsageError: A key that is unknown, or a value of the wrong type.
        DataError: The file is no YAML mapping.
    """
    restrict_imports([])  # a value may name no class
    content: dict[str, Any] = {}
    for path in expand_bases(["--config", file])[1::2]:
        # Strategies are a list of what is compared: a file names all, in either form.
        _update(content, yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}, whole=["strategies"])
    content.pop("base", None)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise UsageError(f"--set {change}: expected KEY=VALUE, such as seeds=[0,1].")
        parts = key.split(".")
        if "options" in parts:  # what follows is one key of fit, such as optim.lr
            at = parts.index("options") + 1
            parts = [*parts[:at], *filter(None, [".".join(parts[at:])])]
        nested: Any = yaml.safe_load(value)
        for part in reversed(parts):
            nested = {part: nested}
        known = content.get("strategies")
        if key.startswith("strategies.") and isinstance(known, list):
            content["strategies"] = {name: {} for name in known}
        _update(content, nested, whole=["strategies"] if key == "strategies" else [])
    content = _without_empty(content)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Comparison)
    try:
        found = parser.instantiate_classes(parser.parse_object(content))
    except (ArgumentError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: {explain_parser_error(str(error), [a.dest for a in parser._actions])}") from error
    if content.get("retrieval") and "images" not in content["retrieval"]:
        raise UsageError("retrieval.images is missing: how many images of the split are ranked.")
    comparison = Comparison(**{key: getattr(found, key) for key in content})
    comparison.check()
    return comparison


def _update(content: dict[str, Any], more: Mapping[str, Any], *, whole: Sequence[str] = ()) -> None:
    """Later values win; mappings are joined, but for the keys in `whole`."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict) and key not in whole:
            _update(content[key], value)
        else:
            content[key] = value


def _without_empty(content: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out keys without a value, which mean the default; a strategy or a task without options stays."""
    given = {key: value for key, value in content.items() if value is not None}
    for key in ("strategies", "finetune"):
        if isinstance(given.get(key), dict):
            given[key] = {name: {} if options is None else options for name, options in given[key].items()}
    return given


def comparison_from(content: Mapping[str, Any]) -> Comparison:
    """A comparison from plain values, as `dataclasses.asdict` gives them."""
    parts: dict[str, Any] = dict(content)
    parts["pretrain"] = Stage(**parts["pretrain"])
    for name, kind in (("retrieval", Retrieval), ("foils", Foils)):
        parts[name] = kind(**parts[name])
    return Comparison(**parts)
