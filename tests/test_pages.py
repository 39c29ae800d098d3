"""Pages to look at: `distillkit report --html` and `distillkit-codec inspect --html`. What a browser shows is looked at
in a headless Chromium; without one, those tests are skipped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from distillkit.cli.codec import cli as codec
from distillkit.cli.main import cli
from distillkit.errors import CorruptDataError
from distillkit.reports.inspection import Inspection, inspect_dataset
from distillkit.reports.inspection_page import inspection_page
from distillkit.reports.run_page import run_page
from distillkit.reports.run_record import read_metrics, read_run
from distillkit.shards import Dataset
from support.browser import Browser, chromium
from support.refusals import check_names, refused
from support.runs import write_run
from support.shards import make_documents, write

# What a name may try in a page: elements, attributes, scripts, styles, comments, entities, directions.
EVIL = (
    "<script>window.pwned = 1</script><img src=http://evil/x onerror=window.pwned=1>",
    "\"' onmouseover='window.pwned=1' style=\"position:fixed\" x='&lt;b&gt; \u202e\x1b[31m\x00 $\\frac{1}{2}$",
    "</title></style></script></svg></table><iframe src=http://evil></iframe>]]><svg onload=window.pwned=1><!--",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind, made by the commands: of one run, of two, and of a dataset."""
    folder = tmp_path_factory.mktemp("pages")
    for number, name in enumerate(("plain", "other")):
        write_run(folder / name, name, scale=1.0 + number)
    write(folder / "data", make_documents(12))
    runs = [str(folder / name) for name in ("plain", "other")]
    for arguments in (["report", runs[0], "--html", "run.html"], ["report", *runs, "--html", "runs.html"]):
        made(cli, [*arguments[:-1], str(folder / arguments[-1])])
    made(codec, ["inspect", str(folder / "data"), "--html", str(folder / "data.html")])
    return {name: folder / f"{name}.html" for name in ("run", "runs", "data")}


def made(command: Any, arguments: list[str]) -> str:
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert arguments[-1].rpartition("/")[2] in "".join(result.output.split())
    return result.output


# -- what a browser shows ----------------------------------------------------------------------------------------------

# The least contrast of any text with what is behind it, and that text. Everything is unfolded first.
CONTRAST = """() => {
  document.querySelectorAll("details").forEach((each) => { each.open = true; });
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => parts(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let each = node; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if ((parts(colour)[3] ?? 1) === 1) return colour;
    }
    throw new Error("no background");
  };
  let least = [99, ""];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || node.closest("script")) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(node.closest("svg") ? style.fill : style.color), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least[0]) least = [ratio, texts.currentNode.data];
  }
  return least;
}"""


@pytest.mark.parametrize("name", ["run", "runs", "data"])
@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1600, "light")])
def test_it_is_readable_and_asks_for_nothing(
    browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    with browser.open(pages[name], width=width, scheme=scheme) as page:
        ratio, text = page.evaluate(CONTRAST)
        assert ratio >= 4.5, text
        # Unfolded by now; only tables may be wider than the page, and scroll by themselves.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 24, 29)" if scheme == "dark" else "rgb(255, 255, 255)")
        for slider in page.locator("input[type=range]").all()[:1]:
            slider.press("Home")
        page.wait_for_timeout(50)
    assert browser.complaints == []


@pytest.mark.parametrize("name", ["run", "runs", "data"])
def test_a_screen_reader_and_a_keyboard_find_everything(browser: Browser, pages: dict[str, Path], name: str) -> None:
    with browser.open(pages[name]) as page:
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => Number(h.tagName[1]))")
        assert levels.count(1) == 1
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
        for landmark in ("header", "nav", "main", "footer"):
            assert page.locator(f"body > {landmark}").count() == 1
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map((each) => each.id)")
        assert len(ids) == len(set(ids))
        assert all(f"#{link}" for link in ids)
        links = page.evaluate("[...document.querySelectorAll('a')].map((each) => each.getAttribute('href'))")
        assert {link.removeprefix("#") for link in links} <= set(ids)
        # Each chart has a text, a slider with a name and a value, and a table with the same lines.
        for chart in page.locator("figure").all():
            title = chart.locator("h3").inner_text()
            assert chart.locator("svg.plot[role=img]").get_attribute("aria-label").startswith(title)
            assert title in chart.locator("input").get_attribute("aria-label")
            assert chart.locator("input").get_attribute("aria-valuetext")
            heads = chart.locator("thead th").all_text_contents()[1:]
            assert heads == [line["label"] for line in json.loads(chart.get_attribute("data-values"))["lines"]]
        assert all(table.locator("caption").count() == 1 for table in page.locator("table").all())
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        for _ in range(12):
            style = page.evaluate(
                "(() => { const s = getComputedStyle(document.activeElement);"
                " return [s.outlineStyle, parseFloat(s.outlineWidth)]; })()"
            )
            assert style[0] != "none"
            assert style[1] >= 2
            page.keyboard.press("Tab")


