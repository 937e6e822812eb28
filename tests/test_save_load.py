"""Every loader loads exactly what was saved, and nothing that is only half right."""

import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import spiking, tiny_gpt2, tiny_opt
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.utils import PeftWarning, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn

from spikelora import SparsityMeter, SpikeLoraConfig, SpikeLoraError
from spikelora.method.gate import SpikeGate

TOKENS = torch.arange(3, 31).view(2, 14)
THRESHOLD = torch.tensor(0.1).item()  # not exact in bfloat16


def trained(base, **options) -> PeftModel:
    """A spiking adapter that does something, with a threshold in one module that its configuration does not have."""
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(base, SpikeLoraConfig(**options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    next(gate for gate in model.modules() if isinstance(gate, SpikeGate)).v_threshold.data.fill_(-0.3)
    return model


@pytest.fixture
def base_folder(tmp_path):
    tiny_opt().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(tmp_path):
    """The folder of a saved adapter on the tiny OPT, and the logits it gives there."""
    model = trained(tiny_opt())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model(TOKENS).logits


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_base", [tiny_opt, tiny_gpt2])
def test_reload_is_equal_to_the_bit(make_base, dtype, tmp_path):
    model = trained(make_base().to(dtype), use_rslora=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base().to(dtype), tmp_path)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert not torch.equal(loaded(TOKENS).logits, make_base().to(dtype)(TOKENS).logits)


def test_the_file_holds_the_neurons_of_all_modules(saved):
    tensors = load_file(saved[0] / "adapter_model.safetensors")
    keys = {key.split("fc1.")[1] for key in tensors if "layers.0.fc1" in key}
    assert keys == {"lora_A.weight", "lora_B.weight", "lora_gate.v_threshold", "lora_gate.tau"}
    neurons = {key: value for key, value in tensors.items() if "lora_gate" in key}
    assert {(value.dtype, value.shape) for value in neurons.values()} == {(torch.float32, (1,))}


def test_the_tensor_wins_over_the_config(saved):
    folder, expected = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"v_threshold": 1e6, "tau": 9.0}))
    assert torch.equal(PeftModel.from_pretrained(tiny_opt(), folder)(TOKENS).logits, expected)


def from_transformers(base, folder):
    base.load_adapter(str(folder))
    return base


