"""Builds the documentation site: `python -m tools.docs`, or `make docs`.

The pages are the Markdown files of the repository, with links that hold there as well. They are copied to `build/pages` as they
lie in the repository, with what they link to, because the site generator takes one folder. The HTTP reference is written into
its page from the OpenAPI document that the app makes. Then zensical builds the site in strict mode: a link or an anchor that
leads nowhere is an error.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from tools.http_reference import http_reference

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"
SOURCES = ("*.md", "docs/**/*.md", "benchmarks/results/*.md")
# What is written into a page in place of this comment.
_GENERATED: Mapping[str, Callable[[], str]] = {"http": http_reference}
_MARK = "<!-- generated: {name} -->"
_STYLE = ROOT / "docs" / "site.css"
_FENCE = re.compile(r"^(```+).*?^\1$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)")


def main() -> None:
    """Builds the site into `build/site`; ends with the status of the generator."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pages-only", action="store_true", help="only collect the pages")
    options = parser.parse_args()
    collect(PAGES)
    if not options.pages_only:
        command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
        sys.exit(subprocess.run(command, cwd=ROOT).returncode)


def collect(folder: Path) -> None:
    """Copies every page, and every file that one links to, to the folder; the folder's old content is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    _copy(_STYLE, folder)
    for source in sources():
        text = source.read_text(encoding="utf-8")
        for target, _ in links(text):
            _copy(source.parent / target, folder)
        for name, make in _GENERATED.items():
            mark = _MARK.format(name=name)
            if mark in text:
                text = text.replace(mark, make())
        _place(source, folder).write_text(_without_folders(source, text), encoding="utf-8")


def sources() -> list[Path]:
    """Returns the Markdown files that are pages."""
    return sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)})


def links(text: str) -> Iterator[tuple[str, str]]:
    """Yields path and anchor of every link of a page that leads to a file of the repository; code holds no links."""
    prose = _CODE.sub("", _FENCE.sub("", text))
    for target in _LINK.findall(prose):
        if re.match(r"[a-z]+:", target) is None:
            path, _, anchor = target.partition("#")
            yield path, anchor


def _copy(target: Path, folder: Path) -> None:
    target = target.resolve()
    if target.is_file() and target.suffix != ".md":
        shutil.copyfile(target, _place(target, folder))


def _place(source: Path, folder: Path) -> Path:
    place = folder / source.resolve().relative_to(ROOT)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _without_folders(source: Path, text: str) -> str:
    """Returns the page with links to a folder's README where the repository shows the folder."""
    for target, _ in links(text):
        if target and (source.parent / target).is_dir():
            text = text.replace(f"]({target})", f"]({PurePosixPath(target) / 'README.md'})")
    return text


if __name__ == "__main__":
    main()
