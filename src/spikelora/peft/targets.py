"""The checks of a target sparsity, the same for a configuration and for a function's argument."""

from typing import Any

from spikelora.errors import SpikeLoraError

TARGET_SCOPES = ("module", "adapter")


def check_target(name: str, target: Any) -> None:
    """Raise a `SpikeLoraError` unless a target sparsity lies between 0 and 1."""
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target < 1:
        raise SpikeLoraError(
            f"`{name}` must be a share of silent activations between 0 and 1, both excluded, got {target!r}. Try 0.9."
        )


def check_scope(name: str, scope: Any) -> None:
    """Raise a `SpikeLoraError` for an unknown scope of a target."""
    if scope not in TARGET_SCOPES:
        raise SpikeLoraError(
            f"`{name}` must be one of {', '.join(map(repr, TARGET_SCOPES))}, got {scope!r}. Take the first by default."
        )
