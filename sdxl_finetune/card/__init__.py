"""The release page of a model, which `sdxl-model card` writes as Markdown and HTML, in English and Chinese.

- `facts.py`: facts that only the author of a model knows, from a TOML file
- `parameters.py`: the training parameters as TOML, without paths and secrets
- `samples.py`: sample pictures with their prompts and seeds
- `contents.py`: everything that the page says, in one value
- `escaping.py`: foreign text in Markdown
- `text.py`: the two languages, open fields, and pieces of Markdown
- `sections.py`: the page as blocks of Markdown
- `tag_section.py`: its section on tags
- `page.py`: the same blocks as HTML
"""
