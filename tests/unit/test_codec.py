"""Activation frames: round trips, and frames from somebody who means harm."""

import contextlib
import hashlib
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skills import codec, rice, zstd
from skills.coding import Coding, Image, Live
from skills.errors import FormatError

X = Live("x", "FP32", (-1, 3, 8, 8))
CODES = Live("codes", "UINT8", (-1, 16))
PICTURE = Live("image", "FP32", (-1, 3, 16, 24), Image((127.0,) * 3, (128.0,) * 3))
GREY = Live("image", "FP32", (-1, 16, 24, 1), Image((0.0,), (255.0,), "NHWC"))


def affine(kind: str, *arrays: np.ndarray) -> Coding:
    pairs = [codec.calibrated(kind, array) for array in arrays]
    return Coding(kind, scales=tuple(one for one, _ in pairs), zeros=tuple(zero for _, zero in pairs))  # type: ignore[arg-type]


@given(
    seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 4), kind=st.sampled_from(["u8", "u4"]), shift=st.floats(-2, 2)
)
def test_an_affine_coding_is_off_by_at_most_half_a_step(seed: int, batch: int, kind: str, shift: float) -> None:
    x = (np.random.default_rng(seed).random((batch, 3, 8, 8)) + shift).astype(np.float32)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    top = 255 if kind == "u8" else 15
    scale = (high - low) / top
    coding = Coding(kind, scales=(scale,), zeros=(round(-low / scale),))  # type: ignore[arg-type]
    frame = codec.encode(coding, (X,), {"x": x})
    back = codec.decode(coding, (X,), frame)["x"]
    assert codec.decoded_bytes((X,), frame) == back.nbytes
    assert back.shape == x.shape
    assert back.dtype == np.float32
    assert np.abs(back - x).max() <= scale * 1.01  # half a step, and half a step for the zero point


@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 4))
def test_native_codes_travel_bit_for_bit(seed: int, batch: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 256, (batch, 16), np.uint8)
    frame = codec.encode(Coding("native"), (CODES,), {"codes": codes})
    back = codec.decode(Coding("native"), (CODES,), frame)["codes"]
    assert np.array_equal(back, codes)
    back += 1  # as whoever computed it here may


def test_several_tensors_share_a_frame_and_integers_stay_exact_beside_floats() -> None:
    chance = np.random.default_rng(0)
    values = {"x": chance.random((2, 3, 8, 8), np.float32), "codes": chance.integers(0, 9, (2, 16), np.uint8)}
    coding = Coding("u8", scales=(1 / 255, 1.0), zeros=(0, 0))
    back = codec.decode(coding, (X, CODES), codec.encode(coding, (X, CODES), values))
    assert np.array_equal(back["codes"], values["codes"])
    assert np.abs(back["x"] - values["x"]).max() <= 1 / 255


@pytest.mark.parametrize("live", [PICTURE, GREY])
@pytest.mark.parametrize("kind", ["pixels", "png"])
def test_pixels_and_png_are_lossless(kind: str, live: Live) -> None:
    shape = (3, *live.shape[1:])
    x = codec.normalised(
        live.image,
        np.random.default_rng(1).integers(0, 256, (3, 16, 24, 3 if live is PICTURE else 1), np.uint8),
        "FP32",
    )  # type: ignore[arg-type]
    assert x.shape == shape
    coding = Coding(kind)  # type: ignore[arg-type]
    assert np.array_equal(codec.decode(coding, (live,), codec.encode(coding, (live,), {"image": x}))["image"], x)


@pytest.mark.parametrize("quality", [75, 90, 95])
def test_jpeg_keeps_a_smooth_picture(quality: int) -> None:
    ramp = np.broadcast_to(np.linspace(20, 230, 24).astype(np.uint8)[None, None, :, None], (1, 16, 24, 3))
    x = codec.normalised(PICTURE.image, ramp, "FP32")  # type: ignore[arg-type]
    coding = Coding("jpeg", quality)
    back = codec.decode(coding, (PICTURE,), codec.encode(coding, (PICTURE,), {"image": x}))["image"]
    assert np.abs(back - x).max() * 128 < 6


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_not_sent(bad: float) -> None:
    x = np.zeros((1, 3, 8, 8), np.float32)
    x[0, 0, 0, 0] = bad
    with pytest.raises(FormatError, match="NaN or infinity"):
        codec.encode(affine("u8", np.ones(3)), (X,), {"x": x})


