"""Samples whose texts differ in length, in one forward: every sample has the bits that it has alone."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tests.unit.exact.shared import Sharing
from torch import Tensor

from flowroll.exact import ragged, ragged_ways

Compute = Callable[[Tensor, Tensor], Tensor]
WIDTH = 64


def weight(seed: int, *shape: int, like: Tensor) -> Tensor:
    """A weight that is the same whenever the model runs."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype) * 0.1


def heads(x: Tensor, count: int = 2) -> Tensor:
    return x.unflatten(-1, (count, -1))


def attend(x: Tensor, **options: Any) -> Tensor:
    query, key, value = (heads(one).transpose(1, 2) for one in (x, x * 0.5, x.neg()))
    return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).flatten(2, 3)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    turned = torch.view_as_complex(heads(x).float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)).flatten(2).to(x.dtype)


def positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[:, None] * torch.arange(1, WIDTH // 4 + 1) / 7


# What is done to a text, as [1, rows, channels] before and after. The first ones a model may well do; the others carry numbers
# from row to row, or depend on the number of rows.
ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, weight(1, WIDTH, WIDTH, like=x), weight(2, WIDTH, like=x)),
    "linear without bias": lambda x: F.linear(x, weight(3, WIDTH, WIDTH, like=x)),
    "layer norm": lambda x: F.layer_norm(x, (WIDTH,)),
    "rms": lambda x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "odd gelu": lambda x: F.pad(F.gelu(x[..., :33]), (0, WIDTH - 33)),
    "modulate": lambda x: x * (1 + weight(4, 1, 1, WIDTH, like=x)) + 0.5,
    "halves": lambda x: torch.cat([x.chunk(2, dim=-1)[1], x[..., :32].neg()], dim=-1),
    "softmax": lambda x: x.softmax(-1),
    "attention": attend,
    "rotation": lambda x: rotate(x, positions(x)),
    "table": lambda x: x + weight(5, 50, WIDTH, like=x)[: x.shape[1]],
}
ACROSS: dict[str, Callable[[Tensor], Tensor]] = {
    "cumsum": lambda x: x.cumsum(1),
    "flip": lambda x: x.flip(1),
    "softmax over rows": lambda x: x.softmax(1),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "masked attention": lambda x: attend(x, attn_mask=torch.ones(1, 1, 1, x.shape[1], dtype=torch.bool)),
    "causal attention": lambda x: attend(x, is_causal=True),
    "scaled by length": lambda x: x * (1.0 / x.shape[1]),
    "positions from the end": lambda x: x + torch.arange(x.shape[1]).flip(0)[:, None],
    "last row": lambda x: x + x[:, -1:],
    "first row": lambda x: x + x[:, :1],
    "rows in pairs": lambda x: x.reshape(1 if len(x) == 1 else len(x), -1).view_as(x),
    "convolution": lambda x: F.conv1d(x.mT, weight(6, WIDTH, WIDTH, 3, like=x), padding=1).mT.contiguous(),
    "long texts": lambda x: x * 2 if x.shape[1] > 6 else x,
    "scores": lambda x: (x @ x.mT).softmax(-1) @ x,
    "dropped": lambda x: F.pad(x[:, 1:], (0, 0, 1, 0)),
    "split rows": lambda x: torch.cat(x.split([1, x.shape[1] - 1], dim=1)[::-1], dim=1),
}


def joint(text: Tensor, image: Tensor, order: str) -> Tensor:
    """The image's rows after attention over both, as the text and the image are ordered."""
    rows = text.shape[1]
    if order == "text first":
        return attend(torch.cat([text, image], dim=1))[:, rows:].contiguous()
    if order == "image first":
        return attend(torch.cat([image, text], dim=1))[:, : image.shape[1]].contiguous()
    return attend(torch.cat([text, image], dim=1)).split_with_sizes([rows, image.shape[1]], dim=1)[1] * 2


def model_of(names: list[str], order: str) -> Compute:
    def compute(text: Tensor, image: Tensor) -> Tensor:
        for name in names:
            text = (ROWS | ACROSS)[name](text)
        return image + joint(text, image, order)

    return compute


