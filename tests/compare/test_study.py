"""The stored studies in docs/study/ have the options of their files in configs/compare/."""

from pathlib import Path

import numpy as np
import pytest

from mmbert.compare.folder import check_same_comparison, previous_primary
from mmbert.compare.plan import list_arms, load_comparison
from mmbert.compare.rows import read_all_outcomes, read_rows
from mmbert.compare.specs import Settings

ROOT = Path(__file__).parents[2]
STUDIES = sorted(folder.name for folder in (ROOT / "docs/study").iterdir() if folder.is_dir())


@pytest.mark.parametrize("name", STUDIES)
def test_stored_study_has_every_arm_of_its_comparison(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # paths in the files start there
    out = Path("docs/study") / name
    comparison = load_comparison(f"configs/compare/{name}.yaml")
    rows = read_rows(out)
    settings = Settings(out, 1, False, [], "")
    specs = check_same_comparison(comparison, settings, rows)  # raises where a row is of another comparison
    arms = [arm.name for arm in list_arms(comparison)]
    assert list(specs) == arms and sorted(rows) == sorted(arms)
    assert all(row["status"] == "done" for row in rows.values())
    assert previous_primary(comparison, out, rows) is None
    for arm, items in read_all_outcomes(out, arms).items():
        for measure, outcomes in items.items():
            assert np.mean(outcomes.values) == pytest.approx(rows[arm]["results"][measure], abs=1e-6), (arm, measure)
