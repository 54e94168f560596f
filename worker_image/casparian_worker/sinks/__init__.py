"""Where rows go: `base` says what every sink offers, `registry` finds the one of a URI."""
