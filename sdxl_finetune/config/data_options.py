"""Options of images, captions, aspect-ratio buckets and caches."""

from typing import Annotated, Literal

from pydantic import Field

from sdxl_finetune.config.caption_sources import CaptionSources
from sdxl_finetune.config.fields import (
    FaceRange,
    FileLocation,
    FilePath,
    MetadataColumns,
    OnlyWith,
    Options,
    Resolution,
    TagGroups,
    ZeroIsOne,
)

Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"]
TAGS = OnlyWith("shuffle_caption caption_tag_dropout_rate token_warmup_step")
"""Options of tags matter if something moves or drops tags."""
HELD_OUT = OnlyWith("validation_split")


class DataOptions(Options):
    """Images"""

    train_data_dir: FileLocation | None = None
    """Folder of images or tar files, or of folders `N_words`: N repeats per epoch, words as caption of images."""
    reg_data_dir: FileLocation | None = None
    """Folder of regularisation images, laid out as `train_data_dir`. An epoch uses as many of them as other images."""
    in_json: FileLocation | None = None
    """Metadata of the images in `train_data_dir`: .json, .jsonl or .parquet file, or a folder of .parquet files."""
    metadata_columns: MetadataColumns | None = None
    """Names of columns or keys of `in_json`, where they have unusual names. Not in sd-scripts."""
    dataset_config: FilePath | None = None
    """TOML or JSON file that describes several datasets. Replaces `train_data_dir`."""
    dataset_repeats: int = Field(1, ge=1)
    """Repeats of each image per epoch. A folder's name and `dataset_config` win over this."""
    resolution: Resolution | None = None
    """Training size in pixels: side, or width and height; with buckets their area. Unset: that in `in_json`."""
    train_batch_size: int = Field(1, ge=1)
    """Images per process in one micro-batch."""
    resize_interpolation: Interpolation | None = None
    """Interpolation that resizes images. Default: area to shrink, Lanczos to enlarge."""
    max_data_loader_n_workers: int = Field(8, ge=0)
    """Data-loader workers of each training process. 0: the training process loads the data itself."""
    caption_extention: str | None = None
    """Older spelling of `caption_extension`. If both are set, this one wins."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """An image that cannot be read stops the run, or is skipped with a warning. Not in sd-scripts."""
    debug_dataset: bool = False
    """Draw the first batches as they are trained, with captions and masks, into `output_dir`; train nothing."""


class CaptionOptions(Options):
    """Captions and tags"""

    caption_extension: Annotated[str, OnlyWith("caption_sources", unless=True)] = ".caption"
    """Ending of the caption file beside each image."""
    caption_sources: CaptionSources | None = None
    """Texts of which one is drawn as caption each time an image is used, with weights. Not in sd-scripts."""
    caption_separator: Annotated[
        str, OnlyWith("shuffle_caption caption_tag_dropout_rate token_warmup_step secondary_separator")
    ] = Field(",", min_length=1)
    """Text between two tags of a caption. It joins them again after shuffling."""
    shuffle_caption: bool = False
    """Shuffle the tags each time an image is used."""
    keep_tokens: Annotated[int, TAGS] = Field(0, ge=0)
    """Number of tags at the start of a caption that are never shuffled or dropped."""
    keep_tokens_separator: Annotated[str, TAGS] = ""
    """Text that ends the fixed start of a caption; a second one begins a fixed end. `keep_tokens` is for the others."""
    secondary_separator: str | None = None
    """Text between parts of one tag, which move and drop together. Read as `caption_separator` afterwards."""
    enable_wildcard: bool = False
    """Draw one line of a caption and one choice of each `{a|b}` in it, each time an image is used."""
    caption_prefix: str | None = None
    """Text before every caption."""
    caption_suffix: str | None = None
    """Text after every caption."""
    caption_dropout_rate: float = Field(0.0, ge=0, le=1)
    """Probability that an image is used with an empty caption, 0 to 1."""
    caption_dropout_every_n_epochs: int = Field(0, ge=0)
    """Use empty captions in every Nth epoch. 0: never."""
    caption_tag_dropout_rate: float = Field(0.0, ge=0, le=1)
    """Probability that a tag is dropped, 0 to 1. Tags kept by `keep_tokens` stay."""
    caption_tag_dropout_groups: Annotated[TagGroups | None, OnlyWith("caption_tag_dropout_rate")] = None
    """Tags dropped together with a tag: a table of lists by tag, or its TOML or JSON file. Not in sd-scripts."""
    protected_tags_file: Annotated[FileLocation | None, TAGS] = None
    """Text file of tags that are never shuffled or dropped, one a line. `*` matches any text. Not in sd-scripts."""
    token_warmup_min: Annotated[int, OnlyWith("token_warmup_step")] = Field(1, ge=0)
    """Number of tags in use at the start of tag warm-up."""
    token_warmup_step: float = Field(0.0, ge=0)
    """Optimizer steps until all tags are in use. Below 1: a share of all steps. 0: no tag warm-up."""


class AugmentationOptions(Options):
    """Image augmentation"""

    flip_aug: bool = False
    """Mirror each image with probability 0.5. The latent cache then holds the mirrored latent as well."""
    color_aug: bool = False
    """Change the colours of each image slightly and at random. Not possible with `cache_latents`."""
    random_crop: bool = False
    """Crop at a random place instead of the centre. Not possible with `cache_latents`."""
    face_crop_aug_range: Annotated[FaceRange | None, OnlyWith("cache_latents", unless=True)] = None
    """Crop around the face that a file name gives, `name_x_y_w_h`: short side of the crop, in sizes of the face."""


class MaskOptions(Options):
    """Masks"""

    conditioning_data_dir: Annotated[FileLocation | None, OnlyWith("masked_loss")] = None
    """Folder of masks for `masked_loss`, each with the name and size of its image. The red channel is the mask."""
    alpha_mask: bool = False
    """Multiply the loss by each image's alpha channel. Colours under transparent parts are kept."""


