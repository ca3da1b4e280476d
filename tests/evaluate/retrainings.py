"""A stand-in for training, and a program that fills a store: ``retrainings.py FOLDER I N SECONDS [RETRAININGS …]``."""

import sys
import time

import numpy as np

from source_proj.evaluate import GroundTruth

N, QUERIES, COUNT, RETRAININGS = 12, 3, 10, 4


def train(kept, seed):
    """Depends on the subset and on the seed, as training does."""
    return np.sin([kept.sum() + seed, len(kept) * seed, (kept**2).sum()])


def open_truth(path, **changes):
    return GroundTruth.subsets(path, N, QUERIES, count=COUNT, **{"retrainings": RETRAININGS, **changes})


if __name__ == "__main__":
    folder, shard, shards, seconds = sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4])

    def slowly(kept, seed):
        time.sleep(seconds)
        return train(kept, seed)

    for retrainings in map(int, sys.argv[5:] or [RETRAININGS]):
        open_truth(folder, retrainings=retrainings).fill(slowly, shard=(shard, shards), progress=False)
