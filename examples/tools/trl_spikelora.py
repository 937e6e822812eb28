"""TRL's commands with SpikeLoRA: all their flags, and flags for the neuron, which `--use_peft` does not have.

    python trl_spikelora.py sft --model_name_or_path facebook/opt-350m --dataset_name stanfordnlp/imdb --v_threshold 0.1
    accelerate launch trl_spikelora.py dpo --config run.yaml

The first argument is the name of one of TRL's scripts (sft, dpo, kto, reward, ...), the rest is what `trl NAME` takes.
`--lora_r`, `--lora_alpha` and the like mean what they mean there.
"""

import importlib
import sys
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

import trl
from peft import LoraConfig

from spikelora import SpikeLoraConfig


def flag(name: str):
    """The field of a flag: the default and the help of SpikeLoraConfig's field of that name."""
    (known,) = (known for known in fields(SpikeLoraConfig) if known.name == name)
    return field(default=known.default, metadata={"help": known.metadata["help"]})


@dataclass
class Neuron:
    v_threshold: float = flag("v_threshold")
    tau: float = flag("tau")
    surrogate: Literal["atan", "straight_through"] = flag("surrogate")
    surrogate_alpha: float = flag("surrogate_alpha")
    learn_threshold: bool = flag("learn_threshold")
    learn_tau: bool = flag("learn_tau")


def spiking(config: LoraConfig, neuron: Neuron) -> SpikeLoraConfig:
    """The configuration that TRL has made from its flags, with a neuron."""
    shared = {known.name: getattr(config, known.name) for known in fields(LoraConfig) if known.init}
    return SpikeLoraConfig(**{k: v for k, v in shared.items() if k != "peft_type"}, **asdict(neuron))


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    script = importlib.import_module(f"trl.scripts.{sys.argv.pop(1)}")
    parser = trl.TrlParser((*script.make_parser().dataclass_types, Neuron))
    *arguments, neuron = parser.parse_args_and_config()
    (model_arguments,) = (each for each in arguments if isinstance(each, trl.ModelConfig))
    model_arguments.use_peft = True
    config = spiking(trl.get_peft_config(model_arguments), neuron)
    trl.get_peft_config = lambda _: config  # the script asks for it when it runs
    script.main(*arguments)


if __name__ == "__main__":
    main()
