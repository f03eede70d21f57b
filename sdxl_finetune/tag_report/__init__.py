"""Measures which tags a model has learned, on images of the dataset. Training and sdxl-model tags use it.

schema        the two tables of a report, as files
tables        rows of the tags table; the CSV file
underfitted   suggested repeats, as a file that image_weights takes
trends        figures of all tags together, over the reports of a folder
scalars       scalars for TensorBoard and other trackers
gallery       images of tags, and pictures drawn with a tag and without it
summary       what to do next, in plain words
charts        figures of plotly
page          the page, from tags.html, tags.css and tags.js
outputs       writes all of them except the tables
"""
