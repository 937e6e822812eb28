import json
import math

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import (
    ArrowConfig,
    BdLoraConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    MontecloraConfig,
    VeloraConfig,
)
from safetensors.torch import save_file

from spikelora import SpikeLoraConfig, SpikeLoraError
from spikelora.peft.adapter_files import say_how_to_load

NOT_FINITE = [math.nan, math.inf, -math.inf, 1e300, True, "0.1", None]
NEURON = {
    "v_threshold": -0.25,
    "tau": 1.5,
    "surrogate": "straight_through",
    "surrogate_alpha": 4.0,
    "learn_threshold": True,
    "learn_tau": True,
    "threshold_pattern": {"q_proj": 0.5, "layers\\.1\\..*": -1.0},
}
WHOLE = {
    "fc1.lora_A.weight": torch.zeros(8, 16),
    "fc1.lora_B.weight": torch.zeros(16, 8),
    "fc1.lora_gate.v_threshold": torch.full((1,), 0.1),
    "fc1.lora_gate.tau": torch.full((1,), 2.0),
}
LORA = {
    "r": 4,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "fc1"],
    "use_rslora": True,
    "rank_pattern": {"fc1": 2},
    "task_type": "CAUSAL_LM",
}


def test_defaults_are_the_paper_s():
    config = SpikeLoraConfig()

    assert {name: getattr(config, name) for name in NEURON} == {
        "v_threshold": 0.1,
        "tau": 2.0,
        "surrogate": "atan",
        "surrogate_alpha": 2.0,
        "learn_threshold": False,
        "learn_tau": False,
        "threshold_pattern": {},
    }
    assert config.peft_type == "SPIKELORA"
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 8, 0.0)


def test_the_exception_is_a_value_error():
    assert issubclass(SpikeLoraError, ValueError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("v_threshold", value) for value in NOT_FINITE),
        *(("tau", value) for value in [*NOT_FINITE, 1, 0.5, 0, -2.0, 1.0 + 1e-9]),
        *(("surrogate_alpha", value) for value in [*NOT_FINITE, 0, -1]),
        *(("surrogate", value) for value in ["ATan", "", None, 1]),
        *(("r", value) for value in [0, -1, 2.5, True, "8", None]),
        *(("rank_pattern", {"x": value}) for value in [0, -1, 2.5, True, "8", None]),
        *(("threshold_pattern", {"x": value}) for value in NOT_FINITE),
        *(("threshold_pattern", value) for value in [0.1, "x", ["x"]]),
        *((field, value) for field in ("learn_threshold", "learn_tau") for value in ["yes", 1, None]),
        *(("lora_alpha", value) for value in [*NOT_FINITE, 0, -1]),
        *(("lora_dropout", value) for value in [*NOT_FINITE, 1, -0.1]),
        *((field, {"x": "y"}) for field in ("rank_pattern", "alpha_pattern", "threshold_pattern")),
        *((field, {key: 1}) for field in ("rank_pattern", "alpha_pattern", "threshold_pattern") for key in ["(", 1]),
        *((field, "(") for field in ("target_modules", "exclude_modules")),
    ],
    ids=str,
)
def test_value_out_of_range(field, value):
    with pytest.raises(SpikeLoraError, match=f"^`{field}[`[]"):
        SpikeLoraConfig(**{field: value})


def test_a_changed_configuration_is_checked_again(opt):
    config = SpikeLoraConfig(target_modules="all-linear")
    config.init_lora_weights = "pissa"
    with pytest.raises(SpikeLoraError, match="pissa"):
        get_peft_model(opt, config)


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("v_threshold", -3, -3.0),
        ("v_threshold", 0, 0.0),
        ("tau", 1 + 2**-23, 1 + 2**-23),
        ("tau", 3, 3.0),
        ("surrogate_alpha", 1, 1.0),
        ("threshold_pattern", {"x": -1.5, "y": 0}, {"x": -1.5, "y": 0.0}),
        ("threshold_pattern", None, {}),
    ],
)
def test_value_in_range(field, value, kept):
    # By their text, which tells 3 from 3.0.
    assert str(getattr(SpikeLoraConfig(**{field: value}), field)) == str(kept)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("target_parameters", ["experts.up_proj"]),
        ("alora_invocation_tokens", [5]),
        ("arrow_config", ArrowConfig()),
        ("use_bdlora", BdLoraConfig(target_modules_bd_a=["q_proj"])),
        ("velora_config", VeloraConfig()),
        ("kasa_config", KasaConfig()),
        ("monteclora_config", MontecloraConfig()),
        ("use_qalora", True),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("lora_bias", True),
    ],
)
def test_option_of_lora_that_contradicts_the_gate(field, value):
    with pytest.raises(SpikeLoraError, match=f"^`{field}` cannot be combined with SpikeLoRA: "):
        SpikeLoraConfig(**{field: value})


@pytest.mark.parametrize(
    "name", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "orthogonal", "mica", "nonsense", None]
)
def test_refused_initialisation(name):
    with pytest.raises(SpikeLoraError, match=f"^`init_lora_weights={name!r}` cannot"):
        SpikeLoraConfig(init_lora_weights=name, loftq_config=LoftQConfig() if name == "loftq" else {})


