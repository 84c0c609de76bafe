"""What a split is handed: arrays under the names that the data gives them, and folders of pictures."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image as Picture

from cloud.split.images import recognise
from cloud.split.inputs import check_fit, read_data
from skills.errors import FormatError
from skills.ort import Port


def graph(name: str) -> onnx.ModelProto:
    value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 3, 8, 8])
    return onnx.helper.make_model(onnx.helper.make_graph([], "g", [value], []))


def test_what_is_wrong_is_told_of_the_file_and_by_the_name_in_it(tmp_path: Path) -> None:
    file, x = tmp_path / "rides.npz", np.zeros((4, 6), np.float32)
    np.savez(file, x=x)
    with pytest.raises(FormatError, match=r"'imu' takes float32 \[N, 9\], x in .*rides.npz is float32 \[N, 6\]"):
        check_fit(read_data(file, graph("imu")), [Port("imu", "float32", (-1, 9))])
    x[2] = np.nan
    np.savez(file, x=x)
    with pytest.raises(FormatError, match=r"rides.npz: 1 of 4 samples in x hold NaN"):
        read_data(file, graph("imu"))


def test_a_folder_of_pictures_is_read_as_compress_does_and_says_how_pixels_became_values(tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for at in range(2):
            Picture.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name / f"{at}.png")
    (folder / "data.yaml").write_text("size: [8, 8]\nmean: [0.4, 0.5, 0.6]\nstd: [0.2]\n")
    given = read_data(folder, graph("images"))
    assert given.feeds["images"].shape == (4, 3, 8, 8)
    assert given.labels is not None
    assert given.labels.tolist() == [0, 0, 1, 1]
    assert given.named == {"images": "x"}
    assert recognise(given.feeds["images"]) is None, "no common way to feed a net"
    assert given.image is not None
    pixels = given.feeds["images"] * np.reshape(given.image.std, (3, 1, 1)) + np.reshape(given.image.mean, (3, 1, 1))
    assert np.abs(pixels - np.rint(pixels)).max() < 0.02
    assert pixels.max() > 200
