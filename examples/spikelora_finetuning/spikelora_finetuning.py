"""Fine-tune a causal language model with SpikeLoRA, show what it did, save the adapter and load it back.

    python spikelora_finetuning.py                                     # the small model and the text shipped with it
    python spikelora_finetuning.py --base_model facebook/opt-350m --data_path yahma/alpaca-cleaned --dtype bfloat16
    python spikelora_finetuning.py run.yaml --max_steps 100            # flags from a YAML file; those given here win

Rows with a text field are used as text. Rows with instruction / input / output become instructions, whose prompt and
padding do not count in the loss. The folder of a finished run holds the adapter, the tokenizer, `config.yaml` (the
resolved flags), `metrics.json`, `sparsity.json` (what each rank of each module does on the held-out text) and
`sparsity.png`.
Under `accelerate launch`, see `accelerate/`, processes share the training rows; the first one prints, counts and saves.
"""

import json
import math
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import torch
import yaml
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from options import Options, parse_options, targets
from results import (
    FiguresInBar,
    as_lora,
    measure,
    next_step,
    peak_memory,
    show,
    show_example,
    warn_of_silence,
)
from run_folder import ADAPTER_FILES, clear_results, last_checkpoint, prepare_folder
from spikelora import (
    SparsityCallback,
    SparsityControlCallback,
    SparsityReport,
    SpikeLoraConfig,
    SpikeLoraError,
    operations,
)
from texts import load_rows, load_tokenizer, split, tokenize


class NeuronTrainer(Trainer):
    """The Trainer, without weight decay on learned thresholds and time constants: it would pull them to 0."""

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if ".lora_gate." not in name]


def adapter_config(options: Options, spiking: bool) -> LoraConfig:
    shared = {
        "r": options.lora_r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "use_rslora": options.use_rslora,
        "target_modules": targets(options),
        "task_type": "CAUSAL_LM",
    }
    if not spiking:
        return LoraConfig(**shared)
    return SpikeLoraConfig(
        v_threshold=options.v_threshold,
        tau=options.tau,
        surrogate=options.surrogate,
        target_sparsity=options.target_sparsity,
        target_scope=options.target_scope,
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
        options.source,
        dtype=options.dtype,
        device_map=device_map,
        quantization_config=quantization,
    )
    for module in base.modules():
        # On CPUs with AVX512-BF16 bitsandbytes packs 4-bit weights in an evaluation, and cannot train on them
        # afterwards.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False) if quantization else base


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
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(FiguresInBar)
    config = model.peft_config["default"]
    if isinstance(config, SpikeLoraConfig):
        trainer.add_callback(SparsityCallback(trainer))
        if config.target_sparsity is not None:
            trainer.add_callback(SparsityControlCallback())
    return trainer


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
        sys.exit("the held-out loss is not a number any more: training diverged. Lower --learning_rate")
    adapter = {"r": options.lora_r, "trainable_parameters": model.get_nb_trainable_parameters()[0]}
    return trainer, before, after | trained | adapter


def save(
    trainer: Trainer, tokenizer, row: dict, report: SparsityReport, options: Options, folder: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """Save to a temporary folder, load back, then move, the configuration last: nothing half-written can be loaded."""
    state, partial_folder = PartialState(), folder / ".partial"
    if state.is_main_process:
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir()
        if (folder / "README.md").exists():  # PEFT adds to a card that is there
            shutil.copy(folder / "README.md", partial_folder)
        # The card shows it, and a picture that is drawn of it.
        (partial_folder / "sparsity.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    trainer.save_model(partial_folder)  # gathers what is sharded, and writes in the first process
    state.wait_for_everyone()
    logits = check_reload(trainer.model, row, options, partial_folder)
    state.wait_for_everyone()
    if state.is_main_process:
        for name in ADAPTER_FILES:
            if (partial_folder / name).exists():  # there is no picture without matplotlib
                os.replace(partial_folder / name, folder / name)
        shutil.rmtree(partial_folder)
        tokenizer.save_pretrained(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(asdict(options), sort_keys=False))
    return logits


@torch.no_grad()
def check_reload(model: PeftModel, row: dict, options: Options, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Load the saved adapter onto a fresh base; its logits must be the same to the bit. Return the base's and them."""
    fresh = PeftModel.from_pretrained(load_base(options), folder).eval()
    ids = torch.tensor([row["input_ids"]], device=model.device)
    trained, loaded = model.eval()(input_ids=ids).logits, fresh(input_ids=ids).logits
    if not torch.equal(trained, loaded):
        sys.exit(f"the adapter in {folder} gives other logits, by up to {(trained - loaded).abs().max():.3g}")
    with fresh.disable_adapter():
        return fresh(input_ids=ids).logits, loaded


def main() -> None:
    options = parse_options(sys.argv[1:])
    state = PartialState(cpu=not torch.accelerator.is_available())
    if not state.is_main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (to the end of the process)
    folder = Path(options.output_dir)
    config = adapter_config(options, spiking=True)
    with state.main_process_first():
        checkpoint = prepare_folder(folder, options, config)
    tokenizer = load_tokenizer(options)
    if options.push_to_hub and state.is_main_process:  # before the training, as it may fail
        try:
            repository = huggingface_hub.create_repo(options.hub_model_id or folder.name, exist_ok=True).repo_id
        except (OSError, ValueError) as error:  # no network, no token, no such name
            sys.exit(f"--push_to_hub: {error}")
    train_rows, val_rows = (tokenize(part, tokenizer, options) for part in split(load_rows(options), options))
    print(f"Model: {options.source}; {len(train_rows):,} rows to train on, {len(val_rows):,} held out")

    if not checkpoint and state.is_main_process:
        clear_results(folder)
    state.wait_for_everyone()
    print(f"\nSpikeLoRA of rank {options.lora_r}:")
    trainer, before, after = run(options, tokenizer, train_rows, val_rows, True, folder, checkpoint)
    before.pop("report")
    report = after.pop("report")
    before_and_after = save(trainer, tokenizer, val_rows[0], report, options, folder)
    ledger = operations(trainer.model, report)
    after["operations"] = ledger.effective.macs
    metrics = {"recipe": options.recipe, "before": before, "spikelora": after, "reloaded_logits_identical": True}
    if options.compare_lora:
        lora_folder, smaller = folder / "lora", as_lora(options, ledger)
        print(f"\nPlain LoRA of rank {smaller.lora_r}, which needs as many operations:")
        lora = run(smaller, tokenizer, train_rows, val_rows, False, lora_folder, last_checkpoint(lora_folder))[2]
        lora["operations"] = ledger.lora_unmerged.macs * smaller.lora_r / options.lora_r
        if not torch.cuda.is_available():
            lora.pop("peak_memory_mb", None)  # of the process, whose peak the first run may have set
        metrics["lora"] = lora
    if not state.is_main_process:
        return
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")

    show(metrics)
    warn_of_silence(after, "after training")
    show_example(tokenizer, val_rows[0], *before_and_after)
    print(f"Loaded afresh, the adapter gives the same logits to the bit. Everything is in {folder}")
    print(next_step(folder))
    if options.push_to_hub:
        kept = ["checkpoint-*/*", "lora/*"]
        print(huggingface_hub.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=kept))


if __name__ == "__main__":
    try:
        main()
    except SpikeLoraError as error:
        sys.exit(str(error))
