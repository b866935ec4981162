import pytest
from torch import nn

from flowroll.parallel.paths import find_modules

MODEL = nn.ModuleDict(
    {"layers": nn.ModuleList([nn.ModuleDict({"a": nn.Identity()}), nn.ModuleDict({"b": nn.Identity()})]), "2-1": nn.Identity()}
)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("2-1", ["2-1"]),
        ("layers.*", ["layers.0", "layers.1"]),
        ("layers.-1", ["layers.1"]),
        ("layers.*.b", ["layers.1.b"]),
        ("layers.0.a", ["layers.0.a"]),
        ("layers.*.[ab]", ["layers.0.a", "layers.1.b"]),
        ("la*.1", ["layers.1"]),
    ],
)
def test_paths_find_their_modules(path: str, names: list[str]) -> None:
    found = find_modules(MODEL, path)
    assert [name for name, _ in found] == names
    assert all(module is MODEL.get_submodule(name) for name, module in found)


@pytest.mark.parametrize("path", ["layer.*", "layers.2", "2-1.-1"])
def test_a_path_without_a_module_is_an_error(path: str) -> None:
    with pytest.raises(LookupError, match="ModuleDict has no module"):
        find_modules(MODEL, path)
