"""CIFAR-10 for the examples: images, augmentation, and ResNets for 32x32 (He et al. 2015, 4.2)."""

from __future__ import annotations

import lzma
import pickle
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the public checkpoint
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


class Block(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.added = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
        return F.relu(y + x)


class ResNet(nn.Module):
    """ResNet of depth 6 n + 2 for 32x32 images: n = 3 is ResNet-20, n = 9 is ResNet-56."""

    def __init__(self, n: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for stage, outputs in enumerate((16, 32, 64), start=1):
            blocks = []
            for i in range(n):
                blocks.append(Block(channels, outputs, 2 if i == 0 and stage > 1 else 1))
                channels = outputs
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Loads arrays of an .npz by name; extra counters are left alone."""
    with np.load(path, allow_pickle=False) as arrays:
        state = {k.removeprefix("module."): torch.from_numpy(arrays[k]) for k in arrays.files}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise SystemExit(f"{path}: missing {missing}, unexpected {unexpected}")


def _undo_median(path: Path) -> np.ndarray:
    """uint8 images (N, H, W, 3) from median-predicted residuals of the planes G, R - G, B - G."""
    with lzma.open(path) as file:
        residuals = np.load(file, allow_pickle=False).transpose(0, 2, 3, 1).astype(np.int16)
    planes, height, width, count = residuals.shape
    green = np.zeros((height, width, count), np.int16)
    decoded = []
    for c in range(planes):
        plane = np.zeros((height, width, count), np.int16)
        for y in range(height):
            for x in range(width):
                none = np.zeros(count, np.int16)
                up = plane[y - 1, x] if y else plane[y, x - 1] if x else none
                left = plane[y, x - 1] if x else up
                corner = plane[y - 1, x - 1] if x and y else left
                guess = np.clip(left + up - corner, np.minimum(left, up), np.maximum(left, up))
                plane[y, x] = ((guess + residuals[c, y, x] + green[y, x]) & 255) - green[y, x]
        decoded.append((plane + green).astype(np.uint8))
        if c == 0:
            green = plane
    red_green_blue = np.stack([decoded[1], decoded[0], decoded[2]], -1)
    return np.ascontiguousarray(red_green_blue.transpose(2, 0, 1, 3))


def _from_archive(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The official cifar-10-python.tar.gz (Python pickles: open only the archive you trust)."""
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            leaf = Path(member.name).name
            if leaf.startswith("data_batch_") or leaf == "test_batch":
                file = archive.extractfile(member)
                assert file is not None
                batch = pickle.load(file, encoding="latin1")
                images = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                parts[leaf] = images, np.array(batch["labels"], np.int64)
    train = [parts[f"data_batch_{i}"] for i in range(1, 6)]
    x, y = (np.concatenate(a) for a in zip(*train, strict=True))
    x_test, y_test = parts["test_batch"]
    return np.ascontiguousarray(x), y, np.ascontiguousarray(x_test), y_test


def load_test_images(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Test images uint8 (N, 32, 32, 3) and labels int64 of a folder of cifar10_*.npy.xz files."""
    with np.load(folder / "cifar10_labels.npz", allow_pickle=False) as labels:
        y = labels["test"].astype(np.int64)
    return _undo_median(folder / "cifar10_test.npy.xz"), y


def load_images(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, test images and labels: uint8 (N, 32, 32, 3) and int64.

    Args:
        data: the official cifar-10-python.tar.gz, or a folder of cifar10_*.npy.xz files.
    """
    if data.is_file():
        return _from_archive(data)
    train = [_undo_median(data / f"cifar10_train_{part}.npy.xz") for part in "ab"]
    with np.load(data / "cifar10_labels.npz", allow_pickle=False) as labels:
        y = labels["train"].astype(np.int64)
    return np.concatenate(train), y, *load_test_images(data)


def normalize(images: np.ndarray) -> Tensor:
    """float32 (N, 3, 32, 32) of uint8 (N, 32, 32, 3)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    return x.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


class Augmented(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Random crop with 4 pixels of padding, and random flip; fetches whole batches at once."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
        self.images, self.labels = torch.from_numpy(padded), torch.from_numpy(labels)
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        self.mean, self.step = mean * 255, 1 / (std * 255)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([i])[0]
        return x, y

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        index = torch.tensor(indices)
        count = len(index)
        top, left = torch.randint(9, (2, count))
        columns = left[:, None] + torch.arange(32)
        flip = torch.rand(count) < 0.5
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        rows = top[:, None] + torch.arange(32)
        x = self.images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        x = ((x.float() - self.mean) * self.step).permute(0, 3, 1, 2)  # channels last in memory
        return list(zip(x, self.labels[index], strict=True))


def collate(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stacks images channels-last, which PyTorch's CPU convolutions like best."""
    x, y = zip(*batch, strict=True)
    return torch.stack([i.permute(1, 2, 0) for i in x]).permute(0, 3, 1, 2), torch.stack(y)
