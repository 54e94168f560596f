"""What the rows compare with, each written as its own project's documentation advises."""
