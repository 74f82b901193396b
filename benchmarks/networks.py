"""The networks that are compared: one description, read by everybody.

A network is a list of layers in the order in which they run. `benchmarks.graphs` makes a lutra
graph of it, `benchmarks.dense` the ordinary PyTorch module that the other runtimes get. There are
no batch norms: every runtime folds them into the convolution before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, TypeAlias


@dataclass(frozen=True)
class Conv:
    """A convolution; `lookup` is False where lutra keeps it dense too.

    A square one keeps the size of the image at a stride of 1; one of rows x columns has no padding.
    """

    name: str
    x: str
    inputs: int
    outputs: int
    kernel: int | tuple[int, int] = 3
    stride: int = 1
    lookup: bool = True
    groups: int = 1

    @property
    def kernels(self) -> tuple[int, int]:
        """Rows and columns."""
        return (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel

    @property
    def padding(self) -> tuple[int, int]:
        """Rows above and below, columns left and right."""
        return (self.kernel // 2,) * 2 if isinstance(self.kernel, int) else (0, 0)


@dataclass(frozen=True)
class Linear:
    """A linear layer; `lookup` is False where lutra keeps it dense too."""

    name: str
    x: str
    inputs: int
    outputs: int
    lookup: bool = True


@dataclass(frozen=True)
class Relu:
    name: str
    x: str


@dataclass(frozen=True)
class Add:
    """The sum of two values of one shape."""

    name: str
    x: str
    other: str


@dataclass(frozen=True)
class MaxPool:
    name: str
    x: str
    kernel: int
    stride: int
    padding: int = 0


@dataclass(frozen=True)
class GlobalAverage:
    """The mean of every channel: (N, C, H, W) to (N, C)."""

    name: str
    x: str


@dataclass(frozen=True)
class GlobalMax:
    """The largest value of every channel: (N, C, H, W) to (N, C)."""

    name: str
    x: str


@dataclass(frozen=True)
class Shrink:
    """Every second pixel of `size` x `size`, and `added` channels of zeros on both sides."""

    name: str
    x: str
    size: int
    added: int


@dataclass(frozen=True)
class Border:
    """Rows of zeros above and below, columns of zeros left and right."""

    name: str
    x: str
    rows: tuple[int, int]
    columns: tuple[int, int]


Layer: TypeAlias = (
    Conv | Linear | Relu | Add | MaxPool | GlobalAverage | GlobalMax | Shrink | Border
)


@dataclass(frozen=True)
class Network:
    """A network of one input "x" and one output, which the last layer makes.

    Attributes:
        name: What it is called in records.
        shape: Shape of one input, without the batch.
        layers: In the order in which they run.
    """

    name: str
    shape: tuple[int, ...]
    layers: tuple[Layer, ...]


@dataclass
class _Writer:
    """Appends layers; every method returns the name of what the layer makes."""

    layers: list[Layer] = field(default_factory=list)

    def add(self, layer: Layer) -> str:
        self.layers.append(layer)
        return layer.name

    def relu(self, x: str) -> str:
        return self.add(Relu(f"{x}.relu", x))

    def block(self, name: str, x: str, inputs: int, outputs: int, size: int | None) -> str:
        """Two 3x3 convolutions and a shortcut; where channels are added the image is halved.

        Args:
            name: Prefix of its layers.
            x: What it reads.
            inputs: Channels of x.
            outputs: Channels that it makes.
            size: Rows of x where the shortcut is padded (He et al. 2015, option A); None where it
                is a 1x1 convolution.
        """
        stride = 1 if inputs == outputs else 2
        y = self.relu(self.add(Conv(f"{name}.conv1", x, inputs, outputs, stride=stride)))
        if stride > 1:
            shortcut: Layer = Conv(f"{name}.shortcut", x, inputs, outputs, 1, stride)
            if size is not None:
                shortcut = Shrink(f"{name}.shortcut", x, size, (outputs - inputs) // 2)
            x = self.add(shortcut)
        y = self.add(Conv(f"{name}.conv2", y, outputs, outputs))
        return self.relu(self.add(Add(f"{name}.add", y, x)))

    def plain_block(self, name: str, x: str, channels: int) -> str:
        """Two 3x3 convolutions, each with a ReLU, and what they read added to their output."""
        y = self.relu(self.add(Conv(f"{name}.conv1", x, channels, channels)))
        y = self.relu(self.add(Conv(f"{name}.conv2", y, channels, channels)))
        return self.add(Add(f"{name}.add", y, x))

    def head(self, x: str, features: int, classes: int) -> None:
        x = self.add(GlobalAverage("average", x))
        self.add(Linear("classifier", x, features, classes, lookup=False))


def convolutions(channels: int, size: int) -> Network:
    """Three equal 3x3 convolutions with ReLU between."""
    w = _Writer()
    x = w.relu(w.add(Conv("conv1", "x", channels, channels)))
    x = w.relu(w.add(Conv("conv2", x, channels, channels)))
    w.add(Conv("conv3", x, channels, channels))
    return Network(f"3 x conv 3x3 {channels}@{size}", (channels, size, size), tuple(w.layers))


def linears(rows: int, inputs: int, outputs: int) -> Network:
    """A linear layer, ReLU and the layer back; `rows` is the batch and stands in the name only."""
    w = _Writer()
    x = w.relu(w.add(Linear("linear1", "x", inputs, outputs)))
    w.add(Linear("linear2", x, outputs, inputs))
    return Network(f"2 x linear {rows}x{inputs}x{outputs}", (inputs,), tuple(w.layers))


def resnet20() -> Network:
    """ResNet-20 for CIFAR (He et al. 2015, 4.2), padded shortcuts, like the zoo's."""
    w = _Writer()
    x = w.relu(w.add(Conv("stem", "x", 3, 16, lookup=False)))
    inputs, size = 16, 32
    for stage, outputs in enumerate((16, 32, 64), start=1):
        for i in range(3):
            x = w.block(f"layer{stage}.{i}", x, inputs, outputs, size)
            size = size * inputs // outputs
            inputs = outputs
    w.head(x, inputs, 10)
    return Network("ResNet-20 32x32", (3, 32, 32), tuple(w.layers))


