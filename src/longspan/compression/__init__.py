"""Steps that make a model small: distill it into fewer layers, prune heads and feed-forward units, quantize it."""
