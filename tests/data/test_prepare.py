"""Data sets that are generated: by `mmbert data prepare`, and by a run that misses them."""

import threading
import time
from pathlib import Path

import pytest

from mmbert.cli.main import main
from mmbert.data import prepare
from mmbert.data.options import DataOptions
from mmbert.data.prepare import GENERATORS, generate, generator_script, list_files, prepare_missing
from mmbert.errors import DataError, UsageError
from mmbert.training import assembly
from mmbert.training.config_files import merge_files, with_bases
from mmbert.training.presets import list_presets
from mmbert.training.run import TrainingRun
from mmbert.training.run_options import parse_run

TINY = ["--train=4", "--val=2", "--test=2", "--jobs=1"]
RUNS = {name: merge_files(with_bases(name)) for name in list_presets() if not name.startswith("compare/")}


@pytest.fixture
def generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the data sets that were generated in an empty working directory, where generating makes a folder."""
    monkeypatch.chdir(tmp_path)
    names: list[str] = []

    def make(name: str, folder: Path, *, quiet: bool) -> None:
        time.sleep(0.1)
        (folder / "images").mkdir()
        names.append(name)

    monkeypatch.setattr(prepare, "generate", make)
    return names


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generator_has_a_script(name: str) -> None:
    assert generator_script(name).is_file()


@pytest.mark.parametrize("name", [name for name, content in RUNS.items() if content.get("data", {}).get("prepare")])
def test_preset_names_files_of_the_data_set_that_it_prepares(name: str) -> None:
    options = DataOptions(**RUNS[name]["data"])
    paths = list(prepare._paths(options))
    assert options.prepare in GENERATORS
    assert paths and all(path.startswith(f"data/{options.prepare}/") for path in paths)


def test_data_prepare_generates_and_lists_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shapes"
    main(["data", "prepare", "shapes", "--out", str(out), *TINY, "--seed", "3", "--size", "32"])
    lines = capfd.readouterr().out.splitlines()
    assert "4 train + 2 val + 2 test scenes" in lines[1]
    listed = [line.split("  ")[0] for line in lines[2:]]
    assert listed == sorted(str(file) for file in out.rglob("*.*") if file.is_file())
    main(["data", "prepare", "shapes", "--out", str(out), *TINY, "--seed", "3", "--size", "32"])
    assert "already holds this set" in capfd.readouterr().out


def test_folder_of_many_files_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    (tmp_path / ".lock").touch()
    for number in range(17):
        (tmp_path / f"many/{number}").write_bytes(b"x" * 100_000)
    (tmp_path / "one").write_bytes(b"x" * 50)
    assert list_files(tmp_path) == [f"{tmp_path}/one  0.1 kB", f"{tmp_path}/many/  17 files, 1.7 MB"]


def test_failure_of_a_script_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["data", "prepare", "shapes", "--out", str(tmp_path), "--train=1"])
    assert stopped.value.code == 1
    assert "shapes was not generated: prepare.py: error: --train is 1" in capsys.readouterr().err


def test_missing_data_set_is_generated_once_by_one_of_several(generated: list[str]) -> None:
    """Threads stand for processes: each has a lock file of its own open."""
    options = DataOptions(prepare="shapes", images={"train": "data/shapes/images"}, annotations="own.json")
    seconds: list[float] = []
    threads = [threading.Thread(target=lambda: seconds.append(prepare_missing(options))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert generated == ["shapes"]
    assert len(seconds) == 3 and all(0.1 <= value < 60 for value in seconds), "waiting counts"
    assert prepare_missing(options) < 0.1


@pytest.mark.parametrize(
    "options",
    [
        DataOptions(prepare="shapes", images="mine/images", tokenizer="bert-base-uncased"),
        DataOptions(prepare="shapes", images="data/shapes2/images", image_names="COCO_{:012d}.jpg"),
        DataOptions(),
    ],
)
def test_data_of_other_folders_is_never_generated(options: DataOptions, generated: list[str]) -> None:
    prepare_missing(options)
    assert generated == [] and list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer": "data/shapes/tokenizer"},
        {"annotations": {"train": "data/shapes/annotations/captions_train.json"}},
        {"image_names": {"train": "./data/shapes/annotations/captions_train.json"}},
        {"questions": {"train": "data/shapes/annotations/questions_train.json"}},
        {"prepare": "easy_vqa", "images": "data/shapes/images"},
    ],
)
def test_missing_data_without_prepare_names_the_command(options: dict, generated: list[str]) -> None:
    with pytest.raises(DataError, match=r"no such file or folder; expected .*run mmbert data prepare shapes"):
        prepare_missing(DataOptions(**options))
    assert generated == []


def test_absolute_path_into_the_folder_counts(generated: list[str]) -> None:
    prepare_missing(DataOptions(prepare="shapes", images=str(Path("data/shapes/images").absolute())))
    assert generated == ["shapes"]


def test_unknown_data_set_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"data\.prepare='shape'; allowed are shapes, easy_vqa.*Did you mean 'shapes'"):
        prepare_missing(DataOptions(prepare="shape"))


def test_quickstart_without_data_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "quickstart", "--data.prepare=null"])
    assert stopped.value.code == 1
    errors = capsys.readouterr().err
    assert "data/shapes/tokenizer: no such file or folder" in errors and "mmbert data prepare shapes" in errors
    assert "Repo id" not in errors and list(tmp_path.iterdir()) == []


def test_time_of_generating_is_no_part_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generate("shapes", Path("data/shapes"), TINY)
    monkeypatch.setattr(assembly, "prepare_missing", lambda options: 1000.0)
    options = ["--config", "quickstart", "--model.image_layers=1", "--data.batch_size=2", "--data.num_workers=0"]
    run = TrainingRun(parse_run([*options, "--trainer.accelerator=cpu"]), started=5.0, dry=True)
    assert run.started == 1005.0
