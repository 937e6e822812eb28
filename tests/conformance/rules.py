"""Why a test that passes for LoRA may end otherwise for SpikeLoRA: refusals by design, and exclusions by name.

A refusal is recognised by its message, and has to be a `SpikeLoraError`. An exclusion names tests, with shell
wildcards; one that names a test which passes, or no test, is an error.
"""

# The reason, and a regular expression for the message.
REFUSALS: dict[str, str] = {
    "merging, weighting and conversion": "cannot be merged, weighted or turned into a weight",
    "other variants of LoRA": r"`(use_dora|alora_invocation_tokens|arrow_config|use_bdlora|velora_config|kasa_config|"
    r"monteclora_config|use_qalora)` cannot be combined",
    "target_parameters": "`target_parameters` cannot be combined",
    "lora_bias": "`lora_bias` cannot be combined",
    "initialisations made for a linear adapter": "`init_lora_weights=.*cannot be combined",
    "Megatron": "`megatron_config` cannot be combined",
    "layers that do not ask for the gate": "on which SpikeLoRA is not supported",
}

# The tests, and the reason.
EXCLUSIONS: dict[str, str] = {}
