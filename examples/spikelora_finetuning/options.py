"""The flags of `spikelora_finetuning.py`, and their checks."""

import math
import re
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser

EMBEDDED_MODEL = Path(__file__).resolve().parent / "model"


def flag(default, help, **options):
    return field(default=default, metadata={"help": help, **options})


@dataclass
class Options:
    base_model: str | None = flag(None, "hub id or local folder; by default the small model shipped with this script")
    data_path: str | None = flag(
        None, "hub id, or a .jsonl .json .csv .parquet .txt file, or a saved dataset; by default Python's own reference"
    )
    text_field: str = flag("text", "column of rows that are plain text")
    output_dir: str = flag("outputs/spikelora", "where everything goes")
    batch_size: int = flag(8, "rows of a step on each device")
    gradient_accumulation_steps: int = flag(1, "steps gathered into one update")
    num_epochs: float = flag(4.0, "passes over the training rows")
    max_steps: int = flag(-1, "updates; overrides num_epochs where positive")
    learning_rate: float | None = flag(None, "peak of the cosine; by default 1e-2 for the small model, else 3e-4")
    warmup_ratio: float = flag(0.06, "share of the updates that warm up")
    weight_decay: float = flag(0.01, "of A and B; learned thresholds and taus get none")
    cutoff_len: int = flag(256, "tokens of a training row; longer texts become several rows, instructions are cut")
    val_set_size: float = flag(0.1, "held-out rows: a share below 1, a number from 1 on")
    eval_step: int = flag(100, "updates between two looks at the held-out loss")
    save_step: int = flag(100, "updates between two checkpoints")
    device_map: str = flag("auto", "where the base model goes, as transformers takes it")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = flag("float32", "of the base model")
    quantize: Literal["none", "8bit", "4bit"] = flag("none", "the base model's linear layers, by bitsandbytes")
    recipe: Literal["paper", "straight_through"] = flag(
        "paper",
        "what the flags left out stand for: paper is --lora_r 8 --lora_alpha 16 --surrogate atan; straight_through is "
        "--lora_r 16 --lora_alpha 32 --surrogate straight_through --target_sparsity 0.89 --target_scope adapter",
    )
    lora_r: int | None = flag(None, "rank")
    lora_alpha: int | None = flag(None, "numerator of LoRA's scaling")
    lora_dropout: float = flag(0.0, "dropout on the adapter's input")
    lora_target_modules: str = flag("all-linear", "all-linear, comma-separated names, or a regular expression")
    use_rslora: bool = flag(False, "scale by lora_alpha / sqrt(lora_r)")
    v_threshold: float = flag(0.1, "firing threshold")
    tau: float = flag(2.0, "membrane time constant, > 1")
    surrogate: Literal["atan", "straight_through"] | None = flag(None, "gradient of the gate: the paper's, or another")
    target_sparsity: float | None = flag(
        None, "share of silent activations to hold during training, by the thresholds; v_threshold is where they begin"
    )
    target_scope: Literal["module", "adapter"] | None = flag(None, "what has to reach target_sparsity")
    learn_threshold: bool = flag(False, "train one threshold per module")
    learn_tau: bool = flag(False, "train one time constant per module")
    seed: int = flag(0, "of everything")
    resume_from_checkpoint: str | None = flag(
        None, "go on from this checkpoint; without a value, from the last one in output_dir", nargs="?", const="last"
    )
    report_to: str = flag("none", "tensorboard, wandb, trackio, ... as transformers takes it")
    push_to_hub: bool = flag(False, "upload the finished run")
    hub_model_id: str | None = flag(None, "repository to upload to")
    compare_lora: bool | None = flag(
        None,
        "train plain LoRA with as many operations on the same rows, seed and budget, and show both; by default with "
        "the small model on its text, else not; --compare_lora=false leaves it out",
        nargs="?",
        const=True,
    )

    @property
    def source(self) -> str:
        """Hub id or folder of the base model."""
        return self.base_model or str(EMBEDDED_MODEL)


_RECIPES = {
    "paper": {"lora_r": 8, "lora_alpha": 16, "surrogate": "atan", "target_sparsity": None, "target_scope": "module"},
    "straight_through": {
        "lora_r": 16,
        "lora_alpha": 32,
        "surrogate": "straight_through",
        "target_sparsity": 0.89,
        "target_scope": "adapter",
    },
}


def parse_options(arguments: list[str]) -> Options:
    parser = HfArgumentParser(Options)
    if arguments and Path(arguments[0]).suffix in (".yaml", ".yml"):
        try:
            values = yaml.safe_load(Path(arguments[0]).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"{arguments[0]} cannot be read: {error}")
        if not isinstance(values, dict):
            parser.error(f"{arguments[0]} must map flags to values")
        given = {name: value for name, value in values.items() if value is not None}
        lists = {name: ",".join(map(str, value)) for name, value in given.items() if isinstance(value, list)}
        arguments = [f"--{name}={value}" for name, value in (given | lists).items()] + arguments[1:]
    options = Options(**vars(parser.parse_args(arguments)))
    for name, value in _RECIPES[options.recipe].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.learning_rate is None:
        options.learning_rate = 3e-4 if options.base_model else 1e-2
    if options.compare_lora is None:
        options.compare_lora = options.base_model is None and options.data_path is None
    positive = ("batch_size", "gradient_accumulation_steps", "num_epochs", "learning_rate", "cutoff_len")
    for name in (*positive, "val_set_size", "eval_step", "save_step"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name} must be positive, got {getattr(options, name)}")
    for name in ("weight_decay", "seed"):
        if not 0 <= getattr(options, name) < math.inf:
            parser.error(f"--{name} must not be negative, got {getattr(options, name)}")
    for name in ("lora_dropout", "warmup_ratio"):
        if not 0 <= getattr(options, name) < 1:
            parser.error(f"--{name} must be a share, at least 0 and below 1, got {getattr(options, name)}")
    if options.quantize != "none" and find_spec("bitsandbytes") is None:
        sys.exit(f"--quantize {options.quantize} needs bitsandbytes: pip install bitsandbytes")
    if is_local(options.source) and not Path(options.source).is_dir():
        sys.exit(f"--base_model {options.source}: no such folder")
    return options


def is_local(name: str) -> bool:
    """Whether a name can only be a path, so that it is not looked up on the hub."""
    return name.startswith((".", "/", "~"))


def targets(options: Options) -> str | list[str]:
    """The modules to adapt, as PEFT takes them."""
    modules = options.lora_target_modules
    names = re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", modules)
    return re.split(r"\s*,\s*", modules) if names else modules
