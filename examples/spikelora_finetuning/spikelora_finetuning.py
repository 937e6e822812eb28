"""Fine-tune a causal language model with SpikeLoRA, show what it did, save the adapter and load it back.

    python spikelora_finetuning.py                                     # the small model and the text shipped with it
    python spikelora_finetuning.py --base_model facebook/opt-350m --data_path yahma/alpaca-cleaned --dtype bfloat16
    python spikelora_finetuning.py run.yaml --max_steps 100            # flags from a YAML file; those given here win

Rows with a text field are used as text; rows with instruction / input / output become instructions, whose prompt and
padding count in no loss. The folder of a finished run holds the adapter, the tokenizer, `config.yaml` (the resolved
flags), `metrics.json`, `sparsity.json` (what each rank of each module does on the held-out text) and `sparsity.png`.
Under `accelerate launch`, see `accelerate/`, processes share the training rows; the first one prints, counts and saves.
"""

import json
import math
import os
import platform
import re
import resource
import shutil
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import huggingface_hub
import matplotlib
import torch
import yaml
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from accelerate import PartialState
from spikelora import SparsityCallback, SparsityControlCallback, SparsityMeter, SpikeLoraConfig, SpikeLoraError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EMBEDDED_MODEL = Path(__file__).resolve().parent / "model"
READERS = {
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".csv": Dataset.from_csv,
    ".parquet": Dataset.from_parquet,
    ".txt": partial(Dataset.from_text, sample_by="paragraph"),
}
ADAPTER_FILES = ("adapter_model.safetensors", "README.md", "adapter_config.json")  # the last makes it loadable
console = Console()


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
    lora_r: int = flag(8, "rank")
    lora_alpha: int = flag(16, "numerator of LoRA's scaling")
    lora_dropout: float = flag(0.0, "dropout on the adapter's input")
    lora_target_modules: str = flag("all-linear", "all-linear, comma-separated names, or a regular expression")
    use_rslora: bool = flag(False, "scale by lora_alpha / sqrt(lora_r)")
    v_threshold: float = flag(0.1, "firing threshold")
    tau: float = flag(2.0, "membrane time constant, > 1")
    target_sparsity: float | None = flag(
        None, "share of silent activations to hold during training, by the thresholds; v_threshold is where they begin"
    )
    learn_threshold: bool = flag(False, "train one threshold per module")
    learn_tau: bool = flag(False, "train one time constant per module")
    seed: int = flag(0, "of everything")
    resume_from_checkpoint: str | None = flag(
        None, "go on from this checkpoint; without a value, from the last one in output_dir", nargs="?", const="last"
    )
    report_to: str = flag("none", "tensorboard, wandb, trackio, ... as transformers takes it")
    push_to_hub: bool = flag(False, "upload the finished run")
    hub_model_id: str | None = flag(None, "repository to upload to")
    compare_lora: bool = flag(False, "train plain LoRA on the same rows, seed and budget, and show it beside")


def parse_options(arguments: list[str]) -> Options:
    parser = HfArgumentParser(Options)
    if arguments and Path(arguments[0]).suffix in (".yaml", ".yml"):
        try:
            values = yaml.safe_load(Path(arguments[0]).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"{arguments[0]} cannot be read: {error}")
        if not isinstance(values, dict):
            parser.error(f"{arguments[0]} must map flags to values")
        given = {name: value for name, value in values.items() if value is not None and value is not False}
        lists = {name: ",".join(map(str, value)) for name, value in given.items() if isinstance(value, list)}
        arguments = [f"--{name}={value}" for name, value in (given | lists).items()] + arguments[1:]
    options = Options(**vars(parser.parse_args(arguments)))
    if options.learning_rate is None:
        options.learning_rate = 3e-4 if options.base_model else 1e-2
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
    return options


# Data ----------------------------------------------------------------------------------------------------------------