def test_the_curves_have_the_values_of_the_logs(browser: Browser, pages: dict[str, Path]) -> None:
    folder = pages["run"].parent / "plain"
    logs = read_metrics(folder / "metrics.jsonl")
    training = {log["step"]: log for log in logs if "loss" in log}
    held_out = {log["step"]: log for log in logs if "eval_loss" in log}
    with browser.open(pages["run"]) as page:
        for title, form, entries, names in (
            ("Training losses", "{:.4f}", training, {"total": "loss", "kl (× 0.5)": "kl", "plain (× 0.5)": "plain"}),
            ("KL and cross-entropy, held out (nats)", "{:.4f}", held_out, {"KL(teacher ‖ student)": "eval_kl"}),
            ("Agreement with the teacher, held out", "{:.2%}", held_out, {"top-1 agreement": "eval_top1_agreement"}),
            ("Learning rate", "{:.3g}", training, {"Learning rate": "learning_rate"}),
        ):
            chart = page.locator("figure", has=page.get_by_role("heading", name=title, exact=True))
            slider = chart.locator("input")
            slider.press("Home")
            for step in entries:
                assert chart.locator(".place").inner_text() == f"step {step}"
                for label, name in names.items():
                    value = form.format(entries[step][name])
                    line = chart.locator(".key li", has=page.get_by_text(label, exact=True))
                    assert line.locator(".value").inner_text() == value
                    assert f"{label} {value}" in slider.get_attribute("aria-valuetext")
                    assert (
                        value
                        in chart.locator("tbody tr", has=page.locator("th", has_text=f"{step}")).first.text_content()
                    )
                slider.press("ArrowRight")
        # The pointer: in the middle of the picture is the value whose place is nearest to it.
        chart = page.locator("figure", has=page.get_by_role("heading", name="Learning rate", exact=True))
        places = json.loads(chart.get_attribute("data-values"))["x"]
        plot = chart.locator("svg.plot")
        plot.hover()
        middle = plot.evaluate("(each) => each.viewBox.baseVal.width / 2")
        nearest = min(range(len(places)), key=lambda index: abs(places[index] - middle))
        assert chart.locator(".place").inner_text() == f"step {nearest + 1}"


def cells(page: Any, section: str) -> dict[str, list[str]]:
    """The rows of a section's tables: the cells of each by its first."""
    rows = page.evaluate(
        "(id) => [...document.querySelectorAll(`#${CSS.escape(id)} tbody tr`)].map((row) =>"
        " [...row.children].map((cell) => cell.textContent))",
        section,
    )
    return {first: rest for first, *rest in rows}


def test_the_tables_have_the_figures_of_the_json(browser: Browser, pages: dict[str, Path]) -> None:
    folder = pages["run"].parent
    output = made(cli, ["report", "--json", str(folder / "plain"), str(folder / "other")])
    figures = json.loads(output)
    with browser.open(pages["run"]) as page:
        first, last = figures["plain"]["eval_first"], figures["plain"]["eval_last"]
        rows = cells(page, "results")
        assert rows["KL(teacher ‖ student), nats"][:2] == [f"{first['eval_kl']:.4f}", f"{last['eval_kl']:.4f}"]
        # 0.2% and 0.44%: below 1%, shares have decimals.
        assert rows["top-1 agreement with the teacher"] == ["0.2%", "0.44%", "+0.2 points"]
    with browser.open(pages["runs"]) as page:
        rows = cells(page, "results")
        for column, name in enumerate(("plain", "other")):
            ends = [figures[name][end]["eval_kl"] for end in ("eval_first", "eval_last")]
            assert rows["KL(teacher ‖ student), nats"][column] == "{:.4f} → {:.4f}".format(*ends)
    inspected = CliRunner().invoke(codec, ["inspect", "--json", str(folder / "data")], catch_exceptions=False)
    data = json.loads(inspected.stdout)
    with browser.open(pages["data"]) as page:
        sizes = cells(page, "size")
        for part, size in data["bytes_per_token"].items():
            if part != "codec":
                assert sizes[part][0] == f"{size:,.1f}"
        assert cells(page, "contents")["documents"] == [f"{data['documents']:,}"]
        assert cells(page, "mass")["median"] == [f"{data['mass']['p50']:.2%}"]
        assert cells(page, "fidelity")["KL, mean"] == [f"{data['fidelity']['kl_mean']:.2e} nats"]
        worst = cells(page, "documents")
        for each in data["worst_documents"]:
            assert worst[f"{each['document']:,}"][0] == f"{each['mass']:.2%}"


