"""The `spikelora` command, also as `python -m spikelora`; it starts even if what it uses is not installed."""

import sys

from spikelora.errors import SpikeLoraError


def main(arguments: list[str] | None = None) -> None:
    """Run the command; by default with the arguments of the process."""
    try:
        from spikelora.report.cli import app

        app(args=arguments, prog_name="spikelora")
    except SpikeLoraError as error:
        sys.exit(str(error))  # to stderr, with status 1
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "matplotlib", "rich", "typer"):
            raise
        sys.exit(f"{error}; install what the command uses with `pip install 'spikelora[report]'`.")


if __name__ == "__main__":
    main()
