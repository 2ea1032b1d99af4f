# SPDX-License-Identifier: Apache-2.0
"""The page of a run: what it holds and forbids, and how it behaves in a real browser opened from a file."""

import html.parser
import json

import pytest
import torch
from browser import browsing, missing
from tiny_models import word_tokenizer

from diffullama_ext.sampling import fill
from diffullama_ext.sampling.page import trace_page, write_page
from diffullama_ext.sampling.token_text import token_text
from diffullama_ext.sampling.trace import Trace

MASK = 8
WORDS = [
    "</script><script>document.title='owned'</script>",
    "<b>bold</b>",
    " the",
    "<!--",
    "\n",
    "é\u2028",
    "&lt;",
    "'\"`",
    "?",
]
TITLE = "A </title><script>run</script> & more {{DATA}}"
STEPS = 5


def recorded(context_denoiser, **options):
    """(trace, final ids): two rows of 16, the first half of each given."""
    generator = torch.Generator().manual_seed(5)
    xt = torch.randint(0, MASK, (2, 16), generator=generator)
    xt[:, :5] = torch.tensor([0, 1, 3, 5, 2])
    masked = (torch.arange(16) >= 6).expand(2, 16)
    trace = Trace(**options)
    filled = fill(context_denoiser(9), xt, masked, mask_id=MASK, steps=STEPS, on_step=trace)
    return trace, filled.xt