def resnet18(size: int) -> Network:
    """ResNet-18, 1x1 shortcuts; the stem is torchvision's from 64 pixels on, one 3x3 below."""
    w = _Writer()
    if size >= 64:
        x = w.relu(w.add(Conv("stem", "x", 3, 64, 7, 2, lookup=False)))
        x = w.add(MaxPool("stem.pool", x, 3, 2, 1))
    else:
        x = w.relu(w.add(Conv("stem", "x", 3, 64, lookup=False)))
    inputs = 64
    for stage, outputs in enumerate((64, 128, 256, 512), start=1):
        for i in range(2):
            x = w.block(f"layer{stage}.{i}", x, inputs, outputs, None)
            inputs = outputs
    w.head(x, inputs, 1000 if size >= 64 else 10)
    return Network(f"ResNet-18 {size}x{size}", (3, size, size), tuple(w.layers))


def resnet9(width: int = 32) -> Network:
    """ResNet-9 for CIFAR (Page 2018), 8 widths wide at its end, like the zoo's."""
    w = _Writer()
    x = w.relu(w.add(Conv("stem", "x", 3, width, lookup=False)))
    x = w.relu(w.add(Conv("conv1", x, width, 2 * width)))
    x = w.add(MaxPool("pool1", x, 2, 2))
    x = w.plain_block("block1", x, 2 * width)
    for i in (2, 3):
        x = w.relu(w.add(Conv(f"conv{i}", x, 2 ** (i - 1) * width, 2**i * width)))
        x = w.add(MaxPool(f"pool{i}", x, 2, 2))
    x = w.add(GlobalMax("max", w.plain_block("block3", x, 8 * width)))
    w.add(Linear("classifier", x, 8 * width, 10, lookup=False))
    return Network("ResNet-9 32x32", (3, 32, 32), tuple(w.layers))


def vgg11() -> Network:
    """VGG-11 for CIFAR: eight convolutions, four pools, global average."""
    w, x, inputs = _Writer(), "x", 3
    for i, outputs in enumerate((64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0), start=1):
        if outputs:
            x = w.relu(w.add(Conv(f"conv{i}", x, inputs, outputs, lookup=inputs > 3)))
            inputs = outputs
        else:
            x = w.add(MaxPool(f"pool{i}", x, 2, 2))
    w.head(x, inputs, 10)
    return Network("VGG-11 32x32", (3, 32, 32), tuple(w.layers))


def vdsr(size: int, depth: int = 20) -> Network:
    """VDSR (Kim et al. 2016): 3x3 convolutions of 64 channels on a plane, added to the plane."""
    w = _Writer()
    x = w.relu(w.add(Conv("conv1", "x", 1, 64, lookup=False)))
    for i in range(2, depth):
        x = w.relu(w.add(Conv(f"conv{i}", x, 64, 64)))
    x = w.add(Conv(f"conv{depth}", x, 64, 1, lookup=False))
    w.add(Add("sum", "x", x))
    return Network(f"VDSR {size}x{size}", (1, size, size), tuple(w.layers))


