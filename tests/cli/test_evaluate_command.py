"""`mmbert evaluate` and its Python functions on a saved model, from files to the printed tables and the report."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranking import CAPTIONS, tiny_model
from tiny import tiny_examples, tiny_processor

import mmbert
from mmbert.cli.main import main
from mmbert.data.readers.base import ImageFolder
from mmbert.data.readers.foils import read_foils
from mmbert.errors import DataError, UsageError
from mmbert.evaluation.retrieval import SCORERS, Candidates
from mmbert.inference.evaluate.retrieval import RetrievalMetrics
from mmbert.metrics.retrieval import recall_at_k
from mmbert.model.objectives.closed_form import canonical_maps
from mmbert.runtime.files import atomic_write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, 7 images, and their captions as Karpathy's JSON and as JSON lines."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, itc in (("model", {}), ("tokens", {"interaction": "tokens"})):
        tiny_model(objectives={"itm": 1.0, "itc": {"embedding_size": 8, **itc}}).save_pretrained(folder / name)
        tiny_processor().save_pretrained(folder / name)
    (folder / "images").mkdir()
    examples = tiny_examples(folder / "images", CAPTIONS)
    images: list[dict[str, Any]] = [
        {"split": "test", "filename": e.image.name, "sentences": [{"raw": caption} for caption in e.captions]}
        for e in examples
    ]
    # A training image that was never downloaded.
    images.append({"split": "train", "filename": "absent.png", "sentences": [{"raw": "a cat"}]})
    for name in ("karpathy.json", "training.json"):  # the second one for what may not be solved on the first
        (folder / name).write_text(json.dumps({"images": images}))
    lines = [json.dumps({"file": e.image.name, "text": caption}) for e in examples for caption in e.captions]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    foils = {"1": {"filename": "0.png", "caption": "a red cat", "negative_caption": "a blue cat"}}
    (folder / "swap.json").write_text(json.dumps(foils))
    return folder


def arguments(
    folder: Path, *more: str, file: str = "karpathy.json", format: str = "karpathy", model: str = "model"
) -> list[str]:
    start = ["evaluate", "retrieval", str(folder / model), "--annotations", str(folder / file)]
    return [*start, "--format", format, "--images", str(folder / "images"), *more]


def fails(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == code and "Traceback" not in message, message
    return message


def metrics(file: Path) -> list[dict[str, Any]]:
    reports = json.loads(file.read_text())
    return [{k: v for k, v in report.items() if not k.endswith("seconds") and k != "peak_memory"} for report in reports]


def test_three_scorers_side_by_side(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "report.json")
    main(arguments(folder, "--scorer", *SCORERS, "--k", "7", "--folds", "1", "2", "--out", out))
    printed = capsys.readouterr().out
    reports = json.loads(Path(out).read_text())
    assert printed.splitlines()[0] == (
        "7 images, 13 texts of split test, 1 to 3 captions per image; ties rank last; equal texts of other images are "
        "wrong"
    )
    for report in reports:
        assert f"\n\n{RetrievalMetrics(report)}\n" in printed
    assert [(r["scorer"], r["folds"]) for r in reports] == [(name, folds) for folds in (1, 2) for name in SCORERS]
    _, exhaustive, two_stage = reports[:3]
    assert (exhaustive["fusion_passes"], two_stage["k"]) == (77, 7)
    assert all(exhaustive[name] == two_stage[name] for name in exhaustive if "R@" in name or "rank" in name)


def test_table_of_a_scorer_lists_recall_by_direction_and_then_the_cost(folder: Path) -> None:
    report = mmbert.evaluate_retrieval(folder / "model", folder / "karpathy.json", folder / "images", scorer="itm")
    metrics = report["itm"]
    head, *directions, cost = str(metrics).splitlines()
    assert head.split() == ["itm", "R@1", "R@5", "R@10", "median", "rank"]
    for line, way in zip(directions, ("image_to_text", "text_to_image"), strict=True):
        recalls = [f"{metrics[f'{way}/R@{n}']:.4f}" for n in (1, 5, 10)]
        assert line.split() == [*way.split("_"), *recalls, f"{metrics[f'{way}/median_rank']:g}"]
    assert cost.startswith(f"rsum {metrics['rsum']:.2f}; 7 image, 11 text and 77 fusion passes; ")
    assert repr(report).endswith(str(metrics)) and repr(report).startswith("7 images, 13 texts")


def test_captions_limits_the_texts_of_each_image(folder: Path) -> None:
    file, images = folder / "karpathy.json", folder / "images"
    found = mmbert.evaluate_retrieval(folder / "model", file, images, scorer="itc", captions=1)["itc"]
    assert found["num_texts"] == 7 and found["captions_per_image"] == "1 caption per image"


def test_first_images_are_those_of_a_shorter_file(folder: Path) -> None:
    file, images = folder / "karpathy.json", folder / "images"
    entries = json.loads(file.read_text())["images"]
    test = [entry for entry in entries if entry["split"] == "test"]
    (folder / "shorter.json").write_text(json.dumps({"images": test[:3]}))
    options = {"scorer": "itm", "captions": 2}
    found = mmbert.evaluate_retrieval(folder / "model", file, images, first_images=3, **options)["itm"]
    expected = mmbert.evaluate_retrieval(folder / "model", folder / "shorter.json", images, **options)["itm"]
    assert found["num_images"] == 3
    recalls = [name for name in expected if "R@" in name]
    assert {name: found[name] for name in recalls} == {name: expected[name] for name in recalls}


def test_auto_prints_itc_before_two_stage_starts(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who stops the expensive scorer has the result of the cheap one, on the screen and in the file."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(SCORERS, "two_stage", stopped)
    out = folder / "stopped.json"
    with pytest.raises(KeyboardInterrupt):
        main(arguments(folder, "--out", str(out)))
    printed = capsys.readouterr().out
    assert "itc" in printed and "rsum" in printed and "two_stage" not in printed
    assert [report["scorer"] for report in json.loads(out.read_text())] == ["itc"]


@pytest.mark.parametrize("model", ["model", "tokens"])
def test_weight_of_itc_is_chosen_on_the_validation_split(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Ranks like the number that the log names."""
    content = json.loads((folder / "karpathy.json").read_text())["images"]
    for row in content[:3]:
        row["split"] = "val"
    file = tmp_path / "splits.json"
    file.write_text(json.dumps({"images": content}))
    options = ["--scorer", "two_stage", "--k", "2", "--out", str(tmp_path / "report.json")]
    with caplog.at_level("INFO", logger="mmbert"):
        main(arguments(folder, *options, "--itc_weight", "auto", file=str(file), model=model))
    (chosen,) = metrics(tmp_path / "report.json")
    said = next(r.getMessage() for r in caplog.records if "itc_weight=auto" in r.getMessage())
    assert "3 images of split val" in said
    main(arguments(folder, *options, "--itc_weight", str(chosen["itc_weight"]), file=str(file), model=model))
    assert metrics(tmp_path / "report.json") == [chosen] and chosen["num_images"] == 4
    message = fails(arguments(folder, "--itc_weight", "car"), 2, capsys)
    assert "argument --itc_weight: 'car' is neither a number of 0 or more nor auto" in message


