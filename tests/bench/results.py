"""Results made by hand, for what reads them."""

from pathlib import Path

from bench.result import Result, Row

IDENTITY = {"device": "NVIDIA H200", "multiprocessors": 132, "driver": "580", "power_limit_w": 700.0, "torch": "2.11"}


def row(case: str, seconds: float, band: float = 0.0, subject: str = "ours") -> Row:
    return Row(case, subject, seconds, seconds * 1.01, band, {"roof": {"of_floor": 0.5}, "error": 1e-3})


def result(*rows: Row, **identity: object) -> Result:
    build = {"lens": "0", "commit": "c"}
    made = {(r.case, r.subject): r for r in rows}
    asked = {"cases": list(dict.fromkeys(r.case for r in rows)), "subjects": None}
    bench = {"asked": asked, "ceilings": {"copy": 4.3e12, "matmul": 7.9e14}, "left_out": {}, "failed": {}}
    return Result(Path("made.json"), {**IDENTITY, **identity}, build, bench, made)
