import errno

import pytest

from fomoe_pl.files import ForgivingStream


def test_a_stream_on_a_full_disk_loses_its_text_alone() -> None:
    full = open("/dev/full", "w")  # noqa: SIM115  closing it writes again, and fails again
    with pytest.raises(OSError, match="No space left"):
        print("lost", file=full, flush=True)
    print("lost", file=ForgivingStream.of(full), flush=True)
    ForgivingStream.of(full).write("x" * 100_000)
    assert ForgivingStream.of(full).name == "/dev/full"
    with pytest.raises(OSError, match="No space left"):
        full.close()


def test_other_errors_are_raised() -> None:
    class Broken:
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def flush(self) -> None:
            raise BrokenPipeError

    stream = ForgivingStream(Broken())  # type: ignore[arg-type]
    with pytest.raises(OSError, match="Input/output"):
        stream.write("x")
    with pytest.raises(BrokenPipeError):
        stream.flush()
