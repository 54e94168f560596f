from casparian_flow.sdk import BasePlugin, PluginMetadata
import pandas as pd

MANIFEST = PluginMetadata(
    pattern="*.csv",           # Auto-creates RoutingRule
    topic="sales_data",        # Auto-creates TopicConfig
    priority=50,
    subscriptions=["csv"]
)

class Handler(BasePlugin):
    def execute(self, file_path: str):
        df = pd.read_csv(file_path)

        # Publish results to configured sink
        self.publish('sales_data', df)