def test_tokens_are_shown_where_they_differ_most(browser: Browser, pages: dict[str, Path]) -> None:
    with browser.open(pages["run"]) as page:
        first = page.locator(".differences > li").first
        text = first.inner_text()
        for shown in ("KL 9.50", "document 0, position 5", "75.0% (6.2%)", "25.0% (< 0.1%)", "87.5%", f"{'plain'}"):
            assert shown in text
        assert page.locator(".differences > li").count() == 14
        assert cells(page, "documents")["3"] == ["4.125", "12.5%", "11", "plain"]


# -- what data may try -------------------------------------------------------------------------------------------------


class Shape(HTMLParser):
    """The elements of a page and the names of their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *sorted(name for name, _ in attrs)))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Pages of a harmless run and dataset, then those in which each of these names is every text."""
    folder = tmp_path_factory.mktemp("hostile")
    write(folder / "data", make_documents(3))
    inspection = inspect_dataset(Dataset.open(folder / "data"))
    made: dict[str, list[str]] = {"run": [], "data": []}
    for number, name in enumerate(("plain", *EVIL)):
        made["run"].append(run_page([write_run(folder / f"run{number}", name)]))
        facts: dict[str, Any] = {"teacher": {"name": name, name: name}, "tokenizer": {"name": name}}
        worst = tuple({**each, "doc_id": name} for each in inspection.worst_documents)
        said = {"doubts": (name,), "impossible": (name,), "codec_warnings": (name,), "fidelity_source": name}
        changed = replace(inspection, path=name, capture={name: [name]}, worst_documents=worst, **facts, **said)
        made["data"].append(inspection_page(changed))
    return made


@pytest.mark.parametrize("kind", ["run", "data"])
def test_names_add_no_element_and_no_attribute(hostile: dict[str, list[str]], kind: str) -> None:
    harmless, *pages = hostile[kind]
    for name, text in zip(EVIL, pages, strict=True):
        assert Shape(text).tags == Shape(harmless).tags, name
        assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize("kind", ["run", "data"])
def test_names_do_nothing_in_a_browser(
    browser: Browser, hostile: dict[str, list[str]], kind: str, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    for text in hostile[kind][1:]:
        page.write_text(text, encoding="utf-8")
        with browser.open(page) as opened:
            opened.mouse.move(200, 400)
            opened.locator("input[type=range]").first.press("Home")
            assert opened.evaluate("window.pwned") is None
            assert opened.locator("h1").is_visible()
        assert browser.complaints == []


def test_only_its_own_script_would_run(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    """The policy of the page stops what escaping would have missed."""
    text = pages["run"].read_text(encoding="utf-8")
    attack = "<script>window.pwned = 1</script><img src='http://localhost:9/x' onerror='window.pwned = 1'>"
    (tmp_path / "page.html").write_text(text.replace("<footer>", f"{attack}<footer>"), encoding="utf-8")
    with browser.open(tmp_path / "page.html") as opened:
        opened.wait_for_timeout(100)
        assert opened.evaluate("window.pwned") is None
        assert opened.locator(".reading input").first.is_visible(), "its own script has run"
    for directive in ("script-src", "img-src"):
        assert any(directive in each and "Content Security Policy" in each for each in browser.complaints)


# -- the commands ------------------------------------------------------------------------------------------------------


def test_a_page_that_cannot_be_written_is_refused_first(pages: dict[str, Path], tmp_path: Path) -> None:
    run = str(pages["run"].parent / "plain")
    for page in (tmp_path / "page.txt", tmp_path, tmp_path / "nowhere" / "page.html"):
        result = CliRunner().invoke(cli, ["report", run, "--html", str(page)])
        assert result.exit_code == 2
        check_names(" ".join(result.output.split()), "--html")


def test_a_run_without_evaluations_has_a_page_and_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    text = run_page([read_run(tmp_path)])
    check_names(text, "Training losses", "2.5000")
    assert "held-out" not in text, "nothing was evaluated"
    for damage in ("[]", '{"positions": 5}', '{"step": 1, "positions": [{}], "documents": []}'):
        (tmp_path / "_differences.json").write_text(damage)
        with refused(CorruptDataError, str(tmp_path / "_differences.json")):
            run_page([read_run(tmp_path)])


def test_figures_that_the_page_does_not_know_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data", make_documents(3))
    known = Inspection.to_dict

    def more(self: Inspection) -> dict[str, Any]:
        content = known(self)
        sizes = {**content["bytes_per_token"], "side_table": 12.5}
        return {**content, "bytes_per_token": sizes, "held_back": {"mean": 7.25, "bins": [1, 2]}}

    monkeypatch.setattr(Inspection, "to_dict", more)
    text = inspection_page(inspect_dataset(Dataset.open(tmp_path / "data")))
    check_names(text, "side table", "12.5", "held_back.mean", "7.25", "1, 2")
