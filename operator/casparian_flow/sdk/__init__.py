"""What a plugin author imports: the standard library and pyarrow, nothing else of ours.

    from casparian_flow.sdk import BasePlugin, PluginMetadata
    import pandas as pd

    MANIFEST = PluginMetadata(pattern="*.csv", topic="sales_data", subscriptions=["csv"])

    class Handler(BasePlugin):
        def execute(self, file_path: str):
            self.publish("sales_data", pd.read_csv(file_path))

The same class runs without Casparian, in a test of its own: `Handler().run("a.csv")` returns what
it published, `{topic: pyarrow.Table}`.
"""

from casparian_flow.sdk.convert import BATCH_BYTES, BATCH_ROWS_MAX, record_batches
from casparian_flow.sdk.errors import PermanentError, PluginError, TransientError
from casparian_flow.sdk.metadata import FileEvent, PluginContext, PluginMetadata
from casparian_flow.sdk.plugin import BasePlugin

__all__ = [
    "BATCH_BYTES",
    "BATCH_ROWS_MAX",
    "BasePlugin",
    "FileEvent",
    "PermanentError",
    "PluginContext",
    "PluginError",
    "PluginMetadata",
    "TransientError",
    "record_batches",
]
