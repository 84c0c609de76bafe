"""Every reference model: the chain of its segments is the whole model, and a real plan is sound."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from cloud.split.graph import observed_types, read_flow
from cloud.split.segment import join, write_segments
from cloud.split.shortlist import shortlist, single_tensor_cuts
from skills import ort

pytestmark = pytest.mark.reference

MODELS = (
    "cifar10jpeg/resnet20_cifar10jpeg.onnx", "cifar10jpeg/resnet56_cifar10jpeg.onnx", "face/ultraface_RFB-320.onnx",
    "imagenet/efficientnet_lite0.onnx", "mlperf_tiny/ad_autoencoder.onnx", "mlperf_tiny/ic_resnet8.onnx",
    "mlperf_tiny/kws_dscnn.onnx", "mlperf_tiny/vww_mobilenetv1_025.onnx", "sst2/sst2_textcnn.onnx",
    "watch_imu/har_watch_cnn.onnx",
)  # fmt: skip


def feeds_for(session: ort.Session) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(0)
    feeds = {}
    for port in session.inputs:
        shape = [2 if at == 0 and size == -1 else 32 if size == -1 else size for at, size in enumerate(port.shape)]
        whole = np.dtype(port.dtype).kind in "iu"
        feeds[port.name] = (chance.integers(0, 50, shape) if whole else chance.standard_normal(shape)).astype(
            port.dtype
        )
    return feeds


@pytest.mark.parametrize("name", MODELS)
def test_the_chain_equals_the_whole_model(name: str, reference: Path, tmp_path: Path) -> None:
    model, session = onnx.load(reference / name), ort.session(reference / name)
    feeds = feeds_for(session)
    types = observed_types(model, feeds)
    flow = read_flow(model, types)
    prefixes = [cut.prefix for cut in shortlist(flow)] or sorted(single_tensor_cuts(flow), key=len)[:1]
    assert prefixes
    pieces = write_segments(model, flow, prefixes, tmp_path, types, base="")
    files = [tmp_path / one.file.lstrip("/") for one in pieces.segments]
    chain, again = (
        ort.chain(files, flow.outputs),
        ort.session(join(files, flow.outputs).SerializeToString(), beside=tmp_path),
    )
    one = {key: value[:1] for key, value in feeds.items()}
    right, found, joined = session.run(one), chain.run(one), again.run(one)
    for output, array in right.items():
        scale = max(1.0, float(np.abs(array).max()))
        assert float(np.abs(found[output] - array).max()) <= 1e-5 * scale
        assert float(np.abs(joined[output] - array).max()) <= 1e-5 * scale
    stored = sum((tmp_path / one.file.lstrip("/")).stat().st_size for one in pieces.segments)
    assert stored <= (reference / name).stat().st_size * 1.02 + 20_000
