"""Residual networks of both versions, with a stem that fits the size of the images.

v1: K. He et al., "Deep Residual Learning for Image Recognition" (2015, arXiv:1512.03385), table 1,
projection shortcuts where the shape changes (its option B). v2: K. He et al., "Identity Mappings in
Deep Residual Networks" (2016, arXiv:1603.05027), BatchNorm and ReLU before each convolution.

The stem is the published 7 x 7 convolution with stride 2 and 3 x 3 max pooling with stride 2 for
images of 64 pixels and more. On smaller ones it would leave a map of 7 x 7 or less to the first
stage; they get a 3 x 3 convolution with stride 1 and no pooling, as the network for CIFAR-10 does
in section 4.2 of the first paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import jax
from flax import linen as nn

from esync.models.resize import resize

# Images with a shorter edge than this, in pixels, get the stem for small images.
SMALL_IMAGE = 64

conv = partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())
norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)

# A residual branch whose last BatchNorm scale is zero starts as the identity, which lets a deep
# network take large first steps (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
zero_scale = nn.initializers.zeros_init()


class BasicV1(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; ReLU after the sum."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        still = not train
        shortcut = x
        strides = (self.stride, self.stride)
        x = conv(self.features, (3, 3), strides=strides, padding=1)(x)
        x = nn.relu(norm(use_running_average=still)(x))
        x = conv(self.features, (3, 3), padding=1)(x)
        x = norm(use_running_average=still, scale_init=zero_scale)(x)
        if shortcut.shape != x.shape:
            shortcut = conv(self.features, (1, 1), strides=strides)(shortcut)
            shortcut = norm(use_running_average=still)(shortcut)
        return nn.relu(x + shortcut)


class BottleneckV1(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut; ReLU after the sum.

    The output has 4 x `features` channels. The stride is in the first convolution, as published.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        still = not train
        shortcut = x
        strides = (self.stride, self.stride)
        x = conv(self.features, (1, 1), strides=strides)(x)
        x = nn.relu(norm(use_running_average=still)(x))
        x = conv(self.features, (3, 3), padding=1)(x)
        x = nn.relu(norm(use_running_average=still)(x))
        x = conv(4 * self.features, (1, 1))(x)
        x = norm(use_running_average=still, scale_init=zero_scale)(x)
        if shortcut.shape != x.shape:
            shortcut = conv(4 * self.features, (1, 1), strides=strides)(shortcut)
            shortcut = norm(use_running_average=still)(shortcut)
        return nn.relu(x + shortcut)


class BottleneckV2(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, each after BatchNorm and ReLU; nothing after the sum.

    The output has 4 x `features` channels.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        still = not train
        shortcut = x
        strides = (self.stride, self.stride)
        x = nn.relu(norm(use_running_average=still)(x))
        if self.stride != 1 or shortcut.shape[-1] != 4 * self.features:
            shortcut = conv(4 * self.features, (1, 1), strides=strides)(x)
        x = conv(self.features, (1, 1), strides=strides)(x)
        x = nn.relu(norm(use_running_average=still)(x))
        x = conv(self.features, (3, 3), padding=1)(x)
        x = nn.relu(norm(use_running_average=still)(x))
        return conv(4 * self.features, (1, 1))(x) + shortcut


class Block(Protocol):
    """What makes a residual block of a width and a stride."""

    def __call__(self, *, features: int, stride: int) -> nn.Module: ...


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, the mean over the map, and a dense layer.

    `depths` is the number of blocks in each stage; stage i is 64 * 2**i features wide and, from
    the second on, halves the map. `preactivated` is what version 2 needs around its blocks:
    BatchNorm and ReLU after the last block instead of after the stem.
    """

    classes: int
    block: Block
    depths: Sequence[int]
    preactivated: bool = False
    image_size: int | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits, shape (N, classes), of `images`, shape (N, H, W, C)."""
        x = self._stem(resize(images, self.image_size), train)
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                x = self.block(features=64 * 2**stage, stride=stride)(x, train)
        if self.preactivated:
            x = nn.relu(norm(use_running_average=not train)(x))
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))

    def _stem(self, x: jax.Array, train: bool) -> jax.Array:
        """The map that the first stage sees: (N, H, W, 64), or a quarter of H and W if large."""
        small = min(x.shape[1:3]) < SMALL_IMAGE
        edge, stride, padding = (3, 1, 1) if small else (7, 2, 3)
        x = conv(64, (edge, edge), strides=(stride, stride), padding=padding)(x)
        if not self.preactivated:
            x = nn.relu(norm(use_running_average=not train)(x))
        if not small:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return x


resnet18_v1 = partial(ResNet, block=BasicV1, depths=(2, 2, 2, 2))
resnet50_v1 = partial(ResNet, block=BottleneckV1, depths=(3, 4, 6, 3))
resnet50_v2 = partial(ResNet, block=BottleneckV2, depths=(3, 4, 6, 3), preactivated=True)