def test_python_functions_take_folder_loaded_model_or_model_with_processor(folder: Path, tmp_path: Path) -> None:
    main(arguments(folder, "--scorer", "itc", "itm", "--folds", "1", "2", "--out", str(tmp_path / "a.json")))
    expected = metrics(tmp_path / "a.json")
    loaded = mmbert.load(folder / "model", "cpu")
    examples = tiny_examples(tmp_path, CAPTIONS)
    training = tiny_model().train()
    options: dict[str, Any] = {"scorer": ["itc", "itm"], "folds": [1, 2]}
    for report in (
        mmbert.evaluate_retrieval(str(folder / "model"), folder / "karpathy.json", folder / "images", **options),
        mmbert.evaluate_retrieval(loaded, folder / "karpathy.json", folder / "images", **options),
        mmbert.evaluate_retrieval(
            training, Candidates.from_examples(examples), processor=tiny_processor(), split="test", **options
        ),
    ):
        assert list(report) == ["itc", "itm", "itc, 2 folds", "itm, 2 folds"]
        (tmp_path / "b.json").write_text(json.dumps(list(report.values())))
        assert metrics(tmp_path / "b.json") == expected
    assert training.training, "the mode of the model is restored"
    foils = mmbert.evaluate_foils(loaded, folder / "swap.json", folder / "images")
    records = read_foils([folder / "swap.json"], ImageFolder(folder / "images"))
    assert foils == mmbert.evaluate_foils(training, records, processor=tiny_processor()) and foils["swap"]["count"] == 1


