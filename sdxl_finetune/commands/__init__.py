"""The programs besides sdxl-train (training/loop.py).

Modules:

    check       sdxl-check, with storage_report, memory_report, memory_estimate, fake_learner and allocations
    cache       sdxl-cache
    model       sdxl-model, with generate, merge, latents, latent_stats and tags, and the package card
    data        sdxl-data, with tag_quality, data_report and the package report
"""
