"""Measures which tags a model has learned, on images of the dataset. Training and sdxl-model tags use it.

schema    the two tables of a report, as files
"""
