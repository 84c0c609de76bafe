"""Reading a question for a skill from a file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cloud.questions import read_question
from skills.errors import FormatError, NotFound, UsageError
from skills.manifest import Tensor

DIGIT = (Tensor("image", "UINT8", (-1, 8, 8)),)
PHOTO = (Tensor("photo", "UINT8", (-1, 3, 6, 4)),)
PAIR = (Tensor("a", "FP32", (-1,)), Tensor("b", "FP32", (-1,)))


def test_one_example_becomes_a_batch_of_one(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.ones((8, 8), np.uint8))
    call = read_question(tmp_path / "one.npy", DIGIT)
    assert call.arrays["image"].shape == (1, 8, 8)


def test_arrays_are_taken_by_name_and_others_passed_over(tmp_path: Path) -> None:
    np.savez(tmp_path / "many.npz", image=np.ones((5, 8, 8), np.uint8), y=np.zeros(5))
    assert set(read_question(tmp_path / "many.npz", DIGIT).arrays) == {"image"}


@pytest.mark.parametrize(("found", "word"), [("uint8", "UINT8"), ("bool", "BOOL"), ("float64", "FP64")])
def test_numbers_of_another_type_are_refused_as_the_device_refuses_them(tmp_path: Path, found: str, word: str) -> None:
    np.save(tmp_path / "x.npy", np.ones((3,), found))
    with pytest.raises(
        FormatError, match=rf"input 'a' is {word} \[3\], the skill takes FP32 \[-1\] .*astype\('float32'\)"
    ):
        read_question(tmp_path / "x.npy", PAIR[:1])


def test_numbers_of_the_other_byte_order_are_the_same_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([1.5, 2], ">f4"))
    assert read_question(tmp_path / "x.npy", PAIR[:1]).arrays["a"].tolist() == [1.5, 2]


def test_a_wrong_shape_is_said_with_the_right_one(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.ones((2, 64), np.uint8))
    with pytest.raises(FormatError, match=r"is UINT8 \[2, 64\], the skill takes UINT8 \[-1, 8, 8\]$"):
        read_question(tmp_path / "flat.npy", DIGIT)


def test_an_image_is_fitted_to_an_input_of_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (60, 90), (255, 0, 0)).save(tmp_path / "red.png")
    photo = read_question(tmp_path / "red.png", PHOTO).arrays["photo"]
    assert photo.shape == (1, 3, 6, 4)
    assert (photo[0, 0] == 255).all()
    assert (photo[0, 1:] == 0).all()


def test_a_skill_of_several_inputs_needs_them_by_name(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.ones(3, np.float32))
    with pytest.raises(UsageError, match=r"takes 2 inputs \(a, b\)"):
        read_question(tmp_path / "one.npy", PAIR)
    np.savez(tmp_path / "half.npz", a=np.ones(3, np.float32))
    with pytest.raises(FormatError, match="lacks the input b, it has a"):
        read_question(tmp_path / "half.npz", PAIR)


def test_what_is_no_array_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_question(tmp_path / "absent.npy", DIGIT)
    (tmp_path / "bad.npz").write_bytes(b"nonsense")
    with pytest.raises(FormatError, match="cannot be read"):
        read_question(tmp_path / "bad.npz", DIGIT)
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(FormatError, match="cannot be read"):
        read_question(tmp_path / "object.npy", DIGIT)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UsageError, match="of an unknown kind"):
        read_question(tmp_path / "notes.txt", DIGIT)
