"""How fast each format of the wire is encoded and decoded: GB of float32 a second, one after the other and together.

`python tools/benchmarks/bench_codec.py --device cpu --output runs/bench_codec`
`python tools/benchmarks/bench_codec.py --device cuda --output runs/bench_codec`

The numbers are as many as a bucket of 64 MiB has, in rows as two, or more, sites code them. On a CPU one thread works.
"Both" is the numbers' bytes over the seconds of encoding and decoding together. Formats take turns, `--repeats` times;
each time counts the mean of as many calls as fit into `--seconds`. Median and range. Writes `bench_codec.json` and
`bench_codec.md`.
"""

from __future__ import annotations

import torch
from harness import Report, in_turns, markdown, middle, now
from jsonargparse import CLI
from torch import Tensor

from fomoe_pl.codec import Codec, Root, codec_of
from fomoe_pl.federation.settings import FORMATS

NAMED: dict[str, Codec] = {
    "float32": codec_of(32), "bfloat16": codec_of(16), **FORMATS, "int2": codec_of(2),
    "int8 of roots": Root(FORMATS["int8"]),
}  # fmt: skip


def seconds_of(codec: Codec, values: Tensor, seconds: float) -> tuple[float, float]:
    """Seconds of one encoding and of one decoding."""
    coded = codec.encode(values)
    found = []
    for call in (lambda: codec.encode(values), lambda: codec.decode(coded, values.shape[-1])):
        call()
        start, calls = now(), 0
        while calls < 3 or now() - start < seconds:
            for _ in range(10 if values.is_cuda else 1):  # the clock waits for the GPU
                call()
                calls += 1
        found.append((now() - start) / calls)
    return found[0], found[1]


def bench(
    device: str = "cpu", mib: int = 64, rows: int = 1, repeats: int = 5, seconds: float = 0.5,
    formats: list[str] | None = None, output: str = "runs/bench_codec", commit: str = "",
) -> None:  # fmt: skip
    """Time every format.

    Args:
        device: `cpu` or `cuda`.
        mib: Of the numbers in float32.
        rows: That they are coded in: 1 between two sites, as many as there are sites between more.
        repeats: Times that the formats take turns.
        seconds: Of each measurement.
        formats: Which ones, by name; all by default.
        output: Folder of the results.
        commit: Of the code, where there is no git.
    """
    torch.set_num_threads(1)
    taken = {name: NAMED[name] for name in formats or NAMED}
    values = torch.randn(rows, mib * 2**18 // rows, generator=torch.Generator().manual_seed(0)).abs_() * 0.01
    signs = torch.randint(2, values.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    signed = (values * signs).to(device)
    values = values.to(device)
    report = Report(output, "bench_codec", device, {"MiB": mib, "rows": rows, "repeats": repeats}, commit)
    found = in_turns(
        {
            name: lambda codec=codec: seconds_of(codec, values if isinstance(codec, Root) else signed, seconds)  # type: ignore[misc]
            for name, codec in taken.items()
        },
        repeats,
    )
    speeds = {
        name: {
            "encode": [values.nbytes / encoding / 1e9 for encoding, _ in times],
            "decode": [values.nbytes / decoding / 1e9 for _, decoding in times],
            "both": [values.nbytes / (encoding + decoding) / 1e9 for encoding, decoding in times],
        }
        for name, times in found.items()
    }
    table = [
        [name, f"{8 * taken[name].nbytes(values.shape[1]) / values.shape[1]:.2f}", *map(middle, speed.values())]
        for name, speed in speeds.items()
    ]
    columns = ("format", "bits a number", "encoding, GB/s", "decoding, GB/s", "both, GB/s")
    print(report.write({"GB_per_second": speeds}, markdown(columns, table)))


if __name__ == "__main__":
    CLI(bench)
