"""The page of the service, in a real browser against a real server: whatever a person does, with a mouse, a keyboard or a finger."""

import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest
from served import application
from small_run import World, documents, run_pipeline, write_jsonl
from test_report_page import chromium  # noqa: F401
from test_service import slow_models

from influence.run import open_run
from influence.service import ServiceSettings
from influence.service.settings import named_runs
from influence.service.tokens import add_token
from jobs.health import write_health

pytestmark = pytest.mark.browser

HOSTILE = "<script>window.intruded = 1</script> <img src=x onerror='window.intruded = 1'> shipped from Lisbon."
FORMULA = "=HYPERLINK(1) crates of glass shipped from Lisbon."
LONG = "Dear friend of Lisbon, " + "the Tagus froze again and nobody sells glass before spring. " * 4


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of two runs, one of which the other is a copy of; among their texts are hostile ones, a long one and a near-duplicate."""
    scratch = tmp_path_factory.mktemp("page")
    own = world.copy(scratch)
    texts = [HOSTILE, FORMULA, LONG, documents()[0]["text"]]
    added = [{"id": f"added/{number}", "text": text, "source": "<b>added</b>"} for number, text in enumerate(texts)]
    write_jsonl(own.data, [*documents(), *added])
    run_pipeline(own.settings(scratch / "runs" / "small"))
    shutil.copytree(scratch / "runs" / "small", scratch / "runs" / "other")
    return scratch / "runs"


@pytest.fixture(scope="module")
def site(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with application(settings_of(runs, tmp_path_factory.mktemp("state"))) as url:
        yield url


def settings_of(runs: Path, state: Path, **changes: Any) -> ServiceSettings:
    return ServiceSettings(runs=named_runs([runs / "small"]), runs_dir=runs, state_dir=state, **changes)


@dataclass(kw_only=True)
class Visit:
    """The page in a browser tab, with what the tab complained of and asked for."""

    url: str
    tab: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, fragment: str = "#run=small", *, ready: str = ".home") -> None:
        self.tab.goto("about:blank")
        self.tab.goto(f"{self.url}/{fragment}")
        self.tab.locator(ready).first.wait_for()

    def fill(self, prompt: str = "Lisbon lies on", completion: str = " the Tagus") -> None:
        self.tab.get_by_label("After this prompt").fill(prompt)
        self.tab.get_by_label("the model says").fill(completion)
        self.tab.locator(".chip").first.wait_for()

    def narrow(self) -> None:
        self.tab.locator("#options").evaluate("details => { details.open = true }")

    def ask(self) -> None:
        self.tab.get_by_role("button", name="Ask", exact=True).click()
        self.answered()

    def answered(self) -> None:
        """Waits for the answer to what was asked last."""
        self.tab.wait_for_url(re.compile("query="))
        self.tab.locator("#main:not([aria-busy]) .answer").first.wait_for()

    def place(self) -> dict[str, str]:
        """What the address says."""
        return {name: values[0] for name, values in parse_qs(self.tab.url.partition("#")[2]).items()}

    def kept(self) -> dict[str, Any]:
        """The query that is shown, as the service keeps it."""
        return dict(httpx.get(f"{self.url}/v1/queries/{self.place()['query']}").json())

    def ids(self, heading: str) -> list[str]:
        return [str(id) for id in self.column(heading).locator(".sequences > li").evaluate_all("all => all.map(item => item.dataset.id)")]

    def column(self, heading: str) -> Any:
        return self.tab.get_by_role("region", name=heading)

    def problem(self) -> str:
        self.tab.locator("#problem:not([hidden])").wait_for()
        return str(self.tab.locator("#problem").inner_text())


@contextmanager
def visiting(browser: Any, url: str, *, width: int = 1280, **options: Any) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)
    context.set_default_timeout(20_000)
    visit = Visit(url=url, tab=context.new_page())
    visit.tab.on("console", lambda message: visit.complaints.append(message.text))
    visit.tab.on("pageerror", lambda error: visit.complaints.append(str(error)))
    visit.tab.on("request", lambda request: visit.requests.append(request.url))
    try:
        yield visit
    finally:
        context.close()


@pytest.fixture
def visit(chromium: Any, site: str) -> Iterator[Visit]:  # noqa: F811
    """A visit that must end without a complaint, an outside request or a script of a training text."""
    with visiting(chromium, site) as found:
        found.open()
        yield found
        assert found.tab.evaluate("window.intruded") is None
        assert [said for said in found.complaints if "Failed to load resource" not in said] == []
        assert [asked for asked in found.requests if not asked.startswith((site, "data:", "blob:", "about:"))] == []


# asking


def test_an_answer_shows_both_ends_and_what_shares_its_words(visit: Visit) -> None:
    visit.fill()
    visit.ask()
    result = visit.kept()["result"]
    assert visit.ids("Made it more likely") == [one["id"] for one in result["results"]]
    assert visit.ids("Made it less likely") == [one["id"] for one in result["opponents"]]
    lexical = visit.column("Shares its words")
    assert lexical.locator(".name").all_inner_texts() == [one["id"] for one in result["bm25"]["results"]]
    assert lexical.locator(".shared").count() >= result["bm25"]["overlap"] > 0
    assert f"{result['bm25']['overlap']} of the first" in lexical.inner_text()
    first = visit.column("Made it more likely").locator("li").first
    assert "".join(token for token, _ in result["results"][0]["tokens"]) == first.locator(".text").evaluate("p => p.textContent")
    assert first.get_by_role("img").get_attribute("aria-label").startswith("By layer")
    pieces = [one for one in result["results"] if one["documents"][0]["windows"] > 1]
    piece = pieces[0]["documents"][0]
    header = visit.column("Made it more likely").locator(f"[data-id='{pieces[0]['id']}'] header").inner_text()
    assert f"{piece['id']}, characters {piece['span'][0]}–{piece['span'][1]}, part {piece['window']} of {piece['windows']}" in header
    duplicates = [one for one in result["results"] if one["duplicates"]]
    assert duplicates
    folded = visit.column("Made it more likely").locator(f"[data-id='{duplicates[0]['id']}'] details")
    folded.locator("summary").click()
    assert duplicates[0]["duplicates"][0]["id"] in folded.inner_text()


def test_what_an_answer_rests_on_is_quoted_in_words(visit: Visit) -> None:
    visit.fill()
    visit.ask()
    words = httpx.get(f"{visit.url}/v1/queries/{visit.place()['query']}/words").json()
    said = visit.column("What this rests on").inner_text()
    assert all(sentence in said for sentence in words["trust"])
    assert "of the model’s parameters are attributed" in said
    visit.open()
    assert "of the true ten best were among its first" in visit.tab.get_by_role("region", name="Run small").inner_text()


def test_tokens_dragged_over_are_the_span(visit: Visit) -> None:
    visit.fill()
    chips = visit.tab.locator(".chip")
    tokens = httpx.post(f"{visit.url}/v1/runs/small/tokens", json={"prompt": "Lisbon lies on", "completion": " the Tagus"}).json()
    assert [chip.replace("·", " ") for chip in chips.all_inner_texts()] == tokens["completion"]
    assert len(tokens["completion"]) > 2
    chips.nth(1).hover()
    visit.tab.mouse.down()
    chips.nth(2).hover()
    visit.tab.mouse.up()
    assert [chip.get_attribute("aria-selected") for chip in chips.all()][:3] == ["false", "true", "true"]
    assert "Only 2 tokens" in visit.tab.locator("#span-said").inner_text()
    visit.ask()
    assert visit.kept()["request"]["span"] == [1, 3]
    assert "Only tokens 2 to 3 of the completion" in visit.tab.locator(".answer .lead").inner_text()


def test_with_ctrl_several_places_are_the_span_and_a_link_keeps_them(visit: Visit) -> None:
    visit.fill()
    chips = visit.tab.locator(".chip")
    for place, keys in ((0, []), (2, ["Control"]), (1, ["Control"]), (1, ["Control"])):
        chips.nth(place).click(modifiers=keys)
    assert [chip.get_attribute("aria-selected") for chip in chips.all()][:3] == ["true", "false", "true"]
    visit.tab.keyboard.press("ArrowRight")
    visit.ask()
    assert visit.kept()["request"]["span"] == [[0, 1], [2, 3]]
    visit.tab.goto(str(visit.tab.get_by_role("link", name="Link to the question").evaluate("link => link.href")))
    visit.answered()
    assert visit.kept()["request"]["span"] == [[0, 1], [2, 3]]
    visit.tab.locator(".chip[aria-selected=false]").nth(0).wait_for()
    assert "“" in visit.tab.locator("#span-said").inner_text()


def test_token_ids_are_asked_instead_of_text(visit: Visit) -> None:
    visit.narrow()
    visit.tab.get_by_label("Token ids instead of text").fill("5, 6,7")
    assert visit.tab.get_by_label("After this prompt").is_disabled()
    visit.ask()
    assert visit.kept()["request"]["input_ids"] == [5, 6, 7]
    assert "prompt" not in visit.kept()["request"]
    visit.tab.get_by_label("Token ids instead of text").fill("5, six")
    visit.tab.get_by_role("button", name="Ask", exact=True).click()
    visit.tab.locator("#problem").wait_for()


def test_keyboard_alone_selects_a_span_asks_and_reads_the_answer(visit: Visit) -> None:
    keys = visit.tab.keyboard
    visit.tab.get_by_label("After this prompt").focus()
    keys.type("Oslo lies on")
    keys.press("Tab")
    keys.type(" the Aker")
    visit.tab.locator(".chip").nth(2).wait_for()
    keys.press("Tab")
    assert visit.tab.evaluate("document.activeElement.id") == "span"
    for key in ("ArrowRight", "Space", "Shift+ArrowRight"):
        keys.press(key)
    for _ in range(2):
        keys.press("Tab")
    assert visit.tab.evaluate("document.activeElement.id") == "submit"
    keys.press("Enter")
    visit.answered()
    assert visit.kept()["request"]["span"] == [1, 3]
    assert visit.tab.evaluate("document.activeElement.id") == "answer-heading"
    text = visit.column("Made it more likely").locator(".text").first
    text.focus()
    keys.press("ArrowRight")
    visit.tab.locator("#spoken", has_text="token 1 of").wait_for(state="attached")
    visit.tab.locator(".heat").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        keys.press(key)
    visit.tab.locator("#spoken", has_text="rank 2").wait_for(state="attached")
    keys.press("Enter")
    assert visit.tab.evaluate("document.activeElement.id") == "a-helped-2"
    visit.column("Made it more likely").locator("button.name").first.focus()
    keys.press("Enter")
    visit.tab.locator("#document mark").wait_for()
    keys.press("Escape")
    assert visit.tab.evaluate("document.activeElement.className") == "name"


def test_contrast_filter_layers_and_number_are_asked(visit: Visit) -> None:
    visit.fill()
    visit.narrow()
    visit.tab.get_by_label("Rather than this completion").fill(" the Aker")
    assert "a contrast compares whole completions" in visit.tab.locator("#span-said").inner_text()
    visit.tab.get_by_label("Only sequences where").fill("source = 'gazetteer'")
    visit.tab.get_by_label("Only layers").fill("*.mlp.*, *.attn.*")
    visit.tab.get_by_label("At each end").fill("3")
    visit.tab.get_by_label("Normalize").check()
    visit.ask()
    expected = {"contrast": " the Aker", "where": "source = 'gazetteer'", "layers": ["*.mlp.*", "*.attn.*"], "k": 3, "normalize": True}
    kept = visit.kept()
    assert expected.items() <= kept["request"].items()
    said = visit.tab.locator(".answer .lead").inner_text()
    assert "the log-probabilities differ by" in said
    assert "source = 'gazetteer'" in said
    assert {one["metadata"]["source"] for one in kept["result"]["results"]} == {"gazetteer"}
    assert len(visit.ids("Made it more likely")) == 3
    assert "√nats" in visit.column("Made it more likely").inner_text()


def test_what_the_form_says_of_the_answer_is_asked_and_kept_in_the_link(visit: Visit) -> None:
    visit.fill()
    visit.narrow()
    visit.tab.get_by_label("Candidates").fill("7")
    visit.tab.get_by_label("Averaged with runs").fill("other")
    visit.tab.get_by_label("Split by predicted token").check()
    visit.tab.get_by_label("Refine").check()
    visit.ask()
    kept = visit.kept()
    assert {"candidates": 7, "also": ["other"], "by_output_token": True, "refine": True}.items() <= kept["request"].items()
    assert kept["result"]["provenance"]["method"] == "refined"
    assert "candidates, also, refine, by output token" in visit.tab.locator("#options-said").inner_text()
    visit.tab.get_by_role("link", name="Link to the question").click()
    visit.answered()
    assert visit.kept()["request"] == kept["request"]


def test_the_report_on_the_run_is_one_click_away(visit: Visit) -> None:
    with visit.tab.expect_download() as download:
        visit.tab.get_by_role("button", name="Report on this run").click()
    assert download.value.suggested_filename == "influence-small.html"
    assert "<h1>Run small</h1>" in Path(download.value.path()).read_text(encoding="utf-8")


def test_the_report_on_the_training_set_is_there_once_it_was_measured(visit: Visit, runs: Path) -> None:
    button = visit.tab.get_by_role("button", name="Report on its training set")
    visit.open("#run=other")
    assert button.count() == 0
    write_health(open_run(runs / "other").health(k=3), runs / "other" / "evaluations" / "health")
    visit.open("#run=other")
    with visit.tab.expect_download() as download:
        button.click()
    assert download.value.suggested_filename == "influence-other-training-set.html"
    assert "near-duplicates" in Path(download.value.path()).read_text(encoding="utf-8").lower()


def test_nothing_found_is_said(visit: Visit) -> None:
    visit.fill()
    visit.narrow()
    visit.tab.get_by_label("Only sequences where").fill("source = 'nowhere'")
    visit.tab.get_by_role("button", name="Ask", exact=True).click()
    visit.tab.locator(".answer, #problem:not([hidden])").first.wait_for()
    assert re.search("No sequence|no .*sequence", visit.tab.locator("body").inner_text())


def test_refusals_are_told_in_plain_words_and_the_form_stays(visit: Visit) -> None:
    visit.fill()
    visit.narrow()
    visit.tab.get_by_label("Only sequences where").fill("sauce = 'web'")
    visit.tab.get_by_role("button", name="Ask", exact=True).click()
    said = visit.problem()
    assert said.startswith("The question cannot be answered as it stands")
    assert "source" in said
    assert visit.tab.get_by_label("the model says").input_value() == " the Tagus"
    visit.open("#run=small&query=00000000000000000000000000000000", ready="#problem:not([hidden])")
    assert "never accepted, or is forgotten" in visit.problem()


def test_a_question_without_a_completion_is_refused_with_the_reason(visit: Visit) -> None:
    visit.tab.get_by_role("button", name="Ask", exact=True).click()
    assert "the completion is empty" in visit.problem().lower()


def test_a_missing_space_is_noticed(visit: Visit) -> None:
    visit.fill(completion="the Tagus")
    visit.tab.get_by_role("button", name="Add one").click()
    assert visit.tab.get_by_label("the model says").input_value() == " the Tagus"
    visit.tab.locator("#completion-hint").wait_for(state="hidden")


def test_one_click_asks_something_of_the_run(visit: Visit) -> None:
    visit.tab.get_by_role("button", name="Surprise me").click()
    visit.answered()
    assert visit.kept()["state"] == "done"
    assert visit.tab.get_by_label("the model says").input_value() == visit.kept()["request"]["completion"]
    visit.open()
    visit.tab.locator(".card").first.click()
    visit.answered()
    assert len(visit.ids("Made it more likely")) == 10


# texts of strangers


def ask_of_added(visit: Visit, prompt: str, completion: str) -> None:
    """A question of the texts that were added alone."""
    visit.fill(prompt, completion)
    visit.narrow()
    visit.tab.get_by_label("Only sequences where").fill("source = '<b>added</b>'")
    visit.ask()


def test_markup_in_training_text_is_shown_as_text(visit: Visit) -> None:
    ask_of_added(visit, "<script>window.intruded", " = 1")
    item = visit.tab.locator("[data-id='added/0:0']").first
    assert item.locator(".text").evaluate("p => p.textContent").startswith("<script>window.intruded = 1</script>")
    assert "<b>added</b>" in item.inner_text()
    item.locator("button.name").click()
    visit.tab.locator(".document span").first.wait_for()
    assert visit.tab.locator(".document").evaluate("box => box.textContent") == HOSTILE
    assert visit.tab.locator("main :is(script, img), #document :is(script, img)").count() == 0


def test_a_sequence_opens_to_its_whole_document(visit: Visit) -> None:
    ask_of_added(visit, "the Tagus froze", " again")
    id = next(one for one in visit.ids("Made it more likely") + visit.ids("Made it less likely") if one.startswith("added/2:"))
    visit.tab.locator(f"[data-id='{id}'] button.name").first.click()
    dialog = visit.tab.get_by_role("dialog", name=id)
    dialog.locator(".document span").first.wait_for()
    assert dialog.locator(".document").evaluate("box => box.textContent") == LONG
    assert dialog.locator("mark").count() == 1
    assert "<b>added</b>" in dialog.inner_text()


# links, files, comparisons


def test_a_link_leads_to_the_same_answer_and_the_way_back(visit: Visit) -> None:
    visit.fill()
    visit.ask()
    ids, place = visit.ids("Made it more likely"), visit.place()
    links = [visit.tab.get_by_role("link", name=f"Link to {what}").get_attribute("href") for what in ("this answer", "the question")]
    for link in links:
        visit.open(str(link), ready=".answer")
        visit.answered()
        assert visit.ids("Made it more likely") == ids
        assert visit.place() == place  # the same question of an unchanged index has its answer kept
    assert visit.tab.get_by_label("After this prompt").input_value() == "Lisbon lies on"
    visit.tab.get_by_role("link", name="influence", exact=True).click()
    visit.tab.locator(".home").wait_for()
    visit.tab.go_back()
    visit.answered()
    assert visit.ids("Made it more likely") == ids


def test_an_answer_to_another_program_is_shown_as_far_as_it_goes(visit: Visit) -> None:
    ids = {}
    for name, body in {
        "one": {"prompt": "Oslo", "completion": " lies", "opponents": True},
        "all": {"text": "Oslo lies on the Aker."},
    }.items():
        ids[name] = httpx.post(f"{visit.url}/v1/runs/small/queries", json=body).json()["id"]
    visit.open(f"#run=small&query={ids['one']}", ready=".answer")
    assert visit.tab.locator(".end h3").all_inner_texts() == ["Made it less likely"]
    visit.open(f"#run=small&query={ids['all']}", ready=".answer")
    assert visit.tab.locator(".end h3").all_inner_texts() == ["Made it more likely"]
    assert visit.tab.get_by_label("the model says").input_value() == "Oslo lies on the Aker."


def test_questions_are_never_in_what_the_browser_asks_for(visit: Visit) -> None:
    visit.open("#run=small&prompt=Lisbon+lies+on&completion=+the+Tagus&where=source+is+not+null", ready=".answer")
    assert not [asked for asked in visit.requests if "Lisbon" in asked or "Tagus" in asked]


def test_files_hold_the_answer(visit: Visit) -> None:
    ask_of_added(visit, "crates of glass", " shipped from Lisbon")
    files = {}
    for name in ("JSON", "CSV", "HTML report"):
        with visit.tab.expect_download() as download:
            visit.tab.get_by_role("button", name=name, exact=True).click()
        files[name] = Path(download.value.path()).read_text(encoding="utf-8")
        assert download.value.suggested_filename.startswith("influence-small-")
    result = visit.kept()["result"]
    assert json.loads(files["JSON"]) == result
    rows = list(csv.DictReader(io.StringIO(files["CSV"])))
    both = [*result["results"], *result["opponents"]]
    assert [row["id"] for row in rows] == [one["id"] for one in both]
    assert [float(row["score"]) for row in rows] == [one["score"] for one in both]
    assert [row["side"] for row in rows] == ["helped"] * len(result["results"]) + ["hurt"] * len(result["opponents"])
    text = {row["id"]: row["text"] for row in rows}
    assert text["added/1:0"].startswith("'=HYPERLINK(1)")  # a spreadsheet takes it for text
    assert {row["metadata.source"] for row in rows} == {one["metadata"]["source"] for one in both}
    assert files["HTML report"].startswith("<!DOCTYPE html>")


def test_two_questions_stand_side_by_side(visit: Visit) -> None:
    visit.fill()
    visit.ask()
    first = visit.place()["query"]
    visit.tab.get_by_role("button", name="Compare with another question").click()
    visit.tab.get_by_label("the model says").fill(" the Aker")
    visit.tab.get_by_role("button", name="Ask", exact=True).click()
    visit.tab.locator(".comparison").wait_for()
    assert visit.place()["with"] == first
    assert visit.tab.locator(".comparison .answer h2").all_inner_texts() == ["What led to “the Tagus”", "What led to “the Aker”"]
    sides = visit.tab.locator(".comparison .answer")
    shown = [set(side.locator("[data-id]").evaluate_all("all => all.map(item => item.dataset.id)")) for side in sides.all()]
    both = visit.tab.get_by_role("region", name="Sequences in both answers").locator("tbody tr .name").all_inner_texts()
    assert shown[0] & shown[1] <= set(both)
    url = visit.tab.url.partition("/#")[2]
    visit.open(f"#{url}", ready=".comparison")


def test_two_runs_stand_side_by_side(visit: Visit) -> None:
    visit.fill()
    visit.ask()
    visit.tab.get_by_role("button", name="Compare with run other").click()
    visit.tab.locator(".comparison").wait_for()
    assert visit.tab.locator(".comparison .answer .eyebrow").all_inner_texts() == ["RUN SMALL", "RUN OTHER"]
    assert visit.place()["run"] == "other"


def test_the_map_answers_the_pointer_and_leads_to_the_sequence(visit: Visit) -> None:
    visit.fill()
    visit.ask()
    result = visit.kept()["result"]
    cells = visit.tab.locator(".heat .cells")
    cells.scroll_into_view_if_needed()
    frame = cells.bounding_box()
    visit.tab.mouse.move(frame["x"] + 8, frame["y"] + 66 + 6)
    visit.tab.locator("#tip").wait_for()
    layer = next(iter(result["results"][0]["layers"]))
    tip = visit.tab.locator("#tip").inner_text()
    assert layer in tip
    assert result["results"][0]["id"] in tip
    visit.tab.mouse.click(frame["x"] + 8, frame["y"] + 66 + 6)
    assert visit.tab.evaluate("document.activeElement.id") == "a-helped-1"
    visit.tab.get_by_text("These numbers as a table").click()
    rows = visit.tab.get_by_role("region", name="Scores by layer and sequence").locator("tbody tr")
    rows.first.wait_for()  # the table is drawn after the click has returned
    assert rows.count() == len(result["results"][0]["layers"]) + 1


# work that takes long


def test_long_work_shows_its_progress_survives_a_reload_and_ends_in_the_answer(visit: Visit) -> None:
    visit.fill("Nairobi lies on", " the Athi")
    visit.narrow()
    visit.tab.get_by_label("Scan every sequence").check()
    with slow_models(0.15):
        visit.tab.get_by_role("button", name="Ask", exact=True).click()
        visit.tab.locator("#work progress[value]").wait_for()
        visit.tab.reload()
        visit.tab.locator("#work progress[value]").wait_for()
        assert re.search(r"\d of \d", visit.tab.locator("#work-said").inner_text())
    visit.answered()
    assert visit.kept()["request"]["exact"] is True
    visit.tab.locator("#work").wait_for(state="hidden")


def test_long_work_can_be_cancelled(visit: Visit) -> None:
    visit.fill("Quito lies on", " the Machángara")
    visit.narrow()
    visit.tab.get_by_label("Scan every sequence").check()
    with slow_models(0.3):
        visit.tab.get_by_role("button", name="Ask", exact=True).click()
        visit.tab.wait_for_url(re.compile("query="))
        visit.tab.locator("#work-said", has_text=re.compile("Working|Waiting")).wait_for()
        visit.tab.get_by_role("button", name="Cancel").click()
        assert visit.problem().startswith("Cancelled")
    assert visit.kept()["state"] == "cancelled"


def test_a_quick_question_is_given_up_by_cancel(visit: Visit) -> None:
    visit.fill("Hanoi lies on", " the Red")
    with slow_models(0.3):
        visit.tab.get_by_role("button", name="Ask", exact=True).click()
        visit.tab.get_by_role("button", name="Cancel").click()
        visit.tab.locator("#work").wait_for(state="hidden")
    assert "query" not in visit.place()


# every screen and everybody


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_window_and_text_stands_out(chromium: Any, site: str, width: int, scheme: str) -> None:  # noqa: F811
    with visiting(chromium, site, width=width, color_scheme=scheme, has_touch=width == 360) as visit:
        visit.open()
        fits = "document.documentElement.scrollWidth <= innerWidth"
        assert visit.tab.evaluate(fits)
        assert faults(visit) == []
        visit.fill("Lisbon lies on", " the Tagus")
        visit.narrow()
        visit.ask()
        assert visit.tab.evaluate(fits)
        assert faults(visit) == []
        background = visit.tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(int(part) for part in re.findall(r"\d+", background)[:3]) < 200) == (scheme == "dark")
        visit.tab.get_by_role("button", name="Compare with another question").click()
        visit.tab.get_by_label("the model says").fill(" the Aker")
        visit.tab.get_by_role("button", name="Ask", exact=True).click()
        visit.tab.locator(".comparison").wait_for()
        assert visit.tab.evaluate(fits)
        assert faults(visit) == []


def test_a_finger_reads_tokens_and_selects_them(chromium: Any, site: str) -> None:  # noqa: F811
    with visiting(chromium, site, width=360, has_touch=True, is_mobile=True) as visit:
        visit.open()
        visit.fill()
        visit.tab.locator(".chip").nth(1).tap()
        assert "Only 1 token" in visit.tab.locator("#span-said").inner_text()
        visit.ask()
        visit.column("Made it more likely").locator(".text .t").nth(2).tap()
        visit.tab.locator("#tip", has_text="token 3 of").wait_for()


def faults(visit: Visit) -> list[str]:
    """What a screen reader or a weak eye would stumble over: missing labels, ids twice or nowhere, leaps of headings, contrasts below 4.5."""
    return list(visit.tab.evaluate((Path(__file__).parent / "page_faults.js").read_text(encoding="utf-8")))


# who may ask


def test_who_has_a_token_signs_in_for_the_tab_and_out_again(
    chromium: Any,  # noqa: F811
    runs: Path,
    tmp_path: Path,
) -> None:
    token = add_token(tmp_path / "tokens", "ada", ("query",))
    settings = settings_of(runs, tmp_path / "state", tokens_file=tmp_path / "tokens")
    with application(settings) as url, visiting(chromium, url) as visit:
        visit.open(ready="#sign-in[open]")
        visit.tab.get_by_label("Token", exact=True).fill("not this one")
        visit.tab.keyboard.press("Enter")
        visit.tab.get_by_text("The service does not know this token.").wait_for()
        assert faults(visit) == []
        visit.tab.get_by_label("Token", exact=True).fill(token)
        visit.tab.keyboard.press("Enter")
        visit.tab.locator(".home").wait_for()
        visit.fill()
        visit.ask()
        with visit.tab.expect_download() as download:
            visit.tab.get_by_role("button", name="HTML report").click()
        assert Path(download.value.path()).stat().st_size > 1000
        visit.tab.reload()
        visit.answered()
        stores = visit.tab.evaluate("[JSON.stringify(localStorage), document.cookie, location.href]")
        assert not any(token in store for store in stores)
        assert not any(token in asked for asked in visit.requests)
        visit.tab.get_by_role("button", name="Sign out").click()
        visit.tab.locator("#sign-in[open]").wait_for()
        assert token not in visit.tab.evaluate("JSON.stringify(sessionStorage)")


def test_a_server_that_is_gone_is_told(chromium: Any, runs: Path, tmp_path: Path) -> None:  # noqa: F811
    with visiting(chromium, "") as visit:
        with application(settings_of(runs, tmp_path / "state")) as url:
            visit.url = url
            visit.open()
            visit.fill()
        visit.tab.get_by_role("button", name="Ask", exact=True).click()
        assert "The service cannot be reached" in visit.problem()
        assert visit.tab.get_by_role("button", name="Try again").is_visible()


def test_a_run_that_cannot_be_asked_says_why(chromium: Any, runs: Path, tmp_path: Path) -> None:  # noqa: F811
    broken = tmp_path / "runs" / "broken"
    broken.mkdir(parents=True)
    (broken / "run.json").write_text((runs / "small" / "run.json").read_text()[:200])
    settings = ServiceSettings(runs_dir=broken.parent, state_dir=tmp_path / "state")
    with application(settings) as url, visiting(chromium, url) as visit:
        visit.open("#run=broken")
        said = visit.tab.locator("main").inner_text()
        assert said.startswith("Run broken cannot be asked")
        assert "run.json" in said or "damaged" in said
        assert faults(visit) == []


def test_a_service_without_runs_says_so(chromium: Any, tmp_path: Path) -> None:  # noqa: F811
    with application(ServiceSettings(state_dir=tmp_path / "state")) as url, visiting(chromium, url) as visit:
        visit.open()
        assert "No run is served" in visit.tab.locator("main").inner_text()
        assert visit.tab.get_by_role("button", name="Ask", exact=True).is_disabled()


def test_every_file_of_the_page_is_served_under_its_own_policy(site: str) -> None:
    folder = Path(__file__).parent.parent / "influence/service/page"
    shared = folder.parents[1] / "report/shared"
    for file in ["", *(path.name for place in (folder, shared) for path in place.iterdir())]:
        response = httpx.get(f"{site}/{file}")
        assert response.status_code == 200
        assert "default-src 'none'; script-src 'self'" in response.headers["content-security-policy"]
        assert not re.search(r"(?<!xmlns=\")https?://(?!www\.w3\.org/2000/svg)", response.text)
        assert "innerHTML" not in response.text
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|<script(?! type=\"module\" src=)|\son\w+=|\sstyle=", page)
