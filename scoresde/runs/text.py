"""The text encoder of a network, beside the captions of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..config import ConfigError, build_network
from ..data import Dataset


def build_text(node: Any, dataset: Dataset, allow: Sequence[str], *, conditional: bool) -> nn.Module | None:
    """The text encoder of a network, told the tokens of the data; None where there is neither.

    Raises:
        ConfigError: captions without an encoder, or one without captions.
    """
    text = dataset.text if conditional else None
    if text is not None and node is None:
        cure = "take text=transformer, or data.captions=null"
        raise ConfigError(f"{dataset.name} has captions, and the network no text encoder to read them: {cure}.")
    if node is None:
        return None
    if text is None:
        cure = "conditional=true" if dataset.text else "data.captions=captions.txt and conditional=true"
        raise ConfigError(f"network.text reads captions, and the network is told none: {cure}, or text=none.")
    return build_network(node, allow, key="network.text", classes=0, vocabulary=text.tokenizer.size)