class Elements(html.parser.HTMLParser):
    """Tags of a page and the contents of its scripts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts.append(data)


def test_the_page_is_one_document_whatever_the_tokens(context_denoiser):
    trace, final = recorded(context_denoiser)
    page = Elements(trace_page(trace, WORDS.__getitem__, title=TITLE))
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 2
    assert names.count("b") == 0
    assert not [tag for tag, attributes in page.tags if attributes.keys() & {"src", "href"}]
    assert any("default-src 'none'" in attributes.get("content", "") for _, attributes in page.tags)
    data = json.loads(page.scripts[0])
    assert set(data["vocabulary"]) <= set(WORDS)
    assert (data["steps"], len(data["rows"])) == (STEPS, 2)
    for row, ids in zip(data["rows"], final.tolist(), strict=True):
        text = row["given"]
        for frame in row["frames"]:
            for position, token in frame["written"]:
                text[position] = token
        assert [data["vocabulary"][token] for token in text] == [WORDS[i] for i in ids]


def test_padding_is_left_out_and_size_is_bounded(context_denoiser):
    trace, _ = recorded(context_denoiser)
    page = Elements(trace_page(trace, WORDS.__getitem__, lengths=torch.tensor([16, 10]), max_entries=40))
    rows = json.loads(page.scripts[0])["rows"]
    assert [len(row["given"]) for row in rows] == [16, 10]
    assert len(rows[0]["frames"]) < STEPS
    assert rows[0]["frames"][-1]["step"] == STEPS
    with pytest.raises(ValueError, match=r"lengths must be int64\[2\]"):
        trace_page(trace, WORDS.__getitem__, lengths=torch.tensor([16]))


def test_a_failed_write_leaves_the_old_page(context_denoiser, tmp_path):
    trace, _ = recorded(context_denoiser)
    path = tmp_path / "run.html"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_page(path, trace, {}.__getitem__)
    with pytest.raises(FileNotFoundError):
        write_page(tmp_path / "no" / "run.html", trace, WORDS.__getitem__)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_page(path, trace, WORDS.__getitem__)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_token_text_of_a_tokenizer():
    text = token_text(word_tokenizer())
    assert (text(5), text(0)) == ("w3", "<unk>")
    assert text(1000) == "<1000>"

    class SentencePieces:
        names = ("\u2581the", "<0xE2>", "s", "")

        def convert_ids_to_tokens(self, i):
            return self.names[i]

        def decode(self, ids, **options):
            return ("the", "\ufffd", "s", "")[ids[0]]

    assert [token_text(SentencePieces())(i) for i in range(4)] == [" the", "<0xE2>", "s", ""]


# --- in a browser -----------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def window():
    with browsing() as browser:
        yield browser


@pytest.fixture
def opened(window, context_denoiser, tmp_path):
    """(browser at the page, opened from a file; trace; final ids)."""
    trace, final = recorded(context_denoiser)
    write_page(tmp_path / "run.html", trace, WORDS.__getitem__, title=TITLE)
    window.open(f"file://{tmp_path}/run.html")
    return window, trace, final


def shown(browser):
    return browser.run("return [...document.querySelectorAll('#text span')].map(token => token.textContent)")


def colours(browser):
    return browser.run("return [...document.querySelectorAll('#text span')].map(token => token.style.background)")


@needs_browser
def test_it_shows_the_text_runs_no_token_and_loads_nothing(opened):
    browser, _, final = opened
    assert browser.run("return document.title") == TITLE
    assert shown(browser) == [WORDS[i].replace("\n", "\u21b5\n") for i in final[0].tolist()]
    assert browser.text("#where") == f"step {STEPS} of {STEPS}: 10 of 10 tokens written"
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.run("return document.querySelectorAll('script').length") == 2
    assert browser.errors() == []


@needs_browser
def test_the_slider_goes_through_the_steps(opened):
    browser, trace, _ = opened
    history = trace.history()
    for step in range(STEPS - 1, -1, -1):
        browser.press("#step", "left")
        masked = history.masked[step - 1, 0] if step else trace.maskable[0]
        assert [text == "\u00b7" for text in shown(browser)] == masked.tolist()
        assert browser.text("#where").startswith(f"step {step} of {STEPS}: {10 - int(masked.sum())} of 10")
        assert browser.run("return document.getElementById('step').getAttribute('aria-valuetext')") == browser.text(
            "#where"
        )
    browser.press("#step", "right")
    new = browser.run("return [...document.querySelectorAll('.new')].map(token => Number(token.dataset.position))")
    assert new == history.committed[0, 0].nonzero().flatten().tolist()


@needs_browser
def test_colours_are_of_the_step_or_the_confidence(opened):
    browser, trace, _ = opened
    by_step = colours(browser)
    assert [colour == "" for colour in by_step] == (~trace.maskable[0]).tolist()
    steps = trace.commit_step[0]
    for i, j in torch.combinations(trace.maskable[0].nonzero().flatten()).tolist():
        assert (by_step[i] == by_step[j]) == bool(steps[i] == steps[j])
    browser.click("input[value=confidence]")
    by_confidence = colours(browser)
    assert by_confidence != by_step
    expected = browser.run(
        "return arguments[0].map(value => value === null ? '' : `rgb(${colour(value).join(', ')})`)",
        [None if value != value else round(value, 4) for value in trace.confidence[0].tolist()],
    )
    assert by_confidence == expected


@needs_browser
def test_pointing_and_arrow_keys_show_the_candidates(opened):
    browser, trace, final = opened
    history = trace.history()
    browser.hover("[data-position='7']")
    about = browser.text("#about")
    step = int(trace.commit_step[0, 7])
    assert about.startswith(f"Position 7: {json.dumps(WORDS[final[0, 7]], ensure_ascii=False)}")
    assert f"written in step {step + 1}, confidence {trace.confidence[0, 7]:.3f}" in about
    listed = browser.run(
        "return [...document.querySelectorAll('#about tr')].map(line => JSON.parse(line.cells[0].textContent))"
    )
    assert listed == [WORDS[i] for i in history.candidates[step, 0, 7].tolist()]
    browser.run("document.querySelector('#text [tabindex=\"0\"]').focus()")
    browser.press_keys("right")
    assert browser.text("#about").startswith("Position 8")
    browser.press_keys("home")
    assert browser.text("#about").endswith("given")
    browser.press("#step", *["left"] * STEPS)
    browser.hover("[data-position='15']")
    assert browser.text("#about") == "Position 15: masked\nnot looked at yet"


@needs_browser
def test_play_and_the_choice_of_the_sequence(opened):
    browser, _, final = opened
    browser.run("const row = document.getElementById('row'); row.value = 1; row.dispatchEvent(new Event('change'))")
    assert shown(browser) == [WORDS[i].replace("\n", "\u21b5\n") for i in final[1].tolist()]
    browser.click("#play")
    assert browser.text("#play") == "Pause"
    assert browser.text("#where").startswith("step 0 of")
    browser.click("#play")
    assert browser.text("#play") == "Play"
