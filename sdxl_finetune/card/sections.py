"""The page as blocks of Markdown, section by section. Each sentence stands beside its translation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sdxl_finetune import __version__
from sdxl_finetune.card.advice import ADD_FACT, advice
from sdxl_finetune.card.contents import Card
from sdxl_finetune.card.escaping import escape
from sdxl_finetune.card.facts import StageFacts
from sdxl_finetune.card.tag_section import tag_blocks, underfitted_tags
from sdxl_finetune.card.text import Words, bullets, code, code_block, facts_table, table
from sdxl_finetune.config.quality_options import QualityTag
from sdxl_finetune.errors import counted

PICTURES = "images"
"""Folder of the sample pictures beside the page."""
PARTS_ZH = {"U-Net": "U-Net", "text encoder 1": "文本编码器 1", "text encoder 2": "文本编码器 2", "VAE": "VAE"}


@dataclass(frozen=True)
class Block:
    """A part of the page. `sample` blocks hold a picture with its text, and stand side by side in HTML."""

    text: str
    kind: Literal["text", "sample"] = "text"


def picture_name(number: int) -> str:
    """Path of a sample picture relative to the page."""
    return f"{PICTURES}/{number:02d}.png"


def markdown(blocks: Sequence[Block]) -> str:
    """The text of the Markdown file."""
    return "\n\n".join(block.text for block in blocks) + "\n"


def page_blocks(card: Card, words: Words) -> list[Block]:
    """All blocks of the page in the order of the page."""
    sections = (_head, _file, _advice, _samples, _base, _data, _training, _tags, _limits, _disclaimer)
    return [block for section in sections for block in section(card, words)]


def _head(card: Card, words: Words) -> Iterator[Block]:
    yield Block(f"# {words.of(card.title)}")
    yield Block(words.or_open(card.description, ("a description", "模型介绍"), "set metadata_description"))
    facts, say = card.facts, words.say
    author = words.or_open(card.author, ("author", "作者"), "set metadata_author")
    version = words.or_open(facts.version, ("version", "版本号"), ADD_FACT.format(key="version"))
    published = words.or_open(facts.published, ("date", "发布日期"), ADD_FACT.format(key="published"))
    yield Block(
        say(
            f"Version {version}, published {published}. Author: {author}.",
            f"版本：{version}；发布日期：{published}；作者：{author}。",
        )
    )


def _file(card: Card, words: Words) -> Iterator[Block]:
    file, say = card.file, words.say
    yield Block(say("## The file", "## 模型文件"))
    names = {part: say(part, PARTS_ZH[part]) for part in file.parameters}
    separator = say(", ", "，")
    parameters = separator.join(
        say(f"{names[part]}: {_amount(count, words)}", f"{names[part]}：{_amount(count, words)}")
        for part, count in file.parameters.items()
    )
    rows = [(say("file", "文件名"), code(file.name))]
    if file.auto_v2:
        rows.append((say("AutoV2 hash", "AutoV2 哈希"), code(file.auto_v2)))
    size = f"{file.size / 1e9:.2f} GB" if file.size >= 1e9 else f"{file.size / 1e6:.1f} MB"
    rows += [
        (say("size", "文件大小"), say(f"{size} ({file.size:,} bytes)", f"{size}（{file.size:,} 字节）")),
        (say("precision", "精度"), file.precision),
        (say("parameters", "参数量"), parameters),
        (say("prediction type", "预测类型"), _objective(card, words)),
        (say("licence", "许可协议"), words.or_open(card.license, ("licence", "许可协议"), "set metadata_license")),
    ]
    if merged := file.metadata.get("modelspec.merged_from"):
        rows.append((say("merged from", "融合自"), escape(merged)))
    yield Block(facts_table(rows, words))


def _amount(count: int, words: Words) -> str:
    """A large number in the unit of the language."""
    if words.language == "en":
        return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
    return f"{count / 1e8:.2f} 亿" if count >= 1e8 else f"{count / 1e4:,.0f} 万"


def _objective(card: Card, words: Words) -> str:
    declared = card.file.declared
    if declared.objective == "flow":
        return words.say("flow matching (rectified flow)", "流匹配（flow matching，rectified flow）")
    if declared.objective != "velocity":
        return "epsilon"
    return words.say("v-prediction", "v-prediction（v 预测）") + (
        words.say(", zero terminal SNR", "，零终端信噪比（zero terminal SNR）") if declared.zero_terminal_snr else ""
    )


def _advice(card: Card, words: Words) -> Iterator[Block]:
    yield Block(words.say("## How to use it", "## 使用建议"))
    yield Block(bullets(advice(card, words)))


def _samples(card: Card, words: Words) -> Iterator[Block]:
    yield Block(words.say("## Samples", "## 示例图"))
    if not card.samples:
        yield Block(words.or_open(None, ("sample pictures", "示例图"), "give --prompts FILE, or --samples FOLDER"))
    for number, sample in enumerate(card.samples, 1):
        parts = [f"![{words.say('sample', '示例图')} {number}]({picture_name(number)})"]
        if sample.prompt:
            parts.append(code_block(sample.prompt))
        if sample.negative_prompt:
            parts += [words.say("Negative prompt:", "反向提示词："), code_block(sample.negative_prompt)]
        shown = {"Seed": "种子", "Steps": "步数", "Sampler": "采样器", "CFG scale": "CFG", "Size": "尺寸"}
        found = [
            words.say(f"{name} {escape(sample.settings[name])}", f"{chinese} {escape(sample.settings[name])}")
            for name, chinese in shown.items()
            if name in sample.settings
        ]
        parts += [words.say(", ", "，").join(found)] if found else []
        yield Block("\n\n".join(parts), kind="sample")


def _base(card: Card, words: Words) -> Iterator[Block]:
    say, ask = words.say, words.or_open
    yield Block(say("## Base model", "## 底模"))
    rows = [(say("name", "名称"), ask(card.base_name, ("base model", "底模"), "add base.name to the file of --facts"))]
    if card.base_author:
        rows.append((say("author", "作者"), card.base_author))
    remedy = "add base.license to the file of --facts"
    licence = ask(card.base_license, ("licence of the base model", "底模的许可协议"), remedy)
    rows.append((say("licence", "许可协议"), licence))
    if card.base_hash:
        rows.append((say("AutoV2 hash", "AutoV2 哈希"), code(card.base_hash)))
    if card.facts.base.url:
        rows.append((say("page", "页面"), f"<{card.facts.base.url}>"))
    yield Block(facts_table(rows, words))


def _data(card: Card, words: Words) -> Iterator[Block]:
    say, facts = words.say, card.facts.data
    yield Block(say("## Data", "## 训练数据"))
    rows = []
    images = None if card.images is None else words.count(card.images)
    images = words.or_open(images, ("number of images", "图片数量"), "add data.images to the file of --facts")
    rows.append((say("captioned images", "带标签的图片"), images))
    if card.held_out:
        rows.append((say("held out for validation", "留作验证"), f"{card.held_out:,}"))
    styles = facts.style_tags if facts.style_tags is not None else sum(card.tag_states.values()) or None
    if styles is not None:
        rows.append((say("style tags", "画风标签"), words.count(styles)))
    else:
        remedy = "measure them with sdxl-model tags, or add data.style_tags to the file of --facts"
        rows.append(
            (say("style tags", "画风标签"), words.or_open(None, ("number of style tags", "画风标签数量"), remedy))
        )
    for least, count in card.tag_counts.items():
        if count and least.isdecimal():
            english = "different tags" if least == "1" else f"tags in at least {int(least):,} images"
            rows.append(
                (say(english, "标签种类" if least == "1" else f"至少出现在 {int(least):,} 张图里的标签"), f"{count:,}")
            )
    yield Block(facts_table(rows, words))
    if facts.description:
        yield Block(words.of(facts.description))
    if card.quality:
        yield from _quality(card, words)


def _quality(card: Card, words: Words) -> Iterator[Block]:
    say = words.say
    yield Block(say("### Quality tags", "### 质量标签"))
    yield Block(
        say(
            "Every image has a score, and its caption holds the quality tag of this score.",
            "每张图片都有评分，评分对应的质量标签写在它的标签里。",
        )
    )
    head = [say("score", "评分"), say("tag", "标签")]
    rows = [
        [condition, code(tag.tag)]
        for condition, tag in zip(_conditions(card.quality, words), card.quality, strict=True)
    ]
    if any(card.quality_images.values()):
        head.append(say("images", "图片数"))
        rows = [[*row, f"{card.quality_images.get(tag.tag, 0):,}"] for row, tag in zip(rows, card.quality, strict=True)]
    yield Block(table(head, rows, numbers=[2]))


def _conditions(tags: Sequence[QualityTag], words: Words) -> Iterator[str]:
    """The scores of each tag. A tag stands for the scores that the tags before it have left."""
    score, upper = words.say("score", "评分"), ""
    for tag in tags:
        if tag.share is not None:
            yield words.say(f"best {tag.share:g} % of the images", f"评分最高的 {tag.share:g} % 图片")
        elif tag.bound is None:
            yield f"{score} {upper}" if upper else words.say("others", "其余")
        else:
            over, under = ("≥", "<") if tag.includes_bound else (">", "≤")
            below = "≤" if tag.includes_bound else "<"
            yield f"{tag.bound:g} {below} {score} {upper}" if upper else f"{score} {over} {tag.bound:g}"
            upper = f"{under} {tag.bound:g}"


def _training(card: Card, words: Words) -> Iterator[Block]:
    say = words.say
    yield Block(say("## Training", "## 训练过程"))
    if card.stages:
        head = [say("stage", "阶段"), say("hardware", "硬件"), say("time", "时长")]
        head += [say("images", "图片"), say("epochs", "轮数（epoch）"), say("steps", "步数")]
        yield Block(
            table(head, [_stage(number, stage, words) for number, stage in enumerate(card.stages, 1)], [2, 3, 4, 5])
        )
        if notes := [f"{words.of(stage.name)}: {words.of(stage.note)}" for stage in card.stages if stage.note]:
            yield Block(bullets(notes))
    else:
        remedy = "add a [[stages]] table to the file of --facts"
        yield Block(words.or_open(None, ("stages of training, hardware and hours", "训练阶段、硬件和时长"), remedy))
    yield Block(say("### Parameters", "### 训练参数"))
    if card.parameters:
        if len(card.stages) > 1:
            yield Block(say("Parameters of the last stage:", "最后一个阶段的参数："))
        yield Block(code_block(card.parameters, "toml"))
    else:
        yield Block(words.or_open(None, ("training parameters", "训练参数"), "give the run's config with --config"))


def _stage(number: int, stage: StageFacts, words: Words) -> list[str]:
    """A row of the table of stages."""
    say, name = words.say, words.of(stage.name) or words.say(f"stage {number}", f"第 {number} 阶段")
    hours = None if stage.hours is None else _duration(stage.hours, words)
    if hours and stage.at_least:
        hours = say(f"at least {hours}", f"至少 {hours}")
    recorded = stage.recorded or name
    remedy = f'add a [[stages]] table with name = "{recorded}" and this key to the file of --facts'
    return [
        name,
        words.or_open(stage.hardware, (f"hardware of {name}", f"{name} 的硬件"), remedy),
        words.or_open(hours, (f"time of {name}", f"{name} 的时长"), remedy),
        "" if stage.images is None else words.count(stage.images),
        "" if stage.epochs is None else f"{stage.epochs:g}",
        "" if stage.steps is None else f"{stage.steps:,}",
    ]


def _duration(hours: float, words: Words) -> str:
    """A time in hours, or in minutes if it is short."""
    if hours < 1:
        minutes = max(1, round(hours * 60))
        return words.say(f"{minutes} min", f"{minutes} 分钟")
    number = f"{hours:,.0f}" if hours >= 20 or hours == int(hours) else f"{hours:.1f}"
    return words.say(f"{number} h", f"{number} 小时")


def _tags(card: Card, words: Words) -> Iterator[Block]:
    if card.tags is not None:
        yield from map(Block, tag_blocks(card.tags, words))


def _limits(card: Card, words: Words) -> Iterator[Block]:
    say, states = words.say, card.tag_states
    items = [words.of(limit) for limit in card.facts.limits]
    total = sum(states.values())
    weak = underfitted_tags(card.tags) if card.tags is not None else []
    names = f": {', '.join(map(code, weak))}" if weak else ""
    chinese_names = f"：{'、'.join(map(code, weak))}" if weak else ""
    if under := states.get("underfitted"):
        items.append(
            say(
                f"{under:,} of {counted(total, 'measured tag')} {'is' if under == 1 else 'are'} underfitted{names}.",
                f"测量的 {total:,} 个标签中有 {under:,} 个欠拟合{chinese_names}。",
            )
        )
    if wrong := states.get("contradictory"):
        items.append(
            say(
                f"{wrong:,} of {total:,} measured tags contradict themselves: their images show different things.",
                f"测量的 {total:,} 个标签里有 {wrong:,} 个自相矛盾：同一标签下的图片内容不一致。",
            )
        )
    if not items:
        items = [
            words.or_open(None, ("what this version cannot do yet", "当前版本的不足"), ADD_FACT.format(key="limits"))
        ]
    yield Block(say("## Limits of this version", "## 当前版本的不足"))
    yield Block(bullets(items))


def _disclaimer(card: Card, words: Words) -> Iterator[Block]:
    say = words.say
    yield Block(say("## Disclaimer", "## 免责声明"))
    standard = say(
        "The model is provided as it is, without any warranty. Its pictures may be wrong or offensive. They may"
        " resemble existing works and people. Whoever draws or publishes pictures is responsible for them, and must"
        " follow the law and the licences of this model and of its base model.",
        "本模型按“原样”提供，不附带任何形式的担保。生成的图片可能有错误或令人不适，也可能与现有作品或真实人物相似。"
        "图片的生成者和发布者须自行承担责任，并遵守当地法律以及本模型和底模的许可协议。",
    )
    yield Block(words.of(card.facts.disclaimer) if card.facts.disclaimer else standard)
    yield Block(say(f"*Page written by sdxl_finetune {__version__}.*", f"*本页由 sdxl_finetune {__version__} 生成。*"))
