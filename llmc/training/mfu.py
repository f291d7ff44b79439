"""Model FLOPs utilisation, and what a GPU says about itself while it works (llm.c llmc/mfu.h).

    MFU = FLOPs of the step (gpt2.flops_per_token) / its seconds / peak FLOP/s of the device
    peak = multiprocessors x FLOPs of one in a clock x clock

The peak is that of dense tensor-core matmuls with fp32 sums. The driver counts the multiprocessors, so a MIG slice is
measured against itself. The other two factors are listed below by product name. A GPU whose exact name is not listed,
as of a laptop, has no peak, and its MFU is n/a.

Sources: for most products their maker states a boost clock and a tensor rate, which agree. For H100, H200, B200 and
B100 the clock is computed from the stated rate and the multiprocessors. GeForce 30 and 40 are from llm.c llmc/mfu.h.
"""

from typing import Any

from llmc.errors import UserError

# FLOPs of a multiprocessor in a clock (16-bit, dense), whether it has bf16 and TF32, {name without NVIDIA: MHz}. The
# clock is the one at which the stated tensor rate holds: H100 SXM runs at up to 1980 MHz, but its 989 TFLOP/s are those
# of 1830 MHz. GeForce cards and L40 sum in fp32 at half the rate of the same chip on other boards.
# These are left out, as their sources disagree or none was found: NVL and GH200 boards, A800, H800, GB200, B300, A10G,
# RTX A5500 to A4500, RTX Ada and RTX PRO Blackwell workstation cards, GeForce 20.
FAMILIES = (
    (8192, True, {"B200": 1856, "B100": 1444}),
    (
        4096,
        True,
        {
            "H200": 1830,
            "H100 80GB HBM3": 1830,
            "H100 PCIe": 1620,
        },
    ),
    (
        2048,
        True,
        {
            "A100-SXM4-40GB": 1410,
            "A100-SXM4-80GB": 1410,
            "A100-PCIE-40GB": 1410,
            "A100-PCIE-80GB": 1410,
            "A100 80GB PCIe": 1410,
            "A30": 1440,
        },
    ),
    (
        1024,
        True,
        {
            "L40S": 2490,
            "L4": 2040,
            "A40": 1740,
            "A10": 1695,
            "A2": 1770,
            "RTX A6000": 1800,
            "RTX A4000": 1560,
            "RTX A2000": 1200,
            "RTX A2000 12GB": 1200,
        },
    ),
    (
        512,
        True,
        {
            "L40": 2490,
            "GeForce RTX 5090": 2407,
            "GeForce RTX 5080": 2617,
            "GeForce RTX 5070 Ti": 2452,
            "GeForce RTX 5070": 2512,
            "GeForce RTX 4090": 2520,
            "GeForce RTX 4080 SUPER": 2550,
            "GeForce RTX 4080": 2505,
            "GeForce RTX 4070 Ti SUPER": 2610,
            "GeForce RTX 4070 Ti": 2610,
            "GeForce RTX 4070 SUPER": 2475,
            "GeForce RTX 4070": 2475,
            "GeForce RTX 4060 Ti": 2535,
            "GeForce RTX 4060": 2460,
            "GeForce RTX 3090 Ti": 1860,
            "GeForce RTX 3090": 1695,
            "GeForce RTX 3080 Ti": 1665,
            "GeForce RTX 3080": 1710,
            "GeForce RTX 3070 Ti": 1770,
            "GeForce RTX 3070": 1725,
            "GeForce RTX 3060 Ti": 1665,
            "GeForce RTX 3060": 1777,
        },
    ),
    (
        1024,
        False,
        {
            "Tesla V100-SXM2-16GB": 1530,
            "Tesla V100-SXM2-32GB": 1530,
            "Tesla V100-PCIE-16GB": 1380,
            "Tesla V100-PCIE-32GB": 1380,
            "Tesla V100S-PCIE-32GB": 1597,
            "Tesla T4": 1590,
            "TITAN RTX": 1770,
            "Quadro RTX 8000": 1770,
            "Quadro RTX 6000": 1770,
        },
    ),
)


