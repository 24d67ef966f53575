"""Print the names and shapes of a `transformers` model's weights, in a process without TensorFlow.

Called with the class of the model, of its configuration, and the configuration as JSON.
"""

import json
import sys


def main() -> None:
    """Build the model without memory for its weights and print its `state_dict` as JSON."""
    import torch
    import transformers

    model_class, config_class, config = sys.argv[1:]
    with torch.device("meta"):
        model = getattr(transformers, model_class)(
            getattr(transformers, config_class)(**json.loads(config))
        )
    print(json.dumps({name: list(value.shape) for name, value in model.state_dict().items()}))


if __name__ == "__main__":
    main()
