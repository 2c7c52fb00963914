"""The report over runs: what is read, that its numbers are those of the stores, that no text of a run becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from robust_pl.callbacks.store.store import seal
from robust_pl.evaluation.baselines import read_baselines
from robust_pl.evaluation.gather import gather
from robust_pl.metrics.effective_robustness import Baseline
from robust_pl.report import Record, interval
from robust_pl.report.html import as_page, paper_markdown, paper_tables
from robust_pl.report.html.contenders import contenders, verdicts
from robust_pl.report.html.training import _thinned

from .made_runs import add_analyses, add_test, add_views, make_run, put_rows, write

CLI = Callable[..., None]
RIGHT = (0, 0, 0, 0, 1, 1, 1, 0)  # 7 of 8
PGD = (0, 0, 0, 1, 1, 1, 0, 0)  # 5 of 8
FGSM = (0, 0, 1, 0, 1, 1, 1, 1)  # 7 of 8; of which the last is wrong when clean


class Page(HTMLParser):
    """Tables by caption, figures, and every tag."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.figures: dict[str, dict] = {}
        self.scripts: list[str] = []
        self._text: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = self._title = ""
        self._kind: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("caption", "figcaption", "td", "th", "script"):
            self._text = []
            self._kind = dict(attrs).get("type")
        elif tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag == "small":
            self._text.append(" ")

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        text = " ".join("".join(self._text).split())
        if tag == "caption":
            self._caption = text
        elif tag == "figcaption":
            self._title = text
        elif tag in ("td", "th"):
            self._rows[-1].append(text)
        elif tag == "table":
            self.tables[self._caption] = self._rows
        elif tag == "script":
            if self._kind == "application/json":
                self.figures[self._title] = json.loads("".join(self._text))
            else:
                self.scripts.append("".join(self._text))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "runs/first")
    add_test(folder, RIGHT, {"pgd": PGD, "fgsm": FGSM})
    return folder


@pytest.fixture
def whole(run: Path) -> Path:
    """A run with all there is."""
    add_analyses(run)
    add_views(run)
    return run


# Reading -------------------------------------------------------------------------------------------------------------


def test_everything_is_read(whole: Path) -> None:
    (found,) = gather([whole])
    assert (found.label, found.seed, found.trained_on, found.method) == ("first", 0, "Digits", "PGDAT · SmallCNN")
    assert found.hardware == "a small CPU" and found.cost["device_hours"] == 0.01 and not found.gaps
    (test,) = found.tests
    assert [(line.name, line.right, line.standing) for line in test.lines] == [
        ("none (clean)", 7, 7),
        ("pgd", 5, 5),
        ("fgsm", 7, 4),
        ("worst of all", 4, 4),
    ]
    assert test.table.about("pgd")["seconds"] == 1.5 and test.classes[0].accuracy.tolist() == [1.0, 0.75]
    by_kind = {one.record.kind: one for one in found.analyses}
    assert set(by_kind) == {"MadeUp", "Corruptions", "RobustnessCurve", "ViewSphere"}
    assert by_kind["MadeUp"].data == "Digits" and list(by_kind["MadeUp"].pictures) == ["seen"]
    curve = by_kind["RobustnessCurve"].record
    assert curve.lines[0].x == [0, 4, 8] and curve.lines[0].lines["at this radius alone"] == [1.0, 0.625, 0.75]
    assert any("rises at 8" in note for note in curve.notes)
    sphere = by_kind["ViewSphere"].record
    # The upper row comes first, and what was not seen is missing.
    assert sphere.maps[0].values == [[None, 1.0], [0.25, 0.5]] and sphere.maps[0].y == ["0 to 90", "-90 to 0"]
    assert sphere.figures == {"mean": pytest.approx((0.25 + 0.5 + 1) / 3), "worst_bin": 0.25}
    (view,) = found.views
    assert (view.name, view.views, view.right, view.objects, view.standing) == ("viewfool", 4, 2, 2, 1)
    assert view.figures == {"view_loss": 2.0, "coverage": 1.0, "renders": 120.0}
    assert found.training["val/acc_clean"].y == [0.5, 0.75] and found.training["val/acc_clean"].axis == "epoch"


