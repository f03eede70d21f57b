"""Options of images, captions, buckets and latents."""

from typing import Literal

from pydantic import Field

from sdxl_finetune.config.fields import FilePath, Options, Resolution

Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"]


class DataOptions(Options):
    """Images"""

    train_data_dir: FilePath | None = None
    """Folder of images, or of folders `N_words`: N repeats an epoch, words for images without caption."""
    reg_data_dir: FilePath | None = None
    """Regularisation images, likewise: as many of them as of the others, in each epoch."""
    in_json: FilePath | None = None
    """Captions and tags of the images in `train_data_dir`, .json or .jsonl, in place of caption files."""
    dataset_config: FilePath | None = None
    """TOML or JSON file of several datasets, in place of `train_data_dir`."""
    dataset_repeats: int = Field(1, ge=1)
    """Times that each image is used in an epoch, where no folder's name and no `dataset_config` says it."""
    resolution: Resolution | None = None
    """Pixels that images are trained at: side of a square, or width and height; with buckets their area."""
    train_batch_size: int = Field(1, ge=1)
    """Images per process in one micro-batch."""
    resize_interpolation: Interpolation | None = None
    """Resampling of images; unset: area to shrink, Lanczos to enlarge."""
    max_data_loader_n_workers: int = Field(8, ge=0)
    """Worker processes that load data, for each training process; 0 loads in the training process."""
    caption_extention: str | None = None
    """The same as `caption_extension` in an older spelling; wins over it."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """An image that cannot be read: stop the run, or leave it out and name it. (Ours.)"""


class CaptionOptions(Options):
    """Captions and tags"""

    caption_extension: str = ".caption"
    """File name ending of the caption beside each image."""
    caption_separator: str = Field(",", min_length=1)
    """Text between the tags of a caption."""
    shuffle_caption: bool = False
    """Shuffle the tags anew each time an image is used."""
    keep_tokens: int = Field(0, ge=0)
    """Tags at the start of a caption that shuffling and tag dropout leave where they are."""
    keep_tokens_separator: str = ""
    """Text that ends the fixed start of a caption, and may begin a fixed end; replaces `keep_tokens`."""
    secondary_separator: str | None = None
    """Text inside a tag that holds tags which move and drop together; becomes `caption_separator`."""
    enable_wildcard: bool = False
    """Draw one line of several, and one of `{a|b}` in it, each time an image is used."""
    caption_prefix: str | None = None
    """Text put before every caption."""
    caption_suffix: str | None = None
    """Text put after every caption."""
    caption_dropout_rate: float = Field(0.0, ge=0, le=1)
    """Chance that an image is used without its caption, 0 to 1."""
    caption_dropout_every_n_epochs: int = Field(0, ge=0)
    """Every so many epochs no image has a caption; 0: never."""
    caption_tag_dropout_rate: float = Field(0.0, ge=0, le=1)
    """Chance of each tag to be left out, 0 to 1; kept tags stay."""
    token_warmup_min: int = Field(1, ge=0)
    """Tags in use at the start of tag warm-up."""
    token_warmup_step: float = Field(0.0, ge=0)
    """Steps until all tags are in use; below 1 a share of all steps; 0: no tag warm-up."""


class AugmentationOptions(Options):
    """Changes made to images"""

    flip_aug: bool = False
    """Mirror each image half of the time (a mirrored latent is cached as well)."""
    color_aug: bool = False
    """Shift the colours of each image a little; not with cached latents."""
    random_crop: bool = False
    """Crop at a random place and not at the centre; not with cached latents."""


class BucketOptions(Options):
    """Buckets"""

    enable_bucket: bool = False
    """Train each image at the size nearest to its shape, not at one size for all."""
    min_bucket_reso: int = Field(256, ge=1)
    """Shortest side of a bucket in pixels, rounded down to a multiple of `bucket_reso_steps`."""
    max_bucket_reso: int = Field(1024, ge=1)
    """Longest side of a bucket in pixels, rounded up to a multiple of `bucket_reso_steps`."""
    bucket_reso_steps: int = Field(64, ge=1)
    """Pixels between bucket sizes; with buckets a multiple of 32."""
    bucket_no_upscale: bool = False
    """Never enlarge an image: a bucket for each size, `min_bucket_reso` and `max_bucket_reso` unused."""


class HoldOutOptions(Options):
    """Validation"""

    validation_split: float = Field(0.0, ge=0, le=1)
    """Share of the images, 0 to 1, that is not trained on but validated; 1 in a dataset of its own. (0: none.)"""
    validation_seed: int = Field(0, ge=0)
    """Chooses the images that are held out, and their noise; apart from `seed`, so that runs can be compared."""


class LatentOptions(Options):
    """Latents"""

    cache_latents: bool = False
    """Encode every image once before training, not at each use; in memory."""
    cache_latents_to_disk: bool = False
    """Keep encoded images in `cache_dir` for the next run; turns `cache_latents` on."""
    vae_batch_size: int = Field(1, ge=1)
    """Images encoded at a time while caching."""
    skip_cache_check: bool = False
    """Take images and captions to be as they were last time, for millions that nobody has changed."""
    cache_dir: FilePath | None = None
    """Folder of dataset index and latent cache; unset: `cache` in `output_dir`. (Ours.)"""
