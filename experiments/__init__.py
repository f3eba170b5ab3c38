"""Experiments: `python -m experiments.NAME --config=configs/NAME/FILE.py[:variant]`, and the report made from them."""
