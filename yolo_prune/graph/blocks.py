# SPDX-License-Identifier: AGPL-3.0-or-later
"""The rules for Ultralytics' blocks: constraints, attributes that store a width, and channels to protect.

The trace reads everything else (sums, concatenations, depthwise convolutions, pooling, ...) from the blocks' forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.modules import block, conv, head
from ultralytics.nn.modules import transformer as transformers

from yolo_prune.env.releases import Blocks
from yolo_prune.graph.probes import PROMPTS, register_probe
from yolo_prune.graph.rules import Facts, read_as_is, register_block

b, c, h, t = Blocks(block), Blocks(conv), Blocks(head), Blocks(transformers)

# These blocks need no facts: their forward works with any layer widths.
read_as_is(tasks.BaseModel)
read_as_is(c.Conv, c.Conv2, c.LightConv, c.ConvTranspose, c.Focus, c.GhostConv, c.Concat, c.Index)
read_as_is(c.ChannelAttention, c.SpatialAttention, c.CBAM)
read_as_is(b.Bottleneck, b.BottleneckCSP, b.C1, b.C3, b.C3f, b.RepC3, b.GhostBottleneck, b.CIB, b.SCDown, b.PSABlock)
read_as_is(b.SPP, b.SPPF, b.SPPELAN, b.AConv, b.HGStem, b.HGBlock, b.ResNetBlock, b.ResNetLayer, b.TorchVision)
read_as_is(b.Proto, b.Proto26, b.CBFuse, b.ABlock, b.A2C2f, b.Residual, b.SwiGLUFFN)
read_as_is(t.MLP, t.MLPBlock, t.LayerNorm2d, t.TransformerLayer, t.TransformerEncoderLayer)
read_as_is(t.DeformableTransformerDecoderLayer, t.DeformableTransformerDecoder)
read_as_is(h.Depth, h.Classify, h.SemanticSegment)


@register_block(b.C2, b.C2f, b.C2PSA, b.PSA, b.C2fAttn, b.RepNCSPELAN4)
def halves(block: Any, facts: Facts) -> None:
    """`cv1` is split into two halves of `c` channels. The halves keep equal counts, but may lose different channels."""
    first, second = facts.parts("cv1", block.c, block.c)
    facts.equal(first, second)
    facts.attribute("c", first)


@register_block(b.ADown)
def adown(block: Any, facts: Facts) -> None:
    """`c` is the width of `cv1`. The trace itself sees that `chunk` splits the *input* into equal halves."""
    facts.attribute("c", facts.outputs("cv1"))


@register_block(b.CBLinear)
def cblinear(block: Any, facts: Facts) -> None:
    """One convolution makes several outputs. Each output can be pruned by itself; `CBFuse` couples those it sums."""
    facts.attribute_list("c2s", *facts.parts("conv", *block.c2s))


@register_block(c.RepConv)
def repconv(block: Any, facts: Facts) -> None:
    """Both branches have the same outputs. With an identity branch, inputs and outputs are the same channels too."""
    facts.attribute("c1", facts.inputs("conv1"))
    facts.attribute("c2", facts.outputs("conv1"))


@register_block(b.RepVGGDW)
def repvggdw(block: Any, facts: Facts) -> None:
    """Two depthwise convolutions read the same channels."""
    facts.attribute("dim", facts.outputs("conv"))


@register_block(b.Attention)
def attention(block: Any, facts: Facts) -> None:
    """All heads have equal sizes, and heads x head_dim is the input's width. `scale` keeps its trained value."""
    role = [block.key_dim, block.key_dim, block.head_dim]
    pieces = facts.parts("qkv", *role * block.num_heads)
    q, k, v = pieces[0::3], pieces[1::3], pieces[2::3]
    if facts.heads == "heads":
        for head in zip(q, k, v, strict=True):
            facts.whole(*head)
        facts.equal(facts.inputs("qkv"), facts.outputs("qkv"))
        facts.attribute("num_heads", facts.outputs("qkv"), per=sum(role))
        return
    facts.equal(*q, *k)
    facts.equal(facts.inputs("qkv"), *v)
    facts.attribute("key_dim", q[0])
    facts.attribute("head_dim", v[0])


@register_block(b.AAttn)
def area_attention(block: Any, facts: Facts) -> None:
    """Queries, keys and values have equal sizes.

    Forward computes the scale from `head_dim`. The weights of the queries are multiplied to compensate for a new scale.
    """
    pieces = facts.parts("qkv", *[block.head_dim] * 3 * block.num_heads)
    if hasattr(block, "all_head_dim"):
        facts.attribute("all_head_dim", facts.outputs("pe"))
    else:  # before Ultralytics 8.4.60, forward takes the width of its input for it
        facts.equal(facts.inputs("qkv"), facts.outputs("pe"))
    if facts.heads == "heads":
        for head in zip(pieces[0::3], pieces[1::3], pieces[2::3], strict=True):
            facts.whole(*head)
        facts.attribute("num_heads", facts.outputs("pe"), per=block.head_dim)
        return
    facts.equal(*pieces)
    facts.attribute("head_dim", pieces[0])
    for q in pieces[0::3]:
        facts.fold("qkv", q, pieces[0], 0.5)


