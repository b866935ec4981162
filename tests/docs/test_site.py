"""The site: every page has its place, every link leads somewhere, and the generator builds it without a warning."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools.docs import links, sources

ROOT = Path(__file__).parents[2]
PAGES = sources()
_HEADING = re.compile(r"^#{1,6} (.*)$", re.MULTILINE)
_FENCE = re.compile(r"^(```+).*?^\1$", re.MULTILINE | re.DOTALL)


def slugs(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as Python-Markdown makes them."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())
        found.add(slug)
    return found


def broken(page: Path) -> Iterator[str]:
    """Yields the links of a page that lead nowhere in the repository."""
    for path, anchor in links(page.read_text(encoding="utf-8")):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in slugs(target)):
            yield f"{page.relative_to(ROOT)}: {path}#{anchor}"


def test_every_link_of_every_page_leads_somewhere() -> None:
    assert len(PAGES) > 40
    assert not [link for page in PAGES for link in broken(page)]


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](#one) [b](#two) [c](no.md) `[d](code.md)`\n```\n[e](fence.md)\n```\n")
    found = {(path, anchor) for path, anchor in links(page.read_text())}
    assert found == {("", "one"), ("", "two"), ("no.md", "")}
    assert "two" not in slugs(page) and "one" in slugs(page)


def test_every_page_has_its_place_in_the_navigation() -> None:
    with (ROOT / "zensical.toml").open("rb") as file:
        navigation = tomllib.load(file)["project"]["nav"]

    def listed(node: object) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            for value in node.values():
                yield from listed(value)
        elif isinstance(node, list):
            for value in node:
                yield from listed(value)

    named = list(listed(navigation))
    assert len(named) == len(set(named))
    assert set(named) == {str(page.relative_to(ROOT)) for page in PAGES}


def test_the_site_is_built_in_strict_mode() -> None:
    for module in ("zensical", "mkdocstrings_handlers.python"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.skip(f"{module} is not installed")
    built = subprocess.run([sys.executable, "-m", "tools.docs"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    http = (ROOT / "build/site/docs/reference/http/index.html").read_text(encoding="utf-8")
    assert "/rollout/generate" in http and "x-flowroll-deadline-s" in http
    python = (ROOT / "build/site/docs/reference/python/index.html").read_text(encoding="utf-8")
    assert "micro_batches" in python and "Returns the importance ratio" in python
    # Nothing is loaded from another host.
    for page in (ROOT / "build/site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//', text), page
