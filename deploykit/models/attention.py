"""Attention whose heads can be fewer than its features would fill."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, scaled_dot_product_attention


class HeadAttention(nn.Module):
    """Multi-head attention in which heads and features are numbers of their own.

    ``torch.nn.MultiheadAttention`` computes the size of a head as features by heads, so a head
    cannot be removed from it. This one gives the same answers and is called in the same way.

    Attributes:
        num_heads: heads ``h``.
        head_dim: features of a head ``d``, of query, key and value alike.
        in_proj: query, key and value in one layer, ``3 h d`` outputs.
        out_proj: ``h d`` inputs.
    """

    # Encoder layers ask for these before they take a kernel that knows torch's own attention only.
    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.embed_dim = self.kdim = self.vdim = attention.embed_dim
        self.head_dim = attention.embed_dim // attention.num_heads
        self.scale = self.head_dim**-0.5
        self.batch_first = attention.batch_first
        self.dropout = attention.dropout
        self.in_proj = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.training = attention.training

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; shapes, masks and results are those of ``torch.nn.MultiheadAttention``."""
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._heads(x) for x in self._project(query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, q)
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.scale
            shares = (scores if mask is None else scores + mask).softmax(-1)
            answer = dropout(shares, p) @ v
            weights = shares.mean(1) if average_attn_weights else shares
        else:
            answer = scaled_dot_product_attention(q, k, v, mask, p, scale=self.scale)
        answer = self.out_proj(answer.transpose(1, 2).flatten(2))
        if not batched:
            return answer.squeeze(0), weights if weights is None else weights.squeeze(0)
        return answer if self.batch_first else answer.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        if query is key and key is value:
            projected: Tensor = self.in_proj(query)
            return projected.chunk(3, -1)
        weights = self.in_proj.weight.chunk(3)
        biases = [None] * 3 if self.in_proj.bias is None else self.in_proj.bias.chunk(3)
        return [linear(*parts) for parts in zip((query, key, value), weights, biases, strict=True)]

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """Add both masks up, ``(N, h, tokens, tokens)`` or what broadcasts to it."""
        mask = _additive(mask, like)
        if mask is not None and mask.ndim == 3:
            mask = mask.reshape(-1, self.num_heads, *mask.shape[1:])
        if padding is None:
            return mask
        keys = _additive(padding, like)
        assert keys is not None
        keys = keys.reshape(-1, 1, 1, padding.shape[-1])
        return keys if mask is None else mask + keys


def replace_attention(module: nn.Module, names: Iterable[str]) -> None:
    """Put `HeadAttention` with the same weights in place of torch's own, in place.

    Names of anything else are passed over.
    """
    for name in names:
        part = module.get_submodule(name)
        if can_replace(part):
            module.set_submodule(name, HeadAttention(part))


def split_attention(module: nn.Module) -> nn.Module:
    """Let heads be removed from all attention in ``module``, in place."""
    replace_attention(module, [name for name, _ in module.named_modules() if name])
    return module


@contextmanager
def splitting_attention(module: nn.Module) -> Iterator[None]:
    """Let heads be removed inside: where none was, torch's own attention comes back."""
    names = [name for name, part in module.named_modules() if name and can_replace(part)]
    before = {name: module.get_submodule(name) for name in names}
    split_attention(module)
    try:
        yield
    finally:
        for name, attention in before.items():
            now: Any = module.get_submodule(name)
            whole: Any = attention
            same = now.in_proj.weight is whole.in_proj_weight
            if same and now.out_proj.weight is whole.out_proj.weight:
                module.set_submodule(name, attention)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Let torch compute attention by single operators, not by one that hides them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def can_replace(part: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Tell whether `HeadAttention` can stand for a module."""
    return (
        type(part) is nn.MultiheadAttention
        and part.in_proj_weight is not None
        and part.bias_k is None
        and not part.add_zero_attn
    )


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """Return a layer that holds these very parameters."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
