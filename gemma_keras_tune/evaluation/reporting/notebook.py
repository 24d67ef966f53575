"""A report within a notebook: the HTML page in a frame of its own.

The frame keeps the page's styles off the notebook, and what is in the report away from it: it may
run its own script and nothing else.
"""

from markupsafe import escape

from gemma_keras_tune.evaluation.reporting import html
from gemma_keras_tune.evaluation.results import Report

HEIGHT = 680


def render(report: Report) -> str:
    """Write a report for a notebook's cell.

    Args:
        report: The report.

    Returns:
        An `iframe` element.
    """
    page = escape(html.render(report))
    return (
        f'<iframe sandbox="allow-scripts" title="Test report" srcdoc="{page}"'
        f' style="width: 100%; height: {HEIGHT}px; border: 0; border-radius: 8px"></iframe>'
    )
