# SPDX-License-Identifier: AGPL-3.0-or-later
"""Blocks as users write them, for `benchmarks/blocks.py`.

Each takes the number of channels `c` and maps `(b, c, h, w)` to the same shape.
"""

import torch
import torch.nn.functional as F
from torch import nn

CASES = {}
SIZES = {"min_size_pool4": 640}  # others: 128


class BN1dGate(nn.Module):  # BAM's channel gate
    def __init__(self, c):
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(c, c // 4), nn.BatchNorm1d(c // 4), nn.Linear(c // 4, c)

    def forward(self, x):
        return x * self.fc2(self.bn(self.fc1(x.mean((2, 3)))).relu()).sigmoid()[..., None, None]


CASES["bn1d"] = BN1dGate


class PickForward(nn.Module):  # FasterNet's PConv
    def __init__(self, c):
        super().__init__()
        self.n = c // 4
        self.conv = nn.Conv2d(self.n, self.n, 3, 1, 1)
        self.forward = self.by_cat

    def by_cat(self, x):
        a, b = x.split([self.n, x.shape[1] - self.n], 1)
        return torch.cat((self.conv(a), b), 1)


CASES["pick_forward"] = PickForward


class PickPart(nn.Module):  # ODConv, RepVGG-likes
    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
        self.part = self.gate

    def gate(self, x):
        return self.b(x).sigmoid()

    def forward(self, x):
        return self.a(x) * self.part(x)


CASES["bound_method_attribute"] = PickPart


class ListOfModules(nn.Module):  # children seen in a plain list/dict as well as registered
    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
        self.steps = [self.a, self.b]

    def forward(self, x):
        for s in self.steps:
            x = s(x)
        return x


CASES["plain_list_of_children"] = ListOfModules


class TypeString(nn.Module):  # DeformConv in plain torch, AKConv, LDConv, DSConv
    def __init__(self, c):
        super().__init__()
        self.a = nn.Conv2d(c, c, 1)

    def forward(self, x):
        y = self.a(x)
        return y + torch.arange(y.shape[3]).type(y.type()) * 0


CASES["type_string"] = TypeString


class CpuTensor2(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a = nn.Conv2d(c, c, 1)

    def forward(self, x):
        return self.a(x) * torch.linspace(0, 1, x.shape[3])


CASES["cpu_tensor"] = CpuTensor2


class DropPath(nn.Module):  # timm's, torchvision's StochasticDepth, any fork's
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        return (
            x
            * torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 1 - self.p, dtype=x.dtype, device=x.device))
            / (1 - self.p)
        )


class Residual(nn.Module):
    def __init__(self, c, p=0.5):
        super().__init__()
        self.a, self.b, self.drop = nn.Conv2d(c, 4 * c, 1), nn.Conv2d(4 * c, c, 1), DropPath(p)

    def forward(self, x):
        return x + self.drop(self.b(F.gelu(self.a(x))))


CASES["drop_path"] = Residual


class FDrop(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, 4 * c, 1), nn.Conv2d(4 * c, c, 1)

    def forward(self, x):
        return x + self.b(F.dropout(F.gelu(self.a(x)), 0.1, self.training))


CASES["functional_dropout"] = FDrop


class ScalarBias(nn.Module):  # StarReLU, HGNetV2's LearnableAffineBlock
    def __init__(self, c, value=0.1):
        super().__init__()
        self.a, self.b, self.bias = (
            nn.Conv2d(c, 2 * c, 1),
            nn.Conv2d(2 * c, c, 1),
            nn.Parameter(torch.full((1,), value)),
        )

    def forward(self, x):
        return self.b(self.a(x).relu() ** 2 + self.bias)


CASES["scalar_bias"] = ScalarBias


