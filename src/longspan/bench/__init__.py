"""What `longspan bench` measures: `cases.py` says what, `measure.py` how, `peers.py` against whom, each at its best."""
