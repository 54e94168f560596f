"""A contract: every row has a symbol, a date and a price, or it goes to quarantine.

The plugin hands the text on as it is; the contract says what it must become. A row that does not
fit is not lost: it is written beside the others, to `stock_prices_quarantine`, with the reason and
its place in the source. With more than a tenth of such rows the job fails, and nothing is written.
"""

from pyarrow import csv, string

from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(
    pattern="stocks*.csv",
    topic="stock_prices",
    priority=60,
    sinks={"stock_prices": ["parquet://stock_prices", "sqlite://stocks.sqlite3"]},
    outputs={
        "stock_prices": {
            "columns": [
                {"name": "symbol", "type": "string", "nullable": False},
                {"name": "date", "type": "date", "nullable": False, "format": "%b %d %Y"},
                {"name": "price", "type": "float64", "nullable": False},
            ],
            "quarantine": {"allow": True, "max_pct": 10.0},
        }
    },
    description="Monthly stock prices under a contract",
)


class Handler(BasePlugin):
    def execute(self, file_path: str) -> None:
        text = dict.fromkeys(("symbol", "date", "price"), string())
        options = csv.ConvertOptions(column_types=text, strings_can_be_null=True)
        with self.open_input() as file:
            self.publish("stock_prices", csv.open_csv(file, convert_options=options))
