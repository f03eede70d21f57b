"""The page of a tag report: it opens in Chromium, sorts, searches and shows details, and foreign text stays text."""

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_finetune.data.tokens import build_tokenizer
from sdxl_finetune.diffusion.objective import build_objective
from sdxl_finetune.model.random_model import TINY, build_random_model
from sdxl_finetune.output.previews import PreviewModel, draw_latents, to_image
from sdxl_finetune.output.prompts import Prompt
from sdxl_finetune.pages.thumbnails import picture_url
from sdxl_finetune.tag_report import page as page_module
from sdxl_finetune.tag_report.gallery import (
    MOST_SHOWN,
    SIDE,
    DrawOptions,
    Example,
    Exhibit,
    make_exhibits,
    tags_to_show,
)
from sdxl_finetune.tag_report.outputs import write_tag_page
from sdxl_finetune.tag_report.page import points, signed
from sdxl_finetune.tag_report.schema import Report, save_report
from sdxl_finetune.tag_report.summary import summarize
from sdxl_finetune.tag_report.tables import tag_rows
from sdxl_finetune.tag_report.trends import Moment
from sdxl_finetune.tag_report.underfitted import suggest_repeats
from tests.browser import CHROMIUM, Page
from tests.tag_report.made_up import ODD, SCRIPT, facts, images_table, made_report, tags_table

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: the page is not opened")
NAMES = "[...document.querySelectorAll('#table tbody th')].map(one => one.textContent)"
CLICK = "[...document.querySelectorAll({!r})].find(one => one.textContent.trim().startsWith({!r})).click()"


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (96, 64), color).save(file, "PNG")
    return file.getvalue()


def example_of(tag: str, image: str) -> Example | None:
    """The third image of each tag is no image, and the fourth is not in the dataset."""
    if image.endswith("003.png"):
        return None
    data = b"no image" if image.endswith("002.png") else png("red")
    return Example(caption=f"{tag}, 1girl", without="1girl", width=96, height=64, read=lambda: data)


@pytest.fixture
def many(tmp_path) -> Path:
    """The page on 12 tags, among them odd ones, after two earlier reports."""
    for step in (100, 300, 500):
        report = made_report(12, step, names=ODD)
        save_report(tmp_path, report)
    exhibits = make_exhibits(tags_to_show(report, DrawOptions()), report, example_of, None, DrawOptions())
    url = picture_url(Image.new("RGB", (64, 64), "blue"))
    exhibits = [replace(one, drawn=(url, url), prompt=f"{SCRIPT}, x") for one in exhibits]
    written = write_tag_page(tmp_path, report, exhibits)
    assert written == tmp_path / "00000500.html"
    return written


@needs_browser
@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 390)])
def test_the_page_opens_without_errors_and_requests(many: Path, dark: bool, width: int) -> None:
    with Page() as page:
        page.open(many, dark=dark, width=width)
        page.wait_for("document.documentElement.dataset.drawn != undefined")
        assert page.evaluate("document.title") == "Tags of style.safetensors"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        charts = page.evaluate("[...document.querySelectorAll('.chart')].map(one => one.id)")
        wanted = ["gain", "accuracy", "states_trend", "accuracy_trend", "gain_trend"]
        assert charts == [f"chart-{name}" for name in wanted]
        assert page.evaluate("document.querySelectorAll('#chart-gain .scatterlayer .point').length") == 12
        assert set(page.evaluate(NAMES)) == set(made_report(12, names=ODD).tags["tag"].to_pylist())
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background))) < 3 * 128) == dark
        assert page.evaluate("[...document.images].every(one => one.src.startsWith('data:'))")
        assert (page.errors, page.requests) == ([], [many.as_uri()])


@needs_browser
def test_the_table_sorts_searches_filters_and_shows_details_from_the_keyboard(many: Path) -> None:
    report = made_report(12, names=ODD)
    rows = {row.tag: row for row in tag_rows(report.tags)}
    with Page() as page:
        page.open(many)
        page.evaluate(CLICK.format("#table thead button", "accuracy"))
        by_accuracy = sorted(rows, key=lambda tag: -rows[tag].accuracy)
        assert page.evaluate(NAMES) == by_accuracy
        page.evaluate(CLICK.format("#table thead button", "accuracy"))
        assert page.evaluate(NAMES) == by_accuracy[::-1]
        assert page.evaluate("document.querySelector('[aria-sort]').textContent") == "accuracy"
        page.evaluate(CLICK.format(".chip", "learned"))
        assert page.evaluate(NAMES) == [tag for tag in by_accuracy[::-1] if rows[tag].state != "learned"]
        page.evaluate(CLICK.format(".chip", "learned"))
        search = "search.value = {!r}; search.dispatchEvent(new Event('input'))"
        page.evaluate(search.format("STYLE 10"))
        assert page.evaluate(NAMES) == ["style_0010"]
        assert page.evaluate("document.getElementById('matches').textContent") == "1 tag (12 in all)"
        page.evaluate(search.format(""))
        page.evaluate("document.querySelector('#table tbody button').focus()")
        for key in ("ArrowDown", "Enter"):
            text = {"text": "\r"} if key == "Enter" else {}
            page.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=13, **text)
        detail = page.evaluate("document.querySelector('.detail').innerText")
        row = rows[by_accuracy[-2]]
        assert f"seen {row.exposures:,} times in training" in detail
        assert f"accuracy {signed(row.accuracy_since_last)} points" in detail
        assert page.evaluate("document.querySelectorAll('.detail .curve').length") == 2
        link = page.evaluate("document.querySelector('.detail a').getAttribute('href')")
        assert page.evaluate(f"document.querySelector('{link} h3').textContent").startswith(row.tag)
        assert page.errors == []


