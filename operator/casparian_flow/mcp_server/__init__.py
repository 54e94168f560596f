"""The MCP server: what a language model may ask of Casparian Flow, and the guards around it."""