def test_what_is_empty_or_larger_than_a_frame_holds_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    live = Live("t", "FP32", (-1, 4))
    with pytest.raises(FormatError, match=r"'t' is empty \(0, 4\)"):
        codec.encode(Coding("native"), [live], {"t": np.zeros((0, 4), np.float32)})
    monkeypatch.setattr(codec, "MAX_DECODED_BYTES", 64)
    for rows, fits in ((4, True), (5, False)):
        arrays = {"t": np.zeros((rows, 4), np.float32)}
        assert (codec.obstacle([live], arrays) == "") == fits
    with pytest.raises(FormatError, match="the tensors have 80 bytes, a frame at most 64"):
        codec.encode(Coding("native"), [live], arrays)


def test_a_float_tensor_that_is_not_finite_is_not_accepted() -> None:
    raw = zstd.compress(np.full((1, 3, 8, 8), np.nan, np.float32).tobytes(), 1)
    frame = struct.pack(">2sBBII", b"SK", 1, 1, 1, len(raw)) + raw
    with pytest.raises(FormatError, match="NaN or infinity"):
        codec.decode(Coding("native"), (X,), frame)


def test_a_bomb_is_stopped_before_it_is_unpacked() -> None:
    bomb = zstd.compress(bytes(1 << 26), 1)
    frame = struct.pack(">2sBBII", b"SK", 1, 1, 1, len(bomb)) + bomb
    with pytest.raises(FormatError, match="unpacks to more than the announced 768 bytes"):
        codec.decode(Coding("native"), (X,), frame)
    with pytest.raises(FormatError, match="allowed are 1 to"):
        codec.decode(Coding("native"), (X,), struct.pack(">2sBBII", b"SK", 1, 1, 0xFFFFFFFF, len(bomb)) + bomb)


def test_a_picture_of_another_size_is_refused_before_it_is_decoded() -> None:
    large = Live("image", "FP32", (-1, 3, 64, 64), PICTURE.image)
    frame = codec.encode(Coding("png"), (large,), {"image": np.zeros((1, 3, 64, 64), np.float32)})
    with pytest.raises(FormatError, match="64x64 RGB came, the plan says 24x16 RGB"):
        codec.decode(Coding("png"), (PICTURE,), frame)


SOUND = Live("sound", "FP32", (-1, 400))
MOTION = Live("motion", "FP32", (-1, 3, 50))
LEVEL = Live("level", "FP32", ())


@given(seed=st.integers(0, 2**32 - 1), step=st.sampled_from([1, 32_768, 32_767]), kind=st.sampled_from(["rice", "u16"]))
def test_what_was_recorded_in_16_bits_travels_without_any_loss(seed: int, step: int, kind: str) -> None:
    chance = np.random.default_rng(seed)
    counts = np.clip(chance.normal(0, chance.choice([3, 300, 30_000]), (2, 400)).cumsum(1), -32_768, 32_767)
    sound = (np.rint(counts) / step).astype(np.float32)
    coding = affine(kind, sound)
    back = codec.decode(coding, (SOUND,), codec.encode(coding, (SOUND,), {"sound": sound}))["sound"]
    assert np.abs(back - sound).max() <= 1e-6 * np.abs(sound).max()
    assert np.array_equal(np.rint(back.astype(np.float64) * step), np.rint(counts))


@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["rice", "u16"]))
def test_any_signal_in_16_bits_is_off_by_half_a_step_at_most(seed: int, kind: str) -> None:
    motion = np.random.default_rng(seed).normal(2, 5, (2, 3, 50)).astype(np.float32)
    coding = affine(kind, motion)
    back = codec.decode(coding, (MOTION,), codec.encode(coding, (MOTION,), {"motion": motion}))["motion"]
    assert np.abs(back - motion).max() <= coding.scales[0] * 1.02