@pytest.mark.parametrize("name", [True, False, "gaussian", "eva"])
def test_allowed_initialisation(name):
    eva_config = EvaConfig() if name == "eva" else None

    assert SpikeLoraConfig(init_lora_weights=name, eva_config=eva_config).init_lora_weights is name


def test_to_dict_round_trip():
    config = SpikeLoraConfig(**NEURON, **LORA)

    as_dict = config.to_dict()

    assert {name: as_dict[name] for name in NEURON} == NEURON
    assert SpikeLoraConfig(**as_dict) == config


@pytest.mark.parametrize("loader", [SpikeLoraConfig, PeftConfig])
def test_save_and_load_alone(tmp_path, loader):
    config = SpikeLoraConfig(**NEURON, **LORA)

    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)

    assert type(loaded) is SpikeLoraConfig
    assert loaded == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SPIKELORA"
    assert not (tmp_path / "README.md").exists()


def test_load_from_a_subfolder(tmp_path):
    SpikeLoraConfig(v_threshold=0.7).save_pretrained(tmp_path / "inner")

    assert SpikeLoraConfig.from_pretrained(str(tmp_path), subfolder="inner").v_threshold == 0.7


def test_load_an_adapter_of_another_method(tmp_path):
    LoraConfig().save_pretrained(tmp_path)

    with pytest.raises(SpikeLoraError, match=f"{tmp_path} holds a .*LORA adapter, not a SPIKELORA one"):
        SpikeLoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"peft_type": "SPIKELORA", "r": ', b"\xff\xfe\x80", b"[]", b"null"],
    ids=["empty", "truncated", "binary", "list", "null"],
)
def test_load_a_damaged_configuration(tmp_path, content):
    file = tmp_path / "adapter_config.json"
    file.write_bytes(content)

    with pytest.raises(SpikeLoraError, match=f"^{file} is damaged"):
        SpikeLoraConfig.from_pretrained(tmp_path)


def test_load_a_configuration_with_a_value_out_of_range(tmp_path):
    SpikeLoraConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"tau": 2.0', '"tau": 0.5'))

    with pytest.raises(SpikeLoraError, match="`tau` must be greater than 1"):
        SpikeLoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-1], lambda content: content[:20], lambda content: b"", lambda content: b"x" * 100],
    ids=["a byte short", "header cut", "empty", "garbage"],
)
@pytest.mark.parametrize("inference_mode", [True, False])
def test_load_beside_damaged_weights(tmp_path, damage, inference_mode):
    SpikeLoraConfig(inference_mode=inference_mode).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(WHOLE, file)
    assert SpikeLoraConfig.from_pretrained(tmp_path).r == 8

    file.write_bytes(damage(file.read_bytes()))

    with pytest.raises(SpikeLoraError, match=f"^{file} is damaged"):
        SpikeLoraConfig.from_pretrained(tmp_path)


def test_load_a_saved_adapter_without_its_weights(tmp_path):
    SpikeLoraConfig(inference_mode=True).save_pretrained(tmp_path)

    with pytest.raises(SpikeLoraError, match=f"^{tmp_path} holds the configuration of a saved adapter but no adapter_"):
        SpikeLoraConfig.from_pretrained(tmp_path)


def test_load_from_a_folder_that_is_no_adapter(tmp_path):
    with pytest.raises(SpikeLoraError, match=r"has no adapter_config\.json"):
        SpikeLoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.clear(), "no `lora_A` at all"),
        (lambda tensors: tensors.pop("fc1.lora_A.weight"), "no `lora_A` at all"),
        (lambda tensors: tensors.pop("fc1.lora_B.weight"), r"no `lora_B\.weight` for `fc1`"),
        (lambda tensors: tensors.pop("fc1.lora_gate.tau"), r"no `lora_gate\.tau` for `fc1`"),
        (lambda tensors: tensors["fc1.lora_gate.tau"].fill_(1), "`tau` of `fc1`"),
        (lambda tensors: tensors["fc1.lora_gate.v_threshold"].fill_(float("nan")), "`v_threshold` of `fc1`"),
        (lambda tensors: tensors.update({"fc1.lora_gate.tau": torch.full((2,), 2.0)}), "`tau` of `fc1`"),
    ],
)
def test_load_an_adapter_that_is_not_whole(tmp_path, change, message):
    tensors = {name: tensor.clone() for name, tensor in WHOLE.items()}
    change(tensors)
    SpikeLoraConfig().save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")

    with pytest.raises(SpikeLoraError, match=message):
        SpikeLoraConfig.from_pretrained(tmp_path)


def test_without_neuron():
    plain = SpikeLoraConfig(**NEURON, **LORA).without_neuron()

    expected = LoraConfig(**LORA)
    assert type(plain) is LoraConfig
    assert plain == expected
    assert vars(plain) == vars(expected)
    assert plain.peft_type == "LORA"


def test_load_beside_weights_that_cannot_be_read(tmp_path):
    SpikeLoraConfig().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").mkdir()
    with pytest.raises(SpikeLoraError, match=rf"^{tmp_path}/adapter_model\.safetensors is damaged"):
        SpikeLoraConfig.from_pretrained(tmp_path)


def test_model_card_without_tags(tmp_path):
    (tmp_path / "README.md").write_text("# My adapter\n")
    say_how_to_load(tmp_path)
    assert "tags:\n- lora\n- spikelora\n" in (tmp_path / "README.md").read_text()
