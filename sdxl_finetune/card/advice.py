"""Advice of the release page on how to draw with the model. Each sentence stands beside its translation."""

from collections.abc import Iterator
from contextlib import suppress

from sdxl_finetune.batch import LATENT_CHANNELS
from sdxl_finetune.card.contents import Card, ModelFile
from sdxl_finetune.card.text import Words, code
from sdxl_finetune.config.flow_options import FlowOptions, fixed_shift
from sdxl_finetune.model.vae_file import LATENTS
from sdxl_finetune.parsing import parse_json

ADD_FACT = "add {key} to the file of --facts"


def advice(card: Card, words: Words) -> list[str]:
    """The points of the section, in the order of the page."""
    say, items = words.say, list[str]()
    if card.guidance:
        items.append(
            say(f"**Guidance (CFG scale): at most {card.guidance:g}.**", f"**CFG 不要超过 {card.guidance:g}。**")
        )
    else:
        open_field = ("highest guidance scale (CFG)", "CFG 上限")
        items.append(words.or_open(None, open_field, ADD_FACT.format(key="guidance")))
    if card.quality_first:
        first = [code(tag) for tag in card.quality_first]
        items.append(
            say(
                f"**Put quality tags first:** {', '.join(first[:-1])}{' or ' * (len(first) > 1)}{first[-1]}"
                " before all other tags.",
                f"**质量标签写在最前面**：把 {'、'.join(first[:-1])}{' 或 ' * (len(first) > 1)}{first[-1]}"
                " 放在其他标签之前。",
            )
        )
    if card.trigger:
        items.append(say(f"Trigger words: {code(card.trigger)}.", f"触发词：{code(card.trigger)}。"))
    if card.resolution:
        items.append(
            say(f"Trained at {card.resolution} pixels", f"训练分辨率为 {card.resolution}")
            + (
                say(" and at other aspect ratios of about this area", "，其他宽高比请保持相近的总像素数")
                * card.has_buckets
            )
            + say(".", "。")
        )
    if card.max_tokens:
        items.append(
            say(
                f"Trained on captions of up to {card.max_tokens} tokens.",
                f"训练时提示词最长 {card.max_tokens} 个 token。",
            )
        )
    items += _of_the_file(card.file, words)
    return items + [words.of(text) for text in (card.usage_hint, *card.facts.advice) if text]


def _of_the_file(file: ModelFile, words: Words) -> Iterator[str]:
    """Settings that follow from the objective, the latents and the empty captions of this file."""
    terminal = bool(file.declared.zero_terminal_snr)
    if file.declared.objective == "velocity":
        yield words.say(
            "In a user interface that does not recognise the file, choose v-prediction"
            + (" with zero terminal SNR." if terminal else "."),
            "如果你的界面不能自动识别，请手动选择 v-prediction"
            + ("，并打开 zero terminal SNR。" if terminal else "。"),
        )
    if file.declared.objective == "flow":
        yield _flow_advice(file.declared.flow, words)
    if LATENTS in file.metadata:
        yield _latents_advice(file.metadata[LATENTS], words)
    if file.declared.zero_cond:
        yield words.say(
            "Leave the negative prompt empty, or write a real one. In ComfyUI put the node ConditioningZeroOut behind"
            " an empty negative prompt, because empty captions were trained as zeros.",
            "反向提示词可以留空，也可以正常填写。训练时空提示词用的是全零向量，因此在 ComfyUI 中，"
            "空的反向提示词后面要接 ConditioningZeroOut 节点。",
        )


def _latents_advice(said: str, words: Words) -> str:
    """The warning that interfaces decode SDXL's own latents only (commands/latents.py, `latent_lines`)."""
    channels = ""
    with suppress(ValueError, KeyError, TypeError, OverflowError):
        channels = f"{int(parse_json(said)['channels'])}"
    en, zh = (f" of {channels} channels", f"（{channels} 通道）") if channels else ("", "")
    return words.say(
        f"**This model has latents{en} other than those of SDXL.** Interfaces decode SDXL's latents with"
        f" {LATENT_CHANNELS} channels and SDXL's scale. Use a program that reads the VAE's own scale from the file.",
        f"**这个模型的 latent{zh}与 SDXL 原版不同。** 常见界面只按 SDXL 的 {LATENT_CHANNELS} 通道和缩放系数解码，"
        "请使用能从文件中读取 VAE 缩放系数的程序。",
    )


def _flow_advice(flow: FlowOptions, words: Words) -> str:
    """How to draw a flow. Interfaces do not recognise flow models of SDXL (model/interfaces.py)."""
    fixed = fixed_shift(flow)
    by_size = f"(width × height / {flow.flow_uniform_base_pixels:.7g})"
    shift = f"the square root of {by_size}" if fixed is None else f"{fixed:g}"
    zh_shift = f"{by_size} 的平方根" if fixed is None else f"{fixed:g}"
    return words.say(
        f"**This is a flow model.** In ComfyUI put the node ModelSamplingSD3 between checkpoint and sampler, with shift"
        f" {shift}. In reForge turn on Advanced Model Sampling, mode SD3, with shift {shift}. Use Euler or Heun with"
        " the schedule Simple. Without this setting pictures are noise.",
        f"**这是 flow 模型。** ComfyUI：在 checkpoint 与 sampler 之间加入节点 ModelSamplingSD3，shift 设为 {zh_shift}。"
        f"reForge：打开 Advanced Model Sampling，选择 SD3，shift 设为 {zh_shift}。"
        "采样器用 Euler 或 Heun，schedule 选 Simple。不做这个设置，画出来的只有噪声。",
    )
