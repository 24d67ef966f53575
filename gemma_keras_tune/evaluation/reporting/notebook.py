"""A report within a notebook: the HTML page in a frame of its own.

The frame keeps the page's styles off the notebook, and the report's content away from it: only its
own script can run.
"""

from markupsafe import escape

from gemma_keras_tune.evaluation.reporting import page
from gemma_keras_tune.evaluation.results import Results

HEIGHT = 680


def render(report: Results) -> str:
    """Write a report for a notebook's cell.

    Args:
        report: The report.

    Returns:
        An `iframe` element.
    """
    text = escape(page.render(report))
    return (
        f'<iframe sandbox="allow-scripts" title="Test report" srcdoc="{text}"'
        f' style="width: 100%; height: {HEIGHT}px; border: 0; border-radius: 8px"></iframe>'
    )
