"""The network of published FIDs against torch: random weights, and the graph of 2015 written out in full."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from heirloom.common.evaluate.extractor import open_extractor  # noqa: E402
from heirloom.common.evaluate.inception import ADM  # noqa: E402

pytestmark = pytest.mark.parity


class Reference:
    """The forward pass; a layer's weights are drawn when it is first called, so that signals keep their size."""

    def __init__(self):
        self.state = {}
        self.generator = torch.Generator().manual_seed(0)

    def conv(self, x, name, width, kernel, stride=1, padding=0):
        rows, cols = (kernel, kernel) if isinstance(kernel, int) else kernel
        parts = ("weight", "bias", "running_mean", "running_var")
        if f"{name}.conv.weight" not in self.state:
            fan_in = x.shape[1] * rows * cols
            draw = torch.randn(width, x.shape[1], rows, cols, generator=self.generator)
            self.state[f"{name}.conv.weight"] = draw * (2 / fan_in) ** 0.5
            for part in parts:
                middle = 1 if part in ("weight", "running_var") else 0
                self.state[f"{name}.bn.{part}"] = middle + 0.1 * torch.randn(width, generator=self.generator)
        x = F.conv2d(x, self.state[f"{name}.conv.weight"], stride=stride, padding=padding)
        weight, bias, mean, variance = (self.state[f"{name}.bn.{part}"] for part in parts)
        return F.relu(F.batch_norm(x, mean, variance, weight, bias, eps=1e-3))

    def a(self, x, name, pooled):
        one = self.conv(x, f"{name}.branch1x1", 64, 1)
        five = self.conv(x, f"{name}.branch5x5_1", 48, 1)
        five = self.conv(five, f"{name}.branch5x5_2", 64, 5, padding=2)
        three = self.conv(x, f"{name}.branch3x3dbl_1", 64, 1)
        three = self.conv(three, f"{name}.branch3x3dbl_2", 96, 3, padding=1)
        three = self.conv(three, f"{name}.branch3x3dbl_3", 96, 3, padding=1)
        pool = self.conv(average(x), f"{name}.branch_pool", pooled, 1)
        return torch.cat([one, five, three, pool], 1)

    def b(self, x, name):
        three = self.conv(x, f"{name}.branch3x3", 384, 3, stride=2)
        double = self.conv(x, f"{name}.branch3x3dbl_1", 64, 1)
        double = self.conv(double, f"{name}.branch3x3dbl_2", 96, 3, padding=1)
        double = self.conv(double, f"{name}.branch3x3dbl_3", 96, 3, stride=2)
        return torch.cat([three, double, F.max_pool2d(x, 3, 2)], 1)

    def c(self, x, name, inner):
        one = self.conv(x, f"{name}.branch1x1", 192, 1)
        seven = self.conv(x, f"{name}.branch7x7_1", inner, 1)
        seven = self.conv(seven, f"{name}.branch7x7_2", inner, (1, 7), padding=(0, 3))
        seven = self.conv(seven, f"{name}.branch7x7_3", 192, (7, 1), padding=(3, 0))
        double = self.conv(x, f"{name}.branch7x7dbl_1", inner, 1)
        double = self.conv(double, f"{name}.branch7x7dbl_2", inner, (7, 1), padding=(3, 0))
        double = self.conv(double, f"{name}.branch7x7dbl_3", inner, (1, 7), padding=(0, 3))
        double = self.conv(double, f"{name}.branch7x7dbl_4", inner, (7, 1), padding=(3, 0))
        double = self.conv(double, f"{name}.branch7x7dbl_5", 192, (1, 7), padding=(0, 3))
        pool = self.conv(average(x), f"{name}.branch_pool", 192, 1)
        return torch.cat([one, seven, double, pool], 1)

    def d(self, x, name):
        three = self.conv(x, f"{name}.branch3x3_1", 192, 1)
        three = self.conv(three, f"{name}.branch3x3_2", 320, 3, stride=2)
        seven = self.conv(x, f"{name}.branch7x7x3_1", 192, 1)
        seven = self.conv(seven, f"{name}.branch7x7x3_2", 192, (1, 7), padding=(0, 3))
        seven = self.conv(seven, f"{name}.branch7x7x3_3", 192, (7, 1), padding=(3, 0))
        seven = self.conv(seven, f"{name}.branch7x7x3_4", 192, 3, stride=2)
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def e(self, x, name, pool):
        one = self.conv(x, f"{name}.branch1x1", 320, 1)
        three = self.conv(x, f"{name}.branch3x3_1", 384, 1)
        wide = self.conv(three, f"{name}.branch3x3_2a", 384, (1, 3), padding=(0, 1))
        tall = self.conv(three, f"{name}.branch3x3_2b", 384, (3, 1), padding=(1, 0))
        double = self.conv(x, f"{name}.branch3x3dbl_1", 448, 1)
        double = self.conv(double, f"{name}.branch3x3dbl_2", 384, 3, padding=1)
        double_wide = self.conv(double, f"{name}.branch3x3dbl_3a", 384, (1, 3), padding=(0, 1))
        double_tall = self.conv(double, f"{name}.branch3x3dbl_3b", 384, (3, 1), padding=(1, 0))
        pooled = self.conv(pool(x), f"{name}.branch_pool", 192, 1)
        return torch.cat([one, wide, tall, double_wide, double_tall, pooled], 1)

    def __call__(self, images):
        x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 128) / 128
        x = self.conv(x, "Conv2d_1a_3x3", 32, 3, stride=2)
        x = self.conv(x, "Conv2d_2a_3x3", 32, 3)
        x = F.max_pool2d(self.conv(x, "Conv2d_2b_3x3", 64, 3, padding=1), 3, 2)
        x = self.conv(x, "Conv2d_3b_1x1", 80, 1)
        x = F.max_pool2d(self.conv(x, "Conv2d_4a_3x3", 192, 3), 3, 2)
        for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = self.a(x, name, pooled)
        x = self.b(x, "Mixed_6a")
        x = self.c(x, "Mixed_6b", 128)
        x = self.c(x, "Mixed_6c", 160)
        spatial = self.conv(x, "Mixed_6d.branch1x1", 192, 1)[:, :7]
        x = self.c(x, "Mixed_6d", 160)
        x = self.c(x, "Mixed_6e", 192)
        x = self.d(x, "Mixed_7a")
        x = self.e(x, "Mixed_7b", average)
        x = self.e(x, "Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, padding=1))
        pooled = x.mean((2, 3))
        self.state.setdefault("fc.weight", torch.randn(1008, 2048, generator=self.generator) * 2048**-0.5)
        return pooled, spatial.permute(0, 2, 3, 1).flatten(1), pooled @ self.state["fc.weight"].T


def average(x):
    return F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)


def test_features_are_those_of_torch(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3)).astype(np.uint8)
    reference = Reference()
    with torch.no_grad():
        want = reference(images)
    # What the released file carries along and the scores do not use.
    torch.save(
        reference.state | {"fc.bias": torch.ones(1008), "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)},
        tmp_path / "fid.pth",
    )
    ours = open_extractor(tmp_path / "fid.pth")
    assert ours.cfg == ADM
    got = jax.jit(ours.model.apply)(ours.params, images)
    for found, expected in zip(got, want, strict=True):
        expected = expected.numpy()
        assert found.shape == expected.shape and expected.std() > 1e-2
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