@register_block(b.MaxSigmoidAttnBlock)
def max_sigmoid_attention(block: Any, facts: Facts) -> None:
    """The heads of `gl` have equal sizes, and so do those of `proj_conv`. Forward divides by the root of the size."""
    guide = facts.parts("gl", *[block.hc] * block.nh)
    out = facts.outputs("proj_conv")
    image = facts.parts("proj_conv", *[len(out) // block.nh] * block.nh)
    facts.equal(*image)
    facts.equal(*guide)
    facts.attribute("hc", guide[0])
    facts.fold("gl", facts.outputs("gl"), guide[0], 0.5)


@register_block(t.MSDeformAttn)
def deformable_attention(block: Any, facts: Facts) -> None:
    """The values have the same size in every head."""
    values = facts.parts("value_proj", *[block.d_model // block.n_heads] * block.n_heads)
    facts.equal(*values)
    facts.attribute("d_model", facts.outputs("value_proj"))
    for name in ("sampling_offsets", "attention_weights"):
        facts.fixed(facts.outputs(name), "sampling points of deformable attention")


@register_block(nn.MultiheadAttention)
def multihead_attention(block: nn.MultiheadAttention, facts: Facts) -> None:
    """Torch's attention has the same width for input and output, and divides this width into heads."""
    reason = "width of nn.MultiheadAttention"
    facts.because(reason)
    facts.fixed(facts.parameter("in_proj_weight", 0), reason)
    facts.fixed(facts.parameter("in_proj_weight", 1), reason)
    facts.fixed(facts.outputs("out_proj"), reason)
    facts.fixed(facts.inputs("out_proj"), reason)


@register_block(nn.RNN, nn.LSTM, nn.GRU)
def recurrent(block: nn.RNNBase, facts: Facts) -> None:
    """Torch's recurrent layers check their input against the sizes from their constructor."""
    for name, parameter in block.named_parameters(recurse=False):
        for dim in range(parameter.ndim):
            facts.fixed(facts.parameter(name, dim), "width of a recurrent layer")


@register_block(t.AIFI, t.TransformerBlock)
def transformer(block: nn.Module, facts: Facts) -> None:
    """Attention (and the position embedding) fixes the width of the stream. Hidden layers can be pruned."""
    facts.because("width of a transformer's stream")


@register_block(nn.Embedding)
def embedding(block: nn.Embedding, facts: Facts) -> None:
    """Rows are classes or queries; columns are the stream of a transformer. Neither can be pruned."""
    for dim in (0, 1):
        facts.fixed(facts.parameter("weight", dim), "embedding")


@register_block(b.ImagePoolingAttn, b.ContrastiveHead, b.BNContrastiveHead, b.SAVPE)
def text(block: nn.Module, facts: Facts) -> None:
    """These blocks combine channels with a text embedding, and another model sets the width of that embedding."""
    facts.because("width of the text embedding")
    if isinstance(block, b.ImagePoolingAttn):
        for name in ("query.1", "key.1", "value.1", "proj"):
            facts.fixed(facts.outputs(name), "width of the text embedding")
    if isinstance(block, b.SAVPE):
        for name in ("cv3", "cv4", "cv5", "cv6.1"):
            facts.fixed(facts.outputs(name), "width of the prompt embedding")


@register_block(b.DFL)
def dfl(block: Any, facts: Facts) -> None:
    """A fixed sum over the bins of a box distribution."""
    for rows in (facts.outputs("conv"), facts.inputs("conv")):
        facts.fixed(rows, "box distribution (DFL)")


@register_block(h.Detect, h.Segment, h.Segment26, h.Pose, h.OBB, h.OBB26, h.WorldDetect, h.YOLOEDetect)
@register_block(h.YOLOESegment, h.YOLOESegment26)
def detect(block: Any, facts: Facts) -> None:
    """Only outputs are fixed. A one-to-one branch keeps the widths of its twin, because either can be deployed."""
    for name, child in block.named_children():
        twin = getattr(block, name.removeprefix("one2one_"), None)
        if not name.startswith("one2one_") or twin is None:
            continue
        facts.spare(name)
        for (path, layer), (_, other) in zip(child.named_modules(), twin.named_modules(), strict=True):
            if isinstance(layer, nn.Conv2d) and layer.groups == 1 and isinstance(other, nn.Conv2d):
                inner = f".{path}" if path else ""
                facts.equal(facts.outputs(f"{name}{inner}"), facts.outputs(f"{name.removeprefix('one2one_')}{inner}"))


@register_block(h.RTDETRDecoder)
def rtdetr(block: Any, facts: Facts) -> None:
    """Layer norms fix the width of the decoder's stream. Hidden layers and values can be pruned."""
    facts.because("width of a transformer's stream")


@register_probe(Blocks(tasks).YOLOEModel)
def prompts(model: Any, image: Any) -> Any:
    """Run YOLOE with text and visual prompts. A plain forward pass uses none, so it leaves these parts out."""
    head = model.model[-1]
    if getattr(head, "is_fused", False) or not hasattr(head, "savpe"):
        return None
    generator = torch.Generator(device="cpu").manual_seed(0)
    text = torch.rand(1, PROMPTS, head.embed, generator=generator, dtype=image.dtype).to(image.device)
    size = [int(n // head.stride[0]) for n in image.shape[2:]]
    boxes = (torch.rand(1, PROMPTS, *size, generator=generator) > 0.5).to(image)
    return model.predict(image, tpe=text, vpe=boxes)
