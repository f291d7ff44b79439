"""Peak rates against the data sheets, and NVML's readings from a stand-in for NVIDIA's package."""

import sys
from types import SimpleNamespace

import pytest

from llmc.errors import UserError
from llmc.training import mfu

# name as CUDA gives it, multiprocessors, TFLOP/s of dense 16-bit matmuls with fp32 sums as the product's maker states
DATA_SHEETS = [
    ("Tesla V100-SXM2-16GB", 80, 125),
    ("Tesla V100-PCIE-32GB", 80, 112),
    ("Tesla V100S-PCIE-32GB", 80, 130),
    ("Tesla T4", 40, 65),
    ("TITAN RTX", 72, 130),
    ("Quadro RTX 6000", 72, 130.5),
    ("NVIDIA A100-SXM4-80GB", 108, 312),
    ("NVIDIA A100 80GB PCIe", 108, 312),
    ("NVIDIA A30", 56, 165),
    ("NVIDIA A10", 72, 125),
    ("NVIDIA A40", 84, 149.7),
    ("NVIDIA A2", 10, 18),
    ("NVIDIA RTX A6000", 84, 154.8),
    ("NVIDIA RTX A4000", 48, 76.7),
    ("NVIDIA RTX A2000", 26, 31.9),
    ("NVIDIA L4", 58, 121),
    ("NVIDIA L40", 142, 181.05),
    ("NVIDIA L40S", 142, 362.05),
    ("NVIDIA H100 PCIe", 114, 756),
    ("NVIDIA H100 80GB HBM3", 132, 989.4),
    ("NVIDIA H200", 132, 989.4),
    ("NVIDIA B100", 148, 1750),
    ("NVIDIA B200", 148, 2250),
    ("NVIDIA GeForce RTX 5090", 170, 209.5),
    ("NVIDIA GeForce RTX 5070", 48, 61.7),
]
# what llm.c's table comes to, where it states a card: bf16 TFLOP/s
LLM_C = {
    "RTX 4090": (128, 165.2), "RTX 4080 SUPER": (80, 104.5), "RTX 4080": (76, 97.5), "RTX 4070 Ti SUPER": (66, 88.2),
    "RTX 4070 Ti": (60, 80.2), "RTX 4070 SUPER": (56, 71.0), "RTX 4070": (46, 58.3), "RTX 4060 Ti": (34, 44.1),
    "RTX 4060": (24, 30.2), "RTX 3090 Ti": (84, 80.0), "RTX 3090": (82, 71.2), "RTX 3080 Ti": (80, 68.2),
    "RTX 3080": (68, 59.5), "RTX 3070 Ti": (48, 43.5), "RTX 3070": (46, 40.6), "RTX 3060 Ti": (38, 32.4),
    "RTX 3060": (28, 25.5),
}  # fmt: skip
DATA_SHEETS += [(f"NVIDIA GeForce {name}", *rest) for name, rest in LLM_C.items()]


@pytest.mark.parametrize("name, multiprocessors, tflops", DATA_SHEETS)
def test_peak(name, multiprocessors, tflops):
    assert mfu.peak_flops(name, multiprocessors, "fp16") == pytest.approx(tflops * 1e12, rel=0.01)
    bf16, fp32 = (mfu.peak_flops(name, multiprocessors, dtype) for dtype in ("bf16", "fp32"))
    if any(old in name for old in ("V100", "T4", "TITAN", "Quadro")):
        assert bf16 is None and fp32 is None  # no such tensor cores
    else:
        assert bf16 == pytest.approx(tflops * 1e12, rel=0.01) and fp32 == bf16 / 2


def test_names_are_exact():
    """A name that merely contains a known one is another product. A slice of a GPU has a slice of its rate."""
    for name in (
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100",
        "NVIDIA A100",
        "NVIDIA L40S-48Q",
        "NVIDIA GB200",
        "GPU",
        "",
    ):
        assert mfu.peak_flops(name, 100, "bf16") is None, name
    whole, half = mfu.peak_flops("NVIDIA H200", 132, "bf16"), mfu.peak_flops("NVIDIA H200 MIG 3g.71gb", 66, "bf16")
    assert half == whole / 2
    names = [name for _, _, clocks in mfu.FAMILIES for name in clocks]
    assert len(names) == len(set(names))


