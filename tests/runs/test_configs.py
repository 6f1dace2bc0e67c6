"""Configurations of runs: suggestions for typos, exit codes for invalid files, round trip of --print_config."""

import random
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interrupted import ROOT, fit, trace
from tiers import tier

from mmbert.cli.main import main
from mmbert.training.config_files import explicit_options, merge_files, with_bases
from mmbert.training.presets import list_presets

PRESETS = [name for name in list_presets() if not name.startswith("compare/")]


def rejected(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and error stream of a command line that is not accepted."""
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *arguments])
    errors = capsys.readouterr().err
    assert isinstance(stopped.value.code, int), stopped.value.code
    return stopped.value.code, errors


TYPOS = {  # written -> meant, at three depths: option, section, key of a section
    "nmae": "name",
    "thraeds": "threads",
    "resmue": "resume",
    "seed_everythin": "seed_everything",
    "modell.fusion": "model.fusion",
    "dta.batch_size": "data.batch_size",
    "optm.lr": "optim.lr",
    "evalution.val_images": "evaluation.val_images",
    "chekpoint.monitor": "checkpoint.monitor",
    "trainr.max_epochs": "trainer.max_epochs",
    "model.hiden_size": "model.hidden_size",
    "model.fusion_layer": "model.fusion_layers",
    "model.num_atention_heads": "model.num_attention_heads",
    "model.image_modell": "model.image_model",
    "model.text_pretraind": "model.text_pretrained",
    "data.batchsize": "data.batch_size",
    "data.anotations": "data.annotations",
    "data.max_text_lenght": "data.max_text_length",
    "data.mlm_probabilty": "data.mlm_probability",
    "data.num_worker": "data.num_workers",
    "optim.weigth_decay": "optim.weight_decay",
    "optim.warmpu": "optim.warmup",
    "evaluation.val_image": "evaluation.val_images",
    "checkpoint.every_n_step": "checkpoint.every_n_steps",
    "trainer.accumulate_grad_batch": "trainer.accumulate_grad_batches",
}


@pytest.mark.parametrize("typo", TYPOS)
def test_typo_gets_a_suggestion(typo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line and in a file."""
    content: object = 1
    for part in reversed(typo.split(".")):
        content = {part: content}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    for arguments in ([f"--{typo}=1"], ["--config", str(tmp_path / "own.yaml")]):
        code, errors = rejected(arguments, capsys)
        assert code == 2
        assert f"Did you mean '{TYPOS[typo]}'?" in errors, errors
        assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("model: {fusion: no}", "model.fusion"),
        ("model: {hidden_size: wide}", "model.hidden_size"),
        ("model: {hidden_size: 1.5}", "model.hidden_size"),
        ("model: {hidden_size: [128]}", "model.hidden_size"),
        ("model: {objectives: 3}", "model.objectives"),
        ("model: 3", "model: expected a mapping"),
        ("name: x\ndata:", "data: expected a mapping"),
        ("trainer: null", "trainer: expected a mapping"),
        ("data: {whole_word: 3}", "data.whole_word"),
        ("data: {annotations: [a, b]}", "data.annotations"),
        ("data: {batch_size: null}", "data.batch_size"),
        ("optim: {lr: fast}", "optim.lr"),
        ("optim: {lr: on}", "optim.lr"),
        ("checkpoint: {every_seconds: {}}", "checkpoint.every_seconds"),
        ("trainer: {max_epochs: many}", "trainer.max_epochs"),
        ("threads: 0", "threads"),
        ("base: 3", "base: expected a file"),
        ("base: [null]", "base: expected a file"),
        ("name: [a]", "name"),
    ],
)
def test_message_about_a_wrong_type_names_the_key(
    content: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text(content)
    code, errors = rejected(["--config", str(tmp_path / "own.yaml")], capsys)
    assert code == 2
    assert errors.startswith("mmbert: error: ") and named in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("preset", PRESETS)
def test_printed_configuration_parses_to_itself(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(config: str) -> dict:
        with pytest.raises(SystemExit) as stopped:
            main(["fit", "--config", config, "--print_config"])
        assert stopped.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    first = printed(preset)
    content = {name: value for name, value in first.items() if name != "base"}  # every value stands there already
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(content))
    second = printed(str(tmp_path / "printed.yaml"))
    assert {**second, "base": None} == {**first, "base": None}
    for section, options in merge_files(with_bases(preset)).items():
        for key, value in options.items() if isinstance(options, dict) else []:
            assert first[section][key] == value, "nothing is lost"


OBJECTIVES = "--model.objectives"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"mlm": 0.5, "itm": {"weight": 2.0, "text": "masked"}}),
        (
            [f"{OBJECTIVES}.itm.negatives=hard"],
            {"mlm": 0.5, "itm": {"weight": 2.0, "text": "masked", "negatives": "hard"}},
        ),
        (
            [f"{OBJECTIVES}.itm.text", "clean", f"{OBJECTIVES}.itm.weight=3"],
            {"mlm": 0.5, "itm": {"weight": 3, "text": "clean"}},
        ),
        (
            [f"{OBJECTIVES}.mlm.weight=0.25", f"{OBJECTIVES}.itc=1.0"],
            {"mlm": {"weight": 0.25}, "itm": {"weight": 2.0, "text": "masked"}, "itc": 1.0},
        ),
        (
            [f"{OBJECTIVES}.itm=1.5", f"{OBJECTIVES}.itm.text=clean"],
            {"mlm": 0.5, "itm": {"weight": 1.5, "text": "clean"}},
        ),
        ([f'{OBJECTIVES}={{"mlm": 1.0}}', f"{OBJECTIVES}.mlm.weight=2"], {"mlm": {"weight": 2}}),
        (
            ["--model={objectives: {itm: {text: clean}}}", f"{OBJECTIVES}.itm.weight=3"],
            {"itm": {"weight": 3, "text": "clean"}},
        ),
    ],
)
def test_option_of_an_objective_keeps_its_other_options(
    options: list[str], expected: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a run and in the rows of a comparison; the mapping in a file replaces that of its base."""
    (tmp_path / "base.yaml").write_text("model: {objectives: {itc: 1.0, itm: {negatives: hard}}}")
    file = tmp_path / "own.yaml"
    file.write_text("base: base.yaml\nmodel: {objectives: {mlm: 0.5, itm: {weight: 2.0, text: masked}}}")
    arguments = ["fit", "--config", str(file), *options]
    with pytest.raises(SystemExit):
        main([*arguments, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["objectives"] == expected
    flat: dict[str, object] = {}
    for name, value in expected.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    assert explicit_options(arguments[1:]) == {f"model.objectives.{name}": value for name, value in flat.items()}


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--model.fusion=early", "--config", "FILE"],
        ["fit", "--config=FILE", "--model.fusion=early"],
        ["fit", "-c", "FILE", "--model.fusion", "early"],
        ["fit", "-cFILE", "--model.fusion=early"],
    ],
)
def test_options_override_files_in_any_order(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base.yaml").write_text("model: {hidden_size: 48}")
    (tmp_path / "own.yaml").write_text("base: base.yaml\nmodel: {fusion: late}")
    arguments = [argument.replace("FILE", str(tmp_path / "own.yaml")) for argument in arguments]
    with pytest.raises(SystemExit):
        main([*arguments, "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert (model["fusion"], model["hidden_size"]) == ("early", 48)


def test_saved_configuration_gives_bit_identical_losses(tiny: list[str], tmp_path: Path) -> None:
    fit(tiny, tmp_path, "--name=one", "--trainer.max_epochs=2")
    main(["fit", "--config", str(tmp_path / "one/config.yaml"), "--name=two"])
    assert trace(tmp_path, "two") == trace(tmp_path, "one")
    assert len(trace(tmp_path, "one")) == 9


SECTIONS = ("model", "data", "optim", "evaluation", "checkpoint", "trainer", "name", "base", "threads", "resume")
KEYS = ("fusion", "hidden_size", "objectives", "annotations", "batch_size", "lr", "monitor", "max_epochs", "callbacks",
        "class_path", "init_args", "split_values", "precision", "logger", "strategy")  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**20)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["early", "mlm", "null", "${oc.env:HOME}", "%", "{", "[", "--name", "../x", "a: b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner),
    max_leaves=6,
)
JUNK = (
    st.dictionaries(st.sampled_from(SECTIONS), VALUES, max_size=3).map(lambda x: yaml.safe_dump(x).encode())
    | VALUES.map(lambda x: yaml.safe_dump(x).encode())
    | st.text(max_size=40).map(lambda x: x.encode("utf-8", "surrogatepass"))
    | st.binary(max_size=40)
)


@settings(max_examples=tier(60, 3000))  # each builds the parser anew: a quarter of a second
@given(JUNK)
@example(b"threads: 2147483648.0\n")
def test_invalid_file_ends_with_an_exit_code(tmp_path: Path, content: bytes) -> None:
    """No generated file can run: `data.images` is missing or no folder."""
    (tmp_path / "junk.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(tmp_path / "junk.yaml"), "--data.tokenizer=./nowhere", "--trainer.fast_dev_run=1"])
    assert stopped.value.code in (1, 2)


def test_preset_with_changed_bytes_ends_with_an_exit_code(tmp_path: Path) -> None:
    text = (
        (ROOT / "configs/pretrain/shapes_plain.yaml")
        .read_bytes()
        .replace(b"base: [../base.yaml, ../fusion/hybrid.yaml]\n", b"")
    )
    rng = random.Random(0)
    for _ in range(tier(30, 1000)):
        broken = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.choice(b"\0\t\n :{}[]&*!'\"-%@`x\xff")
        (tmp_path / "broken.yaml").write_bytes(broken)
        with pytest.raises(SystemExit) as stopped:
            options = ["--data.tokenizer=./nowhere", "--data.prepare=null"]
            main(["fit", "--config", str(tmp_path / "broken.yaml"), *options])
        assert stopped.value.code in (1, 2)
