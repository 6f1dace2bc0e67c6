"""Fine-tuning runs of the command line: from a pretrained model, with what the image is worth beside every score."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from interrupted import killed, results, trace, weights
from processes import ROOT, finish, start

from mmbert.cli.main import main
from mmbert.data.readers.vqa import read_annotations, read_questions, read_results
from mmbert.inference.loading import load_folder
from mmbert.metrics.vqa import AnsweredQuestion, vqa_accuracy
from mmbert.model.initialization import build_model
from mmbert.model.modeling import MMBertForTask
from mmbert.model.options import ModelOptions
from mmbert.training.checkpoints import step_of

CONFIGS = {"vqa": "configs/finetune/vqa_shapes.yaml", "decision": "configs/finetune/snli_ve.yaml"}
SHORT = ["--trainer.max_epochs=1", "--trainer.precision=32-true", "--threads=1"]


def options(tiny_tasks: dict[str, list[str]], task: str, root: Path, *more: str) -> list[str]:
    return [
        "--config",
        str(ROOT / CONFIGS[task]),
        *tiny_tasks[task],
        *SHORT,
        f"--trainer.default_root_dir={root}",
        *more,
    ]


def finetune(tiny_tasks: dict[str, list[str]], task: str, root: Path, *more: str) -> None:
    main(["fit", *options(tiny_tasks, task, root, "--name=run", *more)])


@pytest.mark.parametrize("task", CONFIGS)
def test_run_leaves_scores_with_and_without_the_image(
    task: str, tiny_tasks: dict[str, list[str]], tmp_path: Path
) -> None:
    finetune(tiny_tasks, task, tmp_path)
    found = results(tmp_path)
    names = ("accuracy", "accuracy_blank", "accuracy_shuffled", "prior_majority", "prior_text", "ceiling", "loss")
    for split in ("val", "test"):
        for name in names:
            assert f"{split}/{task}_{name}" in found
    model, _ = load_folder(tmp_path / "run/model")
    assert isinstance(model, MMBertForTask) and model.config.labels
    best = next((tmp_path / "run/checkpoints").glob("best-*.ckpt"))
    assert torch.load(best, weights_only=True)["mmbert"]["labels"] == model.config.labels
    assert (tmp_path / "run/curves.png").is_file()


def test_predictions_score_as_the_run_says(tiny_tasks: dict[str, list[str]], shapes: Path, tmp_path: Path) -> None:
    finetune(tiny_tasks, "vqa", tmp_path)
    questions = read_questions(shapes / "annotations/questions_test.json")
    answers = read_annotations(shapes / "annotations/answers_test.json")
    said = read_results(tmp_path / "run/predictions_test.json", questions)  # each question once, no other
    score = vqa_accuracy(
        AnsweredQuestion(i, said[i], a.answers, a.question_type, a.answer_type) for i, a in answers.items()
    )
    assert round(100 * results(tmp_path)["test/vqa_accuracy"], 2) == score["overall"]


def test_pretrained_weights_arrive_and_the_head_is_fresh(
    tiny: list[str],
    tiny_tasks: dict[str, list[str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = str(ROOT / "configs/pretrain/shapes_plain.yaml")
    main(["fit", "--config", config, *tiny, *SHORT, f"--trainer.default_root_dir={tmp_path}", "--name=before"])
    before = tmp_path / "before/model"
    of_data = [option for option in tiny_tasks["vqa"] if option.startswith("--data.")]
    caplog.set_level("INFO", logger="mmbert")
    main(["fit", "--config", str(ROOT / CONFIGS["vqa"]), *of_data, *SHORT, f"--model.pretrained={before}",
          f"--trainer.default_root_dir={tmp_path}", "--name=run", "--optim.lr=1e-12",
          "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"])  # fmt: skip
    assert "newly initialized: task (6)" in caplog.text
    old, new = load_folder(before)[0].state_dict(), load_folder(tmp_path / "run/model")[0].state_dict()
    for name, value in new.items():
        if name.startswith("mmbert."):
            torch.testing.assert_close(value, old[name], rtol=0, atol=1e-6)
    first = yaml.safe_load((tmp_path / "before/config.yaml").read_text())["model"]
    assert first["vocab_size"] == load_folder(before)[0].config.vocab_size != 30522, "what was built"
    told = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]
    assert told["task"] == "vqa" and "hidden_size" not in told, "another model may be named instead"
    for key in ("fusion_layers=5", "hidden_size=384", "image_model=vit_small_patch16_224", "fusion=late"):
        with pytest.raises(SystemExit):  # 384 is what hidden_size is where nothing is said
            main(["fit", f"--model.{key}", "--config", str(ROOT / CONFIGS["vqa"]), *of_data,
                  f"--model.pretrained={before}"])  # fmt: skip
        assert f"model.{key.split('=')[0]}=" in capsys.readouterr().err
    (tmp_path / "lone.yaml").write_text(f"model: {{pretrained: {before}, hidden_size: 384}}")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "lone.yaml"), *tiny[-14:]])
    assert "model.hidden_size=384, but the pretrained weights have 32" in capsys.readouterr().err
    again = ["test", "--config", str(tmp_path / "run/config.yaml"), "--name=again"]
    with pytest.raises(SystemExit):
        main(again)
    assert "has no head for vqa with these labels" in capsys.readouterr().err
    main([*again, f"--ckpt_path={next((tmp_path / 'run/checkpoints').glob('best-*.ckpt'))}"])
    assert results(tmp_path, "again") == {k: v for k, v in results(tmp_path).items() if k.startswith("test")}
    main(["test", "--config", config, *tiny, f"--model.pretrained={before}", "--name=heads",
          f"--trainer.default_root_dir={tmp_path}", *SHORT])  # fmt: skip
    found = results(tmp_path, "before")
    assert results(tmp_path, "heads") == {k: v for k, v in found.items() if k.startswith("test")}


def test_checkpoint_of_other_labels_is_told(
    tiny_tasks: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(tiny_tasks, "vqa", tmp_path)
    checkpoint = next((tmp_path / "run/checkpoints").glob("best-*.ckpt"))
    more = [f"--ckpt_path={checkpoint}", "--name=other", "--data.min_answer_count=30"]
    with pytest.raises(SystemExit):
        main(["test", *options(tiny_tasks, "vqa", tmp_path, *more)])
    assert "the checkpoint has 16 labels" in capsys.readouterr().err


def test_texts_without_images_say_so(
    tiny_tasks: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A forgotten folder is told; no image is a model of its own."""
    with pytest.raises(SystemExit):
        finetune(tiny_tasks, "decision", tmp_path, "--data.images=")
    assert "data.images is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        finetune(tiny_tasks, "decision", tmp_path, "--data.image_key=null")
    assert "leave data.images out" in capsys.readouterr().err
    finetune(tiny_tasks, "decision", tmp_path, "--data.images=", "--data.image_key=null", "--trainer.max_steps=1")
    assert load_folder(tmp_path / "run/model")[0].config.num_images == 0


