"""The `spikelora` command: what an adapter's folder holds, a report, calibration, conversion to LoRA, autoload.

The exit status is 0 if all is well, 1 if a folder or file is not sound, and 2 for wrong usage.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikelora.errors import SpikeLoraError

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.console import Console

app = typer.Typer(
    help="Look at SpikeLoRA adapters, calibrate them and convert them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # messages unbroken, as scripts read them
    pretty_exceptions_enable=False,
)

autoload = typer.Typer(
    help="Have programs of this environment find SpikeLoRA by importing PEFT, without an import of their own.",
    no_args_is_help=True,
)
app.add_typer(autoload, name="autoload")

_AdapterFolder = Annotated[
    Path, typer.Argument(metavar="ADAPTER", exists=True, file_okay=False, help="Folder of a saved adapter.")
]
_BaseModel = Annotated[
    str | None, typer.Option("--base_model", help="Hub id or folder; by default what the adapter was trained on.")
]
_Data = Annotated[
    Path,
    typer.Option(
        "--data", exists=True, dir_okay=False, help="Text to run: paragraphs of a .txt, or lines of a .jsonl."
    ),
]
_Output = Annotated[Path, typer.Option("--output", help="New or empty folder to save to.")]
_TextField = Annotated[str, typer.Option("--text_field", help="Where the lines of a .jsonl have their text.")]
_BatchSize = Annotated[int, typer.Option("--batch_size", min=1, help="Texts of a batch.")]
_CutoffLen = Annotated[int, typer.Option("--cutoff_len", min=1, help="Tokens of a text; longer ones are cut.")]
_MaxBatches = Annotated[int | None, typer.Option("--max_batches", min=1, help="Batches to run; by default all.")]


@app.command(epilog="Example: spikelora inspect outputs/spikelora")
def inspect(adapter: _AdapterFolder) -> None:
    """Say what an adapter's folder holds, and whether it is sound (status 0) or not (1, with the reason)."""
    from spikelora.report.adapter import read_adapter
    from spikelora.report.html import summary
    from spikelora.report.tables import facts_table, modules_table

    found = read_adapter(adapter)
    console = _console()
    console.print(facts_table(str(adapter), {label: [text] for label, text in summary(found).items()}))
    console.print(modules_table(found))
    console.print("The adapter is sound.")


@app.command(epilog="Example: spikelora report outputs/spikelora outputs/spikelora/lora --output report.html")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_ADAPTER...",
            exists=True,
            file_okay=False,
            help="Folder of a run or an adapter; behind it those to compare it with, which may be of LoRA.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", dir_okay=False, help="HTML file to write; one that is there is replaced.")
    ] = Path("report.html"),
    watch: Annotated[
        bool, typer.Option("--watch", help="Write it again whenever a run has written something, until Ctrl-C.")
    ] = False,
) -> None:
    """Show a run's sparsity, training and thresholds, here and in one HTML file that needs nothing else."""
    from spikelora.report.html import write_report
    from spikelora.report.run import read_runs
    from spikelora.report.tables import run_tables
    from spikelora.report.watch import is_written_to, watch_runs

    if watch:
        found = watch_runs(runs, lambda found: _writing(write_report, found, output, True), typer.echo)
    else:
        try:
            found = read_runs(runs)
        except (SpikeLoraError, OSError) as error:
            if is_written_to(runs):
                typer.echo("A run seems to be writing there. With --watch the report waits until it has.", err=True)
            if isinstance(error, OSError):  # such as a checkpoint that the run has removed meanwhile
                raise SpikeLoraError(f"A file of the run cannot be read ({error}). Run the command again.") from error
            raise
    _writing(write_report, found, output)
    console = _console()
    for table in run_tables(found):
        console.print(table)
    console.print(f"The report is in {output}", soft_wrap=True)


@app.command(
    epilog="Example: spikelora calibrate my-adapter --data train.jsonl --target_sparsity 0.9 --output calibrated"
)
def calibrate(
    adapter: _AdapterFolder,
    data: _Data,
    output: _Output,
    base_model: _BaseModel = None,
    target_sparsity: Annotated[
        float, typer.Option("--target_sparsity", help="Share of silent activations, between 0 and 1.")
    ] = 0.9,
    target_scope: Annotated[
        str, typer.Option("--target_scope", help='What has to reach it: each "module", or the "adapter" as a whole.')
    ] = "module",
    text_field: _TextField = "text",
    batch_size: _BatchSize = 8,
    cutoff_len: _CutoffLen = 256,
    max_batches: _MaxBatches = None,
) -> None:
    """Set the thresholds so that a target share of the activations is silent on a text."""
    from spikelora.peft.targets import check_scope, check_target
    from spikelora.report.tables import numbers_table
    from spikelora.sparsity.calibration import calibrate_thresholds

    try:
        check_target("--target_sparsity", target_sparsity)
        check_scope("--target_scope", target_scope)
    except SpikeLoraError as error:
        raise typer.BadParameter(str(error)) from error
    with _new_folder(output) as partial:
        model, batches = _load(adapter, base_model, data, text_field, batch_size, cutoff_len, max_batches)
        calibration = calibrate_thresholds(model, batches, target_sparsity, target_scope)
        model.save_pretrained(partial)
    console = _console()
    title = f"Thresholds for a sparsity of {target_sparsity:g}"
    console.print(numbers_table(title, calibration, "v_threshold"))
    shares = [target_sparsity + distance for distance in calibration.off.values()]
    console.print(
        f"Sparsity on this text: {calibration.sparsity:.4f}, by module {min(shares):.4f} to {max(shares):.4f}, after "
        f"{calibration.rounds} {'round' if calibration.rounds == 1 else 'rounds'}",
        soft_wrap=True,
    )
    console.print(f"The calibrated adapter is in {output}", soft_wrap=True)


