"""Measures which tags a model has learned, on images of the dataset. Training and sdxl-model tags use it.

Modules of the measurement:

    schema                   the two tables of a report, as files
    listing, choice          which tags are measured, and on which images
    wording                  captions with a tag, without it, and with another one in its place
    measure, finished        losses of the captions; those of an interrupted measurement
    results, states          gains and accuracies of the tags; which tags are learned

Modules of what is made from the tables:

    tables, trends           rows of a report; the CSV file; figures over several reports
    underfitted              suggested repeats, as a file that image_weights takes
    scalars, terminal        scalars for trackers; lines for the terminal
    gallery                  images of tags, and pictures drawn with a tag and without it
    summary, charts, page    what to do next, in words; charts; the page, from tags.html, tags.css and tags.js
    outputs, making          writes the files; a report from beginning to end
"""
