"""Attention with heads of its own answers as torch's does."""

import pytest
import torch
from torch import nn

from deploykit.models.attention import (
    HeadAttention,
    can_replace,
    replace_attention,
    splitting_attention,
)


def pair(**options):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, **options).eval()
    return attention, HeadAttention(attention)


def tokens(count, seed=0, batch=(3,)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, count, 16, generator=generator)


def same(first, second):
    assert torch.allclose(first[0], second[0], atol=1e-6)
    assert (first[1] is None) == (second[1] is None)
    assert first[1] is None or torch.allclose(first[1], second[1], atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_self_attention_equals_torchs(bias, need_weights, average):
    torchs, ours = pair(bias=bias, batch_first=True)
    x, options = tokens(5), {"need_weights": need_weights, "average_attn_weights": average}
    same(torchs(x, x, x, **options), ours(x, x, x, **options))


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_to_other_tokens_equals_torchs(batch_first):
    torchs, ours = pair(batch_first=batch_first)
    query, key, value = tokens(5), tokens(7, 1), tokens(7, 2)
    if not batch_first:
        query, key, value = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    same(torchs(query, key, value), ours(query, key, value))


def test_a_single_sample_needs_no_batch():
    torchs, ours = pair()
    x = tokens(5, batch=())
    same(torchs(x, x, x), ours(x, x, x))


@pytest.mark.parametrize("kind", ["bool", "float", "one a head"])
@pytest.mark.parametrize("padding", [True, False])
def test_masks_are_torchs(kind, padding):
    torchs, ours = pair(batch_first=True)
    x = tokens(5)
    mask = torch.ones(5, 5).triu(1).bool()
    if kind == "float":
        mask = torch.zeros(5, 5).masked_fill(mask, float("-inf"))
    if kind == "one a head":
        mask = mask.expand(12, 5, 5)
    keys = torch.tensor([[False] * (5 - i) + [True] * i for i in range(3)]) if padding else None
    if keys is not None and kind == "float":
        keys = torch.zeros(3, 5).masked_fill(keys, float("-inf"))
    same(
        torchs(x, x, x, attn_mask=mask, key_padding_mask=keys),
        ours(x, x, x, attn_mask=mask, key_padding_mask=keys),
    )


def test_encoder_layer_of_torch_takes_it():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = tokens(5)
    with torch.no_grad():
        expected = layer(x)
        replace_attention(layer, ["self_attn"])
        assert isinstance(layer.self_attn, HeadAttention)
        assert torch.allclose(layer(x), expected, atol=1e-6)


def test_parameters_are_the_very_same():
    torchs, ours = pair()
    assert ours.in_proj.weight is torchs.in_proj_weight
    assert ours.out_proj.bias is torchs.out_proj.bias


@pytest.mark.parametrize(
    "options", [{"kdim": 8}, {"vdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}]
)
def test_attention_of_another_kind_is_not_replaced(options):
    attention = nn.MultiheadAttention(16, 4, **options)
    assert not can_replace(attention)
    module = nn.Sequential(attention)
    replace_attention(module, ["0"])
    assert module[0] is attention


def test_attention_that_is_the_whole_model_stays():
    attention = nn.MultiheadAttention(16, 4)
    with splitting_attention(attention):
        assert type(attention) is nn.MultiheadAttention
