"""Pages of evaluations: HTML and Markdown say what the JSON says, whatever it holds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from evaluations import STORED, energy, stored, whole

from snnconv.report import comparison, html, markdown
from snnconv.report.axes import log_ticks, ticks
from snnconv.report.document import amount, joules
from snnconv.report.figures import svg
from snnconv.report.reading import Report, read

VOID = {"meta", "br", "link", "img"}
OPTIONAL = ["first_within", "layers", "operations", "energy", "errors", "ann", "drop", "qann_float",
            "by_step", "spikes", "agreement", "latency_steps_clocked", "drain_steps", "command",
            "created", "threads", "seed", "data_note", "checkpoint"]  # fmt: skip


class Page(HTMLParser):
    """What a page holds: headline numbers, cells of tables, tags, and the text outside styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.facts: dict[str, tuple[float, str]] = {}
        self.cells: list[str] = []
        self.text = ""
        self._key: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self._key = found["data-key"]
            self.facts[str(self._key)] = (float(str(found["value"])), "")
        elif tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "data":
            self._key = None

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        data = data.replace("\u00a0", " ")
        self.text += data
        if self._key is not None:
            value, text = self.facts[self._key]
            self.facts[self._key] = value, text + data
        if self.cells and {"td", "th"} & set(self.open):
            self.cells[-1] += data


def pages(*evaluations: dict[str, Any]) -> tuple[str, str]:
    reports = [Report(Path(f"r{i}.eval.json"), e) for i, e in enumerate(evaluations)]
    document = comparison.document(reports)
    return html.render(document), markdown.render(document)


def markdown_cells(text: str) -> list[str]:
    """Return the cells of all tables, without marks."""
    rows = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]
    return [
        re.sub(r"\\(.)", r"\1", cell.strip().replace("**", "")) for row in cells for cell in row
    ]


def at(e: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        e = e[part]
    return e


def check_headline(page: Page, e: dict[str, Any]) -> None:
    assert set(page.facts) == {
        "snn.top1_percent", "ann.top1_percent", "qann.top1_percent", "latency_steps",
        "agreement.argmax_percent", "spikes.per_neuron", "energy.snn_nj.total",
    }  # fmt: skip
    for key, (value, text) in page.facts.items():
        assert value == at(e, key)
        shown = float(text.split()[0].replace(",", ""))
        scale = {"mJ": 1e6, "µJ": 1e3}.get(text.split()[-1], 1)
        assert shown * scale == pytest.approx(value, rel=6e-3)
    low, high = e["snn"]["interval95_percent"]
    assert f"{low:.2f} to {high:.2f} at 95 %" in page.text


def test_the_headline_numbers_are_those_of_the_report() -> None:
    e = whole()
    check_headline(Page(pages(e)[0]), e)


def test_a_page_loads_nothing_and_runs_nothing() -> None:
    text, _ = pages(whole(), whole("resnet20-T8-wait-signed.eval.json"))
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "a"}
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {n for n in names if n in ("src", "href", "xlink:href") or n.startswith("on")}
    assert not re.search(r"https?://|url\(|@import", text)


def test_a_page_can_be_read_without_seeing_it() -> None:
    page = Page(pages(whole(), whole("resnet20-T8-wait-signed.eval.json"))[0])
    assert not page.open
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        if "aria-labelledby" in attributes:
            assert set(str(attributes["aria-labelledby"]).split()) <= set(ids)
        assert tag != "th" or attributes["scope"] in ("row", "col")
        assert tag != "svg" or attributes["role"] == "img"


def test_text_of_a_report_is_no_markup() -> None:
    e = whole(model="<script>alert(1)</script>|*x*")
    e["layers"][0]["layer"] = "a<b>&c|d"
    bad = '"><script>'
    text, _ = pages(e, whole(schedule=bad), whole(schedule=f"{bad}2"))
    assert "script" not in {tag for tag, _ in Page(text).tags}
    text, md = pages(e)
    assert "script" not in {tag for tag, _ in Page(text).tags}
    assert "a<b>&c|d" in Page(text).cells
    assert "<script>" not in md.replace("\\<", "") and "a<b>&c|d" in markdown_cells(md)


