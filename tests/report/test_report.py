"""The report of a folder: its numbers equal plain counts, and its page opens in Chromium without errors."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdxl_finetune.commands.data import load_data_config
from sdxl_finetune.commands.data import main as data_tool
from sdxl_finetune.errors import Problem, Tally, UserError
from sdxl_finetune.pages.rendering import script_json
from sdxl_finetune.pages.thumbnails import thumbnail
from sdxl_finetune.printable import CONTROL, printable
from sdxl_finetune.report.collect import Report, collect, find_unusable
from tests.browser import CHROMIUM, Page

SCRIPT = "<script>document.title = 'run'</script>"
SIZES = [(96, 64), (64, 96), (64, 64), (160, 64), (40, 40), (120, 80)]
COLORS = ["red", "green", "blue"]
LONG = ", ".join(f"thing{chr(97 + number % 26)}{chr(97 + number // 26)}" for number in range(60))


@pytest.fixture
def captions(tmp_path: Path, write_images: Callable[..., None]) -> dict[str, str]:
    """Writes 36 images and the config c.toml; returns the captions by name. Some files are as bad as files can be."""
    folder = tmp_path / "images"
    names = {f"{number:02}.png": SIZES[number % len(SIZES)] for number in range(36)}
    write_images(folder, names)
    captions = {name: f"{COLORS[number % 3]}, style, 1girl" for number, name in enumerate(names)}
    captions |= {
        "03.png": f"{SCRIPT}, <b>bold</b> & more, %{{x}}",
        "04.png": LONG,
        "05.png": "",
        "06.png": "red, style\nA second line.",
    }
    for name, caption in captions.items():
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    (folder / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "c.toml").write_text(
        f"train_data_dir = '{folder}'\ncache_dir = '{tmp_path / 'cache'}'\nresolution = 64\ntrain_batch_size = 4\n"
        "enable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 32\n"
        "caption_extension = '.txt'\n"
    )
    return captions


def collected(folder: Path, *options: str) -> Report:
    config = load_data_config(["--config", str(folder / "c.toml"), *options], "sdxl-data report")
    assert config is not None
    return collect(config, rare=3)


def write_report(folder: Path, *options: str) -> Path:
    output = folder / "pages" / "report.html"
    assert data_tool(["report", "--config", str(folder / "c.toml"), "--output", str(output), *options]) == 0
    return output


def figures_of(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="figures">(.*?)</script>', text)[1])


def test_numbers_equal_plain_counts(tmp_path, captions) -> None:
    report = collected(tmp_path)
    first_lines = [text.split("\n")[0] for text in captions.values()]
    tags = Counter(tag for text in first_lines for tag in {tag.strip() for tag in text.split(",")} - {""})
    assert dict(zip(report.tags.names, report.tags.images.tolist(), strict=True)) == tags
    assert report.rare_tags == sum(images < 3 for images in tags.values())
    assert report.sizes.map.counts.sum() == 36
    assert sum(bucket.images for bucket in report.sizes.buckets) == 36
    index = report.index
    for bucket in report.sizes.buckets:
        entries = [entry for entry in map(index.__getitem__, range(36)) if entry.bucket.width == bucket.width]
        entries = [entry for entry in entries if entry.bucket.height == bucket.height]
        cuts = [1 - bucket.width * bucket.height / (entry.resized[0] * entry.resized[1]) for entry in entries]
        assert (len(entries), sum(cuts) / len(cuts)) == pytest.approx((bucket.images, bucket.cut))
        assert sum(entry.resized > entry.size for entry in entries) == bucket.enlarged
    texts = Counter(filter(None, captions.values()))
    assert report.equal_captions.rows == sum(count for count in texts.values() if count > 1)
    assert report.equal_captions.groups == sum(count > 1 for count in texts.values())


def test_findings_name_what_is_wrong(tmp_path, captions) -> None:
    findings = {finding.title: finding for finding in collected(tmp_path).findings}
    assert {title: finding.count for title, finding in findings.items()} == {
        "not usable: not an image of a known format": 1,
        "without a caption": 1,
        "with a caption of several lines, of which only the first is used": 1,
        "with a caption of more than 75 tokens": 1,
        "enlarged to more than 1.5 times their size": 6,
        "of which the crop removes more than 20 %": 18,
    }
    unusable = next(finding for finding in findings.values() if finding.is_problem)
    assert unusable.examples[0].name.endswith("broken.jpg")
    enlarged = next(finding for title, finding in findings.items() if title.startswith("enlarged"))
    assert {Path(example.name).name for example in enlarged.examples} == {
        f"{number:02}.png" for number in range(4, 36, 6)
    }


def test_problems_of_a_kind_are_all_counted_and_few_are_shown() -> None:
    bad_files = Tally(Problem(f"its side of {number} pixels is too long", file=f"{number}.png") for number in range(50))
    bad_files.add(Problem("no image", file="a.txt"))
    long, other = find_unusable(bad_files, usable=49)
    assert (long.title, long.count, long.total) == ("not usable: its side of … pixels is too long", 50, 100)
    assert [example.name for example in long.examples] == [f"{number}.png" for number in range(6)]
    assert (other.count, other.share) == (1, 0.01)


def test_thumbnails_are_small_and_missing_for_what_cannot_be_decoded(tmp_path, write_images) -> None:
    write_images(tmp_path, {"a.jpg": (800, 400), "b.png": (8, 4)})
    for name, size in (("a.jpg", (176, 88)), ("b.png", (8, 4))):
        url = thumbnail((tmp_path / name).read_bytes)
        with Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,")))) as picture:
            assert picture.size == size
    data = (tmp_path / "b.png").read_bytes()
    assert thumbnail(lambda: data[:40]) is None
    assert thumbnail(lambda: b"no image") is None
    assert thumbnail((tmp_path / "missing.png").read_bytes) is None
    huge = data[:16] + (100_000).to_bytes(4, "big") * 2 + data[24:29]
    assert thumbnail(lambda: huge + zlib.crc32(huge[12:29]).to_bytes(4, "big") + data[33:]) is None


def test_only_files_of_equal_content_are_duplicates(tmp_path, captions) -> None:
    folder = tmp_path / "images"
    shutil.copy(folder / "00.png", folder / "copy.png")
    Image.new("L", (64, 64), 1).save(folder / "x.bmp")
    Image.new("L", (64, 64), 2).save(folder / "y.bmp")  # equal in bytes, width and height, with other pixels
    report = collected(tmp_path)
    assert report.duplicates.is_content
    names = [[report.index[row].path.name for row in group.tolist()] for group in report.duplicates.groups.largest]
    assert (names, report.duplicates.groups.surplus) == ([["00.png", "copy.png"]], 1)


def test_the_latent_cache_tells_duplicates_without_reading(tmp_path, captions, cache_latents, monkeypatch) -> None:
    shutil.copy(tmp_path / "images" / "00.png", tmp_path / "images" / "copy.png")
    index = collected(tmp_path).index

    def encode(pixels: torch.Tensor, noise: torch.Tensor):
        return lambda: torch.zeros(len(pixels), 4, pixels.shape[1] // 8, pixels.shape[2] // 8, dtype=torch.float16)

    cache_latents(index, encode, folder=tmp_path / "cache" / "latents" / "vae")
    monkeypatch.setattr(Path, "read_bytes", None)
    report = collected(tmp_path, "--skip_cache_check")
    assert (report.duplicates.groups.rows, report.duplicates.is_content) == (2, True)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: the page is not opened")
@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 1280), (True, 390)])
def test_the_page_opens_without_errors_and_requests(tmp_path, captions, dark: bool, width: int) -> None:
    name = os.fsencode(tmp_path / "images") + b"/caf\xe9 <script>.png"
    shutil.copy(tmp_path / "images" / "01.png", name)
    output = write_report(tmp_path)
    figures = figures_of(output)
    with Page() as page:
        page.open(output, dark=dark, width=width)
        page.wait_for("document.documentElement.dataset.drawn != undefined")
        assert page.errors == []
        assert page.requests == [output.as_uri()]
        assert page.evaluate("document.title") == "Dataset report: 37 images"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        charts = "Object.fromEntries([...document.querySelectorAll('.chart')].map(one => [one.id, %s]))"
        marks = page.evaluate(charts % "one.querySelectorAll('.point path, .hm image, .scatterlayer path').length")
        assert set(marks) == {f"chart-{name}" for name in figures}
        assert all(marks.values()), marks
        assert marks["chart-tags"] == len(figures["tags"]["data"][0]["x"])
        labels = page.evaluate("[...document.querySelectorAll('#chart-tags .ytick text')].map(one => one.textContent)")
        assert labels[:2] == ["style", "1girl"]
        assert SCRIPT[:25] + "…" in labels
        text = page.evaluate("document.body.innerText")
        assert "caf\\udce9 <script>.png" in text or "caf\\udce9 <script>.png" in output.read_text(encoding="utf-8")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background))) < 3 * 128) == dark
        color = "getComputedStyle(document.querySelector('#chart-tags .ytick text')).fill"
        before = page.evaluate(color)
        page.prefer("light" if dark else "dark")
        page.wait_for(f"{color} != '{before}'")
        assert page.errors == []


def test_the_page_shows_the_counts_and_escapes_foreign_text(tmp_path, captions) -> None:
    output = write_report(tmp_path, "--rare", "2")
    figures, text = figures_of(output), output.read_text(encoding="utf-8")
    assert figures["tags"]["data"][0]["x"][:3] == [33, 32, 11]
    assert sum(figures["buckets"]["data"][0]["x"]) == 36
    assert sum(sum(trace["y"]) for trace in figures["tokens"]["data"]) == 36
    assert sum(sum(row) for row in figures["sizes"]["data"][0]["customdata"]) == 36
    assert SCRIPT not in text
    assert "&lt;script&gt;document.title" in text
    assert "in fewer than 2 images" in text
    assert len(re.findall(r'<img src="data:image/jpeg;base64,', text)) >= 9


def test_text_in_a_script_element_cannot_end_it() -> None:
    value = {"a": "</script><!-- <script>"}
    assert "<" not in script_json(value)
    assert json.loads(script_json(value)) == value
    assert printable("a\nb\udce9") == "a\\nb\\udce9"
    assert printable("abcdef", 4) == "abc…"


def test_a_folder_without_captions_has_a_page(tmp_path, write_images) -> None:
    write_images(tmp_path / "images", {"a.png": (64, 64)})
    (tmp_path / "c.toml").write_text(
        f"train_data_dir = '{tmp_path / 'images'}'\ncache_dir = '{tmp_path}'\nresolution = 64"
    )
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "No caption has a tag." in text
    assert "1 image without a caption (100 %)" in text


def test_mistakes_are_named(tmp_path, captions, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"--output = .*: this is a folder"):
        data_tool(["report", "--config", str(tmp_path / "c.toml"), "--output", str(tmp_path)])
    with pytest.raises(UserError, match="--rare = -1"):
        data_tool(["report", "--config", str(tmp_path / "c.toml"), "--rare", "-1"])
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(UserError, match=r"needs plotly, .* run pip install plotly"):
        data_tool(["report", "--config", str(tmp_path / "c.toml"), "--output", str(tmp_path / "r.html")])


def test_help_needs_no_library() -> None:
    code = "import sys; from sdxl_finetune.cli import data; sys.argv[1:] = ['report', '--help']; data()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, "--rare" in done.stdout) == (0, True), done.stderr


def test_hostile_names_and_tags_from_the_command_line(tmp_path) -> None:
    """Names of files and folders, and tags, may hold markup, quotes, line breaks, escape sequences, and other bytes."""
    markup = b"<img src=x onerror=alert(1)>"
    folder = os.fsencode(tmp_path / "images") + b"/1_" + markup
    Path(os.fsdecode(folder)).mkdir(parents=True)
    names = [b"\xff", markup, b"\"quoted'", b"new\nline", "\u202eevil".encode(), b"\x1b[2J", b"&lt;b&gt;", b"{{ 7*7 }}"]
    tags = [
        markup.decode(),
        '"><script>alert(1)</script>',
        "\u202eevil",
        "\x1b]0;t\x07",
        "</script>",
        "' onclick='",
        "\0",
    ]
    for number, name in enumerate(names):
        picture = Image.new("RGB", (64 + 8 * (number % 3), 64), (number * 20, 0, 0))
        picture.save(os.fsdecode(folder + b"/" + name + b".png"))
        Path(os.fsdecode(folder + b"/" + name + b".txt")).write_text(", ".join(tags[:number]) + ", 1girl\nsecond")
    Path(os.fsdecode(folder + b"/\xfe<b>.png")).write_bytes(b"no image")
    command = [sys.executable, "-c", "from sdxl_finetune.cli import data; data()", "report", "--on_bad_image", "skip"]
    command += ["--train_data_dir", "images", "--cache_dir", "cache", "--resolution", "64", "--output", "page.html"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [*command, "--caption_extension", ".txt"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("wrote page.html: 8 images"), done.stderr
    assert r"\udcfe<b>.png: not an image of a known format" in done.stderr
    assert not CONTROL.search((done.stdout + done.stderr).replace("\n", ""))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    text = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not CONTROL.search(text.replace("\n", "")) and "\u202e" not in page and "\x1b" not in page
    elements = re.findall(r"<([a-z0-9]+)([^>]*)>", text)
    assert not [given for _, given in elements if re.search(r"\son\w+=", re.sub(r'"[^"]*"', '""', given))]
    assert all(given.startswith(' src="data:') for name, given in elements if name == "img")
    for words in (r"\udcfe&lt;b&gt;.png", "&lt;img src=x onerror=alert(1)&gt;.png", r"new\nline.png", "&amp;lt;b"):
        assert words in text, words
    assert "{{ 7*7 }}.png" in text and r"\u202eevil" in text
