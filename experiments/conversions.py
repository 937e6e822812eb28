"""What conversions lose: adapters of the example turned from LoRA to SpikeLoRA, back, and pruned; one table.

    python experiments/conversions.py

`examples/spikelora_finetuning/spikelora_finetuning.py` trains the adapters that are converted. Runs that have finished
are not repeated. Writes `docs/conversions.md`. About 8 minutes on two CPU cores.
"""

import contextlib
import io
import re
import statistics
import sys
import tempfile

import torch
from peft import PeftModel
from target_sparsity import ROOT, SCRIPT, finished
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from spikelora import from_lora, prune_ranks, to_lora

sys.path.append(str(SCRIPT.parent))
from options import EMBEDDED_MODEL, parse_options
from results import measure
from run_folder import last_checkpoint
from spikelora_finetuning import load_base
from texts import python_reference, split, tokenize

RUNS = ROOT / "outputs" / "conversions"
TARGETS = (0.5, 0.7, 0.9)  # of `from_lora`
HEAD = """# What conversions lose

Made by `python experiments/conversions.py`: adapters of the example (its small model, text and defaults, seed 0),
converted on a quarter of the training rows, with nothing trained afterwards. Single runs on CPU cores, torch {torch}.
The loss is that of the held-out text; without an adapter it is {without:.3f}. The lost share of an update is
`E|difference|^2 / E|update|^2`, on the rows that were used for the conversion.

| adapter | held-out loss | |
|---|---|---|
"""


class Conversions:
    """The example's model and rows, loaded with its own functions."""

    def __init__(self) -> None:
        self.options = parse_options([])
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
        parts = split(python_reference(), self.options)
        self.rows, self.held_out = (tokenize(part, tokenizer, self.options) for part in parts)
        self.collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)

    def batches(self) -> list[dict[str, torch.Tensor]]:
        rows = self.rows.select(range(0, len(self.rows), 4))
        loaded = torch.utils.data.DataLoader(rows, self.options.batch_size, collate_fn=self.collator)
        return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in loaded]

    def load(self, adapter) -> PeftModel:
        return PeftModel.from_pretrained(load_base(self.options), adapter).eval()

    def measure(self, model: PeftModel) -> dict:
        return measure(model, self.held_out, self.collator, self.options, "held-out text")

    def loss(self, model: PeftModel) -> float:
        return self.measure(model)["loss"]

    def spiking(self, title: str, model: PeftModel) -> tuple[str, float, str]:
        figures = self.measure(model)
        return f"SpikeLoRA, {title}", figures["loss"], f"sparsity {figures['sparsity']:.3f}"

    def gated(self, lora, target: float) -> tuple[str, float, str]:
        model = self.load(lora)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            from_lora(model, self.batches(), target)
        lost = re.search(r"overall: ([\d.]+) at", said.getvalue())
        assert lost, said.getvalue()
        return f"its `from_lora`, target {target:g}", self.loss(model), f"{float(lost[1]):.0%} of the update lost"

    def merged(self, model: PeftModel) -> tuple[str, float, str]:
        approximation = to_lora(model, self.batches())
        errors = approximation.errors.values()
        with tempfile.TemporaryDirectory() as folder:
            approximation.save_pretrained(folder)
            loss = self.loss(self.load(folder))
        by_module = f"{min(errors):.0%} to {max(errors):.0%} of the update lost by module, median"
        return "its `to_lora`", loss, f"{by_module} {statistics.median(errors):.0%}"

    def pruned(self, model: PeftModel) -> tuple[str, float, str]:
        removed = sum(prune_ranks(model, self.batches()).values())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = self.loss(self.load(folder))
        loss = self.loss(model)
        assert loss == again
        return "`prune_ranks` of it", loss, f"{removed} ranks removed; the same when loaded again"


def main() -> None:
    metrics = finished({"compare_lora": True}, RUNS / "fixed")
    finished({"target_sparsity": 0.97}, RUNS / "held")
    work = Conversions()
    lora = last_checkpoint(RUNS / "fixed" / "lora")
    rows = [("LoRA", metrics["lora"]["loss"], ""), *(work.gated(lora, target) for target in TARGETS)]
    fixed, held = work.load(RUNS / "fixed"), work.load(RUNS / "held")
    rows += [work.spiking("`v_threshold` 0.1", fixed), work.merged(fixed)]
    rows += [work.spiking("`target_sparsity` 0.97", held), work.merged(held), work.pruned(held)]
    text = HEAD.format(torch=torch.__version__, without=metrics["before"]["loss"])
    text += "".join(f"| {adapter} | {loss:.3f} | {remark} |\n" for adapter, loss, remark in rows)
    (ROOT / "docs" / "conversions.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
