"""What a user reads after a mistake: one sentence, the right exit code, no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmbert.cli.main import main

ROOT = Path(__file__).parents[2]


def message(
    capsys: pytest.CaptureFixture[str],
    code: int,
    arguments: list[str],
    *,
    config: str = "configs/pretrain/shapes_plain.yaml",
) -> str:
    """Runs `fit`, expects the exit code and returns the one line that was printed as error."""
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(ROOT / config), *arguments])
    assert stopped.value.code == code
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("mmbert: error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.fusoin=early"], ["model.fusoin", "Did you mean 'model.fusion'?"]),
        (["--modle.fusion=early"], ["Did you mean 'model.fusion'?"]),
        (["--model.fusion=earyl"], ["'earyl'", "early, late, late_bilinear, hybrid", "Did you mean 'early'?"]),
        (["--model.text_layers=two"], ["model.text_layers", "int", "two"]),
        (["--model.text_layers=-1"], ["text_layers=-1", "0 or more"]),
        (["--model.num_attention_heads=7"], ["num_attention_heads=7", "hidden_size=32", "1, 2, 4"]),
        (["--model.image_size=36"], ["image_size=36", "patch size 16", "32 and 48"]),
        (["--model.objectives={mlm: 1, imt: 1}"], ["'imt'", "mlm, itm, itc", "Did you mean 'itm'?"]),
        (["--model.objectives={itm: {negative: hard}}"], ["'negative'", "Did you mean 'negatives'?"]),
        (["--model.objectives={mlm: heavy}"], ["objectives.mlm", "'heavy'", "number"]),
        (["--model.text_layers=0", "--model.fusion=early"], ["objectives.itc", "no contextual output"]),
        (["--model.image_model=vit_tiny_patch61_224"], ["vit_tiny_patch61_224"]),
        (["--model.text_pretrained=./nowhere"], ["./nowhere"]),
        (["--model.image_pretrained=./nowhere"], ["./nowhere", "no folder"]),
        (["--data.tokenizer=./nowhere"], ["./nowhere"]),
        (["--data.batch_size=0"], ["data.batch_size=0", "1 or more"]),
        (["--data.batch_size=100"], ["data.batch_size=100", "64 training pairs"]),
        (["--data.format=cocoo"], ["cocoo", "coco, karpathy, jsonl, csv", "Did you mean 'coco'?"]),
        (["--optim.schedule=cosin"], ["optim.schedule", "'cosin'", "cosine, linear, constant"]),
        (["--optim.lr=0"], ["optim.lr=0", "above 0"]),
        (["--model.task=vqa", "--optim.first_stage=mim", "--optim.first_stage_steps=8"],
         ["optim.first_stage='mim'", "model.task=vqa has none", "leave first_stage and first_stage_steps out"]),
        (["--optim.freeze_image=9"], ["freeze", "9", "from 1 to 1"]),
        (["--optim.freeze_image=1", "--model.objectives={mlm: 1, mim: 1}"],
         ["mim trains the image encoder", "optim.freeze_image=1"]),
        (["--optim.freeze_image=all", "--data.cache=cache", "--model.objectives={mlm: 1, mim: 1}"],
         ["mim trains the image encoder", "optim.freeze_image=all"]),
        (["--evaluation.test_scorer=icm"], ["evaluation.test_scorer='icm'", "itc, itm"]),
        (["--checkpoint.monitor=val/itm_auc"], ["val/itm_auc", "Did you mean 'val/itm_auroc'?"]),
        (["--evaluation.val_scorer=itc", "--model.objectives={mlm: 1, itm: 1}"],
         ["evaluation.val_scorer='itc'", "auto, itm"]),
        (["--evaluation.test_images=-1"], ["evaluation.test_images=-1", "0 to rank nothing"]),
        (["--model.objectives={mlm: null}"], ["objectives.mlm", "weight None"]),
        (["--model.objectives={mlm: 1, itm: {weight: null}}"], ["objectives.itm", "weight None"]),
        (["--model.objectives={mlm: 1, imt: 0}"], ["'imt'", "Did you mean 'itm'?"]),
        (["--model.objectives={mlm: 1, itm: {weight: 0, negative: hard}}"], ["'negative'"]),
        (["--model.objectives.itc.temperature=1.0"], ["objectives.itc.temperature=1.0", "0.01 to 0.5"]),
        (["--model.objectives.itc.pooler=[text, image]"], ["objectives.itc.pooler=['text', 'image']", "none, text"]),
        (["--model.objectives.itc.temperature=warm"], ["objectives.itc.temperature='warm'", "a number"]),
        (["--model.fusion=early", "--model.fusion_layers=0"], ["fusion_layers=0", "not depend on the image"]),
        (["--data.val_size=0"], ["data.val_size=0", "null for all"]),
        (["--data.annotations={train: a.json, vall: b.json}"], ["data.annotations.vall", "Did you mean 'val'?"]),
        (["--data.caption_key=text"], ["coco", "caption_key"]),
        (["--data.text_key=question"], ["data.text_key", "model.task"]),
        (["--data.image_key=[a, b]"], ["data.image_key", "one field"]),
        (["--data.images="], ["data.images is missing"]),
        (["--trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val=-1", "0 for no clipping"]),
        (["--trainer.logger=false"], ["trainer.logger=false", "leave it out"]),
        (["--ckpt_path=tests/tiny.py", "--resume=auto"], ["--resume", "leave --ckpt_path out"]),
        (["--base=configs/base.yaml"], ["--base=configs/base.yaml", "a key of YAML files"]),
        (["--seed_everything=-1"], ["--seed_everything -1", "from 0 to 4,294,967,295"]),
        (["--seed_everything=4294967296"], ["from 0 to 4,294,967,295"]),
        (["--trainer.max_epochs=-2"], ["error: trainer: `max_epochs` must be a non-negative integer or -1"]),
        (["--trainer.max_epoch=3"], ["Did you mean 'trainer.max_epochs'?"]),
        (["--ckpt_path=nowhere.ckpt"], ["nowhere.ckpt", "no such file"]),
    ],
    ids=lambda value: value[0].lstrip("-").split("=")[0] if isinstance(value, list) and value[0][:2] == "--" else "",
)  # fmt: skip
def test_usage_mistake_is_told_in_one_sentence(
    arguments: list[str], expected: list[str], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = message(capsys, 2, [*tiny, f"--trainer.default_root_dir={tmp_path}", *arguments])
    for part in expected:
        assert part in line
    assert list(tmp_path.iterdir()) == [], "nothing is written"


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("model: {hiden_size: 3}", "Did you mean 'model.hidden_size'?"),
        ("modle: {fusion: early}", "Did you mean 'model.fusion'?"),
        ("model: {fusion: no}", "model.fusion: expected a str"),
        ("base: nowhere.yaml", "nowhere.yaml"),
        ("base: own.yaml", "builds on itself"),
        ("seed_everything: null", "--seed_everything None: a number from 0 to 4,294,967,295"),
        ("name: null", "name: expected the name of the run's folder. Got value: null"),
    ],
)
def test_mistake_in_a_yaml_is_told_in_one_sentence(
    yaml: str, expected: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text(yaml)
    assert expected in message(capsys, 2, [*tiny, "--config", str(tmp_path / "own.yaml")])


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("model: {fusion: early}\noptim: {lr: 1}\nmodel: {text_layers: 1}", "own.yaml:3: the key 'model' again"),
        ("model:\n  fusion: early\n  hidden_size: 32\n  fusion: late", "own.yaml:4: the key 'fusion' again"),
        ("model.fusion: early", "own.yaml:1: the key 'model.fusion'; expected model: {fusion: ...}"),
    ],
)  # fmt: skip
def test_key_that_would_be_lost_is_told_with_its_line(
    yaml: str, expected: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text(yaml)
    assert expected in message(capsys, 1, [*tiny, "--config", str(tmp_path / "own.yaml")])


@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_evaluation_of_no_weights_is_refused(
    subcommand: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither are random weights judged, nor are the results of a run overwritten."""
    command = [
        subcommand,
        "--config",
        str(ROOT / "configs/pretrain/shapes_plain.yaml"),
        *tiny,
        f"--trainer.default_root_dir={tmp_path}",
    ]
    for more, expected in (
        ([], "would evaluate random weights"),
        (["--resume=auto"], "takes --ckpt_path RUN/checkpoints"),
    ):
        with pytest.raises(SystemExit):
            main([*command, *more])
        assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_splits_that_are_not_used_and_a_missing_val_are_told(
    tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    records = []
    for number, part in enumerate(("train",) * 16 + ("extra",) * 3):
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{number}.png")
        records.append({"image": f"{number}.png", "caption": "a red circle", "part": part})
    caplog.set_level("INFO", logger="mmbert")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    options = {"format": "jsonl", "annotations": tmp_path / "pairs.jsonl", "images": tmp_path, "split_key": "part"}
    more = [*(f"--data.{key}={value}" for key, value in options.items()), "--trainer.fast_dev_run=1"]
    main(["fit", "--config", str(ROOT / "configs/pretrain/shapes_plain.yaml"), *tiny, *more])
    assert "none is called train, val or test...: {'extra': 3}" in caplog.text
    assert "no split 'val': no best checkpoint is chosen" in caplog.text
    with pytest.raises(SystemExit):
        main(
            [
                "validate",
                "--config",
                str(ROOT / "configs/pretrain/shapes_plain.yaml"),
                *tiny,
                *more,
                "--ckpt_path",
                __file__,
            ]
        )
    assert "validate: the data has no split 'val'" in capsys.readouterr().err


def test_yaml_that_is_no_yaml_names_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.yaml").write_text("model:\n  fusion: [early\n")
    assert "own.yaml:3" in message(capsys, 1, ["--config", str(tmp_path / "own.yaml")])


def coco(tmp_path: Path, shapes: Path, **changes: object) -> list[str]:
    """Options for a copy of the training annotations with changes to the first image's record."""
    content = json.loads((shapes / "annotations/captions_train.json").read_text())
    content["images"][0].update(changes)
    (tmp_path / "train.json").write_text(json.dumps(content))
    return [f"--data.annotations={{train: {tmp_path}/train.json}}", f"--trainer.default_root_dir={tmp_path}/runs"]


def test_missing_annotation_file_is_named(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.json" in message(capsys, 1, [*tiny, "--data.annotations={train: nowhere.json}"])


def test_missing_image_is_named_with_its_record(
    tiny: list[str], tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = message(capsys, 1, [*tiny, *coco(tmp_path, shapes, file_name="train/nowhere.png")])
    assert "train.json:images[0]" in line
    assert "nowhere.png" in line


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_stops_the_run_with_its_name(
    workers: int, tiny: list[str], tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shapes / "images/broken.png").write_bytes(b"<html>not found</html>")
    options = [*tiny, *coco(tmp_path, shapes, file_name="broken.png"), f"--data.num_workers={workers}"]
    line = message(capsys, 1, [*options, "--data.batch_size=64", "--trainer.max_epochs=1"])
    assert "broken.png" in line
    assert "HTML" in line


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], []),
        (["fit", "--help"], []),
        (["fit", "--modle.fusion=early"], []),
        (["fit", "--config", "configs/pretrain/shapes_plain.yaml", "--optim.lr=fast"], []),
        (["match", "--help"], []),
        (["ask", "model"], []),
        (["fit", "--config", "configs/pretrain/shapes_plain.yaml", "--trainer.max_epoch=3"], ["torch", "lightning"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_help_and_option_errors_come_before_heavy_imports(arguments: list[str], allowed: list[str]) -> None:
    code = (
        "import sys; from mmbert.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: print('exit', e.code)\n"
        "print('imported', *[m for m in ('torch', 'lightning', 'transformers', 'timm') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *_, code_line, imported = done.stdout.splitlines()
    assert code_line == ("exit 0" if "--help" in arguments else "exit 2"), done.stderr
    assert allowed or imported == "imported"


def test_yaml_is_utf_8_in_any_locale(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# größe\nname: größe\n", encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = (
        "from mmbert.training.run_options import run_parser\n"
        f"print(ascii(run_parser(lightning=False).parse_args(['--config', {str(tmp_path / 'a.yaml')!r}]).name))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "'gr\\xf6\\xdfe'\n", done.stderr


def test_bare_console_script_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 0
    assert "fit" in capsys.readouterr().out


def test_share_of_captions_that_are_cut_is_told_once(
    tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for length, times in ((40, 0), (4, 1)):
        caplog.clear()
        options = [f"--data.max_text_length={length}", "--trainer.fast_dev_run=1"]
        main(["fit", "--config", str(ROOT / "configs/pretrain/shapes_plain.yaml"), *tiny, *options])
        assert caplog.text.count("cuts 100.0 % of captions") == times