def test_a_resumed_training_is_one_course(run: Path) -> None:
    rows = [("epoch", "step", "train/loss", "test/acc", "cost/seconds"), (1, 9, 0.5, 1, 1), (1, 14, 0.25, 1, 1)]
    put_rows(run / "metrics/version_1/metrics.csv", rows)
    course = gather([run])[0].training["train/loss"]
    assert (course.axis, course.x, course.y) == ("step", [4, 9, 14], [2.0, 0.5, 0.25])
    assert not [name for name in gather([run])[0].training if name.startswith(("test", "cost"))]


def test_long_courses_are_drawn_by_means() -> None:
    x, y = _thinned([float(i) for i in range(1000)], [float(i % 2) for i in range(1000)])
    assert len(x) == 334 and x[0] == 2 and y[0] == pytest.approx(1 / 3) and x[-1] == 999


@pytest.mark.parametrize(
    ("spoil", "gap"),
    [
        (
            lambda run: (run / "test/predictions.csv").write_text("index,label\n"),
            "test is left out: predictions.csv is not what",
        ),
        (lambda run: (run / "test/store.json").write_text("{"), "test is left out: .*store.json is damaged"),
        (lambda run: (run / "test/SHA256SUMS").unlink(), "test is not finished: the same command goes on"),
        (
            lambda run: (run / "analysis/test/madeup.json").write_text("[1]"),
            "analysis/test/madeup.json is left out: .*no record",
        ),
        (
            lambda run: (run / "images/robustness_curve.json").write_text("{}"),
            "robustness_curve.json holds no robustness curve",
        ),
        (lambda run: (run / "images/view_sphere.csv").write_text("a\n1\n"), "view_sphere.csv holds no view sphere"),
        (lambda run: (run / "analysis/test/seen.png").write_text("GIF"), "picture 'seen' is left out: seen.png is no PNG"),
        (lambda run: (run / "viewpoints/test_viewfool/views.json").write_text("{"), "viewpoints/test_viewfool is left out"),
        (lambda run: (run / "compute.json").write_text("{"), "compute.json is damaged"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml is damaged"),
        (lambda run: (run / "metrics/version_0/metrics.csv").write_text("a,step\n1,x\n"), "metrics.csv is damaged"),
        (lambda run: (run / "run.json").write_text("[]"), "run.json is damaged"),
    ],
)
def test_what_is_damaged_is_a_stated_gap(whole: Path, spoil: Callable[[Path], None], gap: str) -> None:
    spoil(whole)
    (found,) = gather([whole])
    assert re.search(gap, "\n".join(found.gaps)), found.gaps
    page = as_page([found])
    assert "Note." in page and all(len(one.splitlines()) == 1 for one in found.gaps)


def test_a_record_takes_no_file_from_elsewhere(whole: Path, tmp_path: Path) -> None:
    record = whole / "analysis/test/madeup.json"
    (tmp_path / "private.png").write_bytes((whole / "analysis/test/seen.png").read_bytes())
    record.write_text(record.read_text().replace("seen.png", "../../../../private.png"))
    (found,) = gather([whole])
    assert not found.analyses[1].pictures and any("private.png is no PNG in the run" in gap for gap in found.gaps)


def test_a_run_without_a_test_is_shown_with_a_gap(tmp_path: Path) -> None:
    (found,) = gather([make_run(tmp_path / "bare")])
    assert not found.tests and "no finished evaluation" in found.gaps[0]
    assert "Cost of the training" in Page(as_page([found])).tables
    assert paper_tables([found]) == []


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere is not a folder"):
        gather([tmp_path / "elsewhere"])
    with pytest.raises(ValueError, match=r"runs is no run, as it holds no run\.json: name a run"):
        gather([run.parent])
    with pytest.raises(ValueError, match=r"test is no run.*it lies in the run .*first"):
        gather([run / "test"])
    with pytest.raises(ValueError, match="is named twice"):
        gather([run, run.parent / "." / "first"])
    with pytest.raises(ValueError, match="name at least one run"):
        as_page([])


def test_runs_of_one_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "others/first")
    assert [found.label for found in gather([run, other])] == ["runs/first", "others/first"]