def test_folder_that_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"is no folder of a saved mmbert.*RUN/model"):
        build_model(ModelOptions(pretrained=str(tmp_path)))


def test_killed_finetuning_resumes_to_the_bit(tiny_tasks: dict[str, list[str]], tmp_path: Path) -> None:
    more = (
        "--checkpoint.every_n_steps=1",
        "--trainer.max_steps=8",
        "--model.hidden_dropout_prob=0.1",
        "--data.crop=0.7",
    )
    finetune(tiny_tasks, "vqa", tmp_path / "whole", *more)
    killed(lambda: finetune(tiny_tasks, "vqa", tmp_path / "killed", *more), after_batch=4)
    finetune(tiny_tasks, "vqa", tmp_path / "killed", *more, "--resume=auto")
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path / "killed").items())
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_a_test_split_can_not_reach_what_is_selected(
    tiny_tasks: dict[str, list[str]], shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other answers in the test split change its score and nothing else; and it can't be named as the monitor."""
    answers = json.loads((shapes / "annotations/answers_test.json").read_text())
    for record in answers["annotations"][1:]:  # a split without any known answer is refused
        record["multiple_choice_answer"] = "nothing"
        record["answers"] = [{**a, "answer": "nothing"} for a in record["answers"]]
    false = tmp_path / "answers_test.json"
    false.write_text(json.dumps(answers))
    more = ("--trainer.max_epochs=3", "--optim.lr=3e-3")
    finetune(tiny_tasks, "vqa", tmp_path / "true", *more)
    finetune(tiny_tasks, "vqa", tmp_path / "false", *more, f"--data.annotations.test={false}")
    assert trace(tmp_path / "true") == trace(tmp_path / "false")
    best = [next((tmp_path / name / "run/checkpoints").glob("best-*.ckpt")) for name in ("true", "false")]
    assert step_of(best[0]) == step_of(best[1])
    one, two = results(tmp_path / "true"), results(tmp_path / "false")
    assert two["test/vqa_accuracy"] <= 1 / len(answers["annotations"]) < one["test/vqa_accuracy"]
    assert {k: v for k, v in one.items() if k.startswith("val")} == {
        k: v for k, v in two.items() if k.startswith("val")
    }
    with pytest.raises(SystemExit):
        finetune(tiny_tasks, "vqa", tmp_path / "x", "--checkpoint.monitor=test/vqa_accuracy")
    assert "allowed are val/vqa_accuracy" in capsys.readouterr().err


def test_scores_are_the_same_for_any_batches_loaders_and_processes(
    tiny_tasks: dict[str, list[str]], tmp_path: Path
) -> None:
    """Counts and answers exactly, the loss to 1e-5; 91 questions of 2 processes come out uneven."""
    finetune(tiny_tasks, "vqa", tmp_path / "run")
    checkpoint = next((tmp_path / "run/run/checkpoints").glob("best-*.ckpt"))
    found, said = {}, {}
    for name, more in {"plain": ("16", "0"), "batches": ("7", "0"), "loaders": ("5", "2")}.items():
        where = ["--name=run", f"--ckpt_path={checkpoint}", f"--data.eval_batch_size={more[0]}"]
        main(["test", *options(tiny_tasks, "vqa", tmp_path / name, *where, f"--data.num_workers={more[1]}")])
    where = ["--name=run", f"--ckpt_path={checkpoint}", "--data.eval_batch_size=7"]
    test = ["test", "--config", str(ROOT / CONFIGS["vqa"])]
    finish(start(tiny_tasks["vqa"], tmp_path / "processes", *where, of=test, batch_size=16))
    for name in ("plain", "batches", "loaders", "processes"):
        found[name] = results(tmp_path / name)
        said[name] = (tmp_path / name / "run/predictions_test.json").read_text()
    for name in ("batches", "loaders", "processes"):
        assert said[name] == said["plain"], name
        loss = found[name].pop("test/vqa_loss")
        assert loss == pytest.approx(found["plain"]["test/vqa_loss"], rel=1e-5)
        assert found[name] == {k: v for k, v in found["plain"].items() if k != "test/vqa_loss"}
