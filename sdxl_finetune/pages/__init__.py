"""Parts of self-contained HTML pages, which the report on a dataset and the report on tags share.

Modules:

    words        numbers as text
    figures      charts of plotly, without colours
    thumbnails   small pictures of single images
    rendering    a page from a template, which begins as base.html, with page.css, charts.js and plotly.js in it
"""