def samples(lengths: list[int], dtype: torch.dtype, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, 8) for length in lengths]
    return [
        {name: torch.randn(1, rows, WIDTH, generator=generator).to(dtype) for name, rows in (("text", text), ("image", image))}
        for text, image in shapes
    ]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from([*ROWS] * 3 + [*ACROSS]), min_size=1, max_size=5),
    order=st.sampled_from(["text first", "image first", "split"]),
    lengths=st.lists(st.integers(1, 13), min_size=2, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.sampled_from([1, 2]),
)
@torch.no_grad()
def test_any_model_gives_every_sample_its_bits(
    names: list[str], order: str, lengths: list[int], dtype: torch.dtype, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sharing = Sharing(model_of(names, order))
        # One after the other: what was noted for some lengths is used for others.
        for seed, some in enumerate((lengths, lengths[::-1], [length % 13 + 1 for length in lengths])):
            assert sharing.is_exact(samples(some, dtype, seed)), some
        event("shared" if sharing.shares() else "alone")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("order", ["text first", "image first", "split"])
@torch.no_grad()
def test_row_by_row_models_share_one_forward(order: str) -> None:
    """Whatever the lengths; and attention sees no padding, which would change the bits."""
    sharing = Sharing(model_of([name for name in ROWS if name != "odd gelu"], order))
    for lengths in ([5, 9, 7], [4, 12, 11], [12, 10, 9]):
        assert sharing.is_exact(samples(lengths, torch.float32))
    sharing.model.lengths.clear()
    sharing.forwards.outputs(sharing.model, samples([9, 5, 12], torch.float32))
    assert sharing.model.lengths == [3]
    assert not [name for notes in sharing.analyses for name in notes.without_rule]


@torch.no_grad()
def test_a_length_is_compared_once_with_the_sample_alone() -> None:
    """A model that does something else with long texts is noticed at the first long text, not only when it is analyzed."""
    sharing = Sharing(model_of(["linear"], "text first"))
    sharing.forwards.outputs(sharing.model, samples([5, 7], torch.float32))
    (known,) = sharing.forwards._known.values()
    assert [seen for seen in known.lengths.values()] == [{5, 7}]
    sharing.model.lengths.clear()
    for _ in range(2):
        sharing.forwards.outputs(sharing.model, samples([6, 7], torch.float32))
    assert sharing.model.lengths == [2, 1, 2]
    calls = []

    def odd(text: Tensor, image: Tensor) -> Tensor:
        calls.append(text.shape[1])
        return model_of(["linear"], "text first")(text * (1.5 if text.shape[1] == 6 else 1), image)

    sharing = Sharing(odd)
    sharing.forwards.outputs(sharing.model, samples([5, 7], torch.float32))
    assert sharing.is_exact(samples([6, 7], torch.float32))


@pytest.mark.parametrize("way", ["products", "attention"])
@torch.no_grad()
def test_without_its_question_bits_change(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The faults that the ways prevent are noticed: few rows multiplied with many; keys that are padded."""
    if way == "products":
        monkeypatch.setattr(ragged_ways, "_runs_together", lambda lengths, *_: (True,) * len(lengths.runs))
    else:
        monkeypatch.setattr(ragged, "RaggedAttention", lambda _: lambda samples, func, args, kwargs: func(*args, **kwargs))
    sharing = Sharing(model_of(["linear", "layer norm"], "text first"))
    assert sharing.is_exact(samples([1, 2, 9], torch.float32))
    assert not sharing.shares()


def test_lengths_of_random_order_come_back_in_theirs() -> None:
    sharing, source = Sharing(model_of(["linear", "rotation"], "text first")), random.Random(0)
    with torch.no_grad():
        for _ in range(5):
            assert sharing.is_exact(samples([source.randint(1, 9) for _ in range(6)], torch.bfloat16))


def test_gradients_flow_through_a_shared_forward() -> None:
    """As through the samples alone, up to the order of sums; none comes from the padding."""
    base = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)) * 0.1

    def gradient(together: bool) -> tuple[Tensor, list[Tensor]]:
        one = base.clone().requires_grad_()

        def compute(text: Tensor, image: Tensor) -> Tensor:
            return image + joint(F.layer_norm(F.linear(text, one), (WIDTH,)), F.linear(image, one), "text first")

        sharing, inputs = Sharing(compute), samples([5, 9, 6], torch.float32)
        some = [sharing.forwards.outputs(sharing.model, inputs) for _ in range(2)][-1] if together else []
        outputs: list[Any] = some or [compute(**sample) for sample in inputs]
        assert sharing.shares() == together if together else True
        torch.stack([output.square().mean() for output in outputs]).sum().backward()
        assert one.grad is not None
        return one.grad, [output.detach() for output in outputs]

    (shared, outputs), (alone, expected) = gradient(True), gradient(False)
    assert all(map(torch.equal, outputs, expected))
    assert (shared - alone).norm() < 1e-5 * alone.norm()
