"""The report in a real browser: hostile texts stay texts, nothing is fetched, links, keys and narrow screens work."""

import pytest
from support.runs import write_run

from roserag_jax.report.page import write_page

pytestmark = pytest.mark.browser

HOSTILE = (
    "</script><script>window.hacked=1</script><!-- <script> <img src=x onerror=window.hacked=2> "
    "<svg onload=window.hacked=3></svg>{{ 7*7 }} {% raw %} javascript:window.hacked=4 &lt;b&gt; "
    "\u2028\u2029\u202e \x00 ']]>"
)


@pytest.fixture
def opened(browser, tmp_path):
    """A function: the page of a workdir, opened from disk, with everything that went wrong in it."""
    pages = []

    def make(folder, width=1280, fragment="", compare=(), **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        pages.append(page)
        page.faults, page.fetched = [], []
        page.on("console", lambda message: page.faults.append(message.text))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("request", lambda request: page.fetched.append(request.url))
        file = write_page([str(folder), *map(str, compare)], str(tmp_path / f"page{len(pages)}.html"))
        page.goto(f"file://{file}{fragment}")
        page.wait_for_selector("body[data-ready]", timeout=20_000)
        return page

    yield make
    for page in pages:
        assert page.faults == []
        assert [url for url in page.fetched if not url.startswith("file://")] == []
        page.close()


def test_hostile_texts_are_shown_as_text_and_run_nothing(opened, tmp_path):
    page = opened(write_run(tmp_path / "run", text=HOSTILE))
    for control in ("#pairs-list a", "#differences-before"):
        assert page.locator(control).count()
    page.locator("#pairs-list a").nth(1).click()
    page.fill("#pairs-search", "<script>")
    page.locator("details").first.evaluate("each => each.open = true")
    assert page.evaluate("window.hacked") is None
    shown = page.inner_text("#pairs-detail")
    assert "</script><script>window.hacked=1</script><!-- <script> <img src=x onerror=window.hacked=2>" in shown
    assert "{{ 7*7 }}" in shown and "&lt;b&gt;" in shown
    assert "onload=window.hacked=3" in page.inner_text("#differences-table")
    assert page.locator("main script, main img, [onload], [onerror]").count() == 0
    assert page.locator("script").count() == 3  # two of data and the page's own
    assert len(page.fetched) == 1


def test_policy_stops_a_script_that_is_not_the_pages_own(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"))
    page.evaluate(
        """() => {
        const script = document.createElement('script');
        script.textContent = 'window.hacked = 1';
        document.body.append(script);
        document.body.insertAdjacentHTML('beforeend', '<img src=x onerror="window.hacked=1">');
        }"""
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in fault for fault in page.faults)
    page.faults.clear()


def test_why_a_question_has_no_pair_is_one_search_away(opened, tmp_path):
    """From the first screen: its words or its id and Enter give a sentence with the reason."""
    page = opened(write_run(tmp_path / "run", questions=12))
    assert "4 of 12 training questions have a pair." in page.inner_text("#summary")
    for text in ("founded MUSEUM 1?", "q1"):  # and not q10, which holds it too
        page.goto(f"{page.url.partition('#')[0]}#summary")
        page.fill("#find-text", text)
        page.keyboard.press("Enter")
        page.wait_for_selector("#pairs-detail:focus")
        detail = page.inner_text("#pairs-detail")
        assert "museum 1?" in detail and "Why there is no pair: no candidate reaches the golden answer" in detail
        assert "0 of 2 candidates are correct" in detail and "A passage shown holds a golden answer." in detail
        assert (
            "The candidates answer \u201cthe mill\u201d (2 times)." in detail and "What to do: Raise config." in detail
        )
    page.fill("#find-text", "nowhere")
    page.keyboard.press("Enter")
    page.locator("#pairs-count", has_text="None of the 12 questions here holds all these words.").wait_for()
    assert page.inner_text("#pairs-detail") == ""


def test_why_questions_have_no_pair_leads_to_them(opened, tmp_path):
    """From the funnel's reason to the questions it holds for, and by a link with a question's id; no link breaks it."""
    folder = write_run(tmp_path / "run")
    page = opened(folder)
    page.click("#funnel a:text('none correct')")
    assert page.inner_text("#pairs-count") == "2 of 6 questions"
    assert "Why there is no pair: no candidate reaches the golden answer" in page.inner_text("#pairs-detail")
    page = opened(folder, fragment="#question/q2")
    detail = page.inner_text("#pairs-detail")
    assert "museum 2?" in detail and "every candidate is correct" in detail
    page = opened(folder, fragment="#question/%E0%A4%A")  # no text in UTF-8
    assert page.locator("#differences-table tr").count()


def test_pair_marks_gold_passages_answers_and_cited_words(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"), fragment="#question/q0")
    assert page.locator(".candidate.chosen .badge").all_inner_texts() == ["CHOSEN", "correct"]
    assert page.locator(".candidate.rejected .badge").all_inner_texts() == ["REJECTED", "incorrect"]
    gold = page.locator(".passage.gold")
    assert gold.count() == 1 and gold.locator("mark").all_inner_texts() == ["Ada Lund"]
    assert page.locator(".candidate.chosen .cited").all_inner_texts() == ["museum"]


def test_curves_show_the_values_of_the_step_under_the_pointer_and_of_keys(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"))
    chart = page.locator("#training svg[role=slider]").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 80)
    loss = page.locator("#training .keys").first
    assert "loss 0.7" in loss.inner_text()
    margin = page.locator("#training figure").nth(1)
    assert "margin 0.2" in margin.inner_text()  # the other charts follow
    chart.focus()
    page.keyboard.press("Home")
    assert chart.get_attribute("aria-valuetext").startswith("step 1: loss 1")
    page.keyboard.press("ArrowRight")
    assert "loss 0.9" in loss.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_page_fits_the_width_and_its_text_stands_out(opened, tmp_path, width, scheme):
    """No sideways scrolling at 400 pixels, also with words that have no end; text has a contrast of 4.5 at least."""
    page = opened(write_run(tmp_path / "run", text="x" * 300), width=width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    faint = page.evaluate(
        """() => {
        const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
        const light = (color) => numbers(color).slice(0, 3).map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const back = (node) => {
            for (; node; node = node.parentElement) {
                const color = getComputedStyle(node).backgroundColor;
                if (!numbers(color)[3] && numbers(color).length === 4) continue;
                return color;
            }
            return 'rgb(255, 255, 255)';
        };
        const own = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
        const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        return [...document.querySelectorAll('main *')].filter((node) => own(node) && node.checkVisibility())
            .filter((node) => !node.disabled && !node.closest('svg'))
            .filter((node) => contrast(light(getComputedStyle(node).color), light(back(node))) < 4.5)
            .map((node) => node.outerHTML.slice(0, 100));
        }"""
    )
    assert faint == []


@pytest.mark.parametrize("width", [400, 1280])
def test_page_has_no_violation_that_axe_finds(opened, tmp_path, violations, width):
    """Names, roles, landmarks, headings, tables and contrast, with everything folded out, alone and compared."""
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other", systems=("adapter", "base"))
    page = opened(run, width=width, compare=[other])
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.locator("figure details table").first.wait_for()
    assert violations(page) == []


def test_page_is_used_by_keys_alone(opened, tmp_path):
    """Tab goes through the page from top to bottom and its place is seen; Enter opens a question."""
    page = opened(write_run(tmp_path / "run"))
    places = []
    for _ in range(30):
        page.keyboard.press("Tab")
        places.append(
            page.evaluate(
                """() => {
                const [node, box] = [document.activeElement, document.activeElement.getBoundingClientRect()];
                const seen = getComputedStyle(node).outlineStyle !== 'none' && box.width > 0 && box.left >= 0;
                return [seen, node.closest('header, section')?.id || node.closest('header, a').tagName];
                }"""
            )
        )
    assert all(seen for seen, _ in places)
    order = list(dict.fromkeys(where for _, where in places))
    assert order == ["A", "HEADER", "summary", "funnel", "pairs"]
    page.locator("#pairs-list a").nth(2).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#pairs-detail:focus")  # a function to wait for would be refused by the page's policy
    assert "museum 2?" in page.inner_text("#pairs-detail")
