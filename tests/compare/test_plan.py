"""Files of comparisons, their arms, and the options of the arms."""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from tiny import tiny_config

from mmbert.compare.calibration import check_evaluations
from mmbert.compare.folder import check_arm_folder
from mmbert.compare.plan import Arm, comparison_from, list_arms, load_comparison
from mmbert.errors import DataError, UsageError
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.training.config_files import explicit_options
from mmbert.training.run_options import to_arguments

ROOT = Path(__file__).parents[2]
GOOD = {
    "strategies": ["early", "late"],
    "seeds": [0, 1],
    "pretrain": {"run": "configs/pretrain/shapes_plain.yaml", "steps": 10},
}


def written(folder: Path, content: dict) -> str:
    file = folder / "comparison.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def test_every_preset_loads() -> None:
    presets = sorted((ROOT / "configs/compare").glob("*.yaml"))
    assert presets
    for preset in presets:
        comparison = load_comparison(str(preset))
        assert len(comparison.names) >= 3 and comparison.primary
        for name in comparison.names:
            assert len(comparison.seeds_of(name)) >= 3 or "exploratory" in preset.read_text()


def test_file_builds_on_a_base_and_changes_override_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**GOOD, "retrieval": {"images": 7, "k": 3}}))
    file = written(tmp_path, {"base": "base.yaml", "seeds": [5, 6], "retrieval": {"images": 9}})
    found = load_comparison(file, ["pretrain.steps=20", "pretrain.options={data.batch_size: 8}", "match=steps"])
    assert (found.seeds, found.match, found.pretrain.steps, found.pretrain.run) == (
        [5, 6],
        "steps",
        20,
        "configs/pretrain/shapes_plain.yaml",
    )
    assert found.pretrain.options == {"data.batch_size": 8}
    found = load_comparison(file, ["pretrain.options.optim.lr=0.5"])
    assert found.pretrain.options == {"optim.lr": 0.5}, "one option of fit"
    assert (found.retrieval.images, found.retrieval.k, found.retrieval.scorer) == (9, 3, "itm")
    own = {"late": {}, "hybrid": {"optim.lr": 0.5}}
    for strategies in (own, ["late", "hybrid"]):  # whichever form: no strategy of the base is compared
        found = load_comparison(written(tmp_path, {"base": "base.yaml", "strategies": strategies}))
        assert sorted(found.names) == ["hybrid", "late"]
        found = load_comparison(file, [f"strategies={json.dumps(strategies)}"])
        assert sorted(found.names) == ["hybrid", "late"]
    found = load_comparison(written(tmp_path, GOOD), ["strategies.late.seeds=[5]"])
    assert {name: found.seeds_of(name) for name in found.names} == {"early": [0, 1], "late": [5]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": []}, "expected two or more"),
        ({"strategies": ["early"]}, "expected two or more"),
        ({"seeds": [1, 1]}, "one or more different integers"),
        ({"seeds": []}, "one or more different integers"),
        (
            {"strategies": {"early": {}, "late": {"seeds": [0, 0]}}},
            r"strategies.late.seeds=\[0, 0\]: expected a list of one",
        ),
        (
            {"strategies": {"early": {}, "late": {"seeds": 3}}},
            "strategies.late.seeds=3: expected a list of one or more",
        ),
        ({"fractions": [0.1, 1.5]}, "above 0, up to 1"),
        ({"fractions": [0.1, 0.1, 1]}, "different fractions"),
        ({"match": "flop"}, "Did you mean 'flops'"),
        ({"reference": "hybrid"}, "not one of the strategies early, late"),
        ({"pretrain": {"run": "configs/pretrain/shapes_plain.yaml"}}, "pretrain.steps=0"),
        ({"pretrain": {"steps": 3}}, "pretrain.run is missing"),
        ({"finetune": {"vqa": {"run": "x.yaml"}}}, "finetune.vqa.steps=0"),
        ({"finetune": {"vqa": {"run": "x.yaml", "step": 1}}}, "Did you mean 'steps'"),
        ({"finetune": {"pretrain": {"run": "x.yaml", "steps": 1}}}, "this name is reserved"),
        ({"foils": {"files": ["a.json"]}}, "foils.images is missing"),
        ({"foils": {"images": "a"}}, "foils.files is missing"),
        ({"seeds": [-1, 0]}, "different integers from 0"),
        ({"threads": 0}, "threads=0"),
        ({"name": " "}, "name=' '"),
        ({"pretrain": None}, "pretrain.run is missing"),
        ({"finetune": {"vqa": None}}, "finetune.vqa.run is missing"),
        ({"primary": ["foils/overall"]}, "but there is no foils evaluation"),
        ({"primary": ["pretrian/itm_accuracy"]}, "begin with pretrain/. Did you mean 'pretrain'"),
        ({"primary": ["pretrain"]}, "'pretrain' is not a result"),
        (
            {"retrieval": {"images": 5}, "primary": ["retrieval/text_to_imgae/R@1"]},
            "Did you mean 'retrieval/text_to_image/R@1'",
        ),
        ({"shares": {"samples": 8}}, "shares.pairs is missing"),
        ({"shares": {"pairs": 5}, "primary": ["shares/txt"]}, "Did you mean 'shares/text'"),
        ({"seed": [0]}, "there is no option seed. Did you mean 'seeds'"),
        ({"seeds": ["zero"]}, "seeds"),
        ({"retrieval": {"imagse": 3}}, "imagse"),
        ({"retrieval": {"split": "test"}}, "retrieval.images is missing"),
        ({"retrieval": {"images": -5}}, "images from 0"),
        ({"retrieval": {"images": 5, "captions": 0}}, "captions and k from 1"),
        ({"strategies": ["early", "late", "early"]}, "each strategy once"),
        (
            {"pretrain": {**GOOD["pretrain"], "options": {"trainer.max_steps": 9}}},
            "pretrain.options.trainer.max_steps: set by the comparison: use steps",
        ),
        ({"strategies": {"early": {}, "late": {"seed_everything": 3}}}, "strategies.late.seed_everything.*use seeds"),
        ({"strategies": {"early": {}, "late": {"trainer": {"max_steps": 3}}}}, "late.trainer.max_steps.*use steps"),
        (
            {"pretrain": {**GOOD["pretrain"], "options": {"model.fusion": "late"}}},
            "pretrain.options.model.fusion: set by the comparison: use strategies",
        ),
        (
            {"finetune": {"vqa": {"run": "x.yaml", "steps": 1, "options": {"model.pretrained": "y"}}}},
            "finetune.vqa.options.model.pretrained: set by the comparison: remove it",
        ),
    ],
)
def test_error_names_the_option(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_comparison(written(tmp_path, {**GOOD, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrieval": {"images": 5, "split": "tset"}}, "retrieval.split='tset'; the data has train, test"),
        ({"shares": {"pairs": 5, "split": "tset"}}, "shares.split='tset'; the data has train, test"),
        ({"shares": {"pairs": 5, "target": "itc"}}, "shares.target=itc needs a model .* objective itc"),
        ({"shares": {"pairs": 0, "split": "tset", "target": "itc"}}, ""),
    ],
)
def test_evaluation_that_is_impossible_after_the_training_is_an_error_before_it(changes: dict, message: str) -> None:
    model = MMBertForPreTraining(tiny_config(objectives={"itm": 1.0}))
    comparison = load_comparison({**GOOD, **changes})
    with pytest.raises(UsageError, match=message) if message else contextlib.nullcontext():
        check_evaluations(comparison, model, {"train": [0], "test": [0]})


def test_option_without_value_has_its_default(tmp_path: Path) -> None:
    empty = dict.fromkeys(("name", "about", "seeds", "primary", "finetune", "retrieval", "foils", "reference"))
    found = load_comparison(written(tmp_path, {**GOOD, **empty, "strategies": {"early": None, "late": None}}))
    assert found.names == ["early", "late"] and found.name == "comparison" and found.seeds == [0, 1, 2]
    assert found.primary == [] and found.stages.keys() == {"pretrain"} and not found.foils.files


def test_arms_are_listed_seed_by_seed_and_strategies_may_have_fewer_seeds(tmp_path: Path) -> None:
    content = {**GOOD, "strategies": {"early": {}, "late": {"seeds": [0]}}, "fractions": [0.1, 1.0]}
    arms = list_arms(load_comparison(written(tmp_path, content)))
    assert [arm.name for arm in arms] == [
        *("early-seed0", "late-seed0", "early-seed0-10pct", "late-seed0-10pct", "early-seed1", "early-seed1-10pct"),
    ]
    assert Arm("my_fusion.Gated", 3, 0.3).name == "my_fusion.Gated-seed3-30pct"


def test_comparison_round_trips_through_json(tmp_path: Path) -> None:
    found = load_comparison(written(tmp_path, {**GOOD, "finetune": {"vqa": {"run": "x.yaml", "steps": 3}}}))
    assert comparison_from(asdict(found)) == found


def test_explicit_options_merge_bases_and_later_ones_win(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"model": {"fusion": "early", "objectives": {"mlm": 1.0}}}))
    run = written(tmp_path, {"base": "base.yaml", "optim": {"lr": 0.1}})
    options = {"optim.lr": 0.2, "model.objectives": {"itm": 1.0}, "model.fusion": "late", "data.flip": True}
    arguments = to_arguments(run, options)
    assert explicit_options(arguments) == {
        "data.flip": True,
        "model.fusion": "late",
        "model.objectives.itm": 1.0,
        "optim.lr": 0.2,
    }