# Comparing -----------------------------------------------------------------------------------------------------------


def test_evaluations_of_one_network_are_one_row(run: Path) -> None:
    add_test(run, RIGHT, {"square": (0, 0, 0, 0, 0, 1, 1, 1)}, folder="test-2")
    (row,) = contenders(gather([run]))
    judged = verdicts([row], "Digits")
    assert judged.columns == ["none (clean)", "pgd", "fgsm", "square", "worst of all"]
    # Worst over the attacks of both: clean and pgd leave 0, 1, 2, 4, 5, fgsm breaks 2, square 4.
    assert judged.right[0][1]["worst of all"].nonzero()[0].tolist() == [0, 1, 5]


def test_tests_of_one_network_in_several_runs_are_one_row(tmp_path: Path) -> None:
    folders = []
    for number, data in enumerate(("ImageNetDataModule", "ImageNetV2DataModule")):
        folder = make_run(tmp_path / f"net-{number}")
        (folder / "config.yaml").unlink()
        store = add_test(folder, (RIGHT, PGD)[number], {}, data=data, first_16=data) / "store.json"
        store.write_text(re.sub("sum of net-./best", "sum of one/best", store.read_text()))
        seal(store.parent)
        folders.append(folder)
    runs = gather(folders)
    (row,) = contenders(runs)
    assert row.label == "net-0" and [test.data for test in row.tests] == ["ImageNet", "ImageNetV2"]
    assert paper_markdown(runs).startswith("| ImageNet | clean | on ImageNetV2 |")
    text = as_page(runs)
    assert Page(text).tables["Natural shifts, accuracies in %"][1][:4] == ["net-0", "ImageNetV2", "87.50", "62.50"]
    assert "net-0 is also the network of net-1" in text
    # What was trained stands for itself.
    assert len(contenders([runs[0], replace(runs[1], trained=True)])) == 2


def test_networks_of_one_run_are_not_mixed(run: Path) -> None:
    add_test(run, PGD, {"pgd": PGD}, folder="test-2", checkpoint="last.ckpt")
    rows = contenders(gather([run]))
    assert [row.label for row in rows] == ["first · best.ckpt", "first · last.ckpt"]
    (table,) = paper_tables(gather([run]))
    assert [label for label, _ in table.rows] == ["first · best.ckpt", "first · last.ckpt"]
    assert [values[0] for _, values in table.rows] == [[0.875], [0.625]]


def test_attacks_of_one_name_that_differ_are_told_apart(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "runs/second", width=64)
    weaker = {"pgd": {"class_path": "robust_pl.callbacks.PGD", "init_args": {"eps": "4/255", "steps": 10, "seed": 1}}}
    add_test(other, RIGHT, {"pgd": PGD}, attacks=weaker)
    judged = verdicts(contenders(gather([run, other])), "Digits")
    assert judged.columns == ["none (clean)", "pgd (eps=8/255)", "pgd (eps=4/255)", "fgsm", "worst of all"]
    page = Page(as_page(gather([run, other])))
    assert page.tables["Accuracy in % on Digits, with 95 % intervals"][2][3] == "–"  # noqa: RUF001


def test_data_sets_of_one_name_that_differ_are_told_apart(run: Path) -> None:
    for k, fog in enumerate(("fog", "snow")):
        settings = {"corruption": fog, "seed": k}
        add_test(run, RIGHT, {}, folder=f"test-{k + 2}", data="CDataModule", first_16=fog, settings=settings)
    add_test(run, RIGHT[:6], {}, folder="test-4", first_16="other", labels=(0, 0, 0, 0, 1, 1))
    (found,) = gather([run])
    assert [test.data for test in found.tests] == [
        "Digits (8 samples)",
        "C (corruption=fog)",
        "C (corruption=snow)",
        "Digits (6 samples)",
    ]


