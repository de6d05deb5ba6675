"""Published results as functions: each trains, compresses and measures, and gives a table."""