def test_utilisation():
    """llm.c's 124M on an A100: 300 ms for 524,288 tokens on eight."""
    flops = 803_478_528 * 524_288 / 8
    peak = mfu.peak_flops("NVIDIA A100-SXM4-80GB", 108, "bf16")
    assert mfu.utilisation(flops, 300, peak) == pytest.approx(0.5627, 1e-3)
    assert mfu.utilisation(flops, 300, None) is None


class Board:
    """As much of pynvml as is used, of a board at work. `broken` queries raise what a board without them raises."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU, NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = "sm", "gpu", "slowdown"
    nvmlClocksThrottleReasonGpuIdle, nvmlClocksThrottleReasonSwPowerCap = 1, 4
    nvmlClocksThrottleReasonSwThermalSlowdown, nvmlClocksThrottleReasonHwThermalSlowdown = 32, 64
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128
    READINGS = {
        ("UtilizationRates",): SimpleNamespace(gpu=97, memory=0),
        ("PowerUsage",): 689_999,
        ("EnforcedPowerLimit",): 700_000,
        ("ClockInfo", "sm"): 1785,
        ("MaxClockInfo", "sm"): 1980,
        ("Temperature", "gpu"): 58,
        ("TemperatureThreshold", "slowdown"): 90,
        ("FanSpeed",): 30,
        ("CurrentClocksThrottleReasons",): 0,
    }

    def __init__(self, broken=(), **readings):
        self.broken, self.readings = broken, {**self.READINGS, **{(name,): value for name, value in readings.items()}}

    def nvmlInit(self):
        if "Init" in self.broken:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByPciBusId(self, bus_id):
        if bus_id != "0000:1B:00.0":
            raise self.NVMLError("Not Found")
        return "the second device"

    def __getattr__(self, name):
        def query(handle, *args):
            assert handle == "the second device"
            name_of = name.removeprefix("nvmlDeviceGet")
            if name_of in self.broken:
                raise self.NVMLError("Not Supported")
            return self.readings[(name_of, *args)]

        return query


def stats(monkeypatch, *broken, bus_id="0000:1B:00.0", **readings):
    monkeypatch.setitem(sys.modules, "pynvml", Board(broken, **readings))
    return mfu.GpuStats(bus_id)


def test_line(monkeypatch):
    line = stats(monkeypatch).line()
    expected = "compute 97% | memory 0% | fan 30% | 1785 MHz / 1980 MHz | 689 W / 700 W | 58 C / 90 C | no cap"
    assert line.strip() == expected


def test_what_a_board_does_not_tell(monkeypatch):
    """A passively cooled board has no fan: llm.c ends the run there. Nor does any other query."""
    assert "| fan n/a% |" in stats(monkeypatch, "FanSpeed").line()
    line = stats(monkeypatch, *(name for name, *_ in Board.READINGS)).line()
    assert line.strip() == (
        "compute n/a% | memory n/a% | fan n/a% | n/a MHz / n/a MHz | n/a W / n/a W | n/a C / n/a C | n/a"
    )


@pytest.mark.parametrize(
    "reasons, word",
    [(0, "no cap"), (1, "no cap"), (4, "power cap"), (160, "power cap"), (65, "thermal cap"), (2, "other cap")],
)
def test_what_slows_it_down(reasons, word, monkeypatch):
    assert stats(monkeypatch, CurrentClocksThrottleReasons=reasons).slowed_by() == word


def test_errors(monkeypatch):
    with pytest.raises(UserError, match="GPU 0000:1C:00.0: Not Found. HINT"):
        stats(monkeypatch, bus_id="0000:1C:00.0")
    with pytest.raises(UserError, match="Driver Not Loaded. HINT"):
        stats(monkeypatch, "Init")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UserError, match="-lg needs nvidia-ml-py.*HINT: pip install nvidia-ml-py"):
        mfu.GpuStats("0000:1B:00.0")