# The page ------------------------------------------------------------------------------------------------------------


def test_numbers_of_the_page_are_those_of_the_store(whole: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "runs/second", width=64)
    add_test(other, PGD, {"pgd": PGD, "fgsm": FGSM})
    page = Page(as_page(gather([whole, other])))
    head, first, second = page.tables["Accuracy in % on Digits, with 95 % intervals"]
    assert head == ["network", "samples", "none (clean)", "pgd", "fgsm", "worst of all"]
    said = [f"{100 * n / 8:.2f} {100 * interval(n, 8)[0]:.2f} to {100 * interval(n, 8)[1]:.2f}" for n in (7, 5, 7, 4)]
    assert first == ["first", "8", *said]
    assert second[2].startswith("62.50") and second[5].startswith("50.00")
    bars = page.figures["Accuracy on Digits"]["data"]
    assert bars[0]["y"] == [87.5, 62.5, 87.5, 50.0] and bars[1]["name"] == "second"
    assert bars[0]["error_y"]["array"][1] == pytest.approx(100 * interval(5, 8)[1] - 62.5)
    classes = page.figures["Accuracy by class on Digits"]["data"][0]
    assert classes["z"][:2] == [[100.0, 75.0], [50.0, 50.0]] and classes["customdata"][1][0] == "first, worst, cat"
    assert page.tables["Accuracy in % on fresh views"][1] == ["first", "50.00"]
    assert page.tables["Cost of the training"][1][:4] == ["first", "1 x CPU", "0.01", "36"]
    assert "-        width: 32" in "".join(as_page(gather([whole, other])))  # what differs between configs


def test_any_record_is_shown_over_and_beside_those_of_others(whole: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "runs/second", width=64)
    add_test(other, RIGHT, {"pgd": PGD})
    add_analyses(other, shift=0.125)
    text = as_page(gather([whole, other]))
    page = Page(text)
    assert page.tables["Made up: figures"] == [["run", "mean", "count"], ["first", "0.5", "3"], ["second", "0.625", "3"]]
    assert page.tables["sheet, shares in %"][1:3] == [["first", "fog", "25.00"], ["first", "snow", "–"]]  # noqa: RUF001
    both = page.figures["curve"]["data"]
    assert [trace["name"] for trace in both] == ["first", "second"]
    assert both[1]["y"] == [100.0, 62.5, None] and both[0]["x"] == [0, 4, 8]
    maps = [page.figures[f"map – {name}"]["data"][0] for name in ("first", "second")]  # noqa: RUF001
    assert maps[0]["z"] == [[0.1, None], [3.0, 4.0]]
    assert {(one["zmin"], one["zmax"]) for one in maps} == {(0.1, 4.0)}  # one scale for both
    assert [tag for tag, _ in page.tags].count("img") == 6 and "A sentence that readers need." in text
    assert page.tables["Common corruptions: figures"][1] == ["first", "0.4", "0.8"]


def test_settings_of_an_analysis_that_differ_are_named(whole: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "runs/second")
    add_analyses(other)
    path = other / "analysis/test/madeup.json"
    path.write_text(path.read_text().replace('"samples": 8', '"samples": 4').replace('"seconds": 1.0', '"seconds": 9.0'))
    assert "Settings differ between runs: samples." in as_page(gather([whole, other]))


EVIL = "<img src=x onerror=alert(1)>"
WORSE = "</script><script>alert(2)</script>"


