"""Downloads what a config names at addresses and a run needs as local files: the model and the VAE."""

from typing import Any

from sdxl_finetune.config.options import Config
from sdxl_finetune.storage import Address, naming
from sdxl_finetune.storage.folders import fetch


def with_local_models(config: Config) -> Config:
    """Returns the config with local paths of model and VAE. What stands at an address is downloaded once.

    Raises UserError, which names the option, if something cannot be downloaded.
    """
    found: dict[str, Any] = {}
    for option in ("pretrained_model_name_or_path", "vae"):
        location = getattr(config, option)
        if isinstance(location, Address):
            with naming(option):
                found[option] = fetch(location, config.local_folder / "downloads")
    return config.model_copy(update=found) if found else config
