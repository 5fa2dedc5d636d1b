"""Small models of every family of layers that pruning knows, with the widths that halving gives."""

import torch
from torch import nn
from torch.nn import functional


class Vision(nn.Module):
    """A transformer with all that vision transformers keep outside their layers."""

    def __init__(self, attention, features=16):
        super().__init__()
        self.features = features
        self.patch = nn.Conv2d(3, features, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, features))
        self.position = nn.Parameter(torch.randn(1, 5, features))
        self.norm = nn.LayerNorm(features)
        self.attention = attention()
        self.scale = nn.Parameter(torch.randn(features))
        self.up, self.down = nn.Linear(features, 32), nn.Linear(32, features)
        self.head = nn.Linear(features, 5)

    def forward(self, x):
        x = self.patch(x).reshape(len(x), self.features, 4).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        x = x + self.scale * self.attention(self.norm(x))
        return self.head((x + self.down(functional.gelu(self.up(x))))[:, 0])


class TorchAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class WrittenAttention(nn.Module):
    """Heads and their features are attributes, as in timm; every head has a bias by distance."""

    def __init__(self, fused=True):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim, self.fused = 4, 4, 16, fused
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(9, 4))
        self.register_buffer("index", torch.arange(25) % 9)

    def forward(self, x):
        n, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index].view(5, 5, -1).permute(2, 0, 1).unsqueeze(0)
        if self.fused:
            x = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            x = ((q @ k.transpose(-2, -1)) * 0.5 + bias).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, tokens, self.attn_dim))


class TiedAttention(nn.Module):
    """The size of a head follows from the width of the stream, as in Swin: no head can go."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        n, tokens, c = x.shape
        qkv = functional.linear(x, self.qkv.weight, self.qkv.bias)
        qkv = qkv.reshape(n, tokens, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = (q @ k.transpose(-2, -1) * (c // self.num_heads) ** -0.5).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, tokens, c))


class GroupedQueries(nn.Module):
    """Eight heads of queries read two heads of keys and values, in one layer."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, (8 + 2 + 2) * 4), nn.Linear(32, 16)

    def forward(self, x):
        n, tokens, _ = x.shape
        parts = self.qkv(x).split([32, 8, 8], -1)
        q, k, v = (part.reshape(n, tokens, -1, 4).transpose(1, 2) for part in parts)
        k, v = (part.repeat_interleave(4, 1) for part in (k, v))
        x = functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.proj(x.transpose(1, 2).reshape(n, tokens, 32))


class Between(nn.Module):
    """Two convolutions with layers between them, and a head."""

    def __init__(self, *layers, width=16, readers=16):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.between = nn.Sequential(*layers)
        self.last = nn.Conv2d(readers, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.last(self.between(self.first(x))).mean((2, 3)))


class Does(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Scaled(nn.Module):
    """A scale and a shift in a list."""

    def __init__(self):
        super().__init__()
        self.both = nn.ParameterList([torch.rand(16, 1, 1), torch.rand(16, 1, 1)])

    def forward(self, x):
        return x * self.both[0] + self.both[1]


class Shuffle(nn.Module):
    """A ShuffleNet unit."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        )

    def forward(self, x):
        first, second = x.chunk(2, 1)
        x = torch.cat([first, self.branch(second)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def glu(x):
    return functional.glu(x, 1)


FAMILIES = {
    "attention of torch": (lambda: Vision(TorchAttention), {"patch": 8, "up": 16}),
    "attention written out": (
        lambda: Vision(lambda: WrittenAttention(fused=False)),
        {"patch": 8, "attention.qkv": 24, "attention.proj": 8},
    ),
    "fused attention": (lambda: Vision(WrittenAttention), {"patch": 8, "attention.qkv": 24}),
    "depthwise": (
        lambda: Between(nn.Conv2d(16, 16, 3, groups=16), nn.PReLU(16)),
        {"first": 8, "between.0": 8},
    ),
    "depthwise of two outputs a channel": (
        lambda: Between(nn.Conv2d(16, 32, 3, groups=16), readers=32),
        {"first": 8, "between.0": 16},
    ),
    "grouped": (
        lambda: Between(nn.Conv2d(16, 32, 3, groups=4), nn.BatchNorm2d(32), readers=32),
        {"first": 8, "between.0": 16},
    ),
    "transposed": (lambda: Between(nn.ConvTranspose2d(16, 16, 2)), {"first": 8, "between.0": 8}),
    "transposed and grouped": (
        lambda: Between(nn.ConvTranspose2d(16, 16, 2, groups=4)),
        {"first": 8, "between.0": 8},
    ),
    "transposed and depthwise": (
        lambda: Between(nn.ConvTranspose2d(16, 16, 2, groups=16)),
        {"first": 8, "between.0": 8},
    ),
    "group norm": (lambda: Between(nn.GroupNorm(4, 16)), {"first": 8}),
    "group norm without weights": (
        lambda: Between(nn.GroupNorm(4, 16, affine=False)),
        {"first": 8},
    ),
    "layer norm over channels": (
        lambda: Between(
            Does(lambda x: x.permute(0, 2, 3, 1)),
            nn.LayerNorm(16),
            Does(lambda x: x.permute(0, 3, 1, 2)),
        ),
        {"first": 8},
    ),
    "layer norm without weights": (
        lambda: Between(
            Does(lambda x: x.permute(0, 2, 3, 1)),
            nn.LayerNorm(16, elementwise_affine=False),
            Does(lambda x: x.permute(0, 3, 1, 2)),
        ),
        {"first": 8},
    ),
    "layer norm over images": (lambda: Between(nn.LayerNorm((16, 8, 8))), {"first": 8}),
    "instance norm": (
        lambda: Between(nn.InstanceNorm2d(16, affine=True, track_running_stats=True)),
        {"first": 8},
    ),
    "instance norm without weights": (lambda: Between(nn.InstanceNorm2d(16)), {"first": 8}),
    "batch norm of the batch": (
        lambda: Between(nn.BatchNorm2d(16, affine=False, track_running_stats=False)),
        {"first": 8},
    ),
    "concat": (
        lambda: Between(Does(lambda x: torch.cat([x, x * 2], 1)), readers=32),
        {"first": 8},
    ),
    "stack": (
        lambda: Between(Does(lambda x: torch.stack([x, x.relu()], 1).sum(1))),
        {"first": 8},
    ),
    "chunk": (lambda: Between(Does(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1))), {"first": 8}),
    "gate": (lambda: Between(Does(glu), readers=8), {"first": 8}),
    "flatten": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 12), nn.Linear(12, 5)
        ),
        {"0": 8, "2": 6},
    ),
    "channel shuffle": (lambda: Between(Shuffle()), {"between.0.branch.0": 4}),
    "squeeze and excite": (
        lambda: Between(Does(lambda x: x * x.mean((2, 3), keepdim=True).sigmoid())),
        {"first": 8},
    ),
    "pixel shuffle": (lambda: Between(nn.PixelShuffle(2), readers=4), {"first": 8}),
    "pixel unshuffle": (lambda: Between(nn.PixelUnshuffle(2), readers=64), {"first": 8}),
    "unfold": (
        lambda: Between(nn.Unfold(2), Does(lambda x: x.unsqueeze(-1)), readers=64),
        {"first": 8},
    ),
    "list of parameters": (lambda: Between(Scaled()), {"first": 8}),
    "buffer": (lambda: Between(nn.BatchNorm2d(16, affine=False)), {"first": 8}),
}