def test_text_of_a_run_never_becomes_markup(tmp_path: Path) -> None:
    folder = make_run(tmp_path / EVIL, note=WORSE)
    add_test(folder, RIGHT, {"pgd": PGD}, class_names=[WORSE, "{{ 7 * 7 }}"])
    add_analyses(folder, title=WORSE)
    (folder / f"config-{EVIL}.yaml").write_text(WORSE)
    write(folder / "compute.json", {"a": WORSE})
    runs = gather([folder])
    text = as_page(runs, title=WORSE)
    page = Page(text)
    assert not [tag for tag in page.tags if tag[0] == "img" and not str(tag[1]["src"]).startswith("data:image/png;base64,")]
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert (
        len(page.scripts) == 2
        and "alert(" not in page.scripts[1]
        and "49" not in page.tables["How alike classes fare on Digits"][1]
    )
    assert page.figures["Accuracy on Digits"]["data"][0]["name"] == EVIL.replace("<", "&lt;").replace(">", "&gt;")
    # And if some did: the browser runs what has these sums.
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    for script in page.scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert EVIL not in paper_markdown(runs) and "&lt;img" in paper_markdown(runs)


def test_the_page_names_no_address_of_the_network(whole: Path) -> None:
    asked = {"src", "href", "srcset", "action", "data", "poster"}
    for _, attrs in Page(as_page(gather([whole]))).tags:
        for name in asked & set(attrs):
            assert str(attrs[name]).startswith(("data:", "#")), attrs


def test_parts_are_named_for_those_who_do_not_see_them(whole: Path) -> None:
    page = Page(as_page(gather([whole])))
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    drawings = [attrs for _, attrs in page.tags if attrs.get("class") == "drawing"]
    assert len(drawings) == len(page.figures) and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawings)
    assert [tag for tag, _ in page.tags].count("caption") == [tag for tag, _ in page.tags].count("table")
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")
    anchors = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert len(set(anchors)) == len(anchors)


@pytest.mark.parametrize("name", ["plotly", "jinja2"])
def test_a_missing_library_is_named_with_its_extra(run: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from robust_pl.report.html import page

    page._plotly.cache_clear()
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"needs {name}, which is not installed: pip install 'robust_pl\[report\]'"):
        as_page(gather([run]))


# The table for papers ------------------------------------------------------------------------------------------------


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"at-s{seed}", seed) for seed in (0, 1)]
    add_test(folders[0], RIGHT, {"pgd": PGD})
    add_test(folders[1], FGSM, {"pgd": FGSM})
    wide = make_run(tmp_path / "wide", width=64)
    add_test(wide, PGD, {"pgd": PGD})
    again = make_run(tmp_path / "again", width=64)  # the same seed is no other seed
    add_test(again, PGD, {"pgd": PGD})
    for folder, shift in ((folders[0], 0.0), (wide, 0.25)):
        add_analyses(folder, shift=shift)
    runs = gather([*folders, wide, again])
    (table,) = paper_tables(runs)
    assert [(label, n) for (label, _), n in zip(table.rows, table.seeds, strict=True)] == [("at", 2), ("wide", 1), ("again", 1)]
    lines = table.as_markdown().splitlines()
    assert lines[0] == "| Digits | clean | pgd | worst | corruptions | mCE | training hours |"
    deviation = f"{100 * statistics.stdev([5 / 8, 7 / 8]):.2f}"
    worst = [5 / 8, 7 / 8]  # all that pgd leaves is right when clean
    assert lines[2] == (
        f"| at | **87.50 ± 0.00** | **75.00 ± {deviation}** | **{100 * statistics.mean(worst):.2f} ± {deviation}** "
        "| 40.00 | 80.00 | 0.01 ± 0 |"
    )
    # Of mCE the lowest is best; of costs none.
    assert lines[3] == "| wide | 62.50 | 62.50 | 62.50 | **65.00** | **55.00** | 0.01 |"
    assert lines[4] == "| again | 62.50 | 62.50 | 62.50 |  |  | 0.01 |"
    assert lines[-1].endswith("Mean ± standard deviation over 2 seeds where there are several.")


