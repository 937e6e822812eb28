"""MkDocs hooks for what the site needs beyond MkDocs.

- The README is the site's first page.
- A notebook becomes a page, with the outputs that are saved in it.
- A page may link to any file of the repository. The site gets a copy of it.
- The command's page gets what the command itself says of its options.
- The report's page gets pictures and tables out of a report of the sample runs, which is in the site as well.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

from spikelora.report.html import render
from spikelora.report.run import read_runs

ROOT = Path(__file__).parents[2]
COPIES = "repository"  # where in the site the copies of files outside docs/ are
COMMAND = "<!-- what `spikelora --help` says of each command -->"
SAMPLE = ROOT / "build" / "sample"
REPORT = "sample_report.html"  # in the site
# What the report's page shows of the sample, as it is in the HTML of the report.
SHOWN = {
    "loss": r"<svg[^>]*aria-label=\"loss by step.*?</svg>",
    "sparsity": r"<svg[^>]*aria-label=\"sparsity by step.*?</svg>",
    "thresholds": r"<svg[^>]*aria-label=\"v_threshold by layer.*?</svg>",
    "layers": r'<table class="heat">.*?</table>',
    "ranks": r'<table class="heat rates">.*?</table>',
}
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")

_origins: dict[str, Path] = {}  # by page, the file of the repository that it was made of


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from files elsewhere, and the files that pages link to."""
    _origins.clear()
    texts = []
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            texts.append(_add_notebook(files, config, file))
        elif file.is_documentation_page():
            _origins[file.src_uri] = Path(file.abs_src_path)
            texts.append((Path(file.abs_src_path), file.content_string))
    texts.append(_add(files, config, "index.md", ROOT / "README.md"))
    files.append(File.generated(config, REPORT, content=_sample()))
    while texts:
        origin, text = texts.pop()
        for _, link, _ in LINK.findall(text):
            target = _target(origin, link)
            if target and files.get_file_from_path(_place(target)) is None:
                texts.append(_add(files, config, _place(target), target))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to the repository's files into links to their copies."""
    origin, here = _origins[page.file.src_uri], os.path.dirname(page.file.src_uri)

    def turned(match: re.Match[str]) -> str:
        target = _target(origin, match[2])
        return match[1] + os.path.relpath(_place(target), here) + match[3] if target else match[0]

    if COMMAND in markdown:
        markdown = markdown.replace(COMMAND, _command())
    return LINK.sub(turned, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put what a page shows of the sample report where a comment names it."""

    def shown(match: re.Match[str]) -> str:
        if match[1] == "link":
            return f'<a class="md-button md-button--primary" href="{REPORT}">Open the sample report</a>'
        found = re.search(SHOWN[match[1]], report, re.DOTALL)
        if found is None:
            raise PluginError(
                f"The sample report has no {match[1]}, which {page.file.src_uri} shows. Look at {REPORT}."
            )
        return f'<div class="sample" data-search-exclude tabindex="0">{found[0]}</div>'

    if "<!-- sample: " not in html:
        return html
    report = files.get_file_from_path(REPORT).content_string
    return re.sub(r"<!-- sample: (\w+) -->", shown, html)


def _sample() -> str:
    """The report of the sample runs."""
    folders = [SAMPLE / name for name in ("threshold", "target", "lora")]
    if not all(map(Path.is_dir, folders)):
        raise PluginError(f"The sample runs are not in {SAMPLE}. Make them with `make docs`, or docs/site/sample.py.")
    return render(read_runs(folders))


def _target(origin: Path, link: str) -> Path | None:
    """The file of the repository that a link means, if its place in the site is another."""
    path = Path(os.path.normpath(origin.parent / link))
    stays = _is_page(path) and _is_page(origin) and path.suffix != ".ipynb"
    return path if path.exists() and path.is_relative_to(ROOT) and not stays else None


def _is_page(path: Path) -> bool:
    """Whether MkDocs puts a file into the site by itself, at the place that it has under docs/."""
    return path.is_relative_to(ROOT / "docs") and not path.is_relative_to(ROOT / "docs" / "site")


def _place(target: Path) -> str:
    """Where in the site a file of the repository is: pages for text, the file itself for the rest."""
    if target == ROOT / "README.md":
        return "index.md"
    if _is_page(target):
        place = target.relative_to(ROOT / "docs").as_posix()
        return place + ".md" if target.suffix == ".ipynb" else place
    place = f"{COPIES}/{target.relative_to(ROOT).as_posix()}"
    if target.name.endswith((".md", ".png", ".csv")):
        return place
    return place + ".md"


def _add(files: Files, config: MkDocsConfig, place: str, origin: Path) -> tuple[Path, str]:
    """Put a file of the repository at a place in the site; return its text if that may have links."""
    if not place.endswith(".md"):
        files.append(File.generated(config, place, content=origin.read_bytes()))
        return origin, ""
    name = origin.relative_to(ROOT).as_posix()
    if origin.suffix == ".md":
        text = content = origin.read_text()
    elif origin.is_dir():
        text, content = "", f"# {name}\n\n" + "\n".join(f"- `{path.name}`" for path in sorted(origin.iterdir()))
    else:
        language = {".py": "python", ".yaml": "yaml", ".cff": "yaml"}.get(origin.suffix, "text")
        text, content = "", f"# {name}\n\n````{language}\n{origin.read_text()}\n````\n"
    if place.startswith(COPIES):
        content = "---\nsearch:\n  exclude: true\n---\n\n" + content
    _origins[place] = origin
    files.append(File.generated(config, place, content=content))
    return origin, text


def _add_notebook(files: Files, config: MkDocsConfig, file: File) -> tuple[Path, str]:
    """A notebook as a page: its text, its code and the outputs that are saved in it, pictures beside it."""
    origin = Path(file.abs_src_path)
    resources: dict[str, Any] = {"unique_key": origin.stem, "output_files_dir": f"{origin.stem}_files"}
    text, resources = MarkdownExporter().from_filename(str(origin), resources=resources)
    for name, picture in resources["outputs"].items():
        files.append(File.generated(config, f"{Path(file.src_uri).parent.as_posix()}/{name}", content=picture))
    place = file.src_uri + ".md"
    _origins[place] = origin
    files.append(File.generated(config, place, content=text))
    return origin, text


def _command() -> str:
    """What the command says of itself, one heading lower."""
    command = [sys.executable, "-m", "typer", "spikelora.report.cli", "utils", "docs", "--name", "spikelora"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        raise PluginError(f"{' '.join(command)} failed:\n{said.stderr}")
    return re.sub(r"^#", "##", said.stdout.partition("\n")[2], flags=re.MULTILINE)
