"""What others call the place that a dictionary was trained on, in TransformerLens's words.

Only the output of a block: it is hook_resid_post in every model. What an MLP or an attention layer
puts out passes another norm in some, and which one, the names do not say.
"""

import re

BLOCK_OUTPUTS = (
    re.compile(r"(?:.+\.)?(?:layers|h|blocks)\.(\d+)(?:\.output)?"),  # a module's name
    re.compile(r"resid_(?:post|out)_layer_?(\d+)"),  # dictionary_learning's demos
)
OURS = re.compile(r"(?:blocks\.\d+\.)?(?:[a-z0-9]+\.)?hook_\w+")


def hook_of(name: object) -> str | None:
    """The hook that `name` means for certain, e.g. blocks.3.hook_resid_post for layers.3."""
    name = name if isinstance(name, str) else ""
    if OURS.fullmatch(name):
        return name
    found = next((match for of in BLOCK_OUTPUTS if (match := of.fullmatch(name))), None)
    return f"blocks.{found[1]}.hook_resid_post" if found else None