@given(value=st.floats(-1, 1, width=32), kind=st.sampled_from(["rice", "u16", "u8", "u4"]))
def test_a_tensor_without_dimensions_is_off_by_a_step_at_most(value: float, kind: str) -> None:
    coding = affine(kind, np.array([-1.0, 1.0]))
    back = codec.decode(coding, (LEVEL,), codec.encode(coding, (LEVEL,), {"level": np.array(value, np.float32)}))[
        "level"
    ]
    assert back.shape == ()
    assert abs(float(back) - value) <= coding.scales[0] * 1.02


def test_rice_codes_beat_plain_bytes_on_sound() -> None:
    chance = np.random.default_rng(0)
    counts = np.rint(3000 * np.sin(np.arange(400) / 20) + chance.normal(0, 20, (1, 400)))
    sound = (counts / 32_768).astype(np.float32)
    sizes = {kind: len(codec.encode(affine(kind, sound), (SOUND,), {"sound": sound})) for kind in ("rice", "u16")}
    assert sizes["rice"] < 0.6 * 800
    assert sizes["rice"] < 0.8 * sizes["u16"]


@given(
    rows=st.integers(1, 4),
    time=st.integers(1, 1100),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([1, 90, 9e4]),
)
def test_rice_codes_give_back_every_sample(rows: int, time: int, seed: int, spread: float) -> None:
    samples = np.clip(np.random.default_rng(seed).normal(30_000, spread, (rows, time)), 0, 65_535).astype(np.int64)
    assert np.array_equal(rice.decode(rice.encode(samples), rows, time), samples)


def unary_bytes(body: bytes, rows: int, time: int) -> int:
    return int.from_bytes(body[rows * (3 - -time // rice.BLOCK) :][:4], "big")


@given(
    rows=st.integers(1, 3),
    data=st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 5, 46, 47, 32_768, 65_535]), min_size=1, max_size=700),
    period=st.integers(1, 600),
)
def test_no_samples_need_more_unary_codes_than_a_frame_may_have(rows: int, data: list[int], period: int) -> None:
    samples = np.array([(data * period)[: len(data) + period]] * rows, np.int64)
    time = samples.shape[1]
    body = rice.encode(samples)
    assert unary_bytes(body, rows, time) <= rice.UNARY_BITS * samples.size / 8 + 1
    assert np.array_equal(rice.decode(body, rows, time), samples)


