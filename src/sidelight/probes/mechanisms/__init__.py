"""Mechanisms, which turn the hidden states of all layers and tokens into logits.

To add a mechanism, write its file; the contract tests find it in the registry (``base``).
"""

from importlib import import_module
from pkgutil import iter_modules

# Each module registers its mechanism.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
