"""The report of a comparison has the numbers of the rows and the results of the tests, on any screen."""

import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare.browser import CHROMIUM, Tab, browser
from compare.made import CATEGORIES, comparison, failed, made
from matplotlib.figure import Figure as Canvas
from PIL import Image
from scipy import stats

from mmbert.compare.report import drawing, plots, render, write_report, write_report_again
from mmbert.compare.report.document import Document, build_document
from mmbert.compare.report.outcomes import Outcomes
from mmbert.errors import DataError

CHANCES = {"early": 0.62, "late": 0.5, "hybrid": 0.62}  # early and hybrid are equal, late guesses
EVIL = "<script>alert(1)</script> | `code` **bold** [x](y) & \"quoted\" 'single' \x1b[31m\nnew line \ud800"
EVIL_VISIBLE = EVIL.split("\x1b")[0]


def image(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    drawing_or_photo = np.full((300, 500, 3), 90, np.uint8)
    if kind == "JPEG":
        drawing_or_photo = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    Image.fromarray(drawing_or_photo).save(buffer, kind)
    return buffer.getvalue()


def examples() -> list[dict[str, Any]]:
    outcomes = {"early": True, "late": False, "hybrid": True}
    scene = {"caption": "a red circle above a square", "foil": "a square above a red circle", "outcomes": outcomes}
    return [
        {**scene, "image": image(), "category": "swap_object"},
        {**scene, "image": image("JPEG"), "category": "swap_object"},
        {
            "image": b"no image",
            "caption": EVIL,
            "foil": EVIL,
            "category": EVIL,
            "outcomes": {EVIL: False, "late": EVIL},
        },
    ]


def document(chances: Mapping[str, float] = CHANCES, **more: Any) -> Document:
    rows, items = made(chances, **more)
    return build_document(Outcomes(rows, items, comparison(list(chances))), [])


def without_plots(found: Document) -> Document:
    """Drawing takes the longest."""
    return found._replace(sections=[section._replace(figures=[]) for section in found.sections])


def table(text: str, title: str) -> list[list[str]]:
    """Cells of the Markdown table under `title`, its head first."""
    lines = text.split(f"**{title}**")[1].splitlines()
    found = itertools.takewhile(lambda line: line.startswith("|"), itertools.dropwhile(lambda x: "|" not in x, lines))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in found]
    return [cells[0], *cells[2:]]


def mean(rows: Sequence[Mapping[str, Any]], strategy: str, *path: str, fraction: float = 1.0) -> float:
    found = []
    for row in rows:
        if row["strategy"] == strategy and row["fraction"] == fraction and row["status"] == "done":
            value: Any = row
            for key in path:
                value = value[key]
            found.append(value)
    assert found
    return sum(found) / len(found)