def second_adapter(base, folder):
    model = get_peft_model(base, SpikeLoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.load_adapter(folder, "second")
    model.set_adapter("second", inference_mode=True)
    model.delete_adapter("default")
    return model


LOADERS = {
    "peft": PeftModel.from_pretrained,
    "peft, trainable": lambda base, folder: PeftModel.from_pretrained(base, folder, is_trainable=True).eval(),
    "peft, low memory": lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    "peft, second adapter": second_adapter,
    "transformers": from_transformers,
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_loader_gives_the_same_fixed_neurons(loader, dtype, tmp_path):
    model = trained(tiny_opt().to(dtype))
    model.save_pretrained(tmp_path)
    loaded = loader(tiny_opt().to(dtype), tmp_path)
    gates = [module for module in loaded.modules() if isinstance(module, SpikeGate)]
    assert len(gates) == 12
    assert sorted({gate.v_threshold.item() for gate in gates}) == [torch.tensor(-0.3).item(), THRESHOLD]
    assert {gate.tau.dtype for gate in gates} == {torch.float32}
    assert not any(parameter.requires_grad for gate in gates for parameter in gate.parameters())
    if dtype == torch.float32:  # in bfloat16, the loaders of A and B round differently
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_learned_neurons_stay_learned(tmp_path):
    trained(tiny_opt(), learn_threshold=True, learn_tau=True).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_opt(), tmp_path, is_trainable=True)
    assert all(p.requires_grad for m in loaded.modules() if isinstance(m, SpikeGate) for p in m.parameters())


def test_auto_model(base_folder, tmp_path):
    model = trained(type(tiny_opt()).from_pretrained(base_folder))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_hotswap_takes_thresholds_along(saved, tmp_path):
    folder, expected = saved
    model = trained(tiny_opt(), v_threshold=0.7)
    model.save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(tiny_opt(), tmp_path / "first")
    assert not torch.equal(model(TOKENS).logits, expected)
    hotswap_adapter(model, folder, "default", torch_device="cpu")
    assert torch.equal(model(TOKENS).logits, expected)


def test_the_card_says_what_to_install_and_import(saved):
    card = (saved[0] / "README.md").read_text()
    assert "import spikelora" in card
    assert "KeyError: 'SPIKELORA'" in card
    assert "- spikelora\n" in card.split("---")[1]
    trained(tiny_opt()).save_pretrained(saved[0])  # again, over it
    assert (saved[0] / "README.md").read_text().split() == card.split()


def test_a_card_that_was_there_is_kept(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlibrary_name: peft\n---\n\n# My adapter\n")
    trained(tiny_opt()).save_pretrained(tmp_path)
    once = card.read_text()
    trained(tiny_opt()).save_pretrained(tmp_path)

    assert "# My adapter" in once
    assert "\nimport spikelora" in once
    assert "- lora\n- spikelora\n" in once
    assert card.read_text().split() == once.split()


@pytest.fixture
def measured(tmp_path):
    """An adapter's folder with what it measured, as a run leaves it before it saves the adapter, and what that says."""
    model = trained(tiny_opt())
    with SparsityMeter(model) as meter:
        model(TOKENS)
    report = meter.report()
    (tmp_path / "sparsity.json").write_text(json.dumps(report.to_dict()))
    model.save_pretrained(tmp_path)
    return tmp_path, report, model


def test_the_card_shows_the_sparsity_and_a_picture(measured):
    folder, report, model = measured
    card = (folder / "README.md").read_text()
    for name, shares in {"all": report, **report.kinds}.items():
        assert f"| {name} | {shares.sparsity:.1%} | {shares.zero_threshold_sparsity:.1%} |" in card
    assert "](sparsity.png)" in card
    assert (folder / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text().split() == card.split()
    (folder / "sparsity.json").unlink()
    model.save_pretrained(folder)
    assert "### Sparsity" not in (folder / "README.md").read_text()
    assert "import spikelora" in (folder / "README.md").read_text()


def test_the_card_has_a_table_alone_without_matplotlib(measured, tmp_path, monkeypatch):
    folder, report, model = measured
    (folder / "README.md").unlink()
    (folder / "sparsity.png").unlink()
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    model.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert f"| all | {report.sparsity:.1%} |" in card
    assert "sparsity.png" not in card
    assert not (folder / "sparsity.png").exists()


@pytest.mark.parametrize("content", ["{", '{"sparsity": 0.5}', '{"kinds": {"fc1": 3}}', '{"kinds": 1}'])
def test_an_adapter_is_saved_beside_a_sparsity_that_cannot_be_read(measured, content):
    folder, _, model = measured
    (folder / "sparsity.json").write_text(content)
    with pytest.warns(RuntimeWarning, match=r"says nothing of the sparsity, as sparsity\.json cannot be read"):
        model.save_pretrained(folder)
    assert "### Sparsity" not in (folder / "README.md").read_text()


def test_the_card_of_an_adapter_by_another_name(opt, tmp_path):
    model = get_peft_model(opt, SpikeLoraConfig(target_modules=["fc1"]), "mine")
    model.save_pretrained(tmp_path)
    assert "import spikelora" in (tmp_path / "README.md").read_text()


def test_the_card_of_a_lora_stays_as_it_is(opt, tmp_path):
    get_peft_model(opt, LoraConfig(target_modules=["fc1"])).save_pretrained(tmp_path)
    assert "spikelora" not in (tmp_path / "README.md").read_text()


def test_without_the_import_loading_ends_in_the_documented_error(saved, base_folder, fresh):
    code = (
        "import sys; from peft import PeftModel; from transformers import OPTForCausalLM\n"
        "PeftModel.from_pretrained(OPTForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])"
    )
    run = fresh(code, base_folder, saved[0])
    assert run.returncode == 1
    assert "KeyError: 'SPIKELORA'" in run.stderr


def edit(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_a_shard_that_was_not_gathered_is_said(opt, tmp_path):
    model = trained(opt)
    model.base_model.model.model.decoder.layers[0].fc1.lora_A["default"].weight.data = torch.empty(0)
    with pytest.warns(PeftWarning, match="lora_A"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_file_in_bfloat16_loads_with_gates_in_float32(saved, low_cpu_mem_usage):
    edit(saved[0], lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "autocast_adapter_dtype": False}
    rounded = (
        r"12 numbers of neurons .*, such as `.*lora_gate\.v_threshold`, which is -?0\.\d{6,} and was probably -?0\.\d"
    )
    with pytest.warns(RuntimeWarning, match=rounded):
        model = PeftModel.from_pretrained(tiny_opt().bfloat16(), saved[0], **options)
    dtypes = {("lora_gate" in name, p.dtype) for name, p in model.state_dict().items() if "lora_" in name}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert model(TOKENS).logits.isfinite().all()


def load_with(saved, dtype, thresholds, tau=2.0):
    """The warning of a file with these thresholds in another dtype, one for each module in their order."""

    def cast(tensors):
        names = [name for name in sorted(tensors) if name.endswith("v_threshold")]
        values = dict(zip(names, [*thresholds] + [0.5] * len(names), strict=False))
        values |= {name.replace("v_threshold", "tau"): tau for name in names}
        tensors.update({name: torch.tensor([value]).to(dtype) for name, value in values.items()})

    edit(saved[0], cast)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        PeftModel.from_pretrained(tiny_opt(), saved[0])
    return {str(warning.message) for warning in caught}


FC1 = "base_model.model.model.decoder.layers.0.fc1.lora_gate"
FC2 = "base_model.model.model.decoder.layers.0.fc2.lora_gate"


@pytest.mark.parametrize(
    ("dtype", "threshold", "said"),
    [
        (torch.bfloat16, 0.3173, "0.31640625 and may have been anything from 0.31543 to 0.317383"),
        (torch.bfloat16, 0.123, "0.12304688 and may have been anything from 0.122803 to 0.123291"),
        (torch.bfloat16, -0.3173, "-0.31640625 and may have been anything from -0.317383 to -0.31543"),
        (torch.bfloat16, 0.12, "0.12011719 and was probably 0.12"),
        (torch.float16, 0.3173, "0.31738281 and may have been anything from 0.317261 to 0.317505"),
        (torch.float16, 0.1, "0.099975586 and was probably 0.1"),
    ],
)
def test_a_threshold_in_half_precision_is_named(saved, dtype, threshold, said):
    (warning,) = load_with(saved, dtype, [0.5, threshold])
    assert warning == (
        "1 numbers of neurons in the adapter's file were rounded to half precision, such as "
        f"`{FC2}.v_threshold`, which is {said}. Load the adapter that training saved, with these numbers in float32, "
        "or calibrate its thresholds again."
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_may_have_been_rounded_to_a_threshold(saved, dtype):
    (warning,) = load_with(saved, dtype, [0.3173])
    low, high = (float(number) for number in re.search(r"anything from (\S+) to (\S+)\. Load", warning).groups())
    rounded = torch.tensor(0.3173).to(dtype)
    assert torch.linspace(low + 1e-6, high - 1e-6, 100).to(dtype).eq(rounded).all()
    assert not torch.tensor([low - 1e-6, high + 1e-6]).to(dtype).eq(rounded).any()


def test_each_number_in_half_precision_is_counted(saved):
    thresholds = [0.1, 0.3173, 0.123, 0.4561, 0.789]
    (warning,) = load_with(saved, torch.bfloat16, thresholds, tau=2.3)
    assert warning.startswith("17 numbers of neurons")  # and 12 of tau
    assert f"`{FC1}.v_threshold`, which is 0.10009766 and was probably 0.1; `{FC1}.tau`, which is 2.296875" in warning
    assert f"; `{FC2}.v_threshold`, which is 0.31640625 and may have been" in warning
    assert "; and 14 more. Load" in warning


@pytest.mark.parametrize(
    ("dtype", "thresholds", "tau"),
    [(torch.float16, [0.25, -1.5], 2.0), (torch.bfloat16, [0.0, 3.0], 2.5), (torch.float32, [0.3173, 0.1], 2.3)],
)
def test_numbers_that_are_as_they_were_need_no_warning(saved, dtype, thresholds, tau):
    assert not load_with(saved, dtype, thresholds, tau)


def test_a_tau_of_one_in_bfloat16(saved):
    tau = "base_model.model.model.decoder.layers.1.fc2.lora_gate.tau"
    edit(saved[0], lambda tensors: tensors.update({tau: torch.ones(1).bfloat16()}))
    with pytest.raises(SpikeLoraError, match=r"`tau` of `.*layers\.1\.fc2` in the adapter's file is \[1\.0\]"):
        PeftModel.from_pretrained(tiny_opt(), saved[0])


class _WithLoraHead(nn.Module):
    """A model with a module of its own whose name begins like LoRA's."""

    def __init__(self):
        super().__init__()
        self.body, self.lora_head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.lora_head(self.body(x))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_module_that_is_trained_as_a_whole_may_be_named_like_lora(bias, tmp_path):
    options = {"target_modules": ["body"], "modules_to_save": ["lora_head"], "bias": bias}
    model = spiking(_WithLoraHead(), **options)
    with torch.no_grad():
        model.base_model.model.lora_head.modules_to_save["default"].weight.fill_(3.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_WithLoraHead(), tmp_path)
    assert loaded.base_model.model.lora_head.modules_to_save["default"].weight.eq(3.0).all()
    assert torch.equal(
        loaded.base_model.model.body.lora_A["default"].weight, model.base_model.model.body.lora_A["default"].weight
    )


def test_lora_s_configuration_does_not_read_the_file_for_a_reader_of_its_own(saved):
    file = saved[0] / "adapter_config.json"
    with pytest.raises(SpikeLoraError, match=r"`LoraConfig` reads it as LoRA, without its gate"):
        LoraConfig.from_json_file(file)
    assert type(LoraConfig.from_pretrained(saved[0])) is SpikeLoraConfig
    assert PeftConfig.from_json_file(file) == SpikeLoraConfig.from_json_file(file)


def test_an_adapter_from_before_fixed_numbers_were_buffers():
    """`golden/adapter` was saved when they were parameters, and its configuration lacks the fields added since."""
    folder = Path(__file__).parent / "golden" / "adapter"
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), torch.randn(200, 6)
    expected, fired = x, []
    for i in range(2):
        A, B, tau, v_threshold = (
            tensors[f"base_model.model.{i}.{name}"]
            for name in ("lora_A.weight", "lora_B.weight", "lora_gate.tau", "lora_gate.v_threshold")
        )
        a = expected @ A.T
        fired.append(a / tau >= v_threshold)
        expected = base[i](expected) + config["lora_alpha"] / config["r"] * (a * fired[i]) @ B.T
    model = PeftModel.from_pretrained(base, folder)
    assert not {"surrogate", "target_scope"} & set(config)
    assert all(0.1 < spikes.float().mean() < 0.9 for spikes in fired)
    torch.testing.assert_close(model(x), expected)
    loaded = get_peft_model_state_dict(model)
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