@pytest.mark.parametrize("several", [False, True])
def test_markdown_and_html_have_the_same_cells(several: bool) -> None:
    evaluations = [whole()]
    if several:
        evaluations += [whole("resnet20-T8-paper-signed.eval.json"), stored(STORED[0].name)]
    text, md = pages(*evaluations)
    page = Page(text)
    told = [cell.strip() for cell in page.cells if cell.strip()]
    found = markdown_cells(md)
    assert len(told) > 400
    assert not [cell for cell in told if cell not in found]
    for value, shown in page.facts.values():
        assert shown in found, value


@pytest.mark.parametrize("path", STORED, ids=lambda p: p.name)
def test_every_stored_report_has_a_page(path: Path) -> None:
    e = read(path).contents
    text, md = pages(e)
    page = Page(text)
    assert page.facts["snn.top1_percent"][0] == e["snn"]["top1_percent"]
    for said in (page.text, md):
        assert not re.search(r"\b(None|nan|inf|null)\b", said)
    whole = all(e.get(key) for key in ("by_step", "operations", "energy", "errors"))
    assert whole != ("did not measure" in page.text or "Nothing was simulated" in page.text)


@pytest.mark.parametrize("how", ["missing", "null"])
@pytest.mark.parametrize("key", OPTIONAL)
def test_what_is_missing_is_left_out(key: str, how: str) -> None:
    e = whole(ann={"top1_percent": 91.7, "source": "measured"})
    e |= {"drop": None, key: None}
    if how == "missing":
        del e[key]
    for text in pages(e, whole()):
        said = Page(text).text if text.startswith("<!") else text
        assert not re.search(r"\b(None|nan|null)\b", said)
        assert "89.15 %" in said


def test_inner_parts_may_be_missing() -> None:
    e = whole()
    e["first_within"]["ann"] = None
    e["energy"]["break_even"] = None
    e["errors"] |= {"mend": None, "restored": None, "output": None}
    for row in e["errors"]["layers"]:
        row |= {"isolated": None, "sqnr_db": None}
    for row in e["layers"]:
        del row["rate_percent"], row["sequential_error"]
    text, _ = pages(e)
    page = Page(text)
    assert "None" not in page.text and "Mend first" not in page.text
    assert "No rate of spikes" in page.text
    assert "rate %" not in page.cells and "saturated %" in page.cells


def test_partial_and_second_hand_numbers_are_marked() -> None:
    e = stored("resnet20-T8-paper-signed.eval.json")
    assert e["ann"]["source"] == "stored"
    e |= {"partial": True, "images": 100}
    for text in pages(e):
        assert "Partial: 100 images, not all of test" in text
        assert "second-hand" in text
    assert "second-hand" not in pages(whole())[0]


def test_sums_are_the_totals() -> None:
    e = whole()
    cells = markdown_cells(pages(e)[1])
    for key in ("macs", "synaptic_operations", "membrane_updates"):
        total = e["operations"]["total"][key]
        assert sum(row[key] for row in e["operations"]["layers"]) == pytest.approx(total)
        assert f"{total:,.0f}" in cells


def test_the_pareto_front() -> None:
    points = [(1.0, 70.0), (2.0, 80.0), (2.0, 79.0), (3.0, 80.0), (4.0, 90.0), (4.0, 90.0)]
    assert comparison.pareto(points) == [True, True, False, False, True, True]
    assert comparison.pareto([]) == []


def compared(*evaluations: dict[str, Any]) -> list[dict[str, Any]]:
    return comparison.rows([Report(Path(f"r{i}.eval.json"), e) for i, e in enumerate(evaluations)])