class Page(HTMLParser):
    """Text, tags and attributes of a page whose tags all close in order."""

    VOID = ("meta", "img", "br", "link", "input", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    rows = [*made(CHANCES, fractions=(0.1, 1.0))[0], failed("late", 3)]
    rows[0]["budget"]["missed_by"] = 0.08
    return rows


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    out = tmp_path_factory.mktemp("report")
    write_report(out, rows, made(CHANCES, fractions=(0.1, 1.0))[1], comparison(list(CHANCES)), examples())
    return out


@pytest.fixture(scope="module")
def text(report: Path) -> str:
    return (report / "report.md").read_text()


@pytest.fixture(scope="module")
def web(report: Path) -> Page:
    return Page((report / "report.html").read_text())


def test_only_built_in_differences_are_significant(text: str, web: Page) -> None:
    claim = "early and hybrid are better than late on foils overall"
    assert f"**{claim}.**" in text
    assert claim in web.text
    for words in (text, " ".join(web.text)):
        assert re.search(r"early is better than late on foils overall by \d+\.\d points", words)
        assert "No significant difference between early and hybrid on foils overall" in words
        assert not re.search(r"(early|hybrid) is better than (early|hybrid)|late is better than", words)


def test_equal_strategies_are_not_significantly_different() -> None:
    found = document({"a": 0.55, "b": 0.55, "c": 0.55})
    assert found.headline == "No significant difference between a, b and c"
    assert not re.search(r"\b[abc] (is|are) better", render.render_markdown(found))
    results = [row[-1] for section in found.sections for t in section.tables if "result" in t.head for row in t.rows]
    assert len(results) == 3 * (1 + len(CATEGORIES)) and set(results) == {"not significant"}


def test_results_of_many_strategies_are_grouped() -> None:
    found = document({f"s{i:02}": 0.45 + 0.025 * i for i in range(12)}, seeds=range(5))
    assert re.fullmatch(
        r"s11 is better than \d+ of 11 others on foils overall; \d+ of 66 differences between pairs are significant",
        found.headline,
    )
    text = found.sections[0].text
    assert len(text) <= 14 and any(line.startswith("s11 is better than s00, s01") for line in text)
    web = Page(render.render_html(without_plots(found)))
    assert web.tags["details"] == 2, "the tables of 66 pairs are collapsed"


def with_shares(chances: Mapping[str, float], seeds: Sequence[int]) -> Document:
    """A comparison whose primary measure, the share of the text, is built with the outcomes of the foils."""
    rows, items = made(chances, seeds=seeds)
    for own in items.values():
        own |= {"shares/text": own["foils/overall"], "shares/text:image": own["foils/overall:image"]}
    for row in rows:
        row["results"]["shares/text"] = row["results"].get("foils/overall")
    return build_document(Outcomes(rows, items, comparison(list(chances), seeds, primary=["shares/text"])), [])


def test_a_measure_without_a_better_direction_is_higher_and_never_better() -> None:
    text = render.render_markdown(with_shares(CHANCES, range(3)))
    assert "early and hybrid are higher than late on shares text" in text
    assert {row[-1] for row in table(text, "Tests on primary measures")[1:]} >= {"early is higher", "not significant"}
    assert not re.search(r"better[^.|]* on shares|\| shares text \|.*better", text)
    assert "early is better" in text, "on foils overall"
    many = with_shares({f"s{i:02}": 0.45 + 0.025 * i for i in range(12)}, range(5))
    assert re.match(r"s11 is higher than \d+ of 11 others on shares text;", many.headline)


def test_quality_table_has_the_means_of_the_rows(text: str, rows: list[dict[str, Any]]) -> None:
    head, *body = table(text, r"retrieval: 200 images, 1 caption each, ranked by two\_stage with k=16")
    assert head == ["strategy", "text to image R@1", "image to text R@1", "seeds"]
    assert [row[0] for row in body] == [*CHANCES, "chance or prior"]
    for name, text_to_image, image_to_text, seeds in body[:-1]:
        assert seeds == "3"
        values = [r["results"]["retrieval/text_to_image/R@1"] for r in rows
                  if r["strategy"] == name and r["fraction"] == 1 and r["status"] == "done"]  # fmt: skip
        low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        assert text_to_image == f"{sum(values) / 3:.3f} ± {(high - low) / 2:.3f}"
        assert image_to_text.startswith(f"{mean(rows, name, 'results', 'retrieval/image_to_text/R@1'):.3f} ±")
    assert body[-1][1:3] == ["0.005", "0.005"]


def test_intervals_hold_their_means(text: str, rows: list[dict[str, Any]]) -> None:
    *body, guessed = table(text, "foils")[1:]
    assert guessed == ["chance or prior", "0.500", "–"] and len(body) == len(CHANCES)
    for name, cell, _ in body:
        value, low, high = map(float, re.findall(r"[\d.]+", cell))
        assert value == pytest.approx(mean(rows, name, "results", "foils/overall"), abs=6e-4)
        assert low < value < high


def test_visual_gains_are_the_differences_to_the_ablations(text: str, rows: list[dict[str, Any]]) -> None:
    head, *body = table(text, "foils overall, image ablations")
    assert head[1:4] == ["true input", "blank image", "shuffled image"]
    for row in body:
        own = mean(rows, row[0], "results", "foils/overall")
        blank = mean(rows, row[0], "results", "foils/overall/blank")
        assert row[1:3] == [f"{own:.3f}", f"{blank:.3f}"]
        found, low, high = map(float, re.findall(r"[+-][\d.]+", row[4]))
        assert found == pytest.approx(own - blank, abs=6e-4) and low < found < high


def test_tables_of_categories_splits_fractions_and_costs(text: str, rows: list[dict[str, Any]]) -> None:
    head, *body = table(text, "foils overall, by category")
    assert head[1:-1] == ["overall", "count", "replace object", "swap attribute"]
    assert body[-1] == ["chance or prior", *["0.500"] * 4, "–"]
    for row in body[:-1]:
        assert row[4].startswith(f"{mean(rows, row[0], 'results', 'foils/swap_attribute'):.3f} (")
    head, *body = table(text, "pretrain itm accuracy, seen and unseen pairs")
    assert head[1:] == ["all", "seen", "unseen", "seen − unseen"]
    seen, unseen = (mean(rows, "late", "results", f"pretrain/{part}/itm_accuracy") for part in ("seen", "unseen"))
    assert body[1][3].startswith(f"{unseen:.3f} (") and body[1][4].startswith(f"{seen - unseen:+.3f} (")
    head, *body = table(text, "Other scores, seen − unseen")
    assert head[1:] == ["pretrain itm auroc"] and all(re.fullmatch(r"\+0\.\d+ ± 0\.\d+", row[1]) for row in body)
    head, *body = table(text, "foils overall, by fraction of the training pairs")
    assert head[1:] == ["10 %", "100 %", "100 % − 10 %"]
    few, all_ = (mean(rows, "early", "results", "foils/overall", fraction=share) for share in (0.1, 1.0))
    low, high = map(float, re.findall(r"[+-]0\.\d+", body[0][3])[1:])
    assert body[0][3].startswith(f"{all_ - few:+.3f} (") and low < all_ - few < high
    assert body[0][1].startswith(f"{mean(rows, 'early', 'results', 'foils/overall', fraction=0.1):.3f} (")
    head, *body = table(text, "Cost")
    costs = dict(zip(head, body[1], strict=True))
    assert costs["parameters"] == "1.71 M" and costs["training FLOPs"] == "1.1e13" and costs["steps"] == "940"
    assert (
        costs["peak memory"] == "2.00 GB" and costs["ms per pair"] == "1.60" and costs["search, 200 x 200"] == "13.3 s"
    )
    seconds = [row["cost"]["wall_seconds"] for row in rows if row["strategy"] == "late" and row["status"] == "done"]
    assert costs["wall time"] == f"{min(seconds) / 60:.3g} min (to {max(seconds) / 60:.3g} min)"
    assert costs["training time"] == "4.42 min", "the slowest is 1 % off"


def test_times_are_those_of_the_fastest_seed_and_uncertain_ones_are_named() -> None:
    rows, items = made(CHANCES)
    for row in rows:
        slow = 3 if (row["strategy"], row["seed"]) == ("early", 1) else 1  # another program ran
        row["cost"] |= {"train_seconds": 250.0 * slow, "samples_per_second": 150.0 / slow}
    outcomes = Outcomes(rows, items, comparison(list(CHANCES)))
    found = build_document(outcomes, [])
    head, early, late, _ = table(render.render_markdown(found), "Cost")
    costs = dict(zip(head, early, strict=True))
    assert costs["training time"] == "4.17 min (to 12.5 min)" and costs["pairs/s in training"] == "150 (to 50)"
    assert dict(zip(head, late, strict=True))["training time"] == "4.17 min"
    (note,) = (t.note for section in found.sections for t in section.tables if t.title == "Cost")
    assert "in training time and pairs/s in training: these are upper bounds" in note
    panels = {panel.title for figure in plots.figures(outcomes) for panel in figure.panels if figure.name == "cost"}
    assert not any("training time" in name for name in panels), "an equal cost of the fastest runs has no axis"


def test_intervals_over_seeds_alone_are_thin_and_dotted() -> None:
    rows, items = made(CHANCES)
    outcomes = Outcomes(rows, items, comparison(list(CHANCES)))
    (quality,) = (figure for figure in plots.figures(outcomes) if figure.name == "quality")
    strokes = {}
    for panel in quality.panels[:2]:
        axes = Canvas().subplots()
        panel.draw(axes)
        line = axes.get_lines()[1]
        strokes[panel.title] = line.get_linewidth(), line.is_dashed()
        if panel.title == "retrieval text to image R@1":
            values = [r["results"]["retrieval/text_to_image/R@1"] for r in rows if r["strategy"] == "early"]
            expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
            assert np.ravel(line.get_xdata()) == pytest.approx(expected)
    assert strokes == {"foils overall": (2.2, False), "retrieval text to image R@1": (1.1, True)}
    assert plots.DOTTED_CAPTION in quality.caption
    one = Outcomes([row for row in rows if row["seed"] == 0], items, {}).interval(
        "early", "retrieval/text_to_image/R@1"
    )
    assert one is not None and math.isnan(one.low)


def test_one_fraction_has_no_low_data_curve() -> None:
    found = document()
    assert "Low-data curve" not in [section.title for section in found.sections]
    assert "low_data" not in [figure.name for section in found.sections for figure in section.figures]


def test_failed_arms_missed_budgets_and_few_seeds_are_reported(text: str, web: Page) -> None:
    assert table(text, "Failed arms")[1] == [
        "late-seed3",
        "pretrain",
        "120",
        "the loss is nan",
        "2.5, 7.25, nan",
    ]
    for words in (text, " ".join(web.text)):
        assert "Failed arms, excluded from all results: late-seed3." in words
        assert "Budgets missed by more than 5 %: early-seed0-10% by +8.0 %." in words
        assert "3 seeds are few" in words
        assert (
            "Primary measures without a test, as they were not measured or have no per-item outcomes: retrieval"
            in words
        )
    assert not any("few" in warning or "missed" in warning for warning in document(seeds=range(5)).warnings)


def test_facts_of_the_comparison_are_reported(text: str) -> None:
    for fact in (
        "equal training FLOPs: 1.1e13 each",
        "3 (0, 1, 2)",
        "data/shapes: 20,000 drawn scenes",
        "torch 2.14.1",
    ):
        assert fact in text
    assert "```bash\nmmbert compare -c configs/compare/quick.yaml\n```" in text


@pytest.mark.parametrize("machines", [("CPU (2 cores)",), ("CPU (2 cores)", "GPU")])
def test_machines_and_dates_are_reported_and_several_machines_are_warned_of(machines: tuple[str, ...]) -> None:
    rows = made(CHANCES)[0]
    for i, row in enumerate(rows):
        row["cost"] |= {"date": f"2026-11-2{i % 4}", "machine": machines[i % len(machines)]}
    found = build_document(Outcomes(rows, {}, {}), [])
    assert ("Dates", "2026-11-20 to 2026-11-23") in found.facts
    assert ("Machine", " and ".join(machines)) in found.facts
    assert any("different machines" in warning for warning in found.warnings) == (len(machines) > 1)


@pytest.mark.parametrize("exploratory", [True, False])
def test_every_table_of_an_exploratory_comparison_is_marked(exploratory: bool) -> None:
    seeds = (0,) if exploratory else (0, 1, 2)
    found = document(seeds=seeds, exploratory=exploratory)
    text, web = render.render_markdown(found), Page(render.render_html(without_plots(found)))
    tables = len(re.findall(r"^\| ---", text, flags=re.M))
    assert tables == web.tags["table"] > 5
    marks = [value for _, name, value in web.attributes if name == "class" and value == "mark"]
    assert text.count("*Exploratory*") == len(marks) == (tables if exploratory else 0)
    if exploratory:
        assert found.headline == "Exploratory: no conclusions"
        assert not re.search(r"(early|late|hybrid) is better", text)


def test_page_has_no_external_resources(report: Path, web: Page) -> None:
    for tag, name, value in web.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert value.startswith(("data:image/", "#")), f"<{tag} {name}={value[:60]}>"
        assert not re.search(r"url\((?!#)", value), f"<{tag} {name}={value[:60]}>"
        assert not name.startswith("on"), f"<{tag} {name}>"
    whole = (report / "report.html").read_text()
    assert "http://" not in whole and "https://" not in whole and "@import" not in whole
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & web.tags.keys()
    assert web.tags["svg"] > 10 and web.tags["img"] == 2 and web.tags["style"] == 1, (
        "a style in a plot would apply to the whole page"
    )
    names = [value for _, name, value in web.attributes if name == "id"]
    assert len(names) == len(set(names)), "identifiers in plots are unique on the page"
    used = {value[1:] for _, name, value in web.attributes if name == "href"}
    assert used and used <= set(names)


def test_texts_of_the_data_are_escaped(text: str, web: Page) -> None:
    visible = " ".join(web.text)
    assert visible.count(EVIL_VISIBLE.strip()) == 5  # caption, foil, category, a strategy, an answer
    assert "\x1b" not in visible and "\x1b" not in text
    assert "<script" not in text
    caption = next(line for line in text.splitlines() if line.startswith("- true: ") and "script" in line)
    assert caption.startswith(r"- true: &lt;script&gt;alert(1)&lt;/script&gt; \| \`code\` \*\*bold\*\* \[x\](y) &amp;")


def test_names_are_escaped() -> None:
    names = ["a|b", "`c`", "<i>d</i>", "$e$", "_f", "x" * 90, "融合", EVIL]
    rows, items = made({name: 0.5 + 0.02 * i for i, name in enumerate(names)})
    rows = [{**row, "results": {**row["results"], "odd/<b>|`m`$": 0.5}, "versions": {"<b>": "|"}} for row in rows]
    rows.append({**failed("a|b", 7), "failure": {"message": EVIL, "step": None, "last_losses": [None, "?"]}})
    described = {
        **comparison(names),
        "name": EVIL,
        "budget_rule": {"match": EVIL},
        "dataset": EVIL,
        "command": f"```\n{EVIL}",
    }
    found = build_document(Outcomes(rows, items, described), [])
    text, whole = render.render_markdown(found), render.render_html(found)
    web = Page(whole)
    assert ">$e$</text>" in whole, "names in plots are not parsed as mathematics"
    assert not {"script", "i", "x"} & web.tags.keys()
    assert web.tags["b"] == 0 and "<i>d</i>" in web.text and "<i>" not in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block
    assert "\n````bash\n```\n" in text and text.endswith("````\n")


def test_long_names_may_break_at_underscores() -> None:
    web = Page(page := render.render_html(without_plots(document({"late_bilinear": 0.6, "a<b_c": 0.5}))))
    assert "<span>late_<wbr>bilinear</span>" in page and "<span>a&lt;b_<wbr>c</span>" in page
    assert not any("<wbr>" in text for text in web.text)


@pytest.mark.parametrize(
    "title", ["one seed", "NaN", "nothing measured", "all failed", "one strategy", "no rows", "bare"]
)
def test_missing_inputs_give_a_report(title: str, tmp_path: Path) -> None:
    rows, items = made(CHANCES)
    described: dict[str, Any] = comparison(list(CHANCES))
    if title == "one seed":
        rows = [row for row in rows if row["seed"] == 0]
    elif title == "NaN":
        for row in rows:
            row["results"] |= {"foils/overall": math.nan, "pretrain/itm_accuracy": None}
            row["curves"]["val/itm_accuracy"][2][1] = math.nan
            row["cost"]["ms_per_pair"] = math.inf
            row["budget"]["missed_by"] = None
        items["early-seed0"]["foils/overall"][3] = np.nan
    elif title == "nothing measured":
        rows, items = [{**row, "results": {}, "curves": {}, "cost": {}, "budget": {}} for row in rows], {}
    elif title == "all failed":
        rows = [failed(name, seed) for name in CHANCES for seed in range(3)]
    elif title == "one strategy":
        rows = [row for row in rows if row["strategy"] == "late"]
    elif title == "no rows":
        rows, items = [], {}
    else:
        rows, described = [{"arm": r["arm"], "strategy": r["strategy"], "status": "done"} for r in rows], {}
    text = (write_report(tmp_path, rows, items, described, []).parent / "report.md").read_text()
    Page((tmp_path / "report.html").read_text())
    assert "nan" not in text.replace("the loss is nan", "").replace("7.25, nan", "").lower()
    assert (" is better than " in text) == (title == "NaN" and "foils count" in text)


def test_exploratory_comparison_has_no_conclusions_with_any_number_of_seeds() -> None:
    found = document(exploratory=True)
    text = render.render_markdown(found)
    assert found.headline == "Exploratory: no conclusions" and "is better than" not in text
    body = table(text, "Tests on primary measures")[1:]
    assert len(body) > 1 and {row[-1] for row in body} == {"exploratory"}


def with_primary(primary: Any, **more: Any) -> Document:
    rows, items = made(CHANCES)
    return build_document(Outcomes(rows, items, comparison(list(CHANCES), primary=primary, **more)), [])


def test_only_named_measures_are_primary() -> None:
    found = with_primary(["foils/overal", "foils/swap_attribute"])  # a typo, and one that was measured
    text = render.render_markdown(found)
    assert {row[0] for row in table(text, "Tests on primary measures")[1:]} == {"foils swap attribute"}
    assert "foils overall" in {row[0] for row in table(text, "Tests on secondary measures")[1:]}
    assert any(w.startswith("Primary measures without a test") and "foils overal." in w for w in found.warnings)


def test_a_typo_makes_no_other_measure_primary() -> None:
    found = with_primary(["foils/overal"])
    text = render.render_markdown(found)
    assert found.headline == "No conclusions: none of the primary measures was measured"
    assert "Tests on primary measures" not in text
    others = {row[0] for row in table(text, "Tests on secondary measures")[1:]}
    assert {"foils overall", "foils count"} <= others
    assert ("Primary measures", "foils overal") in found.facts


@pytest.mark.parametrize("primary", [[], None])
def test_without_a_named_measure_none_is_called_primary(primary: Any) -> None:
    found = with_primary(primary)
    text = render.render_markdown(found)
    assert found.headline.startswith("early and hybrid are better than late on foils overall (no primary measure")
    assert any(w.startswith("No primary measure was named beforehand") for w in found.warnings)
    assert ("Primary measures", "none was named beforehand") in found.facts
    assert {row[0] for row in table(text, "Tests")[1:]} == {"foils overall"}
    assert "Tests on primary measures" not in text and "secondary" not in text


def test_a_change_of_primary_measures_is_reported() -> None:
    changed = "The primary measures were changed after 9 arms had finished; before, they were: foils count."
    assert changed in with_primary(["foils/overall"], primary_before={"primary": ["foils/count"], "arms": 9}).warnings
    assert not any("changed after" in warning for warning in with_primary(["foils/overall"]).warnings)


def test_chance_is_computed_if_it_was_not_measured() -> None:
    rows, items = made(CHANCES)
    for row in rows:
        row["results"] = {k: v for k, v in row["results"].items() if "chance" not in k} | {"retrieval/rsum": 90.0}
        row["cost"] |= {"search_images": 20.0, "search_texts": 60.0}
    found = Outcomes(rows, items, comparison(list(CHANCES)))
    assert found.baseline("foils/overall") == found.baseline("foils/swap_attribute") == 0.5
    assert found.baseline("pretrain/itm_accuracy") == 0.5 and math.isnan(found.baseline("pretrain/mlm_accuracy"))
    # 20 images with 3 captions each. A caption finds its image among the first 5 of 20 in 5 of 20 cases; an image
    # misses its 3 captions with 5 of 60 in 57/60 * 56/59 * 55/58 * 54/57 * 53/56 cases.
    assert found.baseline("retrieval/text_to_image/R@5") == 5 / 20
    missed = math.prod((57 - i) / (60 - i) for i in range(5))
    assert found.baseline("retrieval/image_to_text/R@5") == pytest.approx(1 - missed)
    assert found.baseline("retrieval/image_to_text/R@60") == found.baseline("retrieval/text_to_image/R@100") == 1
    every = [found.baseline(f"retrieval/{way}/R@{k}") for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert found.baseline("retrieval/rsum") == pytest.approx(100 * sum(every))
    rows[0]["config"]["retrieval"]["equal_texts"] = True  # the number of equal texts is not stored
    assert math.isnan(found.baseline("retrieval/text_to_image/R@5"))


def test_each_ranking_names_its_scorer() -> None:
    rows, items = made(CHANCES)
    for row in rows:
        row["results"] |= {"pretrain/text_to_image/R@1": 0.3}
    text = render.render_markdown(build_document(Outcomes(rows, items, comparison(list(CHANCES))), []))
    assert "**pretrain: test of the run, scorer unknown**" in text
    for row in rows:
        row["scorers"] = {"pretrain": "itc" if row["strategy"] == "late" else "itm"}
    found = Outcomes(rows, items, comparison(list(CHANCES)))
    (quality,) = (figure for figure in plots.figures(found) if figure.name == "quality")
    titles = ["retrieval: 200 images, 1 caption each, ranked by two_stage with k=16",
              "pretrain: test of the run, ranked by itm (early and hybrid) and itc (late)"]  # fmt: skip
    for title in titles:
        assert f"**{render.escape_markdown(title)}**" in render.render_markdown(build_document(found, []))
        assert f" {title[0].upper()}{title[1:]}." in quality.caption


def test_seeds_without_items_are_reported() -> None:
    rows, items = made(CHANCES)
    del items["late-seed1"]
    items["early-seed0"]["foils/count"] = items["early-seed0"]["foils/count"] * np.nan
    warned = build_document(Outcomes(rows, items, comparison(list(CHANCES))), []).warnings
    left_out = [warning for warning in warned if warning.startswith("Tested with")]
    why = "as the per-item outcomes of others are missing or incomplete"
    assert left_out == [f"Tested with 2 of 3 finished seeds of late, {why}: foils overall, foils count and 2 others.",
                        f"Tested with 2 of 3 finished seeds of early, {why}: foils count."]  # fmt: skip
    assert not any(warning.startswith("Tested with") for warning in document().warnings)


@pytest.mark.parametrize("reference", ["early", None])
def test_gap_of_measured_times_is_reported(reference: str | None) -> None:
    rows, items = made(CHANCES)
    for row in rows:
        row["budget"] |= {"match": "time", "missed_by": 0.0 if row["strategy"] == "early" else 0.004}
        row["cost"]["train_seconds"] = {"early": 100.0, "late": 104.0, "hybrid": 80.0}[row["strategy"]] + row["seed"]
    described = comparison(list(CHANCES)) | ({"reference": reference} if reference else {})
    warned = build_document(Outcomes(rows, items, described), []).warnings
    assert any(w.startswith("Training times were matched") and w.endswith(": hybrid by -19.8 %.") for w in warned)
    for row in rows:
        row["budget"]["match"] = "flops"
    assert not any("were matched" in w for w in build_document(Outcomes(rows, items, described), []).warnings)


def test_report_describes_which_options_are_stored() -> None:
    rows, items = made(CHANCES)
    old = document()
    assert old.options == "Every explicit option is in results.jsonl; the others have the defaults of mmbert 0.3."
    assert "explicit option is in `results.jsonl`;" in render.render_markdown(old)
    for row in rows:
        row["options"] = {"pretrain": {"seed_everything": row["seed"]}}
    new = build_document(Outcomes(rows, items, comparison(list(CHANCES))), [])
    assert new.options == "Every option of every arm is in results.jsonl."
    assert "is in <code>results.jsonl</code>.</p>" in render.render_html(without_plots(new))
    broken = build_document(Outcomes([*rows, failed("late", 3)], items, comparison(list(CHANCES))), [])
    assert broken.options == "Every option of every finished arm is in results.jsonl."


def test_ablated_inputs_name_the_section() -> None:
    rows, items = made(CHANCES)
    for names, title in ((("blank", "shuffled"), "Visual gain"), (("no_text",), "Textual gain"),
                         (("blank", "no_text"), "Visual and textual gain")):  # fmt: skip
        for row in rows:
            own = {k: v for k, v in row["results"].items() if "foils/overall/" not in k}
            row["results"] = own | {f"foils/overall/{name}": 0.5 for name in names}
        found = build_document(Outcomes(rows, items, comparison(list(CHANCES))), [])
        assert [s.title for s in found.sections if s.title.endswith(" gain")] == [title]


def test_steps_of_all_stages_are_reported_and_chance_has_no_curve() -> None:
    rows, items = made(CHANCES)
    for row in rows:
        row["budget"] |= {"steps": 6, "vqa/steps": 3, "nlvr2/steps": 4}
        row["curves"]["val/retrieval_chance_R@1"] = [[1, 0.1], [2, 0.1]]
    found = Outcomes(rows, items, comparison([*CHANCES, "unfinished"]))
    head, early, *_, unfinished = table(render.render_markdown(build_document(found, [])), "Cost")
    assert dict(zip(head, early, strict=True))["steps of pretrain + nlvr2 + vqa"] == "6 + 4 + 3"
    assert set(unfinished[1:]) == {"–"}
    (curves,) = (figure for figure in plots.figures(found) if figure.name == "curves")
    assert [panel.title for panel in curves.panels] == ["val itm accuracy"]


def test_comparison_selects_the_arms_and_whether_it_is_exploratory() -> None:
    rows, items = made(CHANCES, exploratory=True)
    arms = [row["arm"] for row in rows if row["strategy"] != "hybrid" and row["seed"] < 2]
    described = comparison(["early", "late"], arms=arms, exploratory=False)
    found = Outcomes(rows, items, described)
    assert found.strategies == ["early", "late"] and len(found.done) == len(arms) and not found.exploratory
    assert Outcomes(rows, items, {**described, "exploratory": True}).exploratory
    assert Outcomes(rows, items, {}).exploratory and len(Outcomes(rows, items, {}).done) == len(rows)


def test_warnings_name_strategies_with_one_seed() -> None:
    rows, items = made(CHANCES, seeds=range(5))
    rows = [row for row in rows if row["strategy"] != "hybrid" or row["seed"] == 0]
    warned = build_document(Outcomes(rows, items, comparison(list(CHANCES), range(5))), []).warnings
    assert "One seed of hybrid: no conclusion is drawn about it." in warned and not any(
        "few" in text for text in warned
    )
    alone = [row for row in rows if row["strategy"] == "early"]
    assert not any(
        "without a test" in w for w in build_document(Outcomes(alone, items, comparison(list(CHANCES))), []).warnings
    )


def test_one_seed_allows_no_test() -> None:
    assert document(seeds=(0,)).headline.startswith("No tests are possible: they require two seeds per strategy")


def test_items_of_different_shape_raise() -> None:
    rows, items = made(CHANCES)
    items["late-seed1"]["foils/overall"] = items["late-seed1"]["foils/overall"][:-1]
    with pytest.raises(DataError, match=r"items/late-seed1.npz:foils/overall: shape \(599,\); expected \(600,\)"):
        build_document(Outcomes(rows, items, comparison(list(CHANCES))), [])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_report_from_files_is_byte_identical(report: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    before = contents(report)
    again = tmp_path / "again"
    for name in ("comparison.json", "examples.json", "examples/0.png", "examples/1.jpeg"):
        (again / name).parent.mkdir(parents=True, exist_ok=True)
        (again / name).write_bytes(before[name])
    (again / "items").mkdir()
    for arm, arrays in made(CHANCES, fractions=(0.1, 1.0))[1].items():
        np.savez(again / "items" / f"{arm}.npz", **arrays)
    lines = [json.dumps(row, sort_keys=True) for row in reversed(rows)]
    (again / "results.jsonl").write_text("\n".join(lines) + "\n")
    write_report_again(again)
    after = contents(again)
    assert {name for name in before if name.startswith("plots/")} == {
        f"plots/{name}.{kind}"
        for name in ("quality", "image", "categories", "cost", "curves", "low_data")
        for kind in ("png", "svg")
    }
    for name, content in before.items():
        assert after[name] == content, name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.jsonl", b'{"arm": "x"\n', "results.jsonl:1: not JSON"),
        ("comparison.json", None, "comparison.json: can't be read"),
        ("items/x.npz", b"PK no zip", "x.npz: can't be read"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    (tmp_path / "items").mkdir()
    (tmp_path / "results.jsonl").touch()
    (tmp_path / "comparison.json").write_text("{}")
    (tmp_path / name).write_bytes(content) if content is not None else (tmp_path / name).unlink()
    with pytest.raises(DataError, match=re.escape(message)):
        write_report_again(tmp_path)


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """WCAG 2's ratio, 1 to 21."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


# What protanopes, deuteranopes and tritanopes see of linear RGB (Machado, Oliveira & Fernandes 2009, severity 1).
BLINDNESS = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def seen(color: str, blindness: str) -> np.ndarray:
    """CIE L*a*b* of a color as it is seen."""
    channels = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.asarray(BLINDNESS[blindness]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.asarray(to_xyz) @ linear / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(("colors", "card"), [(drawing.LIGHT, "#ffffff"), (drawing.DARK, "#1a2027")])
def test_colors_have_contrast_and_are_distinguishable(colors: Sequence[str], card: str) -> None:
    for color in colors:
        assert contrast(color, card) >= 4.5, color  # names are written in them
    for blindness in BLINDNESS:
        for a, b in itertools.combinations(colors, 2):
            assert np.linalg.norm(seen(a, blindness) - seen(b, blindness)) >= 12, (a, b, blindness)


def test_twelve_strategies_have_distinct_styles() -> None:
    assert len({drawing.line_style(i).color for i in range(8)}) == len(drawing.DARK) == 8
    assert len({drawing.line_style(i) for i in range(12)}) == len({drawing.marker_path(i) for i in range(12)}) == 12
    rules = (Path(render.__file__).parent / "page.css").read_text()
    for name in drawing.SURFACES.values():
        assert rules.count(f"{name}:") == 2, f"{name} has no value for light and dark mode"


def drawn(panel: plots.Panel) -> list[tuple[list[float], list[float]]]:
    """Coordinates of every line and sign of a panel."""
    axes = Canvas().subplots()
    panel.draw(axes)
    return [(np.ravel(line.get_xdata()).tolist(), np.ravel(line.get_ydata()).tolist()) for line in axes.get_lines()]


def test_plots_draw_the_numbers_of_the_rows() -> None:
    rows, items = made(CHANCES)
    outcomes = Outcomes(rows, items, comparison(list(CHANCES)))
    figures = {figure.name: figure for figure in plots.figures(outcomes)}
    lines = drawn(figures["quality"].panels[0])
    for y, name in enumerate(CHANCES):
        assert ([pytest.approx(mean(rows, name, "results", "foils/overall"))], [y]) in lines
        seeds = [row["results"]["foils/overall"] for row in rows if row["strategy"] == name]
        assert any(sorted(xs) == pytest.approx(sorted(seeds)) for xs, ys in lines if len(xs) == 3)
    curve = drawn(figures["curves"].panels[0])[0]
    runs = [dict(row["curves"]["val/itm_accuracy"]) for row in rows if row["strategy"] == "early"]
    assert curve == (list(runs[0]), [pytest.approx(sum(run[step] for run in runs) / 3) for step in runs[0]])
    panels = {panel.title: panel for panel in figures["cost"].panels}
    assert list(panels) == ["parameters, millions", "training time, min", "ms per pair"], "equal FLOPs have no axis"
    front = drawn(panels["ms per pair"])[0]
    best = [mean(rows, name, "results", "foils/overall") for name in ("early", "hybrid")]
    assert front[0][0] == pytest.approx(1.2) and front[1][0] == pytest.approx(best[0])
    assert max(front[1]) == pytest.approx(max(best))
    assert min(front[1]) == pytest.approx(best[0]), "late is not on the front"


def test_losses_and_ranks_are_not_scores_and_tested_measures_are_drawn_first() -> None:
    rows, items = made(CHANCES)
    for row in rows:
        row["results"] |= {"a/loss": 2.0, "a/loss/shuffled": 3.0, "a/median_rank": 4.0, "a/untested": 0.5}
    outcomes = Outcomes(rows, items, comparison(list(CHANCES), primary=["pretrain/itm_accuracy"]))
    figures = {figure.name: figure for figure in plots.figures(outcomes)}
    drawn_first = [panel.title for panel in figures["quality"].panels]
    assert drawn_first[:3] == ["pretrain itm accuracy", "foils overall", "a untested"]
    assert not any("loss" in name or "rank" in name for name in drawn_first)
    assert list(outcomes.ablations()) == ["foils/overall"]


def test_ablation_of_some_items_has_an_interval_over_seeds_alone() -> None:
    rows, items = made({"early": 0.8})
    for found in items.values():
        for name in ("foils/overall/blank", "foils/overall/blank:image"):
            if name in found:
                found[name] = found[name][:-1]
    for found in items.values():
        found.setdefault("foils/overall/blank:image", found["foils/overall:image"][:-1])
    lost = Outcomes(rows, items, {}).interval("early", "foils/overall", minus="foils/overall/blank")
    assert lost is not None and not lost.over_items and 0 < lost.low < lost.mean


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser_light_and_dark_wide_and_narrow(
    report: Path, tab: Tab, tmp_path: Path, width: int, scheme: str
) -> None:
    tab.open(report / "report.html", width=width, scheme=scheme)
    assert tab.evaluate("innerWidth") == width
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg') && "
    wide += "e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 90))"
    assert tab.evaluate(wide) == []
    cut = "[...document.querySelectorAll('.panel svg')].flatMap(s => { const box = s.getBoundingClientRect(); return "
    cut += "[...s.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect(); "
    cut += "return r.left < box.left - 1 || r.right > box.right + 1 || r.bottom > box.bottom + 1 })"
    cut += ".map(t => t.textContent) })"
    assert tab.evaluate(cut) == [], "labels that are cut off"
    images = "[...document.images].map(i => i.naturalWidth)"
    assert tab.evaluate(images) == [360, 360]
    assert [url for url in tab.requests if not url.startswith("data:")] == [(report / "report.html").as_uri()]
    shot = Image.open(tab.screenshot(tmp_path / "page.png")).convert("RGB")
    assert shot.width == width and shot.height > 2000
    assert shot.getpixel((2, 2)) == {"light": (246, 247, 249), "dark": (18, 22, 27)}[scheme]
    # The colors of the plots follow the color scheme.
    colors = {color for _, color in shot.getcolors(1 << 24) or ()}
    palette = drawing.LIGHT if scheme == "light" else drawing.DARK
    other = drawing.DARK if scheme == "light" else drawing.LIGHT
    parsed = [[tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in found[:3]] for found in (palette, other)]
    assert set(parsed[0]) <= colors and not set(parsed[1]) & colors