class BucketOptions(Options):
    """Aspect-ratio buckets"""

    enable_bucket: bool = False
    """Train each image in the bucket nearest to its aspect ratio. Off: one size for all images."""
    min_bucket_reso: Annotated[int, OnlyWith("enable_bucket"), OnlyWith("bucket_no_upscale", unless=True)] = Field(
        256, ge=0
    )
    """Shortest side of a bucket in pixels, rounded down to a multiple of `bucket_reso_steps`."""
    max_bucket_reso: Annotated[int, OnlyWith("enable_bucket"), OnlyWith("bucket_no_upscale", unless=True)] = Field(
        1024, ge=0
    )
    """Longest side of a bucket in pixels, rounded up to a multiple of `bucket_reso_steps`."""
    bucket_reso_steps: Annotated[int, OnlyWith("enable_bucket")] = Field(64, ge=0)
    """Pixels between two bucket sizes. With `enable_bucket`: a multiple of 32."""
    bucket_no_upscale: Annotated[bool, OnlyWith("enable_bucket")] = False
    """Never enlarge an image: buckets follow the sizes of images. `min_bucket_reso`, `max_bucket_reso`: no effect."""


class HoldOutOptions(Options):
    """Validation"""

    validation_split: float = Field(0.0, ge=0, le=1)
    """Share of the images, 0 to 1, held out for validation. 1: the whole dataset. 0: no validation."""
    validation_seed: Annotated[int, HELD_OUT] = Field(0, ge=0)
    """Seed of the choice of held-out images and of their noise. Independent of `seed`, to compare runs."""


class LatentOptions(Options):
    """Latents and text encoder outputs"""

    cache_latents: bool = False
    """Encode every image once before training and keep the latents in memory."""
    cache_latents_to_disk: bool = False
    """Keep the latents in `cache_dir` for later runs. Turns on `cache_latents`."""
    vae_batch_size: Annotated[int, ZeroIsOne, OnlyWith("cache_latents")] = Field(1, ge=1)
    """Images that the VAE encodes at once for the latent cache."""
    cache_text_encoder_outputs: bool = False
    """Encode every caption once before training. The text encoders then take no GPU memory and are not trained."""
    cache_text_encoder_outputs_to_disk: bool = False
    """Keep these outputs in `cache_dir` for later runs. Turns on `cache_text_encoder_outputs`."""
    text_encoder_outputs_variants: Annotated[int, OnlyWith("cache_text_encoder_outputs")] = Field(1, ge=1)
    """Variants to cache of each caption with shuffled or dropped tags, or wildcards. Not in sd-scripts."""
    text_encoder_batch_size: Annotated[int, ZeroIsOne, OnlyWith("cache_text_encoder_outputs")] = Field(16, ge=1)
    """Captions that the text encoders encode at once for that cache. Not in sd-scripts' SDXL trainer."""
    skip_cache_check: bool = False
    """Do not look for changed images and captions since the last run. Saves time with millions of files."""
    cache_dir: FileLocation | None = None
    """Folder of the dataset index and of what is cached. Default: `cache` in `output_dir`. Not in sd-scripts."""
    cache_dir_local: FilePath | None = None
    """Local folder for parts of what is kept at addresses. Default: `~/.cache/sdxl_finetune`. Not in sd-scripts."""
    cache_dir_local_gb: float = Field(0.0, ge=0)
    """Most GB of latents that `cache_dir_local` holds. 0: latents are read from the store. Not in sd-scripts."""
