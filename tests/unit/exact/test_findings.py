"""The table of answers: each question is asked once, by one process for those that follow."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from flowroll.exact import findings
from flowroll.exact.findings import Findings, cache_folder
from flowroll.exact.kernels import KernelSet

CPU = torch.device("cpu")
KERNELS = KernelSet(hardware="a CPU", versions={"torch": "2.13.0"}, settings={})


def question(rows: int = 4, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> tuple[Any, ...]:
    return ("product", torch.Size((2, rows, 8)), 2, torch.Size((8, 8)), True, True, (dtype, device, 1))


def filled(*rows: int) -> Findings:
    table = Findings()
    for one in rows:
        table.answer(question(one), lambda *_: "merged")
    return table


def file_of(folder: Path) -> Path:
    (found,) = folder.rglob("*.json")
    return found


def unasked(*_: object) -> bool:
    raise AssertionError("it was asked again")


def test_a_question_is_asked_once_and_given_what_it_is_about() -> None:
    table, given = Findings(), []
    for _ in range(2):
        assert table.answer(question(), lambda *about: given.append(about) or False) is False
    assert given == [question()[1:]]


def test_the_table_is_bounded_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "_IN_MEMORY", 3)
    table = filled(*range(5))
    assert len(table) == 3
    assert table.answer(question(4), unasked) == "merged"
    with pytest.raises(AssertionError, match="asked again"):
        table.answer(question(0), unasked)


@pytest.mark.parametrize("found", ["stacked", False, True])
def test_what_one_process_found_the_next_one_knows(tmp_path: Path, found: str | bool) -> None:
    asked = ("attention", torch.Size((2, 4, 8, 16)), (True, None, False), 2, (torch.bfloat16, CPU, 3))
    table = filled(1, 2)
    assert table.answer(asked, lambda *_: found) == found
    table.save(tmp_path, KERNELS, CPU)
    later = Findings()
    assert later.load(tmp_path, KERNELS, CPU)
    assert [later.answer(question(rows), unasked) for rows in (1, 2)] == ["merged"] * 2
    assert later.answer(asked, unasked) == found


def test_a_file_is_of_one_device_and_one_set_of_kernels(tmp_path: Path) -> None:
    table, elsewhere = filled(1), question(2, device=torch.device("cuda", 0))
    table.answer(elsewhere, lambda *_: "merged")
    table.save(tmp_path, KERNELS, CPU)
    later = Findings()
    other = KernelSet(hardware="another CPU", versions=KERNELS.versions, settings={})
    assert not later.load(tmp_path, other, CPU) and not len(later)
    assert later.load(tmp_path, KERNELS, CPU) and len(later) == 1


@pytest.mark.parametrize("damage", ["cut", "altered", "empty", "another layout"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    filled(1, 2).save(tmp_path, KERNELS, CPU)
    path = file_of(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[:-20],
            # Wrong, and well formed: it would be believed.
            "altered": whole.replace(b'"merged"', b'"stacked"', 1),
            "empty": b"",
            "another layout": b'{"kernels": {}, "sha256": "", "entries": [[1]]}',
        }[damage]
    )
    later = Findings()
    assert not later.load(tmp_path, KERNELS, CPU)
    assert not len(later)
    assert "is damaged" in caplog.text
    later.answer(question(1), lambda *_: "each")
    later.save(tmp_path, KERNELS, CPU)
    last = Findings()
    assert last.load(tmp_path, KERNELS, CPU) and last.answer(question(1), unasked) == "each"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(1).save(tmp_path, KERNELS, CPU)
    before = file_of(tmp_path).read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        filled(1, 2, 3).save(tmp_path, KERNELS, CPU)
    assert file_of(tmp_path).read_bytes() == before
    assert len(list(file_of(tmp_path).parent.iterdir())) == 1


def test_nothing_is_written_where_nothing_is_new(tmp_path: Path) -> None:
    table = filled(1)
    table.save(tmp_path, KERNELS, CPU)
    file_of(tmp_path).unlink()
    table.save(tmp_path, KERNELS, CPU)
    assert not list(tmp_path.rglob("*.json"))
    table.answer(question(2), lambda *_: "each")
    table.save(tmp_path, KERNELS, CPU)
    assert file_of(tmp_path)


def test_files_are_bounded_in_size_and_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "_IN_A_FILE", 2)
    monkeypatch.setattr(findings, "_FILES", 3)
    sets = [KernelSet(hardware=f"CPU {index}", versions={}, settings={}) for index in range(5)]
    for kernels in sets:
        filled(1, 2, 3).save(tmp_path, kernels, CPU)
    assert len(list(tmp_path.rglob("*.json"))) == 3
    later = Findings()
    assert not later.load(tmp_path, sets[0], CPU)
    assert later.load(tmp_path, sets[4], CPU) and len(later) == 2
    assert later.answer(question(3), unasked) == "merged"


def test_a_folder_that_cannot_be_written_costs_nothing_but_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("")
    filled(1).save(tmp_path / "taken", KERNELS, CPU)
    assert "cannot be kept" in caplog.text


def test_the_folder_is_the_given_one_or_the_variables_or_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder("here") == Path("here")
    monkeypatch.setenv("FLOWROLL_CACHE_DIR", "/there")
    assert cache_folder() == Path("/there")
    monkeypatch.delenv("FLOWROLL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/user")
    assert cache_folder() == Path("/user/flowroll")
