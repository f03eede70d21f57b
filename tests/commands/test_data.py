"""sdxl-data from the command line: what it needs of a config, and the quality tags that it writes."""

from pathlib import Path

import pytest
from PIL import Image

from sdxl_finetune.commands import data
from sdxl_finetune.commands.tag_quality import tagged_text
from sdxl_finetune.config import Subset
from sdxl_finetune.errors import UserError

RELEASE = "masterpiece > 0.75, high quality > 0.6, normal quality > 0.5, low quality > 0.3, worst quality"
CAPTIONS = {
    "a.png": b"1girl, sitting",
    "b.png": b"1girl, low quality, sitting\n",
    "c.png": b"\xef\xbb\xbf\r\n  masterpiece, 1girl \r\nsecond line\r\n",
    "d.png": b"",
    "e.png": None,
}
SCORES = {"a.png": 0.9, "b.png": 0.7, "c.png": 0.8, "d.png": 0.1, "e.png": 0.55}


@pytest.fixture
def work(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / "1_cat").mkdir(parents=True)
    for name, caption in CAPTIONS.items():
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / "1_cat" / name)
        if caption is not None:
            (tmp_path / "images" / "1_cat" / name).with_suffix(".txt").write_bytes(caption)
    rows = [f"{name},{score}" for name, score in SCORES.items()]
    Path("scores.csv").write_text("\n".join(["path,score", *rows, "gone.png,1"]))
    return tmp_path


def run(*more: str) -> int:
    arguments = ["--train_data_dir", "images", "--cache_dir", "cache", "--resolution", "64"]
    arguments += ["--caption_extension", ".txt", "--quality_tags", RELEASE, "--quality_scores", "scores.csv"]
    return data.main(["tag-quality", *arguments, *more])


def captions() -> dict[str, bytes]:
    return {path.with_suffix(".png").name: path.read_bytes() for path in sorted(Path("images/1_cat").glob("*.txt"))}


WRITTEN = {
    "a.png": b"masterpiece, 1girl, sitting",
    "b.png": b"1girl, high quality, sitting\n",
    "c.png": CAPTIONS["c.png"],
    "d.png": b"worst quality",
    "e.png": b"normal quality, cat",
}


def test_help_shows_where_the_config_goes(capsys) -> None:
    with pytest.raises(SystemExit):
        data.main(["report", "--help"])
    assert "sdxl-data report --config FILE [--option VALUE ...]" in capsys.readouterr().out


def test_tags_are_written_once_and_a_second_run_touches_nothing(work, capsys) -> None:
    before = captions()
    Path("images/1_cat/a.txt").chmod(0o640)
    assert run("--dry_run") == 0 and captions() == before
    assert "caption files: 3 would change, 1 new, 1 hold the tag already" in capsys.readouterr().out
    assert run() == 0 and captions() == WRITTEN
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "quality tags: masterpiece 2, high quality 1, normal quality 1, low quality 0, worst quality 1, none 0",
        "caption files: 3 changed, 1 new, 1 hold the tag already",
    ]
    assert Path("images/1_cat/a.txt").stat().st_mode & 0o777 == 0o640
    times = {path: path.stat().st_mtime_ns for path in Path("images/1_cat").iterdir()}
    assert run() == 0 and captions() == WRITTEN
    assert times == {path: path.stat().st_mtime_ns for path in Path("images/1_cat").iterdir()}
    assert "0 changed, 0 new, 5 hold the tag already" in capsys.readouterr().out


def test_new_scores_replace_the_tags(work) -> None:
    run()
    Path("scores.csv").write_text("path,score\n" + "\n".join(f"{name},0.65" for name in SCORES))
    run()
    assert captions()["a.png"] == b"high quality, 1girl, sitting"
    assert captions()["c.png"] == b"\xef\xbb\xbf\r\n  high quality, 1girl \r\nsecond line\r\n"


def test_every_line_gets_the_tag_with_wildcards() -> None:
    options = {"num_repeats": 1, "class_tokens": None, "quality_tags": RELEASE}
    text = "a {cat|dog}\n\n masterpiece, b\n"
    tagged = "low quality, a {cat|dog}\n\n low quality, b\n"
    assert tagged_text(Subset(**options, enable_wildcard=True), text, "low quality") == tagged
    assert tagged_text(Subset(**options), text, "low quality") == "low quality, a {cat|dog}\n\n masterpiece, b\n"


def test_a_caption_file_of_two_images_gets_one_tag_and_the_other_is_named(work, capsys) -> None:
    Image.new("RGB", (64, 64)).save("images/1_cat/a.jpg")
    Path("scores.csv").write_text("path,score\na.png,0.9\na.jpg,0.1\nb.png,0.7\nc.png,0.8\nd.png,0.1\ne.png,0.55")
    assert run() == 2
    assert captions()["a.png"] == b"worst quality, 1girl, sitting"
    error = capsys.readouterr().err
    assert "images/1_cat/a.png: the quality tag cannot be written (a.txt already has the tag worst quality" in error


def test_a_link_stays_a_link(work) -> None:
    Path("images/1_cat/a.txt").rename("elsewhere.txt")
    Path("images/1_cat/a.txt").symlink_to(Path("elsewhere.txt").absolute())
    run()
    assert Path("images/1_cat/a.txt").is_symlink() and Path("elsewhere.txt").read_bytes() == WRITTEN["a.png"]


def test_captions_of_metadata_files_are_not_rewritten(work) -> None:
    Path("meta.json").write_text('{"1_cat/a.png": {"caption": "x"}}')
    with pytest.raises(
        UserError, match=r"captions of a metadata file are not rewritten: leave them .* training adds the tags"
    ):
        run("--in_json", "meta.json")


def test_captions_of_several_sources_are_refused_once(work) -> None:
    with pytest.raises(UserError) as error:
        run("--caption_sources", ".txt")
    assert [problem.key for problem in error.value.problems] == ["caption_sources"]


def test_without_quality_tags_the_option_is_named(work) -> None:
    with pytest.raises(UserError, match="quality_tags: is needed"):
        run("--quality_tags", "")


def test_only_what_the_dataset_needs_is_asked_for(work) -> None:
    with pytest.raises(UserError) as error:
        data.main(["tag-quality", "--quality_tags", "a >", "--train_data_dir", "gone", "--what", "1"])
    keys = {problem.key for problem in error.value.problems}
    assert keys == {"what", "quality_tags", "train_data_dir", "resolution", "output_dir"}


def test_help_names_the_commands(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        data.main(["--help"])
    assert stopped.value.code == 0 and "tag-quality" in capsys.readouterr().out
