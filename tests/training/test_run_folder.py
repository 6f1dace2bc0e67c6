"""The run's folder: its name, and what stands in its way."""

import os
from pathlib import Path

import pytest

from mmbert.errors import UsageError
from mmbert.training.run_folder import make_folder, metric_rows, new_run_folder, print_results


def test_taken_name_gets_a_number(tmp_path: Path) -> None:
    assert [new_run_folder(tmp_path / "runs", "a").name for _ in range(3)] == ["a", "a-2", "a-3"]


@pytest.mark.parametrize("name", ["", ".", "..", "../elsewhere", "/elsewhere", "a\0b"])
def test_name_of_a_run_stays_below_the_root(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"name=.*a folder below trainer.default_root_dir"):
        new_run_folder(tmp_path, name)
    assert new_run_folder(tmp_path, "group/a").parent == tmp_path / "group"


def test_dangling_link_and_file_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "not/mounted")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"link is a link to .*not/mounted, which does not exist"):
        new_run_folder(tmp_path / "link", "a")
    for root in ("file", "file/deeper"):
        with pytest.raises(UsageError, match="file is a file"):
            new_run_folder(tmp_path / root, "a")
    with pytest.raises(UsageError, match="is a link to"):
        make_folder(tmp_path / "link" / "a")


def test_missing_permission_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*_: object, **__: object) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(UsageError, match="Permission denied; choose another one"):
        new_run_folder(tmp_path, "a")


def test_table_lists_the_most_wanted_metrics_first_and_recalls_in_order() -> None:
    names = ["mlm_loss", "text_to_image/R@10", "text_to_image/R@5", "text_to_image/R@1", "itm_accuracy", "rsum"]
    names += ["image_to_text/R@1", "retrieval_images", "vqa_accuracy"]
    splits, rows = metric_rows({**{f"test/{name}": 0.5 for name in names}, "val/rsum": 1.0, "run/seed": 1})
    assert splits == ["val", "test"]
    assert [row[0] for row in rows] == [
        "vqa_accuracy", "image_to_text/R@1", "text_to_image/R@1", "text_to_image/R@5", "text_to_image/R@10", "rsum",
        "itm_accuracy", "mlm_loss", "retrieval_images",
    ]  # fmt: skip
    assert rows[5] == ["rsum", "1", "0.5"]


def test_table_of_a_run_names_its_retrieval_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    print_results({"test/text_to_image/R@1": 0.5}, folder=Path("x"))
    assert "1 caption per image" in capsys.readouterr().out
    print_results({"test/vqa_accuracy": 0.5}, folder=Path("x"))
    assert "caption" not in capsys.readouterr().out
