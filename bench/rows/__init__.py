"""One module a row of the table; each runs alone by `python -m bench --row N`."""
