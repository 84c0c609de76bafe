import pytest

from compress import profiles
from skills.errors import FormatError, NotFound
from skills.profile import load_profile


@pytest.mark.parametrize("name", profiles.names())
def test_every_shipped_profile_is_valid_and_named_like_its_file(name: str) -> None:
    assert profiles.find(name).name == name


def test_the_five_profiles_ship() -> None:
    assert profiles.names() == ("arm64-litert", "arm64-onnxruntime", "ethos-u55", "x86-avx2", "x86-vnni")


@pytest.mark.parametrize(
    ("machine", "isa", "name"),
    [
        ("x86_64", ("avx2", "avx512_vnni"), "x86-vnni"),
        ("x86_64", ("avx2", "avx_vnni"), "x86-vnni"),
        ("x86_64", ("avx2",), "x86-avx2"),
        ("aarch64", ("asimd",), "arm64-onnxruntime"),
    ],
)
def test_auto_takes_the_profile_of_this_machine(machine: str, isa: tuple[str, ...], name: str) -> None:
    assert profiles.detect(machine, isa) == name


def test_a_machine_without_a_profile_is_named() -> None:
    with pytest.raises(NotFound, match="riscv64"):
        profiles.detect("riscv64", ())


@pytest.mark.parametrize(
    ("name", "machine", "isa", "wrong"),
    [
        ("x86-vnni", "x86_64", ("avx2",), True),
        ("arm64-litert", "AMD64", ("avx2", "avx512f"), True),
        ("x86-avx2", "x86_64", ("avx2",), False),  # 7 bits
        ("x86-vnni", "x86_64", ("avx2", "avx_vnni"), False),
        ("x86-vnni", "aarch64", ("asimd",), False),
    ],
)
def test_eight_bits_saturate_on_x86_without_vnni(name: str, machine: str, isa: tuple[str, ...], wrong: bool) -> None:
    assert profiles.saturates(profiles.find(name), machine, isa) is wrong


def test_an_unknown_profile_lists_the_known_ones() -> None:
    with pytest.raises(NotFound, match="no device profile 'toaster'.*x86-vnni"):
        profiles.find("toaster")


def test_a_misspelt_key_is_named_with_its_line() -> None:
    with pytest.raises(FormatError, match="line 4.*weight_bit.*did you mean 'weight_bits'"):
        load_profile("name: a\nruntime: litert\narch: aarch64\nweight_bit: 7\n", "p.yaml")


@pytest.mark.parametrize("key", ["npu_cores", "ram_mb", "flash_kb"])
def test_a_key_that_nothing_would_act_on_is_refused(key: str) -> None:
    with pytest.raises(FormatError, match=f"unknown key '{key}'"):
        load_profile(f"name: a\nruntime: litert\narch: aarch64\n{key}: 8\n", "p.yaml")


def test_a_width_that_nothing_stores_is_refused_with_those_that_exist() -> None:
    with pytest.raises(FormatError, match=r"line 4.*'stored_bits\[1\]' is 5, expected one of 8, 4, 3, 2, 1.6"):
        load_profile("name: a\nruntime: onnxruntime\narch: x86_64\nstored_bits: [8, 5]\n", "p.yaml")


def test_s8_activations_never_go_to_x86() -> None:
    with pytest.raises(FormatError, match=r"^p.yaml: activation s8 on x86_64 .*: use u8$"):
        load_profile("name: a\nruntime: onnxruntime\narch: x86_64\nactivation: s8\n", "p.yaml")
    assert load_profile("name: a\nruntime: litert\narch: x86_64\nactivation: s8\n", "p.yaml").activation == "s8"
    assert all(profiles.find(name).activation == "u8" for name in profiles.names() if name.startswith("x86"))


def test_a_file_larger_than_the_flash_is_warned_of_whatever_runs_it() -> None:
    for runtime in ("litert", "onnxruntime"):
        profile = load_profile(f"name: a\nruntime: {runtime}\narch: aarch64\nflash_kib: 64\n", "p.yaml")
        assert profiles.too_large(64 * 1024, profile) == ()
        assert profiles.too_large(65 * 1024, profile) == ("It takes 65 KiB of flash, a has 64 KiB.",)
    assert profiles.too_large(1 << 30, profiles.find("x86-avx2")) == ()
