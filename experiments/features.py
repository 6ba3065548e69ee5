"""Features of CIFAR-10 pictures from a classifier: ResNet-56, of He et al. 2016, Section 4.2."""

import importlib
import pickle

import torch
import torch.nn.functional as F
from torch import nn

workshop = importlib.import_module("00_workshop")

sde = importlib.import_module("01_sde_and_denoiser")
evaluation = importlib.import_module("05_sample_eval")

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
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        net = ResNet56().eval()
        net.load_state_dict({key.removeprefix("module."): v for key, v in saved.items()})
    except (OSError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise workshop.BadInput(
            f"--features {path!r} is no checkpoint of a CIFAR-10 ResNet-56 "
            f"({type(error).__name__}): give the file of akamaster/pytorch_resnet_cifar10"
        ) from error
    return net.to(workshop.device())


def prepare(x):
    """Bring uint8 pictures (B, 3, H, W) to the size and range the network was trained on."""
    x = x.to(workshop.device()).float() / 255
    if x.shape[-1] != 32:
        x = F.interpolate(x, size=(32, 32), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (MEAN, STD))
    return (x - mean) / std


def resnet56(path):
    """Register the features with torch-fidelity: the name under which it knows them."""
    if not path:
        raise workshop.BadInput(
            "CIFAR-10 is measured in features of a ResNet-56: give its checkpoint as --features "
            "(resnet56-4bfd9763.th of akamaster/pytorch_resnet_cifar10)"
        )
    net = load(path)

    def body(x):
        with torch.no_grad():
            return net.features(prepare(x)).to(x.device)

    return evaluation.register_features(body, 64)
