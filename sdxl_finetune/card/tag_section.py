"""The section about tags: which of them the model has learned, by a tag report (tag_report/schema.py)."""

from collections import Counter
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

from sdxl_finetune.card.text import Words, code, table
from sdxl_finetune.tag_report.schema import STATES, Report

MOST_ROWS = 100
"""Tags in the table of tags that are not learned, those with the lowest gain first."""
MOST_LEARNED = 300
"""Learned tags that are named."""
MOST_NAMED = 5
"""Underfitted tags that a sentence names."""
STATES_ZH = {"learned": "已学会", "underfitted": "欠拟合", "contradictory": "自相矛盾", "unclear": "无法判断"}


def count_states(report: Report) -> dict[str, int]:
    """Number of tags in each state, in the order of STATES."""
    counts = Counter(report.tags["state"].to_pylist())
    return {state: counts[state] for state in STATES}


def underfitted_tags(report: Report) -> list[str]:
    """The underfitted tags, if they are few enough for a sentence; else none."""
    names = [row["tag"] for row in report.tags.to_pylist() if row["state"] == "underfitted"]
    return names if len(names) <= MOST_NAMED else []


def tag_blocks(report: Report, words: Words) -> Iterator[str]:
    """The blocks of the section."""
    say, counts = words.say, count_states(report)
    yield say("## Tags", "## 标签掌握情况")
    yield say(
        "Measured on images of the dataset. *Gain*: by how much the tag lowers the training loss. *Accuracy*: how often"
        " the loss is lowest with the right tag, and not with another one. *Chance*: the accuracy of guessing.",
        "以下数字在数据集的图片上测得。**增益**：加上该标签后损失下降的比例。**准确率**：用正确标签时损失最低的比例。"
        "**随机水平**：随机猜测的准确率。",
    )
    states = [(say(state, STATES_ZH[state]), f"{count:,}") for state, count in counts.items() if count]
    yield table((say("state", "状态"), say("tags", "标签数")), states, [1])
    rows = report.tags.sort_by([("accuracy", "ascending"), ("gain", "ascending")]).to_pylist()
    others = sorted((row for row in rows if row["state"] != "learned"), key=itemgetter("gain"))
    if others:
        yield say("### Tags that need a look", "### 需要留意的标签")
        yield _tag_table(others[:MOST_ROWS], words)
        yield from _rest(len(others) - MOST_ROWS, words)
    learned = [code(row["tag"]) for row in reversed(rows) if row["state"] == "learned"]
    if learned:
        yield say("### Learned tags", "### 已学会的标签")
        yield say(", ", "、").join(learned[:MOST_LEARNED])
        yield from _rest(len(learned) - MOST_LEARNED, words)


def _tag_table(rows: list[Mapping[str, Any]], words: Words) -> str:
    say = words.say
    head = [say("tag", "标签"), say("state", "状态"), say("seen", "训练中出现次数")]
    head += [say("gain", "增益"), say("accuracy", "准确率"), say("chance", "随机水平")]
    cells = [
        [
            code(row["tag"]),
            say(row["state"], STATES_ZH[row["state"]]),
            "" if row["exposures"] is None else f"{row['exposures']:,}",
            f"{row['gain']:.1%}",
            f"{row['accuracy']:.0%}",
            f"{row['chance']:.0%}",
        ]
        for row in rows
    ]
    return table(head, cells, [2, 3, 4, 5])


def _rest(count: int, words: Words) -> Iterator[str]:
    """Says how many tags are left out."""
    if count > 0:
        yield words.say(f"And {count:,} more.", f"另有 {count:,} 个。")
