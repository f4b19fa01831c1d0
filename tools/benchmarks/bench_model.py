"""Training steps of our model against Hugging Face's OLMoE and against our portable backend, with and without ghosts.

`python tools/benchmarks/bench_model.py --output runs/bench_model`

For each case one contestant is the reference: the whole model in our fastest build that runs here. The others are made
one after the other, and blocks of their steps alternate with blocks of the reference's. Memory is each contestant's
own peak, without what the other keeps meanwhile. See model_contestants.py for what a step is, and model_site.py for
the case `olmoe`: one site of four with the 7B shape, which a full replica does not fit. `bench_model.md` and
`bench_model.json` are rewritten after each row.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import model_rows
import model_site
import torch
import torch._dynamo
from harness import Report, architecture, markdown
from model_contestants import VARIANTS, Ours
from model_match import Case, Match, Timer, device_of, matrix_peak, random_batches
from model_rows import Row, SiteRow

from fomoe_pl.model.config import ModelConfig

DEFAULTS = {
    "cuda": ("ours", "hf_compiled", "hf_layers_compiled", "hf_eager", "grouped", "grouped_compiled"),
    "cpu": ("ours_eager", "hf_eager", "hf_loop"),
}
FRACTIONS = ("1", "1/2", "1/4", "1/8", "0")
REFERENCES = ("ours", "ours_eager", "grouped_compiled", "grouped")


def tiny_olmoe() -> ModelConfig:
    """The quickstart's sizes (configs/model/tiny.yaml) with OLMoE's gates, experts, norms and initial values."""
    sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_experts", "top_k", "d_expert")
    small = architecture("tiny")
    return architecture("olmoe-1.3b", **{name: getattr(small, name) for name in sizes})


CASES = {
    "olmoe-1.3b": lambda: Case(architecture("olmoe-1.3b"), 8, 2048),
    "fomoe-153m": lambda: Case(architecture("fomoe-153m"), 8, 2048),
    "tiny": lambda: Case(tiny_olmoe(), 4, 256),  # the quickstart's batch: on a GPU it is launches alone
}
SITE_CASE, SITE_BATCH = "olmoe", 2


class Rows:
    """All rows so far, written after each.

    Args:
        report: The two files.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        self.rows: list[Row] = []
        self.sites: list[SiteRow] = []

    def add(self, row: Row | SiteRow) -> None:
        """Keep a row, print it, and write all."""
        if isinstance(row, Row):
            self.rows.append(row)
        else:
            self.sites.append(row)
        print("| " + " | ".join(row.cells()) + " |", flush=True)
        found = self.targets()
        tables = [markdown(model_rows.COLUMNS, [row.cells() for row in self.rows])]
        if self.sites:
            tables.append(markdown(model_rows.SITE_COLUMNS, [row.cells() for row in self.sites]))
        if len(self.sites) == len(model_site.RANKS):
            tables.append(f"`{SITE_CASE}` as one of four sites: {model_site.site_target(self.sites)}.")
        tables.append(markdown(model_rows.TARGET_COLUMNS, [target.cells() for target in found]))
        results = {"rows": [asdict(row) for row in self.rows], "sites": [asdict(row) for row in self.sites],
                   "targets": [asdict(target) | {"met": target.met} for target in found]}  # fmt: skip
        self.report.write(results, *tables)

    def targets(self) -> list[model_rows.Target]:
        """What the rows say of the targets."""
        return model_rows.targets(self.rows, on_gpu=self.report.facts["device"] != "cpu")


def order(variants: list[str], fractions: list[Fraction], config: ModelConfig) -> list[tuple[str, Fraction]]:
    """Contestants after the reference, what targets need first.

    Args:
        variants: Names in `VARIANTS`; the first is the reference, which is measured whole already.
        fractions: Resident experts over all.
        config: The architecture; fractions that its experts do not allow are left out.
    """
    some = [f for f in fractions if f != 1 and (f == 0 or config.n_experts % f.denominator == 0)]
    reference, *others = variants
    portable = [v for v in others if isinstance(VARIANTS[v], Ours)]
    copying = [v for v in portable if VARIANTS[v].shadow_bits is not None]  # type: ignore[union-attr]
    return [
        *((v, Fraction(1)) for v in others if v not in portable),
        *((reference, f) for f in some),
        *((v, Fraction(1)) for v in portable if v not in copying),  # without absent experts there are no copies
        *((v, f) for f in some if f for v in portable),
    ]


