"""Device profiles: the figures planners rely on, and how a device is found."""

from __future__ import annotations

import pytest

from trimtab.core.devices import DeviceProfile, device, read_devices, shipped_devices
from trimtab.core.errors import BadInput

NAMES = {profile.name for profile in shipped_devices()}


def test_the_devices_of_the_papers_are_there():
    assert {
        "H100-SXM", "H100-PCIe", "H200", "A100-40GB-SXM", "A100-40GB-PCIe", "A100-80GB-SXM",
        "A100-80GB-PCIe", "L40", "L40S", "A6000", "A5000", "RTX-4090", "RTX-3090Ti", "A40", "L4",
        "T4", "MI300X", "cpu",
    } == NAMES  # fmt: skip


@pytest.mark.parametrize("profile", shipped_devices(), ids=lambda profile: profile.name)
def test_each_constant_has_a_source_and_a_plausible_size(profile: DeviceProfile):
    assert all(text != "not stated" for text in profile.sources.model_dump().values())
    assert profile.usd_per_hour_as_of is not None
    assert 0 < profile.usd_per_hour < 10
    if profile.name == "cpu":
        assert all("estimate" in text for text in profile.sources.model_dump().values())
        return
    # The ridge point of every GPU since 2018 lies between 60 and 700 FLOP per byte.
    assert 60 < profile.flop_per_s("fp16") / profile.memory_bandwidth_bytes_per_s < 700
    assert profile.link_bandwidth_bytes_per_s < profile.memory_bandwidth_bytes_per_s / 4
    assert 14e9 < profile.memory_bytes < 210e9


def test_peaks_are_dense_and_not_those_with_sparsity():
    assert device("H100-SXM").flop_per_s("bf16") == 989e12
    assert device("H100-SXM").flop_per_s("fp8") == 1979e12
    assert device("A100").flop_per_s("fp16") == 312e12
    assert device("L40S").flop_per_s("fp16") == pytest.approx(362e12, rel=1e-3)
    # With fp32 accumulation GeForce cards run at half their rate with fp16 accumulation.
    assert device("4090").flop_per_s("fp16") == pytest.approx(165.2e12)
    assert device("3090 Ti").flop_per_s("fp16") == pytest.approx(80e12)


def test_rents_are_those_of_the_cost_efficiency_paper():
    rents = {"RTX-4090": 0.53, "A40": 0.55, "A6000": 0.83, "L40": 0.90, "A100": 1.75, "H100": 2.99}
    assert {name: device(name).usd_per_hour for name in rents} == rents


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("h100", "H100-SXM"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("a100_80gb_pcie", "A100-80GB-PCIe"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("Tesla T4", "T4"),
    ],
)
def test_a_device_is_found_under_any_of_its_names(written, name):
    assert device(written).name == name


def test_an_unknown_device_or_type_says_what_there_is():
    with pytest.raises(BadInput, match="there is no device 'H1000'; the nearest known one is 'H10"):
        device("H1000")
    with pytest.raises(BadInput, match="T4 has no bf16 arithmetic; use fp32 or fp16 or int8"):
        device("T4").flop_per_s("bf16")


OWN = """\
devices:
  - name: H100
    vendor: NVIDIA
    memory_bytes: 80 GiB
    memory_bandwidth_bytes_per_s: 3 TB/s
    peak_flop_per_s: {bf16: 600 TFLOPS}
    link: NVLink 4
    link_bandwidth_bytes_per_s: 3600 Gb/s
    tdp_w: 700
    usd_per_hour: 2
"""


def test_a_users_own_profile_goes_before_the_shipped_one(tmp_path):
    path = tmp_path / "devices.yaml"
    path.write_text(OWN)
    own = read_devices(path)
    mine = device("h100", own)
    assert (mine.memory_bytes, mine.memory_bandwidth_bytes_per_s) == (80 * 2**30, 3e12)
    assert (mine.flop_per_s("bf16"), mine.link_bandwidth_bytes_per_s) == (600e12, 450e9)
    assert mine.sources.tdp_w == "not stated"
    assert device("A100", own) is device("A100")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (("80 GiB", "80 GX"), ":4: devices[0].memory_bytes: '80 GX' is no quantity; write 80 GiB"),
        (("80 GiB", "-1"), ":4: devices[0].memory_bytes is -1; it should be greater than 0"),
        (("3 TB/s", "3 iB/s"), ":5: devices[0].memory_bandwidth_bytes_per_s: 'i' is no prefix of"),
        (("tdp_w", "tdp"), ":9: devices[0].tdp is an unknown key (and 1 more); the nearest"),
        (
            ("bf16", "bf17"),
            ":6: devices[0].peak_flop_per_s.bf17 is an unknown key; the nearest known one is "
            "'bf16'",
        ),
    ],
)
def test_a_fault_in_a_device_file_is_placed(tmp_path, wrong, expected):
    path = tmp_path / "devices.yaml"
    path.write_text(OWN.replace(*wrong))
    with pytest.raises(BadInput) as caught:
        read_devices(path)
    assert str(caught.value).startswith(f"{path}{expected}")


def test_two_devices_of_one_name_are_refused(tmp_path):
    path = tmp_path / "devices.yaml"
    again = OWN.removeprefix("devices:\n").replace("name: H100", "name: X\n    aliases: [h-100]")
    path.write_text(OWN + again)
    with pytest.raises(BadInput) as caught:
        read_devices(path)
    assert str(caught.value) == (
        f"{path}:11: devices[1].name: 'X' and 'H100' both go by the name 'h-100'; "
        "give each device names of its own."
    )
