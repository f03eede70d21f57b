"""Options of checkpoints, training states, previews and logs."""

from typing import Annotated, Literal

from pydantic import Field

from sdxl_finetune.config.fields import FileLocation, FilePath, OnlyWith, Options, Period, Precision

Sampler = Literal[
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++",
    "dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
]  # fmt: skip
PROMPTS = OnlyWith("sample_prompts")
COLOURS = OnlyWith("colour_check_every_n_epochs colour_check_every_n_steps")
UPLOADS = OnlyWith("huggingface_repo_id")


class SavingOptions(Options):
    """Checkpoints"""

    output_dir: FileLocation | None = None
    """Folder for all files that a run saves. It is created if it does not exist."""
    output_name: str | None = None
    """Name of saved files, without ending. Default: names `epoch`, `at` and `last`."""
    save_model_as: Literal["ckpt", "safetensors", "diffusers", "diffusers_safetensors"] | None = None
    """Format of checkpoints. Default: the format of the model that training starts from."""
    use_safetensors: Annotated[bool, OnlyWith("save_model_as", unless=True)] = False
    """Save checkpoints as safetensors if `save_model_as` is not set."""
    save_precision: Annotated[Literal["float", "fp16", "bf16"] | None, Precision] = None
    """Data type of the weights in checkpoints. Default: the type that they are trained in."""
    save_every_n_epochs: int | None = Field(None, ge=1)
    """Save a checkpoint every N epochs. The final checkpoint is always saved."""
    save_every_n_steps: int | None = Field(None, ge=1)
    """Save a checkpoint every N optimizer steps. The final checkpoint is always saved."""
    save_n_epoch_ratio: int | None = Field(None, ge=1)
    """Save about N checkpoints over the run, at ends of epochs. Sets `save_every_n_epochs`."""
    save_last_n_epochs: Annotated[int | None, OnlyWith("save_every_n_epochs save_n_epoch_ratio")] = Field(None, ge=1)
    """Keep only the newest N checkpoints that were saved by epoch."""
    save_last_n_steps: Annotated[int | None, OnlyWith("save_every_n_steps")] = Field(None, ge=1)
    """Keep only checkpoints saved by step within the last N optimizer steps."""


class ResumeOptions(Options):
    """Training states and resume"""

    initial_step: int | None = Field(None, ge=0)
    """Count a new run from this step: names, learning rate, batches. Not on resume. Not in sd-scripts' SDXL trainer."""
    initial_epoch: Annotated[int | None, OnlyWith("initial_step", unless=True)] = Field(None, ge=1)
    """Count a new run from the start of this epoch. `initial_step` wins. Not in sd-scripts' SDXL trainer."""
    save_state: bool = False
    """Save a training state with every checkpoint."""
    save_state_on_train_end: bool = False
    """Save a training state at the end of training."""
    save_last_n_epochs_state: Annotated[
        int | None, OnlyWith("save_every_n_epochs save_n_epoch_ratio"), OnlyWith("save_state")
    ] = Field(None, ge=1)
    """Keep only the newest N states saved by epoch. Default: `save_last_n_epochs`."""
    save_last_n_steps_state: Annotated[int | None, OnlyWith("save_every_n_steps"), OnlyWith("save_state")] = Field(
        None, ge=1
    )
    """Keep only states saved by step within the last N steps. Default: `save_last_n_steps`."""
    resume: FileLocation | None = None
    """Training state or checkpoint to continue from: a path, or `auto` for the newest of this `output_name`."""
    resume_at_next_epoch: Annotated[bool, OnlyWith("resume")] = False
    """Resume at the next epoch if images, captions or batches have changed. Off: refuse. Not in sd-scripts."""


class HubOptions(Options):
    """Hugging Face hub"""

    huggingface_repo_id: str | None = None
    """Repository to which every checkpoint is uploaded, as `user/name`. It is created if it does not exist."""
    huggingface_repo_type: Annotated[str | None, UPLOADS] = None
    """Type of the repository: `model`, `dataset` or `space`. Default: `model`."""
    huggingface_path_in_repo: Annotated[str | None, UPLOADS] = None
    """Folder in the repository. Default: its root."""
    huggingface_token: Annotated[str | None, OnlyWith("huggingface_repo_id resume_from_huggingface")] = None
    """Access token. It is never printed or saved. Default: `HF_TOKEN` of the environment, else the saved login."""
    huggingface_repo_visibility: Annotated[str | None, UPLOADS] = None
    """Visibility of a repository that the run creates: `public` or `private`. Default: `private`."""
    save_state_to_huggingface: Annotated[bool, UPLOADS] = False
    """Upload training states too."""
    resume_from_huggingface: Annotated[bool, OnlyWith("resume")] = False
    """Download the training state that `resume` names, as `user/name/path:revision:type`, and resume from it."""
    async_upload: bool | None = None
    """Train on during an upload. false: wait for each upload, at most 2 minutes. Default: true."""