def peak_flops(name: str, multiprocessors: int, dtype: str) -> float | None:
    """The most FLOP/s that a GPU of this name and size can do in dtype (bf16, fp16 or fp32); None where unknown.

    fp32 is measured against the TF32 rate, half of the 16-bit one, as in llm.c.
    """
    name = name.removeprefix("NVIDIA ").partition(" MIG ")[0]
    for flops_per_clock, has_bf16, clocks in FAMILIES:
        if name in clocks and (has_bf16 or dtype == "fp16"):
            peak = multiprocessors * flops_per_clock * clocks[name] * 1e6
            return peak / 2 if dtype == "fp32" else peak
    return None


def utilisation(flops: float, ms: float, peak: float | None) -> float | None:
    """FLOPs done in ms, as a fraction of what peak FLOP/s would have done; None where there is no peak."""
    return None if peak is None else flops / (ms / 1e3) / peak


def current_gpu() -> tuple[str, int, str]:
    """(name, multiprocessors, PCI bus id) of the GPU that CuPy works on, as CUDA knows it."""
    from llmc.cuda.module import import_cupy

    cuda = import_cupy().cuda
    device = cuda.Device()
    properties = cuda.runtime.getDeviceProperties(device.id)
    return properties["name"].decode(), properties["multiProcessorCount"], device.pci_bus_id


class GpuStats:
    """Readings of one GPU through NVML. What the board does not tell (passive ones have no fan) is n/a.

    pci_bus_id: as CUDA names the GPU. An index would not do: NVML counts all devices of the machine, and CUDA, in
    another order, only those that CUDA_VISIBLE_DEVICES leaves.
    Errors: UserError where nvidia-ml-py or the driver's library is missing, or the device is not found.
    """

    def __init__(self, pci_bus_id: str) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise UserError("-lg needs nvidia-ml-py, which is not there. HINT: pip install nvidia-ml-py") from error
        self.nvml = pynvml
        try:
            pynvml.nvmlInit()
            self.handle = pynvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id)
        except pynvml.NVMLError as error:
            raise UserError(f"-lg: NVML cannot read GPU {pci_bus_id}: {error}. HINT: try nvidia-smi") from error

    def query(self, name: str, *args: Any) -> Any:
        """What nvmlDeviceGet<name> returns, None where this board or driver does not support it."""
        try:
            return getattr(self.nvml, f"nvmlDeviceGet{name}")(self.handle, *args)
        except self.nvml.NVMLError:
            return None

    def line(self) -> str:
        """llm.c's line: use of multiprocessors and memory, fan, clock, power, temperature, and what slows it down."""
        nvml, query = self.nvml, self.query
        use = query("UtilizationRates")
        power, limit = query("PowerUsage"), query("EnforcedPowerLimit")  # milliwatts
        clock, max_clock = (query(f, nvml.NVML_CLOCK_SM) for f in ("ClockInfo", "MaxClockInfo"))
        heat = query("Temperature", nvml.NVML_TEMPERATURE_GPU)
        slowdown = query("TemperatureThreshold", nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
        parts = [
            f"compute {text(use and use.gpu)}%",
            f"memory {text(use and use.memory)}%",
            f"fan {text(query('FanSpeed'))}%",
            f"{text(clock)} MHz / {text(max_clock)} MHz",
            f"{text(power and power // 1000)} W / {text(limit and limit // 1000)} W",
            f"{text(heat)} C / {text(slowdown)} C",
            self.slowed_by(),
        ]
        return " " * 18 + " | ".join(parts)

    def slowed_by(self) -> str:
        """What holds the clock down: power cap, thermal cap, other cap or no cap; n/a if the driver does not tell."""
        reasons, nvml = self.query("CurrentClocksThrottleReasons"), self.nvml
        if reasons is None:
            return "n/a"
        if reasons & (nvml.nvmlClocksThrottleReasonSwPowerCap | nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown):
            return "power cap"
        if reasons & (nvml.nvmlClocksThrottleReasonSwThermalSlowdown | nvml.nvmlClocksThrottleReasonHwThermalSlowdown):
            return "thermal cap"
        return "other cap" if reasons & ~nvml.nvmlClocksThrottleReasonGpuIdle else "no cap"


def text(value: Any) -> str:
    return "n/a" if value is None else str(value)