def python_reference() -> Dataset:
    """Python's language reference as every Python ships it, in passages of about 2,000 characters.

    The topics contain each other: a paragraph is taken once, wherever it stands first, so that none of the held-out
    text is also trained on.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    passages, passage = [], ""
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                passage += paragraph.strip("\n") + "\n\n"
            if len(passage) > 2000:
                passages.append(passage)
                passage = ""
    print(
        f"Text: the language reference of Python {platform.python_version()} (pydoc_data.topics), "
        f"{sum(map(len, passages)):,} characters in {len(passages)} passages"
    )
    return Dataset.from_list([{"text": text} for text in passages])


def is_local(name: str) -> bool:
    """Whether a name can only be a path, and must not be looked up on the hub."""
    return name.startswith((".", "/", "~"))


def load_rows(options: Options) -> Dataset:
    if options.data_path is None:
        return python_reference()
    path = Path(options.data_path)
    try:
        if path.is_dir():
            rows = load_from_disk(path)
        elif path.suffix in READERS or is_local(options.data_path):
            if not path.is_file():
                raise FileNotFoundError("no such file")
            if not path.stat().st_size:
                raise EOFError("the file is empty")
            rows = READERS[path.suffix](str(path))
        else:
            rows = load_dataset(options.data_path, split="train")
    except Exception as error:  # each reader has errors of its own
        sys.exit(f"--data_path {options.data_path} cannot be read: {type(error).__name__}: {error}")
    if isinstance(rows, DatasetDict):
        if "train" not in rows:
            sys.exit(f"--data_path {options.data_path} has no split `train`, only {sorted(rows)}")
        rows = rows["train"]
    if len(rows) < 2:
        sys.exit(f"--data_path {options.data_path} has {len(rows)} rows; at least 2 are needed, to train and to test")
    return rows


def tokenize(rows: Dataset, tokenizer, options: Options) -> Dataset:
    """Rows of `input_ids` and `labels`, at most `cutoff_len` tokens each."""
    columns = set(rows.column_names)
    end = tokenizer.eos_token or ""

    def instruction(row: dict) -> list[tuple[list[int], list[int]]]:
        prompt = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "") + "\n### Answer:\n"
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_ids = tokenizer(row["output"] + end, add_special_tokens=False)["input_ids"]
        ids, labels = prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids
        return [(ids[: options.cutoff_len], labels[: options.cutoff_len])]

    def text(row: dict) -> list[tuple[list[int], list[int]]]:
        ids = tokenizer(row[options.text_field] + end, verbose=False)["input_ids"]
        windows = [ids[start : start + options.cutoff_len] for start in range(0, len(ids), options.cutoff_len)]
        return [(window, window) for window in windows]

    if options.text_field in columns:
        to_rows, needed = text, [options.text_field]
    elif {"instruction", "output"} <= columns:
        to_rows, needed = instruction, ["instruction", "output"]
    else:
        sys.exit(
            f"the rows have the columns {sorted(columns)}, but neither --text_field {options.text_field} nor "
            "instruction and output"
        )

    def batch_to_rows(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        made = []
        for position, index in enumerate(indices):
            row = {name: values[position] for name, values in batch.items()}
            for name in needed:
                if not isinstance(row[name], str):
                    sys.exit(f"row {index} has no text in the column {name}, but {row[name]!r}")
            made += to_rows(row)
        # A row without a label after its first token teaches nothing.
        made = [(ids, labels) for ids, labels in made if any(label != -100 for label in labels[1:])]
        return {"input_ids": [ids for ids, _ in made], "labels": [labels for _, labels in made]}

    made = rows.map(
        batch_to_rows,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        keep_in_memory=True,
        desc="tokenising",
    )
    if not len(made):
        sys.exit("no row has a token to learn from: they are empty, or --cutoff_len ends before the answers")
    return made


def split(rows: Dataset, options: Options) -> tuple[Dataset, Dataset]:
    size = options.val_set_size if options.val_set_size < 1 else int(options.val_set_size)
    held_out = max(1, round(size * len(rows))) if size < 1 else size
    if held_out >= len(rows):
        sys.exit(f"--val_set_size {options.val_set_size} leaves none of the {len(rows)} rows to train on")
    parts = rows.train_test_split(test_size=held_out, seed=options.seed)
    return parts["train"], parts["test"]


# Measuring -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(model: PeftModel, rows: Dataset, collator, options: Options, title: str) -> dict:
    """Loss, perplexity and, of a spiking adapter, the sparsity over all tokens of `rows`, padding left out."""
    model.eval()
    loss, tokens = 0.0, 0
    is_spiking = isinstance(model.peft_config["default"], SpikeLoraConfig)
    is_first = PartialState().is_main_process
    meter = SparsityMeter(model) if is_spiking else None
    batches = DataLoader(rows, options.batch_size, collate_fn=collator)
    # All processes run all rows, as a sharded model needs them together, and the first one counts.
    with meter if meter and is_first else nullcontext():
        for loaded in tqdm(batches, desc=title, leave=False, disable=not is_first):
            batch = {key: value.to(model.device) for key, value in loaded.items()}
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
            labels = batch["labels"][:, 1:]
            loss += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            tokens += (labels != -100).sum().item()
    figures = {"loss": loss / tokens, "perplexity": math.exp(loss / tokens), "tokens": tokens}
    if meter:
        report = meter.report()
        never_called = [name for name, module in report.modules.items() if not module.tokens]
        if never_called:
            sys.exit(f"the model never calls {never_called}, so no adapter can work there; name other targets")
        figures["sparsity"] = report.sparsity
        figures["silent_tokens"] = report.silent_tokens
        figures["zero_threshold_sparsity"] = report.zero_threshold_sparsity
        figures["sparsity_by_kind"] = {kind: shares.sparsity for kind, shares in report.kinds.items()}
        figures["sparsity_by_module"] = {name: module.sparsity for name, module in report.modules.items()}
        figures["report"] = report
    return figures


def warn_of_silence(figures: dict, when: str) -> None:
    silent = [name for name, sparsity in figures["sparsity_by_module"].items() if sparsity == 1]
    if silent:
        console.print(
            f"[yellow]{len(silent)} of {len(figures['sparsity_by_module'])} modules never fire {when}, and learn "
            f"nothing while they are silent: {', '.join(silent[:4])}{', ...' if len(silent) > 4 else ''}. Lower "
            "--v_threshold."
        )


def plot_sparsity(modules: dict[str, float], path: Path) -> None:
    """A heat map of the sparsity: layers by kinds of module."""
    cells = {}
    for name, sparsity in modules.items():
        layer = re.search(r"\.(\d+)\.", name)
        cells[int(layer[1]) if layer else -1, name.rpartition(".")[2]] = sparsity
    layers, kinds = sorted({layer for layer, _ in cells}), list(dict.fromkeys(kind for _, kind in cells))
    grid = [[cells.get((layer, kind), math.nan) for kind in kinds] for layer in layers]
    figure, axes = plt.subplots(figsize=(1.5 + 0.9 * len(kinds), 1.5 + 0.45 * len(layers)), layout="constrained")
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    axes.set_yticks(range(len(layers)), ["other" if layer < 0 else layer for layer in layers])
    axes.set_ylabel("layer")
    axes.set_title("Sparsity on the held-out text")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if not math.isnan(value):
                colour = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="share of silent activations")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# Training ------------------------------------------------------------------------------------------------------------


class NeuronTrainer(Trainer):
    """The Trainer, without weight decay on learned thresholds and time constants: it would pull them to 0."""

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if ".lora_gate." not in name]


def adapter_config(options: Options, spiking: bool) -> LoraConfig:
    targets = options.lora_target_modules
    names = re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", targets)
    shared = {
        "r": options.lora_r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "use_rslora": options.use_rslora,
        "target_modules": re.split(r"\s*,\s*", targets) if names else targets,
        "task_type": "CAUSAL_LM",
    }
    if not spiking:
        return LoraConfig(**shared)
    return SpikeLoraConfig(
        v_threshold=options.v_threshold,
        tau=options.tau,
        target_sparsity=options.target_sparsity,
        learn_threshold=options.learn_threshold,
        learn_tau=options.learn_tau,
        **shared,
    )


def load_base(options: Options):
    quantization = {
        "none": None,
        "8bit": BitsAndBytesConfig(load_in_8bit=True),
        "4bit": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, options.dtype, None),
        ),
    }[options.quantize]
    # One process may spread the model over all devices; of several each has its own.
    device_map = options.device_map if PartialState().num_processes == 1 else {"": PartialState().device}
    base = AutoModelForCausalLM.from_pretrained(
        options.base_model or EMBEDDED_MODEL,
        dtype=options.dtype,
        device_map=device_map,
        quantization_config=quantization,
    )
    for module in base.modules():
        # On CPUs with AVX512-BF16 bitsandbytes packs 4-bit weights that are evaluated, and cannot train them any more.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False) if quantization else base


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; the Trainer's state is what it writes last."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def prepare_folder(folder: Path, options: Options) -> Path | None:
    """Make the output folder; return the checkpoint to go on from, which has to be of a run with the same adapter."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        sys.exit(f"--output_dir {folder} cannot be written: {error}")
    found = last_checkpoint(folder)
    if options.resume_from_checkpoint is None:
        if found and not (folder / "metrics.json").exists():
            sys.exit(
                f"{folder} holds checkpoints of a run that did not end: go on with --resume_from_checkpoint, or choose "
                "another --output_dir"
            )
        return None
    if options.resume_from_checkpoint.lower() not in ("last", "true"):
        found = Path(options.resume_from_checkpoint)
        if not (found / "trainer_state.json").exists():
            sys.exit(f"--resume_from_checkpoint {found} is no checkpoint of a run: it has no trainer_state.json")
    if found is None:
        print(f"{folder} has no checkpoint yet: starting from the beginning")
        return None
    begun, now = SpikeLoraConfig.from_pretrained(found), adapter_config(options, spiking=True)
    neuron = ("v_threshold", "tau", "target_sparsity", "learn_threshold", "learn_tau")
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", *neuron):
        if getattr(begun, name) != getattr(now, name):
            sys.exit(
                f"{found} was trained with {name} {getattr(begun, name)}, not {getattr(now, name)}: go on with the "
                "same flags, or begin anew in another --output_dir"
            )
    return found


