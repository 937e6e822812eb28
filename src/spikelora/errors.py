"""The one exception of the package."""


class SpikeLoraError(ValueError):
    """Raised for every refusal of SpikeLoRA: it names the field or the module, and what to do instead."""