@app.command("to-lora", epilog="Example: spikelora to-lora my-adapter --data train.jsonl --output my-lora")
def to_lora(
    adapter: _AdapterFolder,
    data: _Data,
    output: _Output,
    base_model: _BaseModel = None,
    text_field: _TextField = "text",
    batch_size: _BatchSize = 8,
    cutoff_len: _CutoffLen = 256,
    max_batches: _MaxBatches = None,
) -> None:
    """Approximate an adapter by a plain LoRA, fitted on a text, and say what each module loses."""
    from spikelora.conversion import lora
    from spikelora.report.tables import numbers_table

    with _new_folder(output) as partial:
        model, batches = _load(adapter, base_model, data, text_field, batch_size, cutoff_len, max_batches)
        converted = lora.to_lora(model, batches)
        converted.save_pretrained(partial)
    console = _console()
    console.print(numbers_table("Share of the update that is lost", converted.errors, "share"))
    console.print(f"The LoRA adapter is in {output}", soft_wrap=True)


@autoload.command()
def on() -> None:
    """Write a file into this environment's site-packages that registers SpikeLoRA when PEFT is imported."""
    from spikelora.peft.autoload import switch_on

    typer.echo(f"Wrote {switch_on()}: from now on Python's processes here register SpikeLoRA when they import PEFT.")


@autoload.command()
def off() -> None:
    """Remove that file."""
    from spikelora.peft.autoload import switch_off

    file = switch_off()
    typer.echo(f"Removed {file}." if file else "Autoload was off.")


@autoload.command()
def status() -> None:
    """Say whether that file is there."""
    from spikelora.peft.autoload import describe

    typer.echo(describe())


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, markup=False)


def _load(
    adapter: Path,
    base_model: str | None,
    data: Path,
    text_field: str,
    batch_size: int,
    cutoff_len: int,
    max_batches: int | None,
) -> tuple["PeftModel", list[dict[str, Any]]]:
    """The adapter on its base model, and the data as batches for it."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    from spikelora.peft.config import SpikeLoraConfig
    from spikelora.report.text import SUFFIXES, text_batches

    if data.suffix not in SUFFIXES:
        raise typer.BadParameter(f"--data {data}: {' and '.join(SUFFIXES)} files are read.")
    config = SpikeLoraConfig.from_pretrained(adapter)
    config.check_folder(adapter)
    base = base_model or config.base_model_name_or_path
    if not base:
        raise typer.BadParameter(f"{adapter} does not say what base model it is for; name it with --base_model.")
    auto_class = _auto_class(config.task_type)
    with _loading(base):
        tokenizer = AutoTokenizer.from_pretrained(base)
    # Before the base model, which may take minutes to load.
    batches = list(islice(text_batches(data, tokenizer, text_field, batch_size, cutoff_len), max_batches))
    with _loading(base):
        loaded = auto_class.from_pretrained(base, dtype="auto", device_map="auto")
    positions = getattr(loaded.config, "max_position_embeddings", None)
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    if positions and longest > positions:
        raise SpikeLoraError(
            f"A text has {longest} tokens, more than the {positions} positions of {base}. Set --cutoff_len {positions}."
        )
    config.base_model_name_or_path = base  # what is saved names the base that it was made on
    return PeftModel.from_pretrained(loaded, adapter, config=config), batches


@contextmanager
def _loading(base: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise SpikeLoraError(f"The base model {base} cannot be loaded: {error}\nName it with --base_model.") from error


def _auto_class(task_type: str | None) -> Any:
    import transformers

    classes = {"CAUSAL_LM": "AutoModelForCausalLM", "FEATURE_EXTRACTION": "AutoModel", None: "AutoModelForCausalLM"}
    if task_type not in classes:
        raise SpikeLoraError(
            f"An adapter for {task_type} needs more than a text and the name of its base, such as other inputs or the "
            "number of its labels. Call the function of the same name in Python, with the batches of its training."
        )
    return getattr(transformers, classes[task_type])


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill: it becomes the output if the block ends well, and is deleted otherwise."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise typer.BadParameter(f"--output {output} exists and is not an empty folder; name another.")
    partial = Path(_writing(_sibling, output))
    try:
        yield partial
        if output.exists():
            output.rmdir()
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sibling(output: Path) -> str:
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent)
    os.chmod(folder, 0o755)  # mkdtemp lets only its owner read it
    return folder


def _writing(write: Any, *arguments: Any) -> Any:
    """Call what writes to an output, and say so if it cannot."""
    try:
        return write(*arguments)
    except OSError as error:
        raise SpikeLoraError(f"--output cannot be written ({error}). Name another place.") from error