def test_networks_of_other_data_have_a_table_of_their_own(run: Path, tmp_path: Path) -> None:
    data = {"class_path": "robust_pl.data.CIFAR10DataModule", "init_args": {}}
    other = make_run(tmp_path / "runs/other", data=data)
    add_test(other, RIGHT, {"pgd": PGD}, data="CIFAR10DataModule", first_16="b")
    tables = paper_tables(gather([run, other]))
    assert [(table.data, len(table.rows)) for table in tables] == [("Digits", 1), ("CIFAR10", 1)]
    assert "**" not in paper_markdown(gather([run, other]))  # nothing is compared


def test_table_says_where_corruptions_were_not_measured_alike(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other")
    add_test(other, PGD, {})
    for folder in (run, other):
        add_analyses(folder)
    said = "Corruptions were not measured alike"
    assert said not in paper_markdown(gather([run, other]))
    path = other / "analysis/test/corruptions.json"
    path.write_text(replace(Record.read(path), about={"settings": {"reference": "runs/a.json"}}).as_json())
    assert said in paper_markdown(gather([run, other]))


# Shifts --------------------------------------------------------------------------------------------------------------


def test_effective_robustness_is_that_of_the_baseline(run: Path, tmp_path: Path) -> None:
    add_test(run, PGD, {}, folder="test-2", data="OtherDataModule", first_16="b")
    file = tmp_path / "baseline.csv"
    put_rows(file, [("data", "acc_id", "acc_ood"), ("Other", 0.6, 0.3), ("Other", 0.8, 0.5), ("Other", 0.9, 0.7)])
    baselines = read_baselines(file)
    line = Baseline.fit([(0.6, 0.3), (0.8, 0.5), (0.9, 0.7)])
    runs = gather([run])
    row = Page(as_page(runs, baselines=baselines)).tables["Natural shifts, accuracies in %"][1]
    expected = line.expected(0.875)
    assert row == ["first", "Other", "87.50", "62.50", "25.00", f"{100 * expected:.2f}", f"{100 * (0.625 - expected):.2f}"]
    assert Page(as_page(runs)).tables["Natural shifts, accuracies in %"][1][5:] == ["–", "–"]  # noqa: RUF001
    assert paper_markdown(runs).splitlines()[0].endswith("| on Other | training hours |")


def test_shifts_of_imagenet_are_compared_on_their_own_classes(tmp_path: Path) -> None:
    data = {"class_path": "robust_pl.data.ImageNetDataModule", "init_args": {}}
    folder = make_run(tmp_path / "net", data=data)
    add_test(folder, RIGHT, {}, data="ImageNetDataModule")
    add_test(folder, PGD, {}, folder="test-2", data="ImageNetV2DataModule", first_16="v2")
    add_test(folder, PGD, {}, folder="test-3", data="ImageNetADataModule", first_16="a")
    text = as_page(gather([folder]))
    rows = Page(text).tables["Natural shifts, accuracies in %"][1:]
    assert [row[1:4] for row in rows] == [["ImageNetV2", "87.50", "62.50"], ["ImageNetA", "–", "62.50"]]  # noqa: RUF001
    assert rows[0][5] != "–" and rows[1][5] == "–" and "on the same classes" in text  # noqa: RUF001
    add_test(folder, FGSM, {}, folder="test-3b", data="ImageNetEDataModule", first_16="e")
    rows = Page(as_page(gather([folder]))).tables["Natural shifts, accuracies in %"][1:]
    assert rows[2][1:5] == ["ImageNetE", "–", "87.50", "–"]  # noqa: RUF001  the drop is from the original images
    part = {"classes": "imagenet_a"}
    add_test(folder, FGSM, {}, folder="test-4", data="ImageNetSubsetDataModule", first_16="s", settings=part)
    rows = Page(as_page(gather([folder]))).tables["Natural shifts, accuracies in %"][1:]
    assert rows[1][1:4] == ["ImageNetA", "87.50", "62.50"] and rows[1][5] != "–"  # noqa: RUF001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data,acc_id\nA,0.5\n", "line 2: give data, acc_id, acc_ood"),
        ("data,acc_id,acc_ood\nA,0.5,x\n", "line 2: give data"),
        ("data,acc_id,acc_ood\n", "holds no networks"),
        ("data,acc_id,acc_ood\nA,50,30\nA,60,40\n", "A: acc_id=50.0 is no accuracy"),
    ],
)
def test_a_bad_baseline_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "b.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_baselines(file)
    with pytest.raises(FileNotFoundError, match=r"none\.csv is not there"):
        read_baselines(tmp_path / "none.csv")


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_writes_page_and_table(
    robust_pl: CLI, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (whole / "compute.json").write_text("{")
    robust_pl("report", whole, "--output", tmp_path / "out/page.html", "--markdown", tmp_path / "table.md", "--title", "Mine")
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(tmp_path / "out/page.html"), str(tmp_path / "table.md")]
    assert said.err.startswith("robust-pl: first: compute.json is damaged")
    text = (tmp_path / "out/page.html").read_text(encoding="utf-8")
    assert "<title>Mine</title>" in text and math.isclose(len(text), 4.9e6, rel_tol=0.3)
    assert (tmp_path / "table.md").read_text(encoding="utf-8").startswith("| Digits | clean | pgd | fgsm | worst |")


