"""Adapters of a model by name: `list`, `active`, `set`, `use` and `remove` them.

`load_adapter` puts an adapter on a model, `save_adapter` writes one.
"""

from gemma_keras_tune.adapters.active import active_adapter as active
from gemma_keras_tune.adapters.active import list_adapters as list
from gemma_keras_tune.adapters.active import remove_adapter as remove
from gemma_keras_tune.adapters.active import set_adapter as set
from gemma_keras_tune.adapters.active import use_adapter as use

__all__ = ["active", "list", "remove", "set", "use"]