def pointnet(points: int) -> Network:
    """PointNet (Qi et al. 2017) without transformation networks: points are pixels."""
    w, x, inputs = _Writer(), "x", 3
    for i, outputs in enumerate((64, 64, 64, 128, 512), start=1):
        x = w.relu(w.add(Conv(f"conv{i}", x, inputs, outputs, 1, lookup=i > 1)))
        inputs = outputs
    x = w.add(GlobalMax("max", x))
    for i, outputs in enumerate((256, 128), start=1):
        x = w.relu(w.add(Linear(f"linear{i}", x, inputs, outputs)))
        inputs = outputs
    w.add(Linear("classifier", x, inputs, 10, lookup=False))
    return Network(f"PointNet {points} points", (3, points, 1), tuple(w.layers))


def dscnn() -> Network:
    """The DS-CNN of MLPerf Tiny for keywords (Zhang et al. 2017): MFCCs, depthwise, pointwise."""
    w = _Writer()
    x = w.add(Border("border", "x", (4, 5), (1, 1)))
    x = w.relu(w.add(Conv("stem", x, 1, 64, (10, 4), 2, lookup=False)))
    for i in range(1, 5):
        x = w.relu(w.add(Conv(f"depthwise{i}", x, 64, 64, lookup=False, groups=64)))
        x = w.relu(w.add(Conv(f"pointwise{i}", x, 64, 64, 1)))
    w.head(x, 64, 12)
    return Network("DS-CNN keywords", (1, 49, 10), tuple(w.layers))


#: Stages of inverted bottlenecks: expansion, kernel, stride of the first, channels, blocks.
_MOBILENET_V2: Final = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 3, 2, 32, 3), (6, 3, 2, 64, 4), (6, 3, 1, 96, 3),
    (6, 3, 2, 160, 3), (6, 3, 1, 320, 1),
)  # fmt: skip
_EFFICIENTNET_LITE0: Final = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
)  # fmt: skip


def _inverted(name: str, size: int, stages: tuple[tuple[int, int, int, int, int], ...]) -> Network:
    """Widened by a 1x1 convolution, depthwise, narrowed by a 1x1 convolution; ReLU for ReLU6."""
    w = _Writer()
    x = w.relu(w.add(Conv("stem", "x", 3, 32, stride=2, lookup=False)))
    inputs = 32
    for stage, (expansion, kernel, first, outputs, blocks) in enumerate(stages, start=1):
        for i in range(blocks):
            prefix, stride, wide = f"stage{stage}.{i}", first if i == 0 else 1, inputs * expansion
            y = x
            if expansion > 1:
                y = w.relu(w.add(Conv(f"{prefix}.expand", y, inputs, wide, 1)))
            y = w.relu(
                w.add(Conv(f"{prefix}.depthwise", y, wide, wide, kernel, stride, False, wide))
            )
            y = w.add(Conv(f"{prefix}.project", y, wide, outputs, 1))
            x = w.add(Add(f"{prefix}.add", y, x)) if inputs == outputs and stride == 1 else y
            inputs = outputs
    x = w.relu(w.add(Conv("head", x, inputs, 1280, 1)))
    w.head(x, 1280, 1000)
    return Network(f"{name} {size}x{size}", (3, size, size), tuple(w.layers))


def mobilenet_v2(size: int) -> Network:
    """MobileNetV2 (Sandler et al. 2018)."""
    return _inverted("MobileNetV2", size, _MOBILENET_V2)


def efficientnet_lite0(size: int) -> Network:
    """EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation (Liu 2020)."""
    return _inverted("EfficientNet-Lite0", size, _EFFICIENTNET_LITE0)


def keyword_resnet() -> Network:
    """A ResNet-8 for keywords, on log-mel features, 1x1 shortcuts."""
    w = _Writer()
    x = w.relu(w.add(Conv("stem", "x", 1, 32, 5, 2, lookup=False)))
    inputs = 32
    for i, outputs in enumerate((32, 48, 64), start=1):
        x = w.block(f"block{i}", x, inputs, outputs, None)
        inputs = outputs
    w.head(x, inputs, 12)
    return Network("ResNet-8 keywords", (1, 49, 40), tuple(w.layers))