class MetadataOptions(Options):
    """Metadata of checkpoints"""

    metadata_title: str | None = None
    """Title of the model. Default: `output_name`."""
    metadata_author: str | None = None
    """Author of the model."""
    metadata_description: str | None = None
    """Description of the model."""
    metadata_license: str | None = None
    """Licence of the model."""
    metadata_tags: str | None = None
    """Tags of the model, separated by commas."""
    metadata_usage_hint: str | None = None
    """Advice for users of the model."""
    metadata_thumbnail: str | None = None
    """Picture of the model: an image file or a data URL."""
    metadata_merged_from: str | None = None
    """Names of the models that this model was merged from."""
    metadata_trigger_phrase: str | None = None
    """Words in a prompt that call up what was trained."""
    metadata_preprocessor: str | None = None
    """Preprocessor of the training images."""
    metadata_is_negative_embedding: str | None = None
    """True for a negative embedding. Part of the metadata standard; not useful for checkpoints."""


class PreviewOptions(Options):
    """Previews"""

    sample_prompts: Annotated[
        FilePath | None, OnlyWith("sample_every_n_epochs sample_every_n_steps sample_at_first")
    ] = None
    """File of preview prompts, .txt, .toml or .json. Default: no previews."""
    sample_every_n_epochs: Annotated[int | None, Period, PROMPTS] = None
    """Draw previews every N epochs. If both are set, epochs win over `sample_every_n_steps`. 0: never."""
    sample_every_n_steps: Annotated[int | None, Period, PROMPTS, OnlyWith("sample_every_n_epochs", unless=True)] = None
    """Draw previews every N optimizer steps. 0: never."""
    sample_at_first: Annotated[bool, PROMPTS] = False
    """Draw previews before the first step."""
    sample_sampler: Annotated[
        Sampler, OnlyWith("sample_prompts colour_check_every_n_epochs colour_check_every_n_steps")
    ] = "ddim"
    """Sampler of the previews and of the colour check."""


class ColourOptions(Options):
    """Colours of drawn pictures"""

    colour_check_every_n_epochs: int | None = Field(None, ge=0)
    """Draw the captions of fixed images every N epochs and compare the colours. Default: never. Not in sd-scripts."""
    colour_check_every_n_steps: Annotated[int | None, OnlyWith("colour_check_every_n_epochs", unless=True)] = Field(
        None, ge=0
    )
    """Draw them every N optimizer steps. If both are set, epochs win. Not in sd-scripts."""
    colour_check_images: Annotated[int | None, COLOURS] = Field(None, ge=2)
    """Images of a colour check: held-out ones, or training images if none are held out. Default: 16."""
    colour_check_bound: Annotated[float | None, COLOURS] = Field(None, gt=0, le=1)
    """Warn if mean, contrast or saturation, 0 to 1, is off by more. Default: 0.08. Not in sd-scripts."""


class LoggingOptions(Options):
    """Logs"""

    no_memory: bool = False
    """sdxl-check alone: leave out the memory estimate, which takes most of its time. Not in sd-scripts."""

    logging_dir: FilePath | None = None
    """Folder for logs; each run gets a folder in it. Default: no log files."""
    log_with: Literal["tensorboard", "wandb", "all"] | None = None
    """Tracker of scalars and previews. Default: tensorboard if `logging_dir` is set."""
    log_prefix: Annotated[str | None, OnlyWith("logging_dir")] = None
    """Text before the time in the name of the log folder."""
    log_tracker_name: Annotated[str | None, OnlyWith("log_with")] = None
    """Project name in the tracker. Default: `finetuning`."""
    log_tracker_config: Annotated[FilePath | None, OnlyWith("log_with")] = None
    """TOML file with settings of the trackers."""
    log_config: Annotated[bool, OnlyWith("log_with")] = False
    """Send all options to the tracker."""
    wandb_run_name: Annotated[str | None, OnlyWith("log_with", ("wandb", "all"))] = None
    """Name of the run at Weights & Biases."""
    wandb_api_key: Annotated[str | None, OnlyWith("log_with", ("wandb", "all"))] = None
    """API key for Weights & Biases. It is never printed or saved."""
    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = None
    """Least severe level of messages to show. Default: INFO."""
    console_log_file: FilePath | None = None
    """File for messages. They are then not shown in the terminal."""
    console_log_simple: bool = False
    """Show plain messages, without colours and columns."""