def test_section_given_as_a_mapping_keeps_its_other_options(tmp_path: Path) -> None:
    run = written(tmp_path, {"optim": {"lr": 0.1, "weight_decay": 0.5}})
    arguments = to_arguments(run, {"optim": {"lr": 0.2}})
    assert explicit_options(arguments) == {"optim.lr": 0.2, "optim.weight_decay": 0.5}


def test_folder_of_an_arm_with_other_training_options_raises(tmp_path: Path) -> None:
    """With another evaluation it is evaluated again."""
    folder = tmp_path / "late-seed0"
    folder.mkdir()
    config = {"pretrain.optim.lr": 0.1, "retrieval": {"images": 5}, "foils": {}}
    spec = {"folder": str(folder), "config": config}
    check_arm_folder(spec)
    (folder / "arm.json").write_text(json.dumps(spec))
    (folder / "row.json").write_text("{}")
    check_arm_folder(spec)
    assert (folder / "row.json").is_file()
    with pytest.raises(
        DataError, match=r"late-seed0: an arm of another comparison \(pretrain.optim.lr was 0.1 and is 1"
    ):
        check_arm_folder({**spec, "config": {**config, "pretrain.optim.lr": 1}})
    check_arm_folder({**spec, "config": {**config, "retrieval": {"images": 6}}})
    assert not (folder / "row.json").exists()


def test_value_that_names_a_class_is_never_called(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(mark)]}}
    for changes in (
        {"pretrain": {**GOOD["pretrain"], "options": {"x": popen}}},
        {"finetune": {"vqa": popen}},
        {"retrieval": popen},
    ):
        with contextlib.suppress(UsageError):
            load_comparison(written(tmp_path, {**GOOD, **changes}))
    assert not mark.exists()