@needs_browser
def test_of_two_thousand_tags_the_page_shows_some_and_finds_all(tmp_path) -> None:
    report = made_report(2000)
    written = write_tag_page(tmp_path, report)
    assert written and written.stat().st_size < 8e6
    assert written.read_text(encoding="utf-8").count("<tr data-state=") == 2000, "the table is whole without JavaScript"
    with Page() as page:
        page.open(written, width=390)
        shown = f"{NAMES}.length"
        assert page.evaluate(shown) == 50
        page.evaluate(CLICK.format("#more button", "Show 100"))
        assert page.evaluate(shown) == 150
        page.evaluate("search.value = 'style 1999'; search.dispatchEvent(new Event('input'))")
        assert page.evaluate(NAMES) == ["style_1999"]
        page.evaluate("search.value = ''; search.dispatchEvent(new Event('input'))")
        page.evaluate(CLICK.format("#more button", "Show all"))
        assert page.evaluate(shown) == 2000
        assert page.evaluate("document.getElementById('more').hidden")
        assert page.errors == []


def test_foreign_text_stays_text(many: Path) -> None:
    text = many.read_text(encoding="utf-8")
    assert SCRIPT not in text and text.count("&lt;script&gt;document.title") >= 3
    data = json.loads(re.search(r'id="figures">(.*?)</script>', text)[1])
    labels = [point[0] for trace in data["gain"]["data"] for point in trace["customdata"]]
    assert "&lt;script&gt;document.title = …" in labels


def test_reports_without_tags_exposures_errors_or_step_have_a_page(tmp_path) -> None:
    rows = [{"tag": "a", "exposures": None, "gain_error": None, "accuracy_error": None, "held_out": 0}]
    for number, own in enumerate(([], rows)):
        tags = tags_table(own)
        report = Report(facts(None, model=f"{number}.safetensors", epoch=None), tags, images_table(tags))
        save_report(tmp_path, report)
        written = write_tag_page(tmp_path, report)
        assert written == tmp_path / f"{number}.html"
    text = written.read_text(encoding="utf-8")
    assert "It is not known how often the tags were seen" in text and "No image was held out" in text
    assert 'id="chart-' not in text


def test_the_summary_says_what_to_do() -> None:
    def said(now: list[dict], before: list[dict] | None = None) -> str:
        moments = [
            Moment(str(step), step, {row.tag: row for row in tag_rows(tags_table(rows))})
            for step, rows in ((100, before), (200, now))
            if rows is not None
        ]
        rows = list(moments[-1].rows.values())
        remarks = summarize(rows, moments, suggest_repeats(rows), "tags/u.toml")
        return "\n".join(f"{one.level}: {one.text} {one.todo} {one.code}" for one in remarks)

    learned = {"state": "learned", "exposures": 1000}
    text = said(
        [{"tag": "a", **learned}, {"tag": "b", "exposures": 300}], [{"tag": "a"}, {"tag": "b", "gain": 0.5, **learned}]
    )
    first, second, *rest = text.splitlines()
    assert first.startswith("problem: “b” needs more: training has seen it 300 times, and “a” 1,000 times.")
    assert "shows its images 4 times as often" in first
    assert first.endswith('image_weights = "tags/u.toml"')
    assert second.startswith("warning: 1 tag was lost since step 100: “b”.")
    assert "1 of 2 tags is learned: “a”." in rest[0] and "1 tag was learned since step 100: “a”." in rest[1]
    assert said([{"tag": "a", **learned}]).startswith("good: All tags are learned.")
    assert "“a” is not learned yet, though seen most often. Train longer." in said([{"tag": "a"}])
    assert said([{"tag": "a", "exposures": 0}]).endswith("figures of the model before training.  ")
    three = said([{"tag": "a", "exposures": 50}, {"tag": "b", "exposures": 10}, {"tag": "c", "exposures": 5}])
    assert "2 tags (“b”, “c”) need more: training has seen them from 5 to 10 times, and “a” 50 times." in three
    contradictory = said([{"tag": f"t{number}", "state": "contradictory"} for number in range(7)])
    assert "7 tags (“t0”, “t1”, “t2”, “t3”, “t4” and 2 more) are contradictory" in contradictory
    assert "image_weights" not in contradictory