def run_case(name: str, options: Namespace, rows: Rows, peak: float) -> None:
    """Measure all contestants of a case."""
    case, device = CASES[name](), device_of(options.device)
    case = replace(case, batch_size=options.batch_size or case.batch_size,
                   sequence_length=options.sequence_length or case.sequence_length)  # fmt: skip
    batches = random_batches(case, device)
    timer = Timer(batches, device, options.steps, options.block_seconds, options.warmup)
    match = Match(name, case, timer, rows.add, peak, options.blocks, time.monotonic() + options.seconds)
    tried = [v for v in REFERENCES if v in options.variants]
    while tried and not match.meet(tried[0], Fraction(1)):
        tried.pop(0)
    if tried:
        others = [v for v in options.variants if v not in REFERENCES or v in tried[1:]]
        for variant, fraction in order([tried[0], *others], options.fractions, case.config):
            match.meet(variant, fraction)
    torch._dynamo.reset()


def run_site(options: Namespace, rows: Rows) -> None:
    """The case of one site of four."""
    length = options.sequence_length or 2048
    case = Case(architecture(SITE_CASE), options.batch_size or SITE_BATCH, length)
    device = device_of(options.device)
    build = VARIANTS[next(v for v in REFERENCES if v in options.variants)]
    assert isinstance(build, Ours)
    for rank in model_site.RANKS:
        rows.add(model_site.measure(case.config, device, build, rank, random_batches(case, device)))


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, SITE_CASE], help="all on a GPU, tiny on a CPU")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="builds of the models")
    parser.add_argument("--fractions", nargs="+", type=Fraction, default=[Fraction(f) for f in FRACTIONS],
                        help=f"resident experts over all; {' '.join(FRACTIONS)}")  # fmt: skip
    parser.add_argument("--steps", type=int, default=5, help="of a block, at least")
    parser.add_argument("--block_seconds", type=float, default=0.25, help="of a block, at least")
    parser.add_argument("--blocks", type=int, default=5, help="of each contestant")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the first block")
    parser.add_argument("--batch_size", type=int, help="sequences of a step, in place of the cases' own")
    parser.add_argument("--sequence_length", type=int, help="tokens of a sequence, in place of the cases' own")
    parser.add_argument("--seconds", type=float, default=240, help="after which a case makes no more contestants")
    parser.add_argument("--commit", default="", help="of the code, where there is no git")
    options = parser.parse_args(arguments)
    options.cases = options.cases or ([*CASES, SITE_CASE] if options.device == "cuda" else ["tiny"])
    options.variants = options.variants or DEFAULTS[options.device]
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here: add --device cpu")
    if not set(options.variants) & set(REFERENCES):
        parser.error(f"--variants needs one of ours to compare with: {', '.join(REFERENCES)}")
    # Every build of one run is compiled for its own shapes, as if it were alone in the process.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.automatic_dynamic_shapes = False
    peak = matrix_peak(device_of(options.device))
    on_gpu = options.device == "cuda"
    settings = {
        "matrix peak (TFLOP/s)": round(peak / 1e12, 3),
        "precision": "bfloat16 by autocast, float32 parameters" if on_gpu else "float32",
        "blocks": f"{options.blocks} of at least {options.steps} steps and {options.block_seconds} s",
    }
    rows = Rows(Report(options.output, "bench_model", options.device, settings, options.commit))
    print(markdown(model_rows.COLUMNS, []), flush=True)
    for name in options.cases:
        run_site(options, rows) if name == SITE_CASE else run_case(name, options, rows, peak)
    print("\n" + markdown(model_rows.TARGET_COLUMNS, [target.cells() for target in rows.targets()]))


if __name__ == "__main__":
    main()
