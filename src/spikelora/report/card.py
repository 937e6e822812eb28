"""What a model card says of its adapter's sparsity."""

import warnings
from pathlib import Path

from spikelora.errors import SpikeLoraError
from spikelora.report.figures import by_layer, percent, plot_grid
from spikelora.report.run import read_json
from spikelora.sparsity.meter import SPARSITY_FILE

PICTURE_FILE = "sparsity.png"


def sparsity_section(folder: Path) -> str:
    """Markdown of the sparsity that a file in a folder says, empty where there is none.

    Where matplotlib is installed a picture is put into the folder, and shown. A file that cannot be read is warned of:
    it is no reason to lose a training when its adapter is saved.
    """
    try:
        report = read_json(folder / SPARSITY_FILE)
        if not report:
            return ""
        shares = {"all": report} | report["kinds"]
        rows = [
            f"| {name} | {percent(share['sparsity'])} | {percent(share['zero_threshold_sparsity'])} |"
            for name, share in shares.items()
        ]
        grid = by_layer({name: module["sparsity"] for name, module in report["modules"].items()})
    except (SpikeLoraError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"The model card in {folder} says nothing of the sparsity, as {SPARSITY_FILE} cannot be read ({error!r}). "
            "Measure it again, or take the file away.",
            RuntimeWarning,
            stacklevel=2,
        )
        return ""
    lines = [
        "### Sparsity",
        "",
        f"Share of silent activations by `{SPARSITY_FILE}`, and what it would be at `v_threshold = 0`, which is mere",
        "rectification.",
        "",
        "| modules | silent | at threshold 0 |",
        "|---|---|---|",
        *rows,
    ]
    try:
        plot_grid(grid).savefig(folder / PICTURE_FILE, dpi=150)
    except ModuleNotFoundError:  # matplotlib, which saving an adapter does not need
        return "\n".join(lines)
    return "\n".join((*lines, "", f"![Share of silent activations by layer and kind of module]({PICTURE_FILE})"))