def test_the_most_unary_codes_that_a_frame_may_have_are_nearly_reached() -> None:
    mean = 1 / rice.SPARE  # the last one whose remainders have no bits
    steps = np.diff(np.floor(np.arange(rice.BLOCK) * mean), prepend=0).astype(np.int64)  # folded residuals, 1 or 2
    samples = 30_000 + np.cumsum(np.where(steps % 2, -(steps + 1) // 2, steps // 2))[None]
    assert unary_bytes(rice.encode(samples), 1, rice.BLOCK) > 0.97 * rice.UNARY_BITS * rice.BLOCK / 8


HOSTILE = 128 * (rice.BLOCK + 1)  # samples


@pytest.mark.parametrize("time", [HOSTILE, 1, 2, rice.BLOCK + 1])
@pytest.mark.parametrize(("order", "width"), [(0, 0), (0, 20), (1, 3), (2, 0), (2, 20)])
@pytest.mark.parametrize("unary", [HOSTILE // 8, int(HOSTILE * rice.UNARY_BITS) // 8, 1 << 20])
def test_hostile_rice_codes_take_no_more_memory_than_they_are_counted_for(
    time: int, order: int, width: int, unary: int
) -> None:
    rows = HOSTILE // time
    head = bytes(2 * rows) + bytes([order]) * rows + bytes([width]) * (rows * -(-time // rice.BLOCK))
    body = head + unary.to_bytes(4, "big") + b"\xff" * unary + bytes(-(-rows * time * width // 8))
    tracemalloc.start()
    try:
        with contextlib.suppress(FormatError):
            rice.decode(body, rows, time)
        assert tracemalloc.get_traced_memory()[1] <= rice.PEAK_BYTES * rows * time + (1 << 20)
    finally:
        tracemalloc.stop()


def test_writing_many_short_rows_takes_memory_for_samples_and_not_for_whole_blocks() -> None:
    peaks = []
    for samples in (np.arange(HOSTILE)[:, None] // 7, np.arange(HOSTILE)[None] // 7):
        tracemalloc.start()
        try:
            rice.encode(samples)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[0] <= 2 * peaks[1]


def test_rice_codes_stay_the_bytes_that_they_are() -> None:
    slope = np.arange(6 * 700).reshape(6, 700)
    flat, line, curve = slope // 700 * 9000, slope * 13 % 40_000, slope % 700 * (slope % 700) // 8
    body = rice.encode(np.concatenate((flat, line, curve)))
    assert hashlib.sha256(body).hexdigest()[:16] == "04e376f5a8f5d73d"


@given(rows=st.integers(1, 3), time=st.integers(1, 600), data=st.binary(max_size=200))
def test_any_bytes_are_samples_in_range_or_a_format_error(rows: int, time: int, data: bytes) -> None:
    with contextlib.suppress(FormatError):
        found = rice.decode(data, rows, time)
        assert found.min() >= 0
        assert found.max() <= 65_535


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_scale_that_is_no_positive_number_makes_no_coding(scale: float) -> None:
    with pytest.raises(FormatError, match="finite number above 0"):
        Coding("u8", scales=(scale,), zeros=(0,))


@pytest.mark.parametrize(("kind", "zero"), [("u4", 16), ("u8", 256), ("u8", -1), ("rice", 65_536)])
def test_a_zero_point_beyond_the_codes_makes_no_coding(kind: str, zero: int) -> None:
    with pytest.raises(FormatError, match="lies between 0 and"):
        Coding(kind, scales=(1.0,), zeros=(zero,))  # type: ignore[arg-type]


def test_a_scale_that_overflows_the_tensor_is_refused_on_arrival() -> None:
    coding = Coding("u16", scales=(1e37,), zeros=(0,))
    body = zstd.compress(b"\xff" * 800, 1)
    frame = struct.pack(">2sBBII", b"SK", 1, 1, 1, len(body)) + body
    with pytest.raises(FormatError, match="does not fit its scale"):
        codec.decode(coding, (SOUND,), frame)


CASES = [
    *(
        (affine(kind, np.array([-1.0, 1.0])), (LEVEL,), {"level": np.array(0.5, np.float32)})
        for kind in ("rice", "u16", "u8", "u4")
    ),
    (affine("rice", np.array([-1.0, 1.0])), (MOTION,), {"motion": np.ones((2, 3, 50), np.float32)}),
    (affine("u16", np.array([-1.0, 1.0])), (X,), {"x": np.ones((2, 3, 8, 8), np.float32)}),
    (affine("u8", np.array([-1.0, 1.0])), (X,), {"x": np.ones((2, 3, 8, 8), np.float32)}),
    (affine("u4", np.array([-1.0, 1.0])), (X,), {"x": np.ones((1, 3, 8, 8), np.float32)}),
    (Coding("native"), (CODES,), {"codes": np.ones((1, 16), np.uint8)}),
    (Coding("jpeg", 90), (PICTURE,), {"image": np.zeros((1, 3, 16, 24), np.float32)}),
    (Coding("png"), (PICTURE,), {"image": np.zeros((1, 3, 16, 24), np.float32)}),
    (Coding("pixels"), (PICTURE,), {"image": np.zeros((1, 3, 16, 24), np.float32)}),
]


SCORES, BOXES = Live("scores", "FP32", (1, 300, 2)), Live("boxes", "FP32", (1, 300, 4))
FOUND = {"scores": np.random.default_rng(0).random((1, 300, 2), np.float32),
         "boxes": np.random.default_rng(1).random((1, 300, 4), np.float32) * 1.4 - 0.2}  # fmt: skip
REPLIES = (*(affine(kind, FOUND["scores"], np.array([-0.2, 1.2])) for kind in ("u8", "u16")), Coding("native"))


def as_sent(frame: bytes) -> dict[str, np.ndarray]:
    return {"frame": np.frombuffer(frame, np.uint8)}


@pytest.mark.parametrize(("coding", "gap"), list(zip(REPLIES, (4e-3, 2e-5, 0.0), strict=True)))
def test_a_coded_answer_is_the_answer_but_for_a_step(coding: Coding, gap: float) -> None:
    flat = {name: np.clip(np.round(array, 1), 0, 0.9) for name, array in FOUND.items()}
    for answer in (flat, FOUND):
        frame = codec.encode_reply(REPLIES, (SCORES, BOXES), coding.name, answer)
        assert frame is not None
        back = codec.decode_reply(coding, (SCORES, BOXES), as_sent(frame))
        for name, array in answer.items():
            assert back[name].shape == array.shape
            assert np.abs(back[name] - array).max() <= gap


def test_an_answer_goes_raw_where_its_coding_would_change_it_or_gain_nothing() -> None:
    def frame(name: str = "u8", **changes: np.ndarray) -> bytes | None:
        return codec.encode_reply(REPLIES, (SCORES, BOXES), name, FOUND | changes)

    assert frame() is not None
    for asked in ("", "u4", "x" * 999):
        assert frame(asked) is None
    beyond, broken = FOUND["boxes"].copy(), FOUND["scores"].copy()
    beyond[0, 0, 0], broken[0, 0, 0] = 1.5, np.nan
    assert frame(boxes=beyond) is None  # it was calibrated up to 1.2
    assert frame(scores=broken) is None
    assert frame(scores=FOUND["scores"].astype(np.float64)) is None
    free = Live("scores", "FP32", (1, -1, 2))
    assert codec.encode_reply(REPLIES, (free, BOXES), "u8", FOUND | {"scores": np.zeros((1, 0, 2), np.float32)}) is None
    ten = {"y": np.arange(10, dtype=np.float32)[None]}
    assert codec.encode_reply((Coding("native"),), (Live("y", "FP32", (1, 10)),), "native", ten) is None


@settings(max_examples=200)
@given(
    coding=st.sampled_from(REPLIES[:2]), at=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 40),
    add=st.binary(max_size=8), anything=st.none() | st.binary(max_size=300),
)  # fmt: skip
def test_a_damaged_answer_is_outputs_of_the_right_shape_or_a_format_error(
    coding: Coding, at: int, value: int, cut: int, add: bytes, anything: bytes | None
) -> None:
    frame = bytearray(codec.encode(coding, (SCORES, BOXES), FOUND))
    frame[at % len(frame)] = value
    sent = bytes(frame[: len(frame) - cut]) + add if anything is None else anything
    with contextlib.suppress(FormatError):
        back = codec.decode_reply(coding, (SCORES, BOXES), as_sent(sent))
        assert all(
            back[live.name].shape == live.shape and np.isfinite(back[live.name]).all() for live in (SCORES, BOXES)
        )


@given(case=st.sampled_from(CASES), data=st.binary(max_size=300))
def test_any_bytes_are_tensors_or_a_format_error(case: tuple, data: bytes) -> None:  # type: ignore[type-arg]
    coding, tensors, _ = case
    for frame in (data, b"SK\x01" + bytes([len(tensors)]) + data):
        with contextlib.suppress(FormatError):
            codec.decode(coding, tensors, frame, max_bytes=1 << 20)


@settings(max_examples=200)
@given(
    case=st.sampled_from(CASES),
    at=st.integers(0, 10_000),
    value=st.integers(0, 255),
    cut=st.integers(0, 40),
    add=st.binary(max_size=8),
)
def test_a_damaged_frame_is_tensors_of_the_right_shape_or_a_format_error(
    case: tuple,
    at: int,
    value: int,
    cut: int,
    add: bytes,  # type: ignore[type-arg]
) -> None:
    coding, tensors, arrays = case
    frame = bytearray(codec.encode(coding, tensors, arrays))
    frame[at % len(frame)] = value
    try:
        found = codec.decode(coding, tensors, bytes(frame[: len(frame) - cut]) + add, max_bytes=1 << 20)
    except FormatError:
        return
    for live in tensors:
        assert found[live.name].shape[1:] == live.shape[1:]
        assert np.isfinite(found[live.name].astype(np.float64)).all()
