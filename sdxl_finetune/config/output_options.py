"""Options of saved weights, previews and logs."""

from typing import Annotated, Literal

from pydantic import Field

from sdxl_finetune.config.fields import FilePath, Options, Period

Sampler = Literal[
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++",
    "dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
]  # fmt: skip


class SavingOptions(Options):
    """Saved weights"""

    output_dir: FilePath | None = None
    """Folder for everything that a run saves; made when missing."""
    output_name: str | None = None
    """Name of saved files without ending; unset: `epoch`, `at` and `last`."""
    save_model_as: Literal["ckpt", "safetensors", "diffusers", "diffusers_safetensors"] | None = None
    """Kind of saved files; unset: as the model that training starts from."""
    use_safetensors: bool = False
    """Save safetensors where `save_model_as` is unset."""
    save_precision: Literal["float", "fp16", "bf16"] | None = None
    """Type of saved weights; unset: as they are trained."""
    save_every_n_epochs: int | None = Field(None, ge=1)
    """Save after every so many epochs, and at the end."""
    save_every_n_steps: int | None = Field(None, ge=1)
    """Save after every so many optimizer steps, and at the end."""
    save_n_epoch_ratio: int | None = Field(None, ge=1)
    """Save so many times over the run, at the end of epochs; sets `save_every_n_epochs`."""
    save_last_n_epochs: int | None = Field(None, ge=1)
    """Keep only the newest so many files that were saved by epoch."""
    save_last_n_steps: int | None = Field(None, ge=1)
    """Keep only files that were saved by step within the last so many steps."""


class ResumeOptions(Options):
    """Training states, from which a run goes on exactly"""

    save_state: bool = False
    """Save the training state with all saved weights."""
    save_state_on_train_end: bool = False
    """Save the training state at the end."""
    save_last_n_epochs_state: int | None = Field(None, ge=1)
    """Keep only the newest so many states that were saved by epoch; unset: `save_last_n_epochs`."""
    save_last_n_steps_state: int | None = Field(None, ge=1)
    """Keep only states that were saved by step within the last so many steps; unset: `save_last_n_steps`."""
    resume: FilePath | None = None
    """Go on from a training state or from saved weights: a path, or `auto` for the newest of this `output_name`."""
    resume_at_next_epoch: bool = False
    """If images, captions or batches have changed, resume at the next epoch and do not refuse. (Ours.)"""


class MetadataOptions(Options):
    """Metadata of saved weights"""

    metadata_title: str | None = None
    """Title; unset: `output_name`."""
    metadata_author: str | None = None
    """Author."""
    metadata_description: str | None = None
    """Description."""
    metadata_license: str | None = None
    """Licence."""
    metadata_tags: str | None = None
    """Tags, separated by commas."""
    metadata_usage_hint: str | None = None
    """Advice to users of the model."""
    metadata_thumbnail: str | None = None
    """Picture: an image file, or a data URL."""
    metadata_merged_from: str | None = None
    """Models that this one was merged from."""
    metadata_trigger_phrase: str | None = None
    """Words that call up what was trained."""
    metadata_preprocessor: str | None = None
    """Preprocessor of the training images."""
    metadata_is_negative_embedding: str | None = None
    """Whether this is a negative embedding; of no use for checkpoints, kept for the standard's sake."""


class PreviewOptions(Options):
    """Previews"""

    sample_prompts: FilePath | None = None
    """File of prompts, .txt, .toml or .json; without it there are no previews."""
    sample_every_n_epochs: Annotated[int | None, Period] = None
    """Draw previews after every so many epochs; wins over `sample_every_n_steps`; 0: never."""
    sample_every_n_steps: Annotated[int | None, Period] = None
    """Draw previews after every so many optimizer steps; 0: never."""
    sample_at_first: bool = False
    """Draw previews before the first step."""
    sample_sampler: Sampler = "ddim"
    """Sampler of previews."""


class LoggingOptions(Options):
    """Logs"""

    logging_dir: FilePath | None = None
    """Folder for the logs of runs, each in a folder of its own; unset: no logs on the disk."""
    log_with: Literal["tensorboard", "wandb", "all"] | None = None
    """Where scalars and previews go; unset: tensorboard if there is a `logging_dir`."""
    log_prefix: str | None = None
    """Text before the time in the name of a run's log folder."""
    log_tracker_name: str | None = None
    """Name of the tracker's project; unset: `finetuning`."""
    log_tracker_config: FilePath | None = None
    """TOML file with the trackers' own settings."""
    log_config: bool = False
    """Send the options to the tracker as well."""
    wandb_run_name: str | None = None
    """Name of the run at Weights & Biases."""
    wandb_api_key: str | None = None
    """Key for Weights & Biases; never printed or saved."""
    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = None
    """Least severity of messages that are shown; unset: INFO."""
    console_log_file: FilePath | None = None
    """File that messages go to, in place of the terminal."""
    console_log_simple: bool = False
    """Plain messages, without colours and columns."""