@pytest.mark.slow
def test_the_page_of_a_run_of_the_command_line(robust_pl: CLI, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    analysis = "[{class_path: FrequencyFilter, init_args: {sizes: [4, 2]}}]"
    curve = "{class_path: RobustnessCurve, init_args: {attack: {class_path: FGSM, init_args: {eps: 0.1}}, eps: [0.05, 0.1]}}"
    tiny.write_text(tiny.read_text().replace("  logger: false\n", ""))
    robust_pl("fit", "-c", tiny, "--trainer.callbacks", f"{analysis[:-1]}, {curve}]")
    robust_pl("test", "--ckpt_path", "runs/tiny/checkpoints/best.ckpt")
    capsys.readouterr()
    robust_pl("report", "runs/tiny", "--markdown", "table.md")
    assert capsys.readouterr() == ("report.html\ntable.md\n", "")
    page = Page(Path("report.html").read_text(encoding="utf-8"))
    figures = json.loads(Path("runs/tiny/test/figures.json").read_text())
    shown = [f"{100 * figures[f'acc_{name}']:.2f}" for name in ("clean", "fgsm", "pgd", "worst")]
    row = page.tables["Accuracy in % on Digits, with 95 % intervals"][1]
    assert row[:2] == ["tiny", "360"] and [cell.split()[0] for cell in row[2:]] == shown
    assert Path("table.md").read_text(encoding="utf-8").splitlines()[2].startswith(f"| tiny | {' | '.join(shown)} |")
    record = json.loads(Path("runs/tiny/analysis/test/frequencyfilter.json").read_text())
    (filtered,) = [rows for caption, rows in page.tables.items() if caption.startswith(f"{record['title']}: figures")]
    assert filtered[1][1:] == [f"{value:.4g}" for value in record["figures"].values()]
    stored = json.loads(Path("runs/tiny/images/robustness_curve.json").read_text())
    assert page.figures["Accuracy over the radius"]["data"][0]["y"] == [100 * share for share in stored["accuracy"]]
    assert page.figures["val/acc_worst"]["data"][0]["x"] == [0, 1]
    measured = {row[0]: row[1] for row in page.tables["Seeds, hardware and versions; what differs is bold"]}
    assert "threads of torch" in measured["trained on"] and measured["tested on"] == measured["trained on"]
    with pytest.raises(SystemExit, match="0"):
        robust_pl("--help")
    assert "Show everything that runs measured side by side" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: RUN"),
        (("nowhere",), "nowhere is not a folder: name a run"),
        ((".", "--output", "."), "--output . is a folder: name a file in it"),
        (("first", "--baseline", "none.csv"), "none.csv is not there"),
    ],
)
def test_the_command_says_what_is_wrong(
    robust_pl: CLI,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(run.parent)
    with pytest.raises(SystemExit, match="2"):
        robust_pl("report", *arguments)
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
