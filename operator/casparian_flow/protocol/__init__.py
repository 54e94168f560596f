"""The wire between Sentinel and worker; the grammar is docs/protocol.md."""
