"""Everything that a run writes for its user.

Modules:

    checkpoints, metadata   names, formats and metadata of saved weights
    log, trackers           metrics.jsonl, TensorBoard, wandb; log_history cuts a log back for a resumed run
    watch, spikes           the checks of each step's numbers
    histograms              counts of drawn timesteps
    previews, prompts       preview images
    samplers                samplers of each objective, and the loop that draws latents
    colours                 mean, contrast and saturation of pictures
    curve                   the picture of a curve
    contact_sheet           many images on one picture
    console                 messages on the terminal
    uploads, hub, hub_process           Hugging Face hub: queue of uploads, one call, the process that makes it
"""
