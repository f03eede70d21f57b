"""The programs besides sdxl-train (training/loop.py).

Modules:

    check       sdxl-check, with memory_report, memory_estimate and allocations
    cache       sdxl-cache
    model       sdxl-model, with generate
"""