def test_python_functions_raise_for_missing_arguments(folder: Path) -> None:
    with pytest.raises(UsageError, match="processor is missing"):
        mmbert.evaluate_retrieval(tiny_model(), Candidates(["a"], ["b"], [0]))
    with pytest.raises(UsageError, match="images is missing"):
        mmbert.evaluate_retrieval(folder / "model", folder / "karpathy.json")
    with pytest.raises(UsageError, match="model is a MMBertModel, which has no head to rank with"):
        mmbert.evaluate_foils(tiny_model().mmbert, [])
    with pytest.raises(UsageError, match="foils is empty"):
        mmbert.evaluate_foils(folder / "model", [], folder / "images")


def test_command_imports_no_torch_before_it_runs() -> None:
    """Help and option errors of evaluate, ask and match are fast: they need no library."""
    code = (
        "import sys, mmbert.cli.main as cli\n"
        "for line in ('evaluate retrieval --help', 'ask --help', 'match m i t --colour red'):\n"
        "    try: cli.main(line.split())\n"
        "    except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'lightning', 'numpy', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "there is no option --colour" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_a_closed_pipe_ends_the_output_without_a_traceback(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mmbert", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
    assert subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command]).returncode == 0, "no output at all"


def test_json_lines_give_the_same(folder: Path, tmp_path: Path) -> None:
    main(arguments(folder, "--out", str(tmp_path / "a.json"), "--k", "2", "--equal_texts"))
    keys = ["--image_key", "file", "--caption_key", "text", "--k", "2", "--equal_texts", "--batch_size", "3"]
    jsonl = arguments(folder, *keys, file="captions.jsonl", format="jsonl")
    main([*jsonl, "--out", str(tmp_path / "b.json")])
    assert metrics(tmp_path / "a.json") == metrics(tmp_path / "b.json")


