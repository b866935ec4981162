"""Random small models of any of torch's functions: samples that are given together have the bits that they have alone."""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tests.unit.exact.shared import Sharing, random_inputs
from torch import Tensor, nn

Op = Callable[[Tensor, random.Random], Tensor]


def weight(source: random.Random, *shape: int, like: Tensor) -> Tensor:
    """A weight that is the same whenever the model runs."""
    generator = torch.Generator().manual_seed(source.getrandbits(32))
    return torch.randn(shape, generator=generator).to(like.dtype) * 0.3


def three(x: Tensor) -> Tensor:
    """Any tensor as [batch, rows, channels]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def heads(x: Tensor) -> Tensor:
    return three(x).unsqueeze(1)


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    return y


def multihead(x: Tensor, source: random.Random) -> Tensor:
    torch.manual_seed(source.getrandbits(16))
    state = torch.get_rng_state()
    layer = nn.MultiheadAttention(x.shape[-1], 1, batch_first=True, dtype=x.dtype)
    torch.set_rng_state(state)
    return layer(three(x), three(x), three(x))[0]  # type: ignore[no-any-return]


OPS: dict[str, Op] = {
    "matmul": lambda x, r: x @ weight(r, x.shape[-1], 9, like=x),
    "linear": lambda x, r: F.linear(x, weight(r, 16, x.shape[-1], like=x), weight(r, 16, like=x)),
    "linear to whole vectors": lambda x, r: F.linear(x, weight(r, 64, x.shape[-1], like=x)),
    "einsum": lambda x, r: torch.einsum("b...d,de->b...e", x, weight(r, x.shape[-1], 12, like=x)),
    "bmm": lambda x, r: torch.bmm(three(x), three(x).transpose(1, 2)),
    "baddbmm": lambda x, r: torch.baddbmm(weight(r, 1, like=x), three(x), three(x).transpose(1, 2)),
    "addmm": lambda x, r: torch.addmm(weight(r, 8, like=x), x.flatten(0, -2), weight(r, x.shape[-1], 8, like=x)),
    "conv1d": lambda x, r: F.conv1d(three(x), weight(r, 6, three(x).shape[1], 3, like=x), padding=1),
    "conv2d": lambda x, r: F.conv2d(heads(x), weight(r, 4, 1, 3, 3, like=x), padding=1),
    "layer_norm": lambda x, r: F.layer_norm(x, x.shape[-1:], weight(r, x.shape[-1], like=x)),
    "rms_norm": lambda x, r: F.rms_norm(x, x.shape[-1:]),
    "group_norm": lambda x, r: F.group_norm(x, 1),
    "attention": lambda x, r: F.scaled_dot_product_attention(heads(x), heads(x) * 0.5, heads(x)),
    "masked attention": lambda x, r: F.scaled_dot_product_attention(
        heads(x), heads(x), heads(x), attn_mask=torch.ones(x.shape[0], 1, 1, three(x).shape[1], dtype=torch.bool)
    ),
    "causal attention": lambda x, r: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), is_causal=True),
    "multi-head layer": multihead,
    "softmax": lambda x, r: x.softmax(r.choice([-1, 1, 0])),
    "cumsum": lambda x, r: x.cumsum(r.choice([-1, 1, 0])),
    "sort": lambda x, r: x.sort(dim=r.choice([-1, 1])).values,
    "argsort": lambda x, r: x.gather(-1, x.argsort(-1)),
    "topk": lambda x, r: x.topk(2, dim=-1)[0],
    "mean": lambda x, r: x.mean(r.choice([-1, 1, 0, (1, 2), None]), keepdim=True),  # type: ignore[call-overload]
    "mean away": lambda x, r: x.mean(r.choice([-1, 1, 0])),
    "var": lambda x, r: x.var(r.choice([-1, 1]), keepdim=True, correction=0) + x,
    "norm": lambda x, r: x / torch.norm(x, dim=-1, keepdim=True),
    "normalize": lambda x, r: F.normalize(x, dim=1),
    "max": lambda x, r: x - x.max(-1, keepdim=True).values,
    "silu": lambda x, r: F.silu(x),
    "gelu": lambda x, r: F.gelu(x, approximate=r.choice(["none", "tanh"])),
    "tanh": lambda x, r: x.tanh(),
    "power": lambda x, r: x.abs() ** r.choice([2, 0.5, 3]),
    "complex": lambda x, r: torch.view_as_real(
        torch.complex(x.float(), x.float().flip(-1)) * torch.polar(x.float().abs(), x.float())
    ),
    "add": lambda x, r: torch.add(x, x.flip(-1), alpha=r.choice([1, 3])),
    "residual": lambda x, r: x + 0.5 * x.tanh(),
    "divide": lambda x, r: x / (x.abs() + 1),
    "where": lambda x, r: torch.where(x > 0, x, weight(r, 1, like=x)),
    "masked_fill": lambda x, r: x.masked_fill(x > 1, 0.5),
    "positions": lambda x, r: x * torch.arange(x.shape[-1]).to(x.dtype).cos(),
    "constants of the batch": lambda x, r: x + torch.ones(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype).cumsum(-1),
    "expanded table": lambda x, r: torch.cat([x, weight(r, 1, *x.shape[1:], like=x).expand(x.shape)], dim=-1),
    "index": lambda x, r: x[:, r.choice([0, -1, slice(0, 1), slice(1, None)])],
    "list index": lambda x, r: x[..., [0, -1, 0]],
    "batch index": lambda x, r: x + x[r.choice([0, -1])],
    "chunk": lambda x, r: x.chunk(2, dim=-1)[r.choice([0, -1])] * 2,
    "chunk of the batch": lambda x, r: torch.cat(x.chunk(2)[::-1]),
    "cat": lambda x, r: torch.cat([x, x.neg()], dim=r.choice([0, 1, -1])),
    "stack": lambda x, r: torch.stack([x, x * 2], dim=r.choice([0, 1, -1])),
    "unbind": lambda x, r: torch.stack([one.tanh() for one in x.unbind(r.choice([0, 1]))]),
    "pad": lambda x, r: F.pad(x, (1, 2), mode=r.choice(["constant", "reflect"])),
    "interpolate": lambda x, r: F.interpolate(three(x), scale_factor=2, mode=r.choice(["nearest", "linear"])),
    "pool": lambda x, r: F.avg_pool1d(three(x), 2),
    "transpose": lambda x, r: x.transpose(*r.choice([(1, -1), (0, 1)])),
    "permute": lambda x, r: x.permute(0, *range(x.ndim - 1, 0, -1)),
    "reshape": lambda x, r: x.reshape(x.shape[0], -1),
    "flatten": lambda x, r: x.flatten(r.choice([0, 1])).unsqueeze(-1),
    "unflatten": lambda x, r: x.unflatten(-1, (2, -1)),
    "unsqueeze": lambda x, r: x.unsqueeze(r.choice([0, 1, -1])),
    "squeeze": lambda x, r: x.squeeze(r.choice([1, -1])),
    "repeat": lambda x, r: x.repeat(*[1] * (x.ndim - 1), 2),
    "flip": lambda x, r: x.flip(r.choice([0, 1, -1])),
    "roll": lambda x, r: x.roll(1, r.choice([0, 1, -1])),
    "write": lambda x, r: in_place(x),
    "in place": lambda x, r: x.clone().add_(1),
    "written view": lambda x, r: x.contiguous().clone().view(-1).mul_(2).view(x.shape),
    "length": lambda x, r: x * x.shape[0],
    "number": lambda x, r: x * x.float().sum().item(),
    "embedding": lambda x, r: F.embedding(x.abs().long().clamp(max=4), weight(r, 5, 8, like=x)),
    "cast": lambda x, r: x.to(torch.float64).to(x.dtype).contiguous(),
    "bessel": lambda x, r: torch.special.i0(x.float()).to(x.dtype),
    "log cosh": lambda x, r: F.softplus(x) - F.logsigmoid(x),
    "noise off": lambda x, r: F.dropout(x, 0.5, training=False),
}


def model_of(names: list[str], seed: int) -> Callable[[Tensor], Tensor]:
    """The functions one after the other."""

    def compute(x: Tensor) -> Tensor:
        for index, name in enumerate(names):
            x = OPS[name](x, random.Random(seed + index))
        return x

    return compute


def runs(compute: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether the functions fit each other: a sample alone passes, and what comes out is of a moderate size."""
    try:
        result = compute(x)
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
        return False
    return isinstance(result, Tensor) and 1 <= result.ndim <= 6 and 0 < result.numel() < 200_000


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(sorted(OPS)), min_size=1, max_size=7),
    seed=st.integers(0, 2**16),
    shape=st.sampled_from([(1, 3, 5), (1, 4, 64), (2, 2, 8), (1, 17, 96), (1, 1, 7), (2, 16, 64)]),
    count=st.integers(2, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.sampled_from([1, 2]),
)
@torch.no_grad()
def test_any_model_gives_every_sample_its_bits(
    names: list[str], seed: int, shape: tuple[int, ...], count: int, dtype: torch.dtype, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs: list[dict[str, Any]] = random_inputs(count, *shape, dtype=dtype, seed=seed)
        fitting: list[str] = []
        for name in names:
            if runs(model_of([*fitting, name], seed), inputs[0]["x"]):
                fitting.append(name)
        sharing = Sharing(model_of(fitting, seed))
        assert sharing.is_exact(inputs), fitting
        event("shared" if sharing.shares() else "alone")
    finally:
        torch.set_num_threads(before)