def test_reports_are_compared_and_the_front_is_marked() -> None:
    names = ["T3-drain-signed", "T8-drain-signed", "T8-wait-signed", "T8-paper-unsigned"]
    evaluations = [whole(f"resnet20-{name}.eval.json") for name in names]
    rows = compared(*evaluations)
    assert [row["latency_steps"] for row in rows] == [10, 17, 160, 8]
    # 70.54 % after 10 steps, 89.15 % after 17, the same after 160, and 68.01 % after 8.
    assert [row["on_latency_front"] for row in rows] == [True, True, False, True]
    assert [row["label"] for row in rows[:2]] == ["drain T 3", "drain T 8"]
    text, _ = pages(*evaluations)
    page = Page(text)
    assert [tag for tag, a in page.tags if a.get("class") == "part"] == ["details"] * 4
    fronts = [a["points"] for _, a in page.tags if a.get("class") == "front"]
    assert [len(str(points).split()) for points in fronts[2:]] == [3, 3]  # latency, both widths
    assert all(label in page.text for label in ("drain T 3", "wait T 8", "paper T 8 unsigned"))


def test_settings_tell_reports_apart() -> None:
    e = whole(schedule="stagger", stagger=1, drain=None)
    ways = [{}, {"stagger": 2}, {"drain": 3}, {"initial_membrane": "zero"}]
    assert comparison.labels([{**e, **way} for way in ways]) == [
        "stagger T 8",
        "stagger 2 T 8",
        "stagger T 8 drain 3",
        "stagger T 8 V0 0",
    ]


def test_reports_of_other_images_have_no_front() -> None:
    rows = compared(whole(), whole(images=500, partial=True))
    assert [row["on_energy_front"] for row in rows] == [None, None]
    text, _ = pages(whole(), whole(images=500, partial=True))
    page = Page(text)
    assert "different images" in page.text and "Accuracy against" not in page.text
    assert "500*" in page.cells


def test_other_assumptions_are_told() -> None:
    other = whole()
    changed = {**other["energy"]["assumptions"], "add_int8_pj": 1.0}
    other["energy"] = energy(
        other["operations"], changed, activation_bits=4, weight_bits=8, steps=17
    )
    assert "different assumptions" in pages(whole(), other)[0]
    assert "different assumptions" not in pages(whole(), whole())[0]


def test_figures_show_their_numbers() -> None:
    page = Page(pages(whole())[0])
    circles = [a for tag, a in page.tags if tag == "circle"]
    assert len(circles) == 2 * len(whole()["by_step"])
    heights = [float(str(a["cy"])) for a in circles[: len(circles) // 2]]
    accuracies = [row["top1_percent"] for row in whole()["by_step"]]
    order = sorted(range(len(accuracies)), key=lambda i: accuracies[i])
    assert [heights[i] for i in order] == sorted(heights, reverse=True)
    assert "mend first" in page.text


@pytest.mark.parametrize("size", [1, 2, 40])
def test_figures_stay_in_their_frames(size: int) -> None:
    e = whole()
    for key in ("layers", "by_step"):
        e[key] = (e[key] * 3)[:size]
    e["errors"]["layers"] = (e["errors"]["layers"] * 3)[:size]
    document = comparison.document([Report(Path("x.eval.json"), e)])
    figures = [f for section in document.sections for f in section.figures]
    assert len(figures) == 4
    for figure in figures:
        for kind, width in (("wide", 720), ("narrow", 358)):
            text = svg(figure, kind, "f")
            assert not re.search("nan|inf", text)
            xs = [float(x) for x in re.findall(r' (?:x|cx|x1|x2)="([-\d.]+)"', text)]
            assert min(xs) >= 0 and max(xs) <= width + 5


def test_numbers_are_written_for_people() -> None:
    assert [amount(x) for x in (0, 0.00123, 0.5, 1.234, 12.34, 1234.5, 12)] == [
        "0", "0.00123", "0.500", "1.23", "12.3", "1,234", "12",
    ]  # fmt: skip
    assert [joules(x) for x in (0.5, 12.0, 1234.0, 2.5e6)] == [
        "500 pJ",
        "12 nJ",
        "1.23 µJ",
        "2.50 mJ",
    ]
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert log_ticks(8, 240) == [10, 20, 50, 100, 200]


def test_a_browser_shows_the_numbers(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("needs chromium, which is not installed")
    e = whole()
    page = tmp_path / "page.html"
    page.write_text(pages(e)[0], encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    done = subprocess.run(
        [browser, *options, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    check_headline(Page(done.stdout), e)
    assert "CONSOLE" not in done.stderr
    assert len(json.dumps(e)) < len(done.stdout)