class ChannelBias(nn.Module):  # NAFNet's beta, position embeddings, ...
    def __init__(self, c, value=0.1, shape=(1, -1, 1, 1)):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(2 * c, c, 1)
        self.beta = nn.Parameter(torch.full((2 * c,), value).view(shape))

    def forward(self, x):
        return self.b(self.a(x).relu() + (self.beta if self.beta.ndim > 1 else self.beta[:, None, None]))


CASES["channel_bias_1C11"] = ChannelBias


class Square(nn.Module):  # anything that knows its tokens to be a square
    def __init__(self, c):
        super().__init__()
        self.a = nn.Conv2d(c, c, 1)

    def forward(self, x):
        t = x.flatten(2)
        n = int(t.shape[2] ** 0.5)
        return self.a(t.unflatten(2, (n, n))).flatten(2).view(x.shape)


CASES["square_only"] = Square


class FixedPos(nn.Module):  # a position embedding of the training resolution
    def __init__(self, c, n=4):
        super().__init__()
        self.a = nn.Conv2d(c, c, 1)
        self.pos = nn.Parameter(torch.randn(1, 1, n, n))

    def forward(self, x):
        return self.a(x) + self.pos


CASES["fixed_resolution"] = FixedPos


class AssertC(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.a = nn.Conv2d(c, c, 1)

    def forward(self, x):
        assert x.shape[1] == self.c, f"expected {self.c} channels"
        return self.a(x)


CASES["asserts_channels"] = AssertC


class FGroups(nn.Module):  # VanillaNet's activation, shift convolutions, wavelet pools: functional depthwise
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.a = nn.Conv2d(c, c, 1)
        self.weight = nn.Parameter(torch.randn(c, 1, 3, 3))

    def forward(self, x):
        return F.conv2d(self.a(x), self.weight, padding=1, groups=self.c)


CASES["functional_depthwise_own_groups"] = FGroups


class MyHooks(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
        self.my_hooks = {"n": 2}

    def forward(self, x):
        return self.b(self.a(x)) * self.my_hooks["n"]


CASES["attribute_called_hooks"] = MyHooks


class ManualMean(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 1), nn.Conv2d(1, 1, 3, 1, 1)

    def forward(self, x):
        x = self.a(x)
        return x * self.b(x.sum(1, keepdim=True) / x.shape[1]).sigmoid()


CASES["manual_channel_mean"] = ManualMean


class Unfl(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.u, self.b = nn.Conv2d(c, c, 1), nn.Unflatten(1, (4, c // 4)), nn.Conv2d(c, c, 1)

    def forward(self, x):
        return self.b(self.u(self.a(x)).transpose(1, 2).flatten(1, 2))


CASES["nn_unflatten"] = Unfl


class Autocast(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        with torch.autocast("cuda", enabled=False):
            return self.b(self.a(x.float()).relu())


CASES["float_cast"] = Autocast


class Train2(nn.Module):  # another way in eval mode
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.a, self.b = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        y = self.a(x)
        if not self.training:
            y = y * (self.c / y.shape[1])
        return self.b(y)


CASES["eval_only_width_factor"] = Train2


class SE(nn.Module):  # as everybody writes it
    def __init__(self, c):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(c, c // 4), nn.ReLU(), nn.Linear(c // 4, c), nn.Sigmoid())

    def forward(self, x):
        b, c, _, _ = x.size()
        return x * self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1)


CASES["se_view"] = SE


class MinSize(nn.Module):  # pools by 4 at the deepest level
    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        x = self.a(x)
        return self.b(x * F.interpolate(F.avg_pool2d(x, 4), x.shape[2:]).sigmoid())


CASES["min_size_pool4"] = MinSize


class Weighted(nn.Module):  # learned weights of inputs, as in BiFPN
    def __init__(self, c):
        super().__init__()
        self.a, self.b, self.w = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1), nn.Parameter(torch.ones(2))

    def forward(self, x):
        w = self.w.relu()
        w = w / (w.sum() + 1e-4)
        return self.b(w[0] * x + w[1] * self.a(x))


CASES["learned_input_weights"] = Weighted
