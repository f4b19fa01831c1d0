"""The hardware of a site: accelerators, memory, links, price. Sites may differ in everything."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fomoe_pl.costs.activations import Precision
from fomoe_pl.costs.memory import GIB
from fomoe_pl.errors import ConfigError


@dataclass(frozen=True)
class Accelerator:
    """One device, from its data sheet.

    Attributes:
        tflops: Dense bfloat16 products with float32 sums, 10^12 FLOP a second.
        memory_gib: Memory that the driver shows, GiB.
        memory_gbps: Bandwidth of the memory, 10^9 bytes a second.
        tflops_fp32: float32 products, 10^12 FLOP a second; not TensorFloat-32, which torch leaves off and so do we.
        inside_gbps: From one device to the others of its machine, 10^9 bytes a second in one direction: NVLink where
            there is one, else PCIe.
        kernels: Our kernels run there; else torch's own operations do, which take more memory.
    """

    tflops: float
    memory_gib: float
    memory_gbps: float
    tflops_fp32: float
    inside_gbps: float
    kernels: bool = True


ACCELERATORS = {
    "b200": Accelerator(2250, 178, 8000, 75, 900),
    "h200": Accelerator(989, 140, 4800, 67, 450),
    "h100": Accelerator(989, 79.6, 3350, 67, 450),
    "a100-80": Accelerator(312, 80, 2039, 19.5, 300),
    "a100-40": Accelerator(312, 40, 1555, 19.5, 300),
    "mi300x": Accelerator(1307, 192, 5300, 163, 448, kernels=False),
    "l40s": Accelerator(362, 45, 864, 91.6, 32),
    "rtx4090": Accelerator(165, 24, 1008, 82.6, 32),
    "rtx3090": Accelerator(71, 24, 936, 35.6, 32),
}
"""Data sheets: dense products, SXM where there is one."""
PCIE_GBPS = 32.0
"""PCIe 4 of 16 lanes, 10^9 bytes a second in one direction: between devices of which nothing else is known."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place with accelerators, joined to other sites by slow links.

    Attributes:
        name: Its name in tables.
        accelerator: A row of the table of data sheets: b200, h200, h100, a100-80, a100-40, mi300x, l40s, rtx4090,
            rtx3090; what is given below replaces its values. Without it `tflops`, `memory_gib` and `memory_gbps` must
            be given. Our kernels do not run on the mi300x: where one of the sites has it, memory is counted without
            them.
        devices: Number of accelerators.
        bandwidth_mbit: Of the link to the other sites in each direction, 10^6 bits a second, as its owner sells it:
            Ethernet frames included.
        latency_ms: One way to another site, milliseconds.
        inner_bandwidth_mbit: Between accelerators of the site that are sites of the federation each.
        inside_gbps: Between accelerators that train one site's model together, 10^9 bytes a second in one direction:
            NVLink or PCIe by the table of data sheets, else 32 (PCIe 4). Half of it is counted.
        tflops: Peak of an accelerator, 10^12 FLOP a second in bfloat16.
        tflops_fp32: The same in float32, which counts for `precision: 32-true` alone.
        memory_gib: Memory of an accelerator, GiB.
        memory_gbps: Its bandwidth, 10^9 bytes a second.
        host_gbps: Between the memory of an accelerator and the host's, both ways at once, 10^9 bytes a second in each:
            37 were measured on an H100 (PCIe 5, 64 by its standard); the default is an assumption for PCIe 4.
        mfu: Share of the peak that local steps reach: an assumption; on an H100 0.14 (153M preset) and 0.21 (1.3B) were
            measured in bf16-mixed, and 0.29 and 0.35 where blocks are compiled and steps recorded.
        step_factor: Measured seconds of a local step over those at the data sheet's peak, instead of `mfu`;
            `tools/benchmarks/check_costs.py step` prints it.
        price_per_hour: Of the whole site, in any currency.
    """

    name: str = "site"
    accelerator: str | None = None
    devices: int = 1
    bandwidth_mbit: float = 1000.0
    latency_ms: float = 10.0
    inner_bandwidth_mbit: float = 200_000.0
    inside_gbps: float | None = None
    tflops: float | None = None
    tflops_fp32: float | None = None
    memory_gib: float | None = None
    memory_gbps: float | None = None
    host_gbps: float = 18.0
    mfu: float = 0.2
    step_factor: float | None = None
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        """Fill in values of the data sheet, and validate.

        Raises:
            ConfigError: For an unknown accelerator, a missing value, or one out of range.
        """
        if self.accelerator is not None and self.accelerator not in ACCELERATORS:
            raise self._refuse("accelerator", "is not in the table",
                               f"choose one of {', '.join(ACCELERATORS)}, or leave it out and give tflops, memory_gib "
                               "and memory_gbps")  # fmt: skip
        sheet = ACCELERATORS.get(self.accelerator or "")
        for name in ("tflops", "tflops_fp32", "memory_gib", "memory_gbps"):
            if getattr(self, name) is None:
                if sheet is None and name != "tflops_fp32":
                    raise self._refuse(name, "is not known", "give it, or an accelerator of the table")
                object.__setattr__(self, name, getattr(sheet, name, None))
        if self.inside_gbps is None:
            object.__setattr__(self, "inside_gbps", PCIE_GBPS if sheet is None else sheet.inside_gbps)
        positive = (
            "bandwidth_mbit inner_bandwidth_mbit inside_gbps tflops tflops_fp32 memory_gib memory_gbps host_gbps mfu "
            "step_factor devices"
        )
        for name in (*positive.split(), "latency_ms", "price_per_hour"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise self._refuse(name, "must be a number", "give a finite one")
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise self._refuse(name, "must be above 0", "give a positive number")
        if self.mfu > 1:
            raise self._refuse("mfu", "is a share of the peak", "give a number in 0..1, such as 0.2")
        for name in ("latency_ms", "price_per_hour"):
            if (getattr(self, name) or 0) < 0:
                raise self._refuse(name, "must not be negative", "give 0 or more")

    def _refuse(self, key: str, rule: str, hint: str) -> ConfigError:
        return ConfigError(f"sites.{self.name}.{key}", getattr(self, key), rule, hint)

    @property
    def kernels(self) -> bool:
        """Whether our kernels run there; of an accelerator that is not in the table it is assumed."""
        return self.accelerator is None or ACCELERATORS[self.accelerator].kernels

    def peak_flops(self, precision: Precision = "bf16-mixed") -> float:
        """FLOP a second of one accelerator.

        Raises:
            ConfigError: In float32, if that peak is not known.
        """
        if precision != "32-true":
            assert self.tflops is not None
            return self.tflops * 1e12
        if self.tflops_fp32 is None:
            raise self._refuse("tflops_fp32", "is not known, and `precision: 32-true` needs it",
                               "give it, or an accelerator of the table")  # fmt: skip
        return self.tflops_fp32 * 1e12

    @property
    def memory_bytes(self) -> float:
        """Bytes of one accelerator."""
        assert self.memory_gib is not None
        return self.memory_gib * GIB