def test_numbers_that_round_to_zero_have_no_sign() -> None:
    assert [points(share) for share in (-0.0001, -0.012, 0.5)] == ["0.0", "−1.2", "50.0"]
    assert [signed(change) for change in (None, 0.0001, -0.0001, 0.012, -0.012)] == ["–", "0.0", "0.0", "+1.2", "−1.2"]


def test_tags_that_are_not_learned_are_shown_first_beside_learned_ones() -> None:
    report = made_report(2000)
    states = {row.tag: row.state for row in tag_rows(report.tags)}
    chosen = tags_to_show(report, DrawOptions(tags=16))
    drawn = [tag for tag, is_drawn in chosen if is_drawn]
    assert len(chosen) == len({tag for tag, _ in chosen}) == MOST_SHOWN
    assert len(drawn) == 16 and sum(states[tag] == "learned" for tag in drawn) == 4
    assert not any(is_drawn for _, is_drawn in tags_to_show(report, DrawOptions(tags=0)))
    few = made_report(12)
    assert all(is_drawn for _, is_drawn in tags_to_show(few, DrawOptions()))
    assert len(tags_to_show(report, DrawOptions(tags=100))) == 100


@pytest.fixture(scope="module")
def tiny() -> PreviewModel:
    model, vae = build_random_model(TINY, seed=0)
    tokenizer = build_tokenizer(max_token_length=None)
    return PreviewModel(sdxl=model, vae=vae, tokenizer=tokenizer, objective=build_objective("noise"))


def decoded(url: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return np.asarray(image)


def test_pictures_with_and_without_a_tag_differ_by_the_caption_alone(tiny: PreviewModel) -> None:
    report = made_report(3)
    options = DrawOptions(tags=1, steps=2, seed=5)
    chosen = tags_to_show(report, options)
    tiny.sdxl.train()
    first, *others = make_exhibits(chosen, report, example_of, tiny, options)
    assert tiny.sdxl.training
    assert first.drawn and not any(one.drawn for one in others)
    assert first.prompt == f"{first.tag}, 1girl"
    draw = partial(Prompt, width=96, height=64, steps=2, scale=5.0)
    tiny.sdxl.eval()
    for url, text in zip(first.drawn, (first.prompt, "1girl"), strict=True):
        latents = draw_latents(tiny, "euler_a", [draw(prompt=text)], [5])
        assert url == picture_url(to_image(tiny.vae, latents), SIDE)
    assert first.drawn[0] != first.drawn[1] and decoded(first.drawn[0]).shape == (64, 96, 3)
    gains = [image.gain for image in first.images]
    assert gains == sorted(gains, reverse=True) and len(first.images) == 4
    assert [image.name for image in first.images if image.held_out] == ["style/000.png"]
    assert make_exhibits(chosen[:1], report, example_of, tiny, options) == [first], "drawn again, they are the same"


def test_an_image_that_cannot_be_shown_or_drawn_leaves_a_gap(tiny: PreviewModel, caplog) -> None:
    report = made_report(1)
    tag = report.tags["tag"][0].as_py()

    def find(broken: Callable[[str], bool], tag: str, image: str) -> Example | None:
        found = example_of(tag, "style/000.png")
        return replace(found, read=(lambda: b"none") if broken(image) else found.read, width=8)

    (exhibit,) = make_exhibits(
        [(tag, True)], report, partial(find, lambda image: image.endswith("0.png")), tiny, DrawOptions(sampler="no")
    )
    assert [image.url is None for image in exhibit.images] == [False, False, False, True]
    assert exhibit.drawn is None and f"no pictures were drawn of the tag {tag}: KeyError" in caplog.text
    (none,) = make_exhibits([(tag, True)], report, lambda *_: None, tiny, DrawOptions())
    assert (none.images, none.drawn) == ([], None)


def test_pictures_beyond_the_bound_are_left_out_and_counted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(page_module, "MOST_BYTES", 5000)
    report = made_report(12)
    url = "data:image/jpeg;base64," + "A" * 1500
    exhibits = [Exhibit(tag=f"style_{number:04}", images=[], drawn=(url, url)) for number in range(12)]
    written = write_tag_page(tmp_path, report, exhibits)
    assert written
    text = written.read_text(encoding="utf-8")
    assert text.count(url) == 2 and "The pictures of 11 more tags are left out" in text
