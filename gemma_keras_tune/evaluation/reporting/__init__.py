"""Writers of a report. Each has `render(report) -> str`.

`html` is a page that stands alone, `notebook` the same within a notebook, `markdown` and `junit`
are what their names say. `texts` makes untrusted text fit to be shown, `pictures` draws.
"""