def clear_results(folder: Path) -> None:
    """Remove what a finished run left in the folder, the file that makes its adapter loadable first."""
    if not (folder / "metrics.json").exists():
        return
    for name in (*ADAPTER_FILES[::-1], "sparsity.png", "sparsity.json"):
        (folder / name).unlink(missing_ok=True)
    for checkpoint in (*folder.glob("checkpoint-*"), *folder.glob("lora/checkpoint-*")):
        shutil.rmtree(checkpoint)
    (folder / "metrics.json").unlink()


def make_trainer(model: PeftModel, train_rows, val_rows, collator, options: Options, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        num_train_epochs=options.num_epochs,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup_ratio,  # a float below 1 is a share
        weight_decay=options.weight_decay,
        max_grad_norm=1.0,
        logging_steps=20,
        eval_strategy="steps",
        eval_steps=options.eval_step,
        save_strategy="steps",
        save_steps=options.save_step,
        save_total_limit=2,
        include_num_input_tokens_seen="non_padding",
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        report_to=options.report_to,
        seed=options.seed,
    )
    try:
        trainer = NeuronTrainer(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=val_rows,
            data_collator=collator,
            processing_class=collator.tokenizer,
        )
    except (ImportError, RuntimeError, ValueError) as error:
        sys.exit(f"the Trainer refuses --report_to {options.report_to}, or another flag: {error}")
    config = model.peft_config["default"]
    if isinstance(config, SpikeLoraConfig):
        trainer.add_callback(SparsityCallback(trainer))
        if config.target_sparsity is not None:
            trainer.add_callback(SparsityControlCallback())
    return trainer


