"""`spikelora autoload`, in its own virtual environment, which sees the packages of the tests."""

import shutil
import site
import sys
import sysconfig
import zipfile

import pytest
import torch
from conftest import tiny_opt
from environment import Environment
from peft import PeftModel, get_peft_model

from spikelora import SpikeLoraConfig, SpikeLoraError
from spikelora.__main__ import main
from spikelora.peft import autoload


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("environments") / "one")


@pytest.fixture(scope="module")
def on(environment):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda name: str(environment.packages))
        patch.setattr(site, "getsitepackages", lambda: [str(environment.packages)])
        autoload.switch_on()
    return environment


@pytest.fixture
def bare(tmp_path, on):
    """Another environment with the file alone, without this package, PEFT or anything else."""
    other = Environment(tmp_path / "bare")
    other.paths([])
    shutil.copy(on.packages / "spikelora-autoload.pth", other.packages)
    return other


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A spiking adapter whose threshold is no number of bfloat16, on a base in bfloat16."""
    folder = tmp_path_factory.mktemp("adapter")
    base = tiny_opt().to(torch.bfloat16)
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    config = SpikeLoraConfig(v_threshold=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_on_off_and_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path)])
    file = tmp_path / "spikelora-autoload.pth"

    def said(switch):
        with pytest.raises(SystemExit) as ended:
            main(["autoload", switch])
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert said("status").startswith(f"Autoload is off in {sys.prefix}: ")
    assert said("off") == "Autoload was off.\n"
    assert said("on").startswith(f"Wrote {file}: ")
    assert said("status") == f"Autoload is on in {sys.prefix}, by {file}.\n"
    contents = file.read_text()
    assert [line.partition(" ")[0] for line in contents.splitlines()] == ["#", "import"]

    file.write_text("# an older one\n")
    assert "of another version: `spikelora autoload on` renews it" in said("status")
    said("on")
    assert file.read_text() == contents
    assert oct(file.stat().st_mode)[-3:] == "644"

    assert said("off") == f"Removed {file}.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["/proc/no-such-folder", "/dev/null"])
def test_an_environment_that_cannot_be_written_is_left_with_the_reason(where, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: where)
    monkeypatch.setattr(site, "getsitepackages", lambda: [where])

    with pytest.raises(SpikeLoraError, match=r"cannot be written .*`python -m venv`"):
        autoload.switch_on()


def test_a_folder_whose_pth_files_are_not_read_is_left_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))

    with pytest.raises(SpikeLoraError, match=r"Python reads no \.pth files in"):
        autoload.switch_on()
    assert list(tmp_path.iterdir()) == []


def test_a_write_or_a_removal_that_fails_leaves_all_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path)])
    (tmp_path / "spikelora-autoload.pth").mkdir()

    for switch in (autoload.switch_on, autoload.switch_off):
        with pytest.raises(SpikeLoraError, match="cannot be written"):
            switch()
    assert [path.name for path in tmp_path.iterdir()] == ["spikelora-autoload.pth"]


def test_the_quick_start_of_the_paper_s_authors_in_an_isolated_process(on):
    output = on.run(
        "-I",
        "-c",
        """
from peft import SpikeLoraConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM

model = OPTForCausalLM(OPTConfig(vocab_size=9, hidden_size=8, word_embed_proj_dim=8, num_hidden_layers=1, ffn_dim=8,
                                 num_attention_heads=1))
