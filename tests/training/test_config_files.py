"""Presets and YAML files that build on each other."""

from pathlib import Path

import pytest
import yaml

from mmbert.cli.main import main
from mmbert.compare.plan import load_comparison
from mmbert.errors import DataError, UsageError
from mmbert.training import presets
from mmbert.training.config_files import expand_bases, explicit_options, merge_files, with_bases
from mmbert.training.presets import find_config, list_presets
from mmbert.training.run_options import parse_run, run_parser

CONFIGS = Path(__file__).parents[2] / "configs"


def test_presets_are_named_by_their_path_without_suffix() -> None:
    found = list_presets()
    assert found["quickstart"] == CONFIGS / "quickstart.yaml"
    assert found["pretrain/ucm"] == CONFIGS / "pretrain/ucm.yaml"
    assert sorted(found.values()) == sorted(CONFIGS.rglob("*.yaml"))


def test_file_of_that_name_comes_before_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart") == find_config("presets/quickstart") == CONFIGS / "quickstart.yaml"
    (tmp_path / "quickstart").mkdir()
    assert find_config("quickstart") == CONFIGS / "quickstart.yaml", "a folder is no configuration"
    (tmp_path / "base").write_text("name: own")
    assert find_config("base") == Path("base") and find_config("presets/base") == CONFIGS / "base.yaml"
    assert find_config("base", CONFIGS / "fusion") == CONFIGS / "base.yaml"


def test_installed_presets_come_before_those_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mmbert/presets").mkdir(parents=True)
    (tmp_path / "mmbert/presets/only.yaml").touch()
    monkeypatch.setattr(presets.mmbert, "__file__", str(tmp_path / "mmbert/__init__.py"))
    assert list(list_presets()) == ["only"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("quickstrat", "Did you mean 'quickstart'?"),
        ("configs/quickstart.yaml", "Did you mean 'quickstart'?"),
        ("presets/quikstart", "Did you mean 'quickstart'?"),
        ("pretrain/ucm.yml", "Did you mean 'pretrain/ucm'?"),
        ("ucm", "Did you mean 'compare/ucm' or 'pretrain/ucm'?"),
        ("zzz", "a preset. mmbert configs lists"),
        ("nul\0", "neither a file"),
        ("", "neither a file"),
    ],
)
def test_unknown_name_gets_the_closest_presets(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        find_config(name)
    assert hint in str(error.value)


@pytest.mark.parametrize("file_name", ["own.yaml", "own.yml", "own", "own.conf", "own.json"])
@pytest.mark.parametrize("form", [["--config", "FILE"], ["--config=FILE"], ["-c", "FILE"], ["-cFILE"], ["-c=FILE"]])
def test_base_counts_whatever_the_file_is_called(
    file_name: str, form: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / file_name).write_text("base: [presets/fusion/late]\nname: own")
    arguments = [part.replace("FILE", file_name) for part in form]
    late = str(CONFIGS / "fusion/late.yaml")
    assert expand_bases([*arguments, "--threads=1"]) == ["--config", late, "--config", file_name, "--threads=1"]
    assert explicit_options(arguments) == {"model.fusion": "late", "name": "own"}


def test_bases_come_in_order_and_relative_to_their_file(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "below.yaml").write_text("data: {batch_size: 1, annotations: {train: a, val: b}}\noptim: {lr: 1}")
    (tmp_path / "inner/middle.yaml").write_text("base: ../below.yaml\ndata: {batch_size: 2, annotations: {train: c}}")
    (tmp_path / "top.yaml").write_text("base: [inner/middle.yaml]\ndata: {num_workers: 0}\nname: top")
    files = with_bases(str(tmp_path / "top.yaml"))
    assert [file.name for file in files] == ["below.yaml", "middle.yaml", "top.yaml"]
    assert merge_files(files) == {
        "data": {"batch_size": 2, "annotations": {"train": "c"}, "num_workers": 0},
        "optim": {"lr": 1},
        "name": "top",
    }


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("base: own.yaml", UsageError, "own.yaml builds on itself: .*own.yaml -> .*own.yaml"),
        ("base: [quikstart]", UsageError, "own.yaml: base: 'quikstart' is neither .* Did you mean 'quickstart'"),
        ("base: {a: 1}", UsageError, "own.yaml: base: expected a file or a list of files"),
        ("[1, 2]", DataError, "own.yaml: a list; expected a YAML mapping"),
        ("name: a\nname: b", DataError, "own.yaml:2: the key 'name' again, as in line 1"),
        ("name: [", DataError, "own.yaml:1"),
    ],
)
def test_message_about_a_file_has_file_and_line(content: str, error: type, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(error, match=message):
        with_bases(str(tmp_path / "own.yaml"))


def test_yaml_is_utf8_in_any_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    (tmp_path / "own.yaml").write_bytes("name: für".encode())
    assert explicit_options(["--config", str(tmp_path / "own.yaml")]) == {"name": "für"}


RUNS = [name for name in list_presets() if not name.startswith("compare/")]


@pytest.mark.parametrize("name", RUNS)
def test_resolved_preset_is_what_a_run_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The parser of runs is the oracle for the merge that `configs show --resolved` prints."""
    main(["configs", "show", name, "--resolved"])
    resolved = yaml.safe_load(capsys.readouterr().out)
    parsed = parse_run(["--config", name]).config
    for section, options in resolved.items():
        for option, value in options.items() if isinstance(options, dict) else [(None, options)]:
            key = section if option is None else f"{section}.{option}"
            found = parsed[key]
            assert (found.as_dict() if hasattr(found, "as_dict") else found) == value, key


def test_configs_lists_every_preset_with_its_first_comment(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(list_presets())
    for line, (name, file) in zip(lines, list_presets().items(), strict=True):
        first = file.read_text().splitlines()[0]
        assert first.startswith("# ") and line.endswith(first.removeprefix("# ")), file
        assert name not in RUNS or len(line) <= 120, f"{file}: the first line is too long for a list"


def test_comparison_is_found_by_name() -> None:
    assert load_comparison("compare/quick").name == load_comparison("presets/compare/quick").name == "quick"


def test_configs_show_prints_the_file_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs", "show", "pretrain/openstax"])
    assert capsys.readouterr().out == (CONFIGS / "pretrain/openstax.yaml").read_text()
    main(["configs", "show", "compare/openstax", "--resolved"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["seeds"] == [0, 1, 2] and shown["retrieval"]["equal_texts"] is False, "from its base, and its own"
    with pytest.raises(SystemExit):
        main(["configs", "show", "quikstart"])
    assert "Did you mean 'quickstart'?" in capsys.readouterr().err


def test_options_in_two_arguments_are_those_with_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("optim: {lr: 0.1}")
    arguments = ["--optim.lr", "0.2", "--config", str(tmp_path / "a.yaml"), "--data.eval_seed", "-1", "--name=a"]
    found = explicit_options([*arguments, "--trainer", "{max_steps: 3}"])
    assert found == {"data.eval_seed": -1, "name": "a", "optim.lr": 0.2, "trainer.max_steps": 3}


@pytest.mark.parametrize("text", ["", "# nothing set\n"])
def test_file_without_options_is_accepted(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert run_parser(lightning=False).parse_args(["--config", str(tmp_path / "a.yaml")]).name == "run"
