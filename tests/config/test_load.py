"""A config file and the command line become one config, as in the reference, or all their mistakes are reported."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_finetune.config import Config, load_config
from sdxl_finetune.config.reading import read_file, tomllib
from sdxl_finetune.errors import UserError

STYLE = Path(__file__).parents[2] / "configs" / "style.toml"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with everything that a config has to name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("images/a.png", "model.safetensors", "prompts.txt"):
        (tmp_path / name).touch()
    return tmp_path


NEEDED = {
    "pretrained_model_name_or_path": "model.safetensors",
    "train_data_dir": "images",
    "resolution": "1024",
    "output_dir": "out",
}
TYPED = [word for name, value in NEEDED.items() for word in (f"--{name}", value)]


def load(*arguments: str) -> Config:
    config = load_config([*TYPED, *arguments], program="sdxl-train")
    assert config is not None
    return config


def printed(arguments: list[str], capsys) -> dict[str, object]:
    assert load_config([*arguments, "--print_config"], program="sdxl-train") is None
    tables = tomllib.loads(capsys.readouterr().out)
    return {name: value for table in tables.values() for name, value in table.items()}


def problems(*arguments: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(*arguments)
    return [str(problem) for problem in caught.value.problems]


# What the reference's own cases come to here, by the text of the file, where it is not the same.
REFUSED = {
    "[b]\nlearnign_rate=1e-4\nfoo='bar'\n": ["learnign_rate", "foo"],
    "[b]\nlearning_rate='1e-4'\nmax_token_length=255\nmixed_precision='weird'\n"
    "optimizer_args='weight_decay=0.1'\nlr_warmup_steps='0.1'\n": [
        "mixed_precision",
    ],
    "[b]\nresolution=1024\n[b.c]\nseed=3\n": ["c"],
    "[[x]]\nseed=3\n": ["x"],
    "[a]\nlr_warmup_steps=0.1\nmax_grad_norm=0\nlr_warmup_steps2=1\n": ["lr_warmup_steps2"],
    "bad = = 1": [None],
}


def test_config_files_of_the_reference(golden, folder, capsys, caplog):
    seen = 0
    for case in golden("config.json")["config_file"]["cases"]:
        text, arguments = case["toml"], case["argv"]
        if "--output_config" in arguments or text is None or "--config_fil" in arguments:
            continue
        (folder / case["file_name"]).write_text(text, encoding="utf-8")
        seen += 1
        if text in REFUSED:
            with pytest.raises(UserError) as caught:
                printed(arguments, capsys)
            assert [problem.key for problem in caught.value.problems] == REFUSED[text]
        elif case["file_name"] == "c.TOML":  # not found by the reference; found here
            assert printed(arguments, capsys)["seed"] == 1
        else:
            values = printed(arguments, capsys)
            expected = {name: value for name, value in case["changed_from_defaults"].items() if name != "config_file"}
            if "resolution" in expected:
                expected["resolution"] = "1024,1024"
            if "optimizer_args" in expected:  # printed as Python writes them
                expected["optimizer_args"] = ["weight_decay=0.1", "betas=(0.9, 0.99)"]
            assert {name: values[name] for name in expected} == expected, text
        (folder / case["file_name"]).unlink()
    assert seen > 15


def test_output_config_writes_what_was_typed(golden, folder):
    case = next(c for c in golden("config.json")["config_file"]["cases"] if "written" in c)
    arguments = case["argv"]
    assert load_config(arguments, program="sdxl-train") is None
    written = (folder / "o.toml").read_text()
    assert tomllib.loads(written) == {
        "data": {"dataset_config": "d.toml"},
        "optimizer": {"learning_rate": 1e-4},
    }  # no secrets
    with pytest.raises(UserError, match="exists"):
        load_config(arguments, program="sdxl-train")
    with pytest.raises(UserError, match="needs --config"):
        load_config(["--output_config"], program="sdxl-train")


def test_typed_options_win(folder):
    (folder / "c.toml").write_text("seed = 1\nxformers = true\nlearning_rate = 5e-5\nmin_snr_gamma = 5\n")
    config = load("--config", "c", "--seed", "7", "--no-xformers", "--learning_rate", "2e-06", "--min_snr_gamma", "")
    assert (config.seed, config.xformers, config.learning_rate, config.min_snr_gamma) == (7, False, 2e-6, None)


def test_typed_values_have_types(folder):
    config = load(
        *("--optimizer_args", "betas=0.9,0.99", "weight_decay=0.1", "--lr_scheduler", "cosine"),
        *("--lr_warmup_steps", "10%", "--max_token_length", "150", "--noise_offset", "1", "--cache_latents"),
    )
    assert config.optimizer_args == {"betas": (0.9, 0.99), "weight_decay": 0.1}
    assert (config.lr_warmup_steps, config.max_token_length, config.noise_offset) == (0.1, 150, 1.0)
    assert config.cache_latents and config.train_data_dir == Path("images")


def test_all_mistakes_are_reported_at_once(folder):
    (folder / "c.toml").write_text(
        "# a comment\n[train]\nlearnign_rate = 1e-4\nseed = 'x'\nxformers = 'yes'\n"
        "[more]\nfull_bf16 = true\noutput_name = [3]\nvae = 'none.safetensors'\nnetwork_module = 'networks.lora'\n"
    )
    here = Path.cwd()
    assert problems("--config", "c.toml", "--clip_skpi", "2", "--keep_tokens", "two", "--v2") == [
        "c.toml:3: learnign_rate = 0.0001: unknown option; did you mean learning_rate?",
        "c.toml:10: network_module = 'networks.lora': this is a LoRA config, but this program trains the whole model:"
        " use a config without it",
        "command line: v2 = True: this program trains SDXL only: start from an SDXL checkpoint",
        "command line: clip_skpi = 2: unknown option; --help lists all options",
        "c.toml:4: seed = 'x': must be a whole number from 0 to 9223372036854775807, without quotes",
        "c.toml:5: xformers = 'yes': must be true or false, without quotes",
        "c.toml:8: output_name = [3]: must be text, in quotes",
        "command line: keep_tokens = 'two': must be a whole number of at least 0",
        'c.toml:7: full_bf16 = True: needs mixed_precision = "bf16"',
        f"c.toml:9: vae = 'none.safetensors': no such file or folder: check the path, which is relative to {here};"
        " nothing is downloaded",
    ]


def test_a_refused_value_is_reported_only_once(folder):
    assert len(problems("--mixed_precision", "weird", "--full_bf16")) == 1
    assert len(problems("--resolution", "abc", "--enable_bucket")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nbad = = 1\n", "c.toml:2:7: not valid TOML: Invalid value"),
        ("seed = 1\nseed = 2\n", "c.toml:2:9: not valid TOML: Cannot overwrite a value"),
        (b"seed = '\xff'", "c.toml: not a UTF-8 text file: save it as UTF-8"),
        (None, "c.toml: cannot be read: No such file or directory"),
    ],
)
def test_files_that_cannot_be_read_are_refused(folder, text, message):
    if text is not None:
        (folder / "c.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert problems("--config", "c") == [message]


@pytest.mark.parametrize("quote", ['"', "'"])
def test_a_missing_quote_is_named(folder, quote):
    (folder / "c.toml").write_text(f"a = {quote}b\nc = 1\n")
    (problem,) = problems("--config", "c")
    assert problem.startswith("c.toml:") and problem.endswith(". Is the closing quote missing?")


def test_unknown_words_of_the_command_line_are_refused_with_a_suggestion(folder):
    assert problems("style.toml") == ["command line: style.toml: unknown option; did you mean --config style.toml?"]
    assert problems("--xformers", "yes") == ["command line: yes: unknown option; --help lists all options"]
    assert problems("--max-train-steps=3") == [
        "command line: max-train-steps = 3: unknown option; did you mean max_train_steps?"
    ]
    assert problems("--config_fil", "c")[0].startswith("command line: config_fil = 'c': unknown option")
    assert "--seed: expected one argument" in problems("--seed")[0]


def test_byte_order_mark_and_windows_line_ends_are_read(folder):
    (folder / "c.toml").write_bytes(b"\xef\xbb\xbf[a]\r\nseed = 3\r\n")
    given, _, _ = read_file("c")
    assert (given["seed"].value, given["seed"].place) == (3, "c.toml:2")


def test_options_of_other_programs_are_honoured_or_logged(folder, caplog):
    (folder / "c.toml").write_text(
        "sdxl = true\nepoch = 3\nno_token_padding = false\nlowram = false\nno_half_vae = true\nclip_skip = 1\n"
        'dynamo_backend = "no"\noptimizer = "Lion"\nmax_token_length = 255\nreg_data_dir = ""\nv2 = false\n'
        'huggingface_token = "secret"\n'
    )
    config = load("--config", "c")
    assert config.optimizer_type == "Lion" and config.max_token_length == 225
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[2].split(" =")[0].strip() for line in said] == [
        "sdxl",
        "epoch",
        "no_token_padding",
        "no_half_vae",
        "optimizer",
        "max_token_length",
        "huggingface_token",
    ]
    assert "secret" not in caplog.text and "is read as 225" in said[-2]


def test_numbers_in_quotes_are_read_and_said_once(folder, caplog):
    (folder / "c.toml").write_text(
        'max_train_steps = "2500"\nlearning_rate = "3e-05"\nxformers = "true"\nmax_token_length = "225"\n'
        "output_name = 3\nseed = 7.0\ncache_latents = 1\n"
    )
    config = load("--config", "c")
    assert (config.max_train_steps, config.learning_rate, config.xformers) == (2500, 3e-5, True)
    assert (config.max_token_length, config.output_name, config.seed, config.cache_latents) == (225, "3", 7, True)
    assert [record.getMessage() for record in caplog.records] == [
        "max_train_steps, learning_rate, xformers, max_token_length: the quotes around the value are ignored"
    ]


def test_values_that_the_reference_does_not_check_in_a_file_are_read(folder, caplog):
    (folder / "c.toml").write_text(
        'sample_sampler = "dpmpp_2m_karras"\nsave_precision = "fp32"\ndynamo_backend = "NO"\nmax_token_length = 77\n'
        "noise_offset = false\nlr_warmup_steps = 100.0\nlearning_rate = 1.e-5\n"
        'lr_scheduler = "cosine"\n'
    )
    config = load("--config", "c")
    assert (config.sample_sampler, config.save_precision, config.max_token_length) == ("ddim", "float", 75)
    assert (config.noise_offset, config.lr_warmup_steps, config.learning_rate) == (None, 100, 1e-5)
    said = "\n".join(record.getMessage() for record in caplog.records)
    for text in ("previews use ddim", "is read as 75", "not valid TOML, but read as in the reference"):
        assert text in said
    assert "sample_sampler" in problems("--sample_sampler", "dpmpp_2m_karras")[0]  # refused there too


def test_without_the_package_wandb_a_run_is_logged_to_files(folder, caplog, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = load("--log_with", "wandb")
    assert (config.log_with, config.logging_dir) == ("tensorboard", Path("out/logs"))
    assert "pip install wandb" in caplog.text
    assert load("--log_with", "all", "--logging_dir", "here").logging_dir == Path("here")


def test_the_start_of_an_option_is_read_as_the_option_on_the_command_line(folder, caplog):
    config = load("--max_train_epoch=120", "--lr_warm", "100", "--lr_scheduler", "cosine")
    assert (config.max_train_epochs, config.lr_warmup_steps) == (120, 100)
    assert "is read as max_train_epochs" in caplog.text
    assert "unknown option" in problems("--save_every", "1")[0]  # several options start so


def test_an_option_of_a_fork_is_not_read_as_the_longer_option_that_starts_so(folder, caplog):
    config = load("--edm2_loss_weighting", "--edm2_loss_weighting_generate_graph")
    assert config.edm2_loss_weighting_generate_graph_every_x_steps == 100
    assert "edm2_loss_weighting_generate_graph = True: has no effect: the log always shows the curve" in caplog.text


def test_a_windows_path_in_double_quotes_is_explained(folder):
    for line in ('train_data_dir = "C:\\train"', 'train_data_dir = "C:\\images"'):
        (folder / "c.toml").write_text(line)
        with pytest.raises(UserError, match=r"c\.toml:1.*single quotes"):
            load_config(["--config", "c", *TYPED[:2], *TYPED[4:]], program="sdxl-train")


def test_a_gui_s_json_file_is_explained(folder):
    assert "GUI" in problems("--config", "preset.json")[0]


def test_options_of_other_trainers_are_ignored_in_one_warning(folder, caplog):
    (folder / "c.toml").write_text(
        "unet_lr = 1e-4\ntext_encoder_lr = 5e-5\nfp8_base = true\nclip_skip = 3\npin_memory = true\ndeepspeed = true\n"
        'timestep_sampling = "sigma"\nweighting_scheme = "logit_normal"\nguidance_scale = 3.5\nzero_stage = 2\n'
        "skip_latents_validity_check = true\n"
    )
    assert load("--config", "c").skip_cache_check
    said = "\n".join(record.getMessage() for record in caplog.records)
    for text in (
        "learning_rate is the learning rate",
        "learning_rate_te1",
        "full_bf16",
        "pinned",
        "sdxl-check and the log",
    ):
        assert text in said
    assert said.count("other than SDXL") == 1 and "guidance_scale" in said


def test_a_key_given_twice_is_logged(folder, caplog):
    (folder / "c.toml").write_text("seed = 9\ntrain_batch_size = 2\n[b]\nseed = 2\ntrain_batch_size = 2\n")
    assert load("--config", "c").seed == 2
    assert [record.getMessage() for record in caplog.records] == [
        "c.toml:4: seed = 2: given twice; this value is used, not the one at c.toml:1"
    ]


def test_style_toml_loads_with_three_warnings(folder, caplog):
    for name in ("base.safetensors", "prompts.txt"):
        (folder / name).touch()
    caplog.set_level(logging.WARNING)
    config = load_config(["--config", str(STYLE), "--output_dir", "out"], program="sdxl-train")
    assert config is not None
    assert config.resolution == (1024, 1024) and config.multires_noise_iterations == 8
    assert (config.learning_rate, config.learning_rate_te1, config.max_token_length) == (3e-5, 1e-6, 225)
    said = [record.getMessage().split(" =")[0].split(": ")[-1] for record in caplog.records]
    assert said == ["no_token_padding", "persistent_data_loader_workers", "max_token_length"]


def test_help_and_version(capsys):
    for order in ("--help", "--version"):
        with pytest.raises(SystemExit) as ended:
            load_config([order], program="sdxl-train")
        assert not ended.value.code
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in Config.model_fields)
    assert "--network_module" not in text


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom sdxl_finetune.config import load_config\n"
        "try: load_config(['--help'], program='x')\nexcept SystemExit: pass\n"
        "print({'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_tables_of_tag_groups_are_values_and_not_groups_of_options(folder, capsys):
    expected = '{"miku": ["aqua hair"]}'
    for text in (
        'caption_tag_dropout_groups = {miku = ["aqua hair"]}\n',
        '[captions]\ncaption_tag_dropout_groups = {miku = ["aqua hair"]}\n',
        '[caption_tag_dropout_groups]\nmiku = ["aqua hair"]\n',
        'caption_tag_dropout_groups = \'{"miku": ["aqua hair"]}\'\n',
    ):
        Path("c.toml").write_text(text)
        assert printed(["--config", "c.toml", "--print_config"], capsys)["caption_tag_dropout_groups"] == expected
    Path("c.toml").write_text("[captions]\nseed = {a = 1}\n[more]\ncaption_tag_dropout_groups = {miku = [3]}\n")
    nested, wrong = problems("--config", "c.toml")
    assert "c.toml:2: seed" in nested and "a table inside a table is not allowed" in nested
    assert "caption_tag_dropout_groups = {'miku': [3]}: what 'miku' stands for is neither a text nor a list" in wrong
    assert wrong.endswith('must be a path, an address, or a table as {"hatsune miku" = ["aqua hair", "twintails"]}')