def test_delimiter_and_dropped_images_are_options(folder: Path, tmp_path: Path) -> None:
    lines = ["image|caption", *(f"{i}.png|{captions[0]}" for i, captions in enumerate(CAPTIONS))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    karpathy = json.loads((folder / "karpathy.json").read_text())
    karpathy["images"][0]["sentences"] = []
    (tmp_path / "a.json").write_text(json.dumps(karpathy))
    options: dict[str, Any] = {"images": folder / "images", "scorer": "itc"}
    table = mmbert.evaluate_retrieval(
        folder / "model", tmp_path / "a.csv", format="csv", image_key="image", caption_key="caption", delimiter="|",
        **options,
    )  # fmt: skip
    assert (table["itc"]["num_images"], table["itc"]["captions_per_image"]) == (7, "1 caption per image")
    with pytest.raises(DataError, match="drop_uncaptioned"):
        mmbert.evaluate_retrieval(folder / "model", tmp_path / "a.json", **options)
    dropped = mmbert.evaluate_retrieval(folder / "model", tmp_path / "a.json", drop_uncaptioned=True, **options)
    assert dropped["itc"]["num_images"] == 6


def test_torchrun_with_two_processes_gives_the_same_and_prints_once(folder: Path, tmp_path: Path) -> None:
    command = arguments(folder, "--scorer", *SCORERS, "--k", "2", "--batch_size", "2", "--device", "cpu")
    main([*command, "--out", str(tmp_path / "one.json")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "mmbert"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *command, "--out", str(tmp_path / "two.json")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rsum") == len(SCORERS)
    assert metrics(tmp_path / "one.json") == metrics(tmp_path / "two.json")


@pytest.mark.parametrize("command", ["task", "shares", "bias"])
def test_what_is_not_sharded_is_computed_on_rank_0_only(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model does not exist, which only rank 0 finds."""
    source = [] if command == "bias" else ["--annotations", "a", "--format", "jsonl"]
    for rank, codes in (("1", []), ("0", [2])):
        monkeypatch.setenv("RANK", rank)
        stopped = []
        try:
            main(["evaluate", command, "absent", *source, "--json"])
        except SystemExit as error:
            stopped.append(error.code)
        assert stopped == codes and not capsys.readouterr().out


def test_foils_are_printed_by_category(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "foils.json"
    options = ["--images", str(folder / "images"), "--foils", str(folder / "swap.json"), "--out", str(out)]
    main(["evaluate", "foils", str(folder / "model"), *options])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == ["category", "count", "accuracy", "blank", "shuffled"]
    assert [row[0] for row in printed[1:]] == ["overall", "swap"] and printed[1][4] == "-", "there is one image"
    assert json.loads(out.read_text())["swap"]["count"] == 1


def in_c_locale(text: str) -> str:
    """An argument as Python gives it where the locale's encoding is ASCII."""
    return text.encode().decode("ascii", "surrogateescape")


def test_names_are_utf8_and_any_character_is_printed_in_any_locale(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    renamed = [{"datei": row["file"], "größe": row["text"], "teil": "prüfung"} for row in rows]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in renamed), encoding="utf-8"
    )
    foils = {"1": {"filename": "0.png", "caption": "a", "negative_caption": "b", "category": "größe"}}
    (tmp_path / "f.json").write_text(json.dumps(foils, ensure_ascii=False), encoding="utf-8")
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii", errors="surrogateescape"))
    names = ["--image_key", "datei", "--caption_key", in_c_locale("größe"), "--split_key", "teil"]
    start = ["evaluate", "retrieval", str(folder / "model"), "--annotations", str(tmp_path / "a.jsonl")]
    data = ["--format", "jsonl", "--images", str(folder / "images"), "--scorer", "itc"]
    main([*start, *data, *names, "--split", in_c_locale("prüfung")])
    main(["evaluate", "foils", str(folder / "model"), "--foils", str(tmp_path / "f.json"), *data[2:4]])
    sys.stdout.flush()
    printed = output.getvalue().decode("ascii")
    assert "of split pr\\xfcfung" in printed and "gr\\xf6\\xdfe" in printed


def test_user_errors_are_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(code: int, *more: str, model: Path | None = None, **options: str) -> str:
        command = arguments(folder, *more, **options)
        command[2] = str(model or folder / "model")
        return fails(command, code, capsys)

    assert "no readable config.json. A run has it below itself: RUN/model." in error(2, model=folder)
    assert "no mmbert model folder" in error(2, model=tmp_path / "absent")
    assert "no image in the split 'val'; expected one of the splits it has: test, train" in error(1, "--split", "val")
    assert "split 'tset'; a karpathy file has train, val, test. Did you mean 'test'?" in error(2, "--split", "tset")
    assert "there is no option --scorers. Did you mean 'scorer'?" in error(2, "--scorers", "itc")
    assert "invalid choice: 'itx'" in error(2, "--scorer", "itx")
    assert "batch_size=0: must be 1 or more" in error(2, "--batch_size", "0")
    assert "captions=0: must be 1 or more" in error(2, "--captions", "0")
    assert "first_images=8: allowed are 1 to 7, the images of split test" in error(2, "--first_images", "8")
    assert "folds=8: allowed are 1 to 7, the number of images" in error(2, "--folds", "8")
    assert "absent.png" in error(1, "--split", "train")
    assert "no key 'image'" in error(1, file="captions.jsonl", format="jsonl")
    message = error(2, "--split", "val", file="captions.jsonl", format="jsonl")
    assert "split='val': a file of format jsonl is one split" in message and "split_key" in message

    message = error(2, "--scorer", "itc", "--itc_weight", "3")
    assert "itc_weight=3.0: only the scorer two_stage uses it, and itc ranks; leave it out" in message
    assert "itc_weight=auto: only the scorer" in error(2, "--scorer", "itm", "itc", "--itc_weight", "auto")
    message = error(2, "--train_annotations", "pairs.json")
    assert "train_annotations='pairs.json': only baseline reads it; give that too, or leave" in message
    assert "val_annotations='a.json': only itc_weight='auto' reads it" in error(2, "--val_annotations", "a.json")
    assert "val_split=a, b: only itc_weight='auto' reads it" in error(2, "--val_split", "a", "b")

    other = tmp_path / "other"
    tiny_model().mmbert.save_pretrained(other)
    tiny_processor().save_pretrained(other)
    assert "holds a MMBertModel, which has no head to rank with" in error(2, model=other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["MMBertForPreTraining"]}))
    assert "missing keys" in error(1, model=other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "weights that can't be loaded" in error(1, model=other)
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    assert "holds a BertModel; expected MMBertForPreTraining" in error(2, model=other)


@pytest.mark.parametrize("command", ["retrieval", "foils", "task", "shares", "bias"])
def test_output_is_checked_before_the_work(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model, which does not exist either, is not loaded."""
    source = ["--annotations", "a", "--format", "jsonl", "--images", "b"]
    options = {"foils": ["--foils", "a", "--images", "b"], "bias": []}.get(command, source)
    for out, reason in ((tmp_path, "is a folder"), (tmp_path / "no" / "r.json", "its folder does not exist")):
        message = fails(["evaluate", command, "absent", *options, "--out", str(out)], 2, capsys)
        assert message == f"mmbert: error: --out {out}: {reason}; give a file.\n"
    if command == "bias":
        assert "'absent' has no model card README.md" in fails(["evaluate", command, "absent", "--card"], 2, capsys)


def test_a_report_replaces_a_file_in_one_step_and_a_device_is_written(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("old")
    (tmp_path / "pipe").symlink_to("/dev/null")
    for name in ("r.json", "pipe"):
        atomic_write_text(tmp_path / name, "new")
    assert (tmp_path / "r.json").read_text() == "new" and (tmp_path / "pipe").is_symlink()
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(tmp_path / "r.json", "lone \ud800")
    assert (tmp_path / "r.json").read_text() == "new"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pipe", "r.json"]


def test_broken_image_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "caption": "a cat"}')
    options = ["--annotations", str(tmp_path / "a.jsonl"), "--images", str(tmp_path), "--format", "jsonl"]
    command = ["evaluate", "retrieval", str(folder / "model"), *options]
    assert f"mmbert: error: {tmp_path / 'a.png'}" in fails(command, 1, capsys)


@pytest.mark.parametrize(
    ("kind", "options"), [("val", ["--itc_weight", "auto"]), ("train", ["--baseline", "closed_form"])]
)
def test_ranked_images_are_neither_validation_nor_training(
    kind: str, options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the file is called; a file without splits holds one."""

    def error(*more: str, **file: str) -> str:
        return fails(arguments(folder, *options, *more, **file), 2, capsys)

    same = ["--" + kind + "_annotations", str(folder / "images" / ".." / "karpathy.json")]
    for given in ([], same):
        message = error(*given, f"--{kind}_split", "train", "test")
        assert f"{kind}_split=train, test: 'test' of '" in message and "is the split to rank; give" in message
    jsonl: Any = {"file": "captions.jsonl", "format": "jsonl"}
    keys = ["--image_key", "file", "--caption_key", "text"]
    same[1] = str(folder / "images" / ".." / "captions.jsonl")
    for given in ([], same):
        message = error(*keys, *given, **jsonl)
        assert "captions.jsonl' is the file to rank, and one split; give another file with the" in message
    other = [f"--{kind}_annotations", str(folder / "other.jsonl"), f"--{kind}_split", "a", "b"]
    assert f"{kind}_split=a, b: a file of format jsonl is one split; leave" in error(*keys, *other, **jsonl)
    with pytest.raises(UsageError, match=f"{kind}_annotations is missing"):
        evaluate: Any = mmbert.evaluate_retrieval
        name = options[0].strip("-")
        evaluate(folder / "model", Candidates(["a"], ["b"], [0]), **{name: options[1]})


# --- the closed form as a baseline -----------------------------------------------------------------------------------


def test_closed_form_is_ranked_first_and_equals_its_own_computation(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features, projections and cosines by hand, image by image and text by text."""
    other = ["--train_annotations", str(folder / "training.json"), "--train_split", "test"]
    options = ["--scorer", "itc", "--baseline", "closed_form", *other]
    main(arguments(folder, *options, "--out", str(tmp_path / "report.json")))
    found, itc = metrics(tmp_path / "report.json")
    assert (found["scorer"], itc["scorer"]) == ("closed_form", "itc") and found["fusion_passes"] == 0
    assert re.findall(r"^(closed_form|itc) ", capsys.readouterr().out, re.MULTILINE) == ["closed_form", "itc"]
    loaded = mmbert.load(folder / "model")
    model, processor = loaded.model.eval(), loaded.processor
    texts, images = [], []
    with torch.no_grad():
        for i, captions in enumerate(CAPTIONS):
            for caption in captions:
                batch = processor(text=caption, images=folder / "images" / f"{i}.png")
                text = model.mmbert.encode_text(batch["input_ids"], batch["attention_mask"]).hidden_states[0]
                image = model.mmbert.encode_image(batch["pixel_values"]).hidden_states[0]
                texts.append(torch.cat([text[0], text.mean(dim=0)]))
                images.append(torch.cat([image[0], image.mean(dim=0)]))
    owner = [i for i, captions in enumerate(CAPTIONS) for _ in captions]
    maps = canonical_maps(torch.stack(texts), torch.stack(images), directions=len(texts), ridge=0.3)
    text_vectors = torch.stack(texts).double() @ maps.text_weight.T + maps.text_bias
    image_vectors = torch.stack(images).double() @ maps.image_weight.T + maps.image_bias
    firsts = [owner.index(i) for i in range(len(CAPTIONS))]
    scores = F.normalize(image_vectors, dim=1)[firsts] @ F.normalize(text_vectors, dim=1).T
    expected = recall_at_k(scores, torch.tensor(owner))
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["rsum"] > itc["rsum"], "the projections of the untrained model know nothing"


def test_closed_form_ranks_beside_late_interaction_as_beside_one_vector(folder: Path) -> None:
    """The baseline reads the encoders only, which are the same in both models."""
    pairs: Any = {"train_annotations": folder / "training.json", "train_split": "test"}
    options: Any = {"scorer": "itc", "baseline": "closed_form", **pairs}
    data = folder / "karpathy.json", folder / "images"
    found, expected = (mmbert.evaluate_retrieval(folder / name, *data, **options) for name in ("tokens", "model"))
    assert found["closed_form"]["rsum"] == expected["closed_form"]["rsum"]
    assert found["itc"]["rsum"] != expected["itc"]["rsum"] and found["itc"]["fusion_passes"] == 0


def test_baseline_names_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(arguments(folder, "--scorer", "itc", "--baseline", "closed_form"), 1, capsys)
    assert "absent.png" in message
    message = fails(arguments(folder, "--baseline", "closed_form", "--train_split", "val"), 1, capsys)
    assert "no image in the split 'val'" in message
    with pytest.raises(UsageError, match="baseline='cca'; allowed are closed_form"):
        mmbert.evaluate_retrieval(folder / "model", folder / "karpathy.json", folder / "images", baseline="cca")


def test_training_pairs_of_the_baseline_may_be_in_another_file(folder: Path, tmp_path: Path) -> None:
    candidates = Candidates.from_examples(tiny_examples(tmp_path, CAPTIONS))
    options: Any = {"scorer": "itc", "baseline": "closed_form"}
    with pytest.raises(UsageError, match="train_annotations is missing"):
        mmbert.evaluate_retrieval(folder / "model", candidates, **options)
    file: Any = {"train_annotations": folder / "karpathy.json", "train_split": "test"}
    of_file = mmbert.evaluate_retrieval(folder / "model", candidates, folder / "images", **options, **file)
    same = mmbert.evaluate_retrieval(
        folder / "model", folder / "training.json", folder / "images", **options, **{**file, "train_split": ["test"]}
    )
    assert of_file["closed_form"]["rsum"] == same["closed_form"]["rsum"]
