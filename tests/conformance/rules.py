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

_FLOAT32 = "asserts that the adapter has the base's dtype; a gate stays float32, as bfloat16 has no 0.1"
_NOT_TRAINED = "asserts that all tensors of an adapter are trained; a gate's are not unless asked for"
_MIXED = "needs PeftMixedModel, which takes a list of PEFT's own types"
_START = "expects A of an embedding to move in three steps; it starts random with B = 0, as A = 0 would never spike"

# The tests, and the reason.
EXCLUSIONS: dict[str, str] = {
    "test_custom_models.py::TestPeftCustomModel::test_adapter_dtype_autocast[*-False-dtype*]": _FLOAT32,
    "test_custom_models.py::TestPeftCustomModel::test_set_requires_grad[LoraConfig]": _NOT_TRAINED,
    "test_custom_models.py::TestRequiresGrad::test_loading_model_requires_grad_set_correctly[*]": _NOT_TRAINED,
    "test_custom_models.py::TestRequiresGrad::"
    "test_loading_model_with_modules_to_save_requires_grad_set_correctly[True-LoraConfig]": _NOT_TRAINED,
    "test_custom_models.py::TestRequiresGrad::"
    "test_loading_model_with_trainble_tokens_requires_grad_set_correctly[True]": _NOT_TRAINED,
    "test_custom_models.py::TestPeftCustomModel::test_add_adapter_rejects_duplicate_name*[True]": _MIXED,
}
