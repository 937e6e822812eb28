"""Why a test that passes for LoRA may not pass for SpikeLoRA: refusals by design, and exclusions by name.

A refusal is recognised by its message, and has to be a `SpikeLoraError`. An exclusion names tests, with shell
wildcards. If it names a test that passes, or no test, that is an error.
"""

# The reason, and a regular expression for the message.
REFUSALS: dict[str, str] = {
    "merging, weighting and conversion": "cannot be merged, weighted or turned into a weight",
    "other variants of LoRA": r"`(use_dora|alora_invocation_tokens|arrow_config|use_bdlora|velora_config|kasa_config|"
    r"monteclora_config|use_qalora)` cannot be combined",
    "target_parameters": "`target_parameters` cannot be combined",
    "lora_bias": "`lora_bias` cannot be combined",
    "initialisations made for a linear adapter": "`init_lora_weights=.*cannot be combined",
    "layers that do not ask for the gate": "on which SpikeLoRA is not supported",
    "modules whose weight a model reads without calling them": "is read by its model, not called",
    "pickled adapter files": "is a pickle, which SpikeLoRA never loads",
}

_MIXED = "needs PeftMixedModel, which takes a list of PEFT's own types"
_BY_TYPE = "has PEFT build LoRA's own layers, or a config of type LORA; PEFT refuses the config, by its field `tau`"
_NAMES = "asserts on the name of the type, the model or a layer's class"
_COUNTS = "counts tensors or parameters, without the gates"
_EMBEDDING = "asserts on LoRA's start of embeddings, A = 0, at which no gate would ever open"
_EXPERTS = "PEFT turns targets among fused experts into `target_parameters`, for LoRA only"
_INTRUDERS = "PEFT refuses: intruder dimensions are those of a merged weight"
_FILES = "expects a file to load, or another error, that is incomplete, not from a training or not for the model"
_UNKNOWN_FIELDS = "expects unknown fields of a configuration to be dropped; they are refused"
_SILENT = "draws or trains an adapter whose gates stay silent where the test looks, so it changes nothing there"

# The tests, and the reason.
EXCLUSIONS: dict[str, str] = {
    "test_mixed.py::*": _MIXED,
    "test_custom_models.py::*::test_add_adapter_rejects_duplicate_name_without_mutation[True]": _MIXED,
    "test_initialization.py::*::test_mixed_model_from_pretrained_low_cpu_mem_usage_works[cpu]": _MIXED,
    "test_initialization.py::*::test_no_infinite_recursion[PeftMixedModel]": _MIXED,
    "test_tuners_utils.py::*::test_mixed_model_raises": _MIXED,
    "test_xlora.py::*": _BY_TYPE,
    "test_hub_features.py::*::test_custom_peft_type_does_not_raise": _BY_TYPE,
    "test_lora_variants.py::*::test_invalid_variant_combination_raises_error": _BY_TYPE,
    "test_lora_variants.py::*::test_unregistered_variant_raises_error": _BY_TYPE,
    "test_lora_variants.py::*::test_unsorted_variant_keys_raises_error": _BY_TYPE,
    "test_initialization.py::*::test_hotswap_different_peft_types_raises": _NAMES,
    "test_initialization.py::*::test_modules_to_save_targets_lora_layer_raises": _NAMES,
    "test_initialization.py::*::test_trainable_token_indices_targets_lora_layer_raises": _NAMES,
    "test_other.py::*::test_targeting_trainable_tokens_raises": _NAMES,
    "test_tuners_utils.py::*::test_adapter_model_type_*": _NAMES,
    "test_tuners_utils.py::*::test_model_status_with_modules_to_save": _NAMES,
    "test_tuners_utils.py::*::test_model_status_with_trainable_tokens": _NAMES,
    "test_tuners_utils.py::*::test_peft_types_*": _NAMES,
    "test_tuners_utils.py::*::test_prefixes_select_correct_state_dict_keys": _COUNTS,
    "test_initialization.py::*::test_lora_embedding_default": _EMBEDDING,
    "test_initialization.py::*::test_lora_embedding_gaussian": _EMBEDDING,
    "test_custom_models.py::*::test_only_params_are_updated[Embedding + transformers Conv1D 2 LoRA-*]": (
        "expects A of an embedding to move in three steps; it starts with B = 0 and moves by less than the tolerance"
    ),
    "test_integrations.py::*::test_qwen3_moe_*": _EXPERTS,
    "test_lora_intruders.py::*": _INTRUDERS,
    "test_lora_conversion.py::*::test_converted_lora_to_lora_works_and_warns": (
        "PEFT refuses with a TypeError: the layers say that they cannot be converted"
    ),
    "test_config.py::*::test_from_pretrained_forward_compatible[LoraConfig-*]": _UNKNOWN_FIELDS,
    "test_config.py::*::test_from_pretrained_forward_compatible_load_from_peft_config[LoraConfig-*]": _UNKNOWN_FIELDS,
    "test_config.py::*::test_from_pretrained_sanity_check[LoraConfig-*]": _UNKNOWN_FIELDS,
    "test_config.py::*::test_save_pretrained_with_runtime_config[LoraConfig-*]": _FILES,
    "test_custom_models.py::*::test_load_resized_embedding_ignore_mismatched_sizes": _FILES,
    "test_initialization.py::*::test_hotswap_extra_key_raises": _FILES,
    "test_initialization.py::*::test_hotswap_missing_key_works": _FILES,
    "test_initialization.py::test_from_pretrained_missing_keys_warning": _FILES,
    "test_low_level_api.py::*::test_inject_from_state_dict_low_cpu_mem_usage_with_weight_conversion": _FILES,
    "test_low_level_api.py::*::test_inject_from_state_dict_missing_keys_warning": (
        "deletes a module's A and B from a state dict by name, and leaves its gate there"
    ),
    "test_custom_models.py::*::test_disable_adapters[Conv2d Groups2 LoRA-*]": _SILENT,
    "test_custom_models.py::*::test_safe_merge[Vanilla MLP 1 LoRA with MiCA-*]": _SILENT,
    "test_trainable_tokens.py::*::test_multiple_adapters_overlapping_token_indices_merging[<lambda>]": (
        "merges, which is refused, and expects another message in the error"
    ),
}
