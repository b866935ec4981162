"""Every code block of the documentation runs, or says why it cannot; every command that a page names has the flags it gives."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from tests.docs.blocks import LANGUAGES, NEEDS, OUTPUT, PAGES, ROOT, Block, blocks_of, run_page

from flowroll.cli.app import COMMANDS
from flowroll.errors import FlowrollError

# A block without a language is a figure or a formula.
_COMMAND = re.compile(r"^\s*(?:flowroll|pip|python|python3|torchrun|make|curl|docker|hf|bash|export) ", re.MULTILINE)
_INLINE = re.compile(r"`(flowroll [^`]+)`")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT / "docs"))


def _running() -> list[object]:
    pages = [page for page in PAGES if any(block.runs for block in blocks_of(page))]
    return [pytest.param(page, id=_name(page), marks=pytest.mark.slow) for page in pages]


@pytest.mark.parametrize("page", _running())
def test_the_blocks_of_a_page_run_in_their_order(page: Path, tmp_path: Path) -> None:
    if any("curl " in block.text for block in blocks_of(page) if block.runs) and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    assert run_page(page, tmp_path) > 0


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES, block
        assert block.title in ("", OUTPUT) or block.title.startswith(NEEDS), block
        assert block.language or not _COMMAND.search(block.text), f"{_name(page)}:{block.line} is a command without a language"
        _parse(block)


def _parse(block: Block) -> None:
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "bash":
        checked = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "toml":
        tomllib.loads(block.text)


def test_every_command_that_the_pages_name_has_its_flags() -> None:
    wrong, count = [], 0
    for page in PAGES:
        named = _INLINE.findall(page.read_text(encoding="utf-8"))
        for block in blocks_of(page):
            if block.language == "bash":
                named += block.text.replace("\\\n", " ").splitlines()
        for line in named:
            count += 1
            if unknown := unknown_flags(line):
                wrong.append((_name(page), line, unknown))
    assert count > 30
    assert not wrong


def unknown_flags(line: str) -> set[str]:
    """Returns the flags of a `flowroll` command in this line that it does not have, or its name if there is none."""
    # A "..." in prose stands for what is left out.
    try:
        words = [word for word in shlex.split(line, comments=True) if word != "..."]
    except ValueError:
        # One line of a text over several.
        words = line.split()
    places = [place for place, word in enumerate(words) if word == "flowroll" and (place == 0 or words[place - 1] == "-m")]
    if not places:
        return set()
    words = words[places[0] + 1 :]
    if not words or words[0].startswith("-"):
        return set()
    if words[0] not in COMMANDS:
        return {words[0]}
    command, words = COMMANDS[words[0]].load(words[0]), words[1:]
    while hasattr(command, "commands") and words:
        if words[0] not in command.commands:
            return {words[0]}
        command, words = command.commands[words[0]], words[1:]
    known = {"--help"} | {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return {word.partition("=")[0] for word in words if word.startswith("--")} - known


def test_a_flag_that_a_command_does_not_have_is_found() -> None:
    assert unknown_flags("flowroll serve MODEL --sp 2 --no-such-flag 3") == {"--no-such-flag"}
    assert unknown_flags("flowroll bench serve --url URL --rates 3") == {"--rates"}
    assert unknown_flags("flowroll sevre") == {"sevre"}


def test_every_error_has_its_place_in_troubleshooting() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    kinds = [FlowrollError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    shown = [kind for kind in kinds[1:] if kind.__module__ == "flowroll.errors"]
    missing = [kind.__name__ for kind in shown if f"`{kind.__name__}`" not in page or f"`{kind.code}`" not in page]
    assert len(shown) > 20 and not missing
