"""Mechanisms: what turns the hidden states of all layers and tokens into logits.

To add one, write its file; the law tests find it in the registry (``base``).
"""

from importlib import import_module
from pkgutil import iter_modules

# Each registers its mechanism.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
