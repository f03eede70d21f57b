"""Any config that is written as a file loads as the same config."""

from typing import Literal, get_args, get_origin

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_finetune.config import Config, to_toml
from sdxl_finetune.config.fields import LARGEST, Shown, kinds
from sdxl_finetune.config.options import SECRETS
from sdxl_finetune.config.reading import read_file
from sdxl_finetune.storage import Address


def _values() -> dict[str, st.SearchStrategy]:
    """A strategy for each option, from its type."""
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
    path = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
    address = st.sampled_from([Address("s3://bucket"), Address("gs://b/a b/c")])
    finite = st.floats(allow_nan=False, allow_infinity=False)
    argument = st.none() | st.booleans() | st.integers() | finite | text
    arguments = st.dictionaries(st.sampled_from("abc"), argument | st.tuples(argument, argument))
    strategies = {
        "resolution": st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
        "face_crop_aug_range": st.tuples(st.floats(0.01, 2), st.floats(2, 9)),
        "lr_warmup_steps": st.integers(0, 10**6) | st.floats(0, 1),
        "lr_decay_steps": st.integers(0, 10**6) | st.floats(0, 1),
        "block_lr": st.lists(st.floats(0, 1), min_size=23, max_size=23),
        "freeze_unet_blocks": st.lists(st.integers(0, 99), min_size=1, max_size=4),
        "freeze_parameters": st.sampled_from(["*.attn2.*", " a.[01].?, b", ["x.*", "y"]]),
        "train_parameters": st.sampled_from(["out.*", ["x.*", "y"]]),
        "quality_tags": st.sampled_from(["a > 0.75, b >= -1e-07, c", "a top 0.5%, b top 30%", "only"]),
        "tag_report_timesteps": st.sampled_from([500, "400, 600", [1, 999]]),
        "vae_custom_scale": st.floats(1e-3, 9) | st.lists(st.floats(1e-3, 9), min_size=1, max_size=4),
        "vae_custom_shift": finite | st.lists(finite, min_size=1, max_size=4),
        "lr_scheduler": st.sampled_from(["constant", "cosine", "adafactor:3e-05"]),
        "optimizer_args": arguments,
        "lr_scheduler_args": arguments,
        "edm2_loss_weighting_optimizer_args": arguments,
        "metadata_columns": st.sampled_from(["path=key", "caption=a b,score=x"]),
        "caption_sources": st.sampled_from([".txt", ".json#a b:0.25,.txt:1e-9", "tags:0.6, caption:0.4", ["a", "b:3"]]),
        "caption_tag_dropout_groups": path.filter(lambda name: name.lstrip()[:1] not in ("", "{"))
        | st.dictionaries(text, text | st.lists(text), max_size=3),
    }
    for name in set(Config.model_fields) - set(strategies) - SECRETS:
        field = Config.model_fields[name]
        (kind,) = kinds(field)
        limits = {type(note).__name__: note for note in field.metadata}
        least = getattr(limits.get("Ge"), "ge", getattr(limits.get("Gt"), "gt", None))
        most = getattr(limits.get("Le"), "le", getattr(limits.get("Lt"), "lt", None))
        if get_origin(kind) is Literal:
            strategies[name] = st.sampled_from(get_args(kind))
        elif kind is float:
            bounds = {"min_value": least, "max_value": most, "exclude_min": "Gt" in limits}
            bounds["exclude_max"] = "Lt" in limits
            strategies[name] = st.floats(**bounds, allow_nan=False, allow_infinity=False)
        else:
            strategies[name] = {
                bool: st.booleans(),
                int: st.integers(-LARGEST if least is None else least, LARGEST if most is None else most),
                Shown("a path"): path,
                Shown("a path, or an address as s3://bucket/folder"): st.one_of(path, address),
            }.get(kind, text)
    return strategies


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({}, optional=_values()))
def test_a_printed_config_loads_as_the_same_config(tmp_path_factory, values):
    config = Config(**values)
    path = tmp_path_factory.getbasetemp() / "printed.toml"
    for changed_only in (False, True):
        path.write_text(to_toml(config, changed_only=changed_only), encoding="utf-8", newline="")
        given_again, problems, _ = read_file(str(path))
        assert not problems
        assert Config(**{name: one.value for name, one in given_again.items()}) == config
