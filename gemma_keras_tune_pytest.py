"""`pytest --gemma-model MODEL plan.jsonl`: each case of a test plan is a test.

pytest imports this in every run, also in those that have nothing to do with Gemma. So it stands
outside the package, and imports it only where a plan is to be tested.
"""

import pathlib
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup("gemma_keras_tune", "test plans for Gemma models")
    group.addoption(
        "--gemma-model", metavar="MODEL",
        help="test the plans named on the command line (.jsonl, .csv, .yaml) on this model: "
        "anything gemma_keras_tune.load takes",
    )  # fmt: skip
    group.addoption("--gemma-adapter", metavar="DIR", help="with this adapter on")
    group.addoption("--gemma-pairs", metavar="FILE",
                    help="skip cases whose prompt is in these training pairs")  # fmt: skip
    group.addoption("--gemma-policy", metavar="MODEL", help="a ShieldGemma, for `safe` checks")
    group.addoption("--gemma-max-new-tokens", metavar="N", type=int, default=256,
                    help="longest answer, in tokens")  # fmt: skip


def pytest_collect_file(file_path: pathlib.Path, parent: pytest.Collector) -> Any:
    """A plan that was named, where there is a model to test: other files are left alone."""
    if not parent.config.getoption("gemma_model") or not parent.session.isinitpath(file_path):
        return None
    from gemma_keras_tune.evaluation import pytest_plugin

    return pytest_plugin.collect(file_path, parent)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist how tests are dealt out: it does not know."""
    node.workerinput["gemma_dist"] = node.config.getoption("dist", None)
