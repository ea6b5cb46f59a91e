"""The learning rate that each layer really gets, under three optimizers.

Trains the network of Zeiler (2012), 500-300-10, on scikit-learn's digits with Adadelta, with Adam,
and with SGD and momentum under a scheduler. Writes a TensorBoard logdir, a Parquet dataset of each
run, a picture and a report: python examples/demo.py [--epochs 50] [--out FOLDER]

The code is in lrprobe/demo.py, so that `lrprobe demo` runs it without a checkout.
"""

import argparse
from pathlib import Path

from lrprobe.demo import EPOCHS, digits, main, zeiler_net

__all__ = ["digits", "main", "zeiler_net"]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.out)
