"""Tasks: labelled examples in, the metrics of the field out."""
