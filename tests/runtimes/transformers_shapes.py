"""The names and shapes of a `transformers` model's weights, from a process without TensorFlow.

A request is the class of the model, that of its configuration, and the configuration's values.
"""

from typing import Any

import twins


def answer(asked: tuple[str, str, dict[str, Any]]) -> dict[str, list[int]]:
    """Build the model without memory for its weights, and look at its `state_dict`."""
    import torch
    import transformers

    model_class, config_class, config = asked
    with torch.device("meta"):
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
    return {name: list(value.shape) for name, value in model.state_dict().items()}


if __name__ == "__main__":
    twins.serve(answer)