def peak_memory() -> float:
    """In MB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def run(options: Options, tokenizer, train_rows, val_rows, spiking: bool, folder: Path, checkpoint: Path | None):
    """Train one adapter; return the trainer and the figures before and after."""
    set_seed(options.seed)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model = get_peft_model(load_base(options), adapter_config(options, spiking))
    model.print_trainable_parameters()
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    trainer = make_trainer(model, train_rows, val_rows, collator, options, folder)
    before = measure(model, val_rows, collator, options, "held-out text, before")
    if spiking:
        warn_of_silence(before, "at the start")
    # Now, as the Trainer may remove the checkpoint when it writes newer ones.
    resumed = json.loads((checkpoint / "trainer_state.json").read_text()) if checkpoint else {}
    updates = len(train_rows) / (trainer.args.train_batch_size * trainer.args.world_size)
    updates = math.ceil(math.ceil(updates) / options.gradient_accumulation_steps)
    last_step = options.max_steps if options.max_steps > 0 else math.ceil(options.num_epochs * updates)
    if checkpoint and resumed["global_step"] >= last_step:  # it had come to its end
        model.load_adapter(checkpoint, "default", is_trainable=True)
        trained = {"steps": resumed["global_step"]}
    else:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:
            sys.exit(f"\ninterrupted; go on with --output_dir {options.output_dir} --resume_from_checkpoint")
        seconds = next(e["train_runtime"] for e in reversed(trainer.state.log_history) if "train_runtime" in e)
        tokens = trainer.state.num_input_tokens_seen - resumed.get("num_input_tokens_seen", 0)
        trained = {
            "steps": trainer.state.global_step,
            "training_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_mb": peak_memory(),
        }
    after = measure(model, val_rows, collator, options, "held-out text, after")
    if not math.isfinite(after["loss"]):
        sys.exit("the held-out loss is no number any more: training diverged. Lower --learning_rate")
    return trainer, before, after | trained | {"trainable_parameters": model.get_nb_trainable_parameters()[0]}


def save(trainer: Trainer, tokenizer, row: dict, options: Options, folder: Path) -> str:
    """Save beside, load back, then move in place with the configuration last: nothing half-written can be loaded."""
    state, partial_folder = PartialState(), folder / ".partial"
    if state.is_main_process:
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir()
        if (folder / "README.md").exists():  # PEFT adds to a card that is there
            shutil.copy(folder / "README.md", partial_folder)
    trainer.save_model(partial_folder)  # gathers what is sharded, and writes in the first process
    state.wait_for_everyone()
    generation = check_reload(trainer.model, tokenizer, row, options, partial_folder)
    state.wait_for_everyone()
    if state.is_main_process:
        for name in ADAPTER_FILES:
            os.replace(partial_folder / name, folder / name)
        shutil.rmtree(partial_folder)
        tokenizer.save_pretrained(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(asdict(options), sort_keys=False))
    return generation


@torch.no_grad()
def check_reload(model: PeftModel, tokenizer, row: dict, options: Options, folder: Path) -> str:
    """Load the saved adapter onto a fresh base; its logits must be the same to the bit. Return a short generation."""
    fresh = PeftModel.from_pretrained(load_base(options), folder).eval()
    ids = torch.tensor([row["input_ids"]], device=model.device)
    trained, loaded = model.eval()(input_ids=ids).logits, fresh(input_ids=ids).logits
    if not torch.equal(trained, loaded):
        sys.exit(f"the adapter in {folder} gives other logits, by up to {(trained - loaded).abs().max():.3g}")
    begin = next(position for position, label in enumerate(row["labels"]) if label != -100)
    prompt = ids[:, : begin or 32]  # an instruction, or the first words of a text
    made = fresh.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=32,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )[0]
    return f"{tokenizer.decode(prompt[0])} >>> {tokenizer.decode(made[prompt.shape[1] :])}"


def show(metrics: dict) -> None:
    table = Table(title="Held-out text")
    methods = [name for name in ("spikelora", "lora") if name in metrics]
    for heading in ("", "before", *({"spikelora": "SpikeLoRA", "lora": "LoRA"}[name] for name in methods)):
        table.add_column(heading, justify="right" if heading else "left")
    after = [metrics[name] for name in methods]

    def row(label: str, key: str, form: str, before: bool = False) -> None:
        table.add_row(
            label,
            format(metrics["before"][key], form) if before else "",
            *(format(figures[key], form) if key in figures else "" for figures in after),
        )

    row("loss", "loss", ".4f", before=True)
    row("perplexity", "perplexity", ".2f", before=True)
    row("trainable parameters", "trainable_parameters", ",d")
    row("training tokens / s", "tokens_per_second", ",.0f")
    row("peak memory, MB", "peak_memory_mb", ",.0f")
    row("sparsity", "sparsity", ".1%", before=True)
    for kind, sparsity in after[0]["sparsity_by_kind"].items():
        table.add_row(f"  {kind}", f"{metrics['before']['sparsity_by_kind'][kind]:.1%}", f"{sparsity:.1%}")
    row("tokens without a spike", "silent_tokens", ".1%", before=True)
    row("sparsity at threshold 0", "zero_threshold_sparsity", ".1%", before=True)
    console.print(table)


def main() -> None:
    options = parse_options(sys.argv[1:])
    state = PartialState(cpu=not torch.accelerator.is_available())
    if not state.is_main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (to the end of the process)
    folder = Path(options.output_dir)
    adapter_config(options, spiking=True)
    with state.main_process_first():
        checkpoint = prepare_folder(folder, options)
    source = options.base_model or str(EMBEDDED_MODEL)
    if options.quantize != "none" and find_spec("bitsandbytes") is None:
        sys.exit(f"--quantize {options.quantize} needs bitsandbytes: pip install bitsandbytes")
    if is_local(source) and not Path(source).is_dir():
        sys.exit(f"--base_model {source}: no such folder")
    if options.push_to_hub and state.is_main_process:  # before the training, as it may fail
        try:
            repository = huggingface_hub.create_repo(options.hub_model_id or folder.name, exist_ok=True).repo_id
        except (OSError, ValueError) as error:  # no network, no token, no such name
            sys.exit(f"--push_to_hub: {error}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        positions = getattr(AutoConfig.from_pretrained(source), "max_position_embeddings", None) or math.inf
    except (OSError, ValueError) as error:
        sys.exit(f"--base_model {source} cannot be read: {error}")
    if options.cutoff_len > positions:
        sys.exit(f"--cutoff_len {options.cutoff_len} is more than the {positions} positions of {source}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    train_rows, val_rows = (tokenize(part, tokenizer, options) for part in split(load_rows(options), options))
    print(f"Model: {source}; {len(train_rows):,} rows to train on, {len(val_rows):,} held out")

    if not checkpoint and state.is_main_process:
        clear_results(folder)
    state.wait_for_everyone()
    trainer, before, after = run(options, tokenizer, train_rows, val_rows, True, folder, checkpoint)
    generation = save(trainer, tokenizer, val_rows[0], options, folder)
    before.pop("report")
    report = after.pop("report")
    metrics = {"before": before, "spikelora": after, "reloaded_logits_identical": True}
    if options.compare_lora:
        lora_folder = folder / "lora"
        lora = run(options, tokenizer, train_rows, val_rows, False, lora_folder, last_checkpoint(lora_folder))[2]
        if not torch.cuda.is_available():
            lora.pop("peak_memory_mb", None)  # of the process, whose peak the first run may have set
        metrics["lora"] = lora
    if not state.is_main_process:
        return
    plot_sparsity(after["sparsity_by_module"], folder / "sparsity.png")
    (folder / "sparsity.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")

    show(metrics)
    warn_of_silence(after, "after training")
    print(f"Loaded afresh, the adapter gives the same logits to the bit. It goes on from held-out text:\n{generation}")
    print(f"\nEverything is in {folder}")
    if options.push_to_hub:
        kept = ["checkpoint-*/*", "lora/*"]
        print(huggingface_hub.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=kept))


if __name__ == "__main__":
    try:
        main()
    except SpikeLoraError as error:
        sys.exit(str(error))
