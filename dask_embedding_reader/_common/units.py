"""Numbers as people read them."""

from __future__ import annotations


def human_size(nbytes: float) -> str:
    """Write out a number of bytes, in powers of 1000.

    Examples
    --------
    >>> human_size(6_144_000)
    '6.144 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            break
        nbytes /= 1000
    return f"{nbytes:.4g} {unit if nbytes != 1 or unit != 'bytes' else 'byte'}"


def counted(number: int, noun: str) -> str:
    """Write out how many there are of something.

    Examples
    --------
    >>> counted(1, "file"), counted(1_200, "file"), counted(0, "batch")
    ('1 file', '1,200 files', '0 batches')
    """
    plural = "es" if noun.endswith(("ch", "s", "x")) else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def human_count(number: float) -> str:
    """Write out a count in three digits, so that it keeps its width while it changes.

    Examples
    --------
    >>> human_count(950), human_count(1_234_567)
    ('950', '1.23M')
    """
    for unit in ("", "k", "M", "G"):
        if number < 999.5 or unit == "G":
            break
        number /= 1000
    return f"{number:.3g}{unit}"


def human_time(seconds: float) -> str:
    """Write out a time.

    Examples
    --------
    >>> human_time(75), human_time(7_325)
    ('1:15', '2:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
