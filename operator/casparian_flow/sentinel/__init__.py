"""The control plane's heart: broker, its shells, and the calls others may make."""
