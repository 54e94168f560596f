"""Input that rows share: CSV files and Arrow batches, the same every time."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

CSV_HEADER = "order_id,customer,city,sold_on,amount,quantity,remark\n"
_CITIES = ("Oslo", "Lima", "Pune", "Kyiv", "Bonn", "Graz", "Turku", "Porto")
SEED = 20_240_229


def write_csv_files(folder: Path, count: int, size_bytes: int) -> int:
    """Write `count` CSV files of about `size_bytes` each; returns the rows in all of them."""
    chance = random.Random(SEED)
    rows = 0
    for number in range(count):
        lines, size = [CSV_HEADER], len(CSV_HEADER)
        while size < size_bytes:
            line = (
                f"{rows},customer{chance.randrange(5000)},"
                f"{_CITIES[chance.randrange(8)]},2024-{1 + rows % 12:02}-{1 + rows % 28:02},"
                f"{chance.random() * 1000:.2f},{1 + rows % 9},remark number {rows % 97}\n"
            )
            lines.append(line)
            size += len(line)
            rows += 1
        place = folder / f"day{number % 50:02}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"orders{number:05}.csv").write_text("".join(lines))
    return rows


def batches(total_bytes: int, rows: int = 65_536) -> list[pa.RecordBatch]:
    """Record batches of numbers, texts, times and nulls: `total_bytes` of Arrow data in all."""
    numbers = np.random.default_rng(SEED)
    made: list[pa.RecordBatch] = []
    size = 0
    while size < total_bytes:
        customers = numbers.integers(0, 5_000, rows)
        columns: dict[str, Any] = {
            "order_id": np.arange(rows, dtype=np.int64) + rows * len(made),
            "customer": [f"customer{n:05}" for n in customers],
            "city": [_CITIES[n % 8] for n in customers],
            "amount": pa.array(numbers.random(rows) * 1_000, mask=customers % 50 == 0),
            "quantity": numbers.integers(1, 9, rows),
            "sold_at": (1_700_000_000_000_000 + customers * 1_000_000).astype("datetime64[us]"),
        }
        batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
        made.append(batch)
        size += batch.nbytes
    return made


CONTRACT = """{"columns": [
  {"name": "order_id", "type": "int64", "nullable": false},
  {"name": "customer", "type": "string", "nullable": false},
  {"name": "city", "type": "string", "nullable": false},
  {"name": "amount", "type": "float64"},
  {"name": "quantity", "type": "int64", "nullable": false},
  {"name": "sold_at", "type": "timestamp", "nullable": false}]}"""
"""What `batches` fulfil."""