model = get_peft_model(model, SpikeLoraConfig(v_threshold=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM"))
model.print_trainable_parameters()
""",
    )

    assert "spiking adapter 'default' on 1 modules || r: 8 || v_threshold: 0.5 || tau: 2" in output


CHECK = """
import importlib, sys
import peft
from transformers.integrations.peft import PeftAdapterMixin
from transformers.trainer_callback import CallbackHandler

assert peft.SpikeLoraConfig is sys.modules["spikelora"].SpikeLoraConfig and "SPIKELORA" in peft.PeftType.__members__
for guarded in (PeftAdapterMixin.load_adapter, CallbackHandler.on_init_end):
    assert guarded.__code__.co_filename.startswith(sys.modules["spikelora"].__path__[0]), guarded
    assert not hasattr(guarded.__wrapped__, "__wrapped__")
assert "exec_module" not in vars(peft.__spec__.loader)
assert importlib.reload(peft) is peft and peft.SpikeLoraConfig is sys.modules["spikelora"].SpikeLoraConfig
print("registered")
"""


# In the middle of its own modules transformers imports PEFT, whose registration needs those modules whole.
@pytest.mark.parametrize(
    "first",
    [
        "import transformers.trainer_callback",
        pytest.param("from transformers import Trainer", marks=pytest.mark.slow),
        pytest.param("from trl import SFTTrainer", marks=pytest.mark.slow),
        pytest.param("import spikelora", marks=pytest.mark.slow),
    ],
)
def test_whatever_imports_peft_registers_the_method(on, first):
    assert on.run("-c", f"{first}\n{CHECK}") == "registered\n"


@pytest.mark.slow
def test_threads_that_import_at_once(on):
    code = """
import threading

first, second = [], []
def import_peft():
    from peft import SpikeLoraConfig
    first.append(SpikeLoraConfig)
def import_accelerate():  # transformers' own names cannot be imported by several threads at once, autoload or not
    from accelerate import Accelerator
    second.append(Accelerator)
threads = [threading.Thread(target=target) for target in [import_peft, import_accelerate] * 4]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(first) == len(second) == 4, (first, second)
"""
    assert on.run("-c", code + CHECK) == "registered\n"


def test_what_does_not_import_peft_brings_nothing(on):
    code = """
import sys
print(*sorted(sys.modules), file=open(sys.argv[1], "w"))
import importlib.util, json
import transformers.utils
from transformers import PretrainedConfig
assert importlib.util.find_spec("peft").name == "peft"
assert not {"peft", "spikelora"} & sys.modules.keys()
"""
    with_it, without = on.packages / "with.txt", on.packages / "without.txt"
    on.run("-c", code, with_it)
    on.run("-S", "-c", "import sys; print(*sorted(sys.modules), file=open(sys.argv[1], 'w'))", without)

    # All that a start with the file brings is what `site` and the paths in it bring.
    assert set(with_it.read_text().split()) - set(without.read_text().split()) <= {"site", "os", *STARTED}


STARTED = {"_sitebuiltins", "genericpath", "os.path", "posixpath", "stat", "_stat", "_collections_abc", "sitecustomize"}
STARTED |= {"encodings.utf_8_sig"}  # with which Python 3.13 reads any such file


def test_transformers_and_its_pipeline_find_the_method_of_an_adapter(on, adapter):
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers.utils import logging

logging.disable_progress_bar()
assert "peft" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
gates = [module for name, module in model.named_modules() if name.endswith("lora_gate.default")]
# The first call is guarded already: without that the threshold is that of a bfloat16.
print(type(model).__name__, len(gates), *{(gate.v_threshold.dtype, gate.v_threshold.item()) for gate in gates})

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
model = pipeline("text-generation", model=sys.argv[1], tokenizer=tokenizer, device="cpu").model
torch.save(model(input_ids=torch.arange(10).unsqueeze(0)).logits, sys.argv[2])
"""
    file = on.packages / "logits.pt"
    threshold = torch.tensor(0.1).item()
    output = on.run("-W", "ignore", "-c", code, adapter, file)
    assert output == f"OPTForCausalLM 2 (torch.float32, {threshold})\n"

    model = PeftModel.from_pretrained(tiny_opt().to(torch.bfloat16), adapter)
    with torch.no_grad():
        assert torch.equal(torch.load(file), model(input_ids=torch.arange(10).unsqueeze(0)).logits)


def test_isolated_it_waits_and_without_site_it_is_out_of_the_way(on):
    finders = "import sys; print([f for f in sys.meta_path if 'SpikeLora' in repr(f)])"
    assert on.run("-S", "-c", finders) == "[]\n"
    assert on.run("-I", "-c", finders) == "[<class 'SpikeLoraAutoload'>]\n"


def test_a_file_of_an_outer_environment_beside_the_own_one_waits_once(on):
    second = on.packages / "second"
    second.mkdir()
    shutil.copy(on.packages / "spikelora-autoload.pth", second)
    code = (
        f"import site, sys; site.addsitedir({str(second)!r}); print(sum('SpikeLora' in repr(f) for f in sys.meta_path))"
    )

    assert on.run("-c", code) == "1\n"


STAND_IN = "class PeftType: pass\n"


def test_a_file_that_outlives_the_package_is_silent(bare):
    (bare.packages / "peft.py").write_text(STAND_IN)

    assert bare.run("-W", "error", "-c", "import peft; print(peft.PeftType.__name__)") == "PeftType\n"


def test_a_package_that_cannot_be_imported_is_said_in_a_warning_and_peft_works(bare):
    (bare.packages / "peft.py").write_text(STAND_IN)
    (bare.packages / "spikelora.py").write_text("import no_such_module\n")
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft
print(len(caught), caught[0].category.__name__, caught[0].message)
import importlib
importlib.reload(peft)
"""
    output = bare.run("-c", code)

    assert output.startswith("1 RuntimeWarning SpikeLoRA is not registered with PEFT: ModuleNotFoundError(")
    assert "no_such_module" in output
    assert "`spikelora autoload off`" in output


def test_modules_of_one_s_own_are_left_alone(bare):
    (bare.packages / "spikelora.py").write_text("raise SystemExit('imported')\n")
    (bare.packages / "peft.py").write_text("mine = 1\n")
    (bare.packages / "accelerate").mkdir()  # without an __init__.py
    (bare.packages / "accelerate" / "inner.py").write_text("mine = 2\n")

    code = (
        "import peft, accelerate.inner as inner; print(peft.mine, inner.mine, peft.__spec__.loader.get_source('peft'))"
    )
    assert bare.run("-c", code) == "1 2 mine = 1\n\n"


def test_an_import_that_fails_is_tried_again(bare):
    (bare.packages / "peft.py").write_text(f"import sys\nsys.tried = True\nimport needed\n{STAND_IN}")
    (bare.packages / "spikelora.py").write_text("import peft\nprint('registered')\n")
    code = """
import pathlib, sys
try:
    import peft
except ImportError:
    pathlib.Path("needed.py").write_text("")
    sys.path_importer_cache.clear()
import peft
"""
    assert bare.run("-c", code) == "registered\n"


def test_packages_in_a_zip_file_are_left_alone(bare):
    with zipfile.ZipFile(bare.packages / "packages.zip", "w") as archive:
        archive.writestr("peft.py", STAND_IN)
        archive.writestr("spikelora.py", "print('imported')\n")
    bare.paths([bare.packages / "packages.zip"])

    output = bare.run("-c", "import peft, importlib; importlib.reload(peft); print(peft.__file__)")
    assert output == f"{bare.packages / 'packages.zip' / 'peft.py'}\n"


def test_this_package_in_a_zip_file_is_found(bare):
    (bare.packages / "peft.py").write_text(STAND_IN)
    with zipfile.ZipFile(bare.packages / "packages.zip", "w") as archive:
        archive.writestr("spikelora.py", "print('imported')\n")
    bare.paths([bare.packages / "packages.zip"])

    assert bare.run("-c", "import peft") == "imported\n"
