"""The report on a dataset: one self-contained HTML page (`sdxl-data report`).

Modules, each of which uses those before it:

    sizes, tags, captions      statistics of whole columns
    rows, scores, duplicates   captions of an index in columns; its scores; its duplicates
    findings, collect          what a person should look at; the statistics of an index as one Report
    charts, summary            figures of plotly; the summary in plain words
    page                       the page, from page.html and the parts in pages/
"""
